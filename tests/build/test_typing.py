# SPDX-License-Identifier: Apache-2.0
"""Type hints: every public function has all of them, and mypy accepts the packages and a user's file."""

import importlib
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = {
    "groupmamba_ext": None,
    "groupmamba_ext.reference": None,
    "groupmamba_ext.selftest": None,
    "groupmamba": None,
    "groupmamba.checkpoints": None,
    "groupmamba.cli": None,
    "groupmamba.counters": None,
    "groupmamba.models": "timm",
    "groupmamba.vision": "segmentation_models_pytorch",
}


def own(value):
    return getattr(value, "__module__", "").partition(".")[0] in ("groupmamba", "groupmamba_ext")


def public_functions(module):
    """Name and function of all that a user may call: functions, and the public methods of classes."""
    defined = [n for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__ and n[0] != "_"]
    names = getattr(module, "__all__", defined)
    for name in names:
        value = getattr(module, name)
        if inspect.isclass(value) and own(value):
            for attribute, member in vars(value).items():
                function = getattr(member, "__func__", member)
                if inspect.isfunction(function) and (not attribute.startswith("_") or attribute == "__init__"):
                    yield f"{name}.{attribute}", function
        elif inspect.isroutine(value) and own(value):
            yield name, inspect.unwrap(value)


@pytest.mark.parametrize("name", list(MODULES))
def test_public_functions_are_annotated(name):
    if MODULES[name]:
        pytest.importorskip(MODULES[name])
    functions = dict(public_functions(importlib.import_module(name)))
    assert functions
    for function, value in functions.items():
        signature = inspect.signature(value)
        parameters = list(signature.parameters.values())
        if "." in function and parameters[0].name in ("self", "cls"):
            parameters.pop(0)
        missing = [p.name for p in parameters if p.annotation is p.empty]
        assert not missing, f"{name}.{function}: {missing} have no type"
        if not function.endswith("__init__"):
            assert signature.return_annotation is not signature.empty, f"{name}.{function}: returns no type"


def test_packages_are_marked_as_typed():
    for package in ("groupmamba", "groupmamba_ext"):
        assert Path(importlib.import_module(package).__file__).with_name("py.typed").is_file()


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="needs the extra 'dev'")
def test_mypy():
    pytest.importorskip("timm")
    pytest.importorskip("segmentation_models_pytorch")
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
