# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels of every instruction set that this machine has, each in a process of its own, since a process chooses
once."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import groupmamba_ext as ext
from support.common import FLOOR, relative_error
from support.every_op import OPS, make_case, results

SETS = ("baseline", "avx2", "avx512")  # each machine has those before its own too
FACTORS = (1.0, 1.5, 3.0, 0.75 * 2**-9, 1.5 * 2**-14)


def every_value(dtype):
    """All 65,536 values of a 16-bit dtype, infinities and NaN among them."""
    return torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)


def scaled(dtype, factor):
    """Every value times ``factor``, in float32 and rounded once: a convolution of images of one pixel."""
    x = every_value(dtype)
    weight = torch.zeros(len(x), 3, 3)
    weight[:, 1, 1] = factor
    return ext.depthwise_conv3x3(x.view(1, 1, 1, -1), weight).flatten()


def write(path):
    found = {(name, dtype): results(make_case(name, "cpu", dtype)) for name in OPS for dtype in FLOOR}
    rounded = {
        (dtype, factor): scaled(dtype, factor) for dtype in (torch.float16, torch.bfloat16) for factor in FACTORS
    }
    torch.save({"set": ext.build_info()["cpu_capability"], "results": found, "rounded": rounded}, path)


@pytest.fixture(scope="module", params=SETS)
def of_set(request, tmp_path_factory):
    """What `write` finds with one set."""
    own = ext.build_info()["cpu_capability"]
    if SETS.index(request.param) > SETS.index(own):
        pytest.skip(f"this machine runs {own}")
    path = tmp_path_factory.mktemp("sets") / "found.pt"
    environment = {**os.environ, "GROUPMAMBA_CPU_CAPABILITY": request.param}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    code = f"import test_instruction_sets; test_instruction_sets.write({str(path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = torch.load(path)
    assert found["set"] == request.param
    return found


@functools.cache
def allowed_errors(name, dtype):
    """For each result: float64's, the size that its error is relative to, and the error allowed."""
    function, tensors = case = make_case(name, "cpu", dtype)
    wide = {k: None if t is None else t.double() for k, t in tensors.items()}
    truth = results((function, wide))
    # d(scale) = sum(x dx) / scale may cancel: what counts is the size that such a sum has by chance.
    sizes = {"scale": (wide["x"] * truth["x"]).norm().item()} if "scale" in truth else {}
    return {
        key: (
            truth[key],
            sizes.get(key, 0.0),
            max(FLOOR[dtype], 2 * relative_error(own, truth[key], sizes.get(key, 0.0))),
        )
        for key, own in results(case).items()
    }


@pytest.mark.parametrize("dtype", FLOOR)
@pytest.mark.parametrize("name", OPS)
def test_every_op(of_set, name, dtype):
    """As near to float64 as the set that this process runs, which all other tests hold against the reference."""
    found, expected = of_set["results"][name, dtype], allowed_errors(name, dtype)
    assert found.keys() == expected.keys()
    for key, (truth, size, allowed) in expected.items():
        error = relative_error(found[key], truth, size)
        assert error <= allowed, f"{key}: {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_values_are_rounded_to_nearest_even(of_set, dtype, factor):
    """As torch rounds them: ties, subnormal numbers, infinities and NaN."""
    expected = (every_value(dtype).float() * factor).to(dtype)
    torch.testing.assert_close(of_set["rounded"][dtype, factor], expected, rtol=0, atol=0, equal_nan=True)
