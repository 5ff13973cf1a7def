# SPDX-License-Identifier: Apache-2.0
"""What is shipped: the sdist holds the sources as they are committed, a wheel the two packages, and neither more.

``GROUPMAMBA_DIST=FOLDER`` names a folder with an sdist and a wheel that was built from it, as ``.ci/run`` does; without
it the sdist is made here.
"""

import base64
import csv
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from groupmamba_ext import __version__

ROOT = Path(__file__).resolve().parents[2]
DIST = os.environ.get("GROUPMAMBA_DIST")
BUILT = r"groupmamba_ext/(libgroupmamba\.so|_C\.[\w-]+\.so|kernels\.json)"
ADDED = {"PKG-INFO", "setup.cfg"}  # by setuptools


def committed() -> set[str]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("git alone knows which files are committed, and this tree is no checkout")
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("git alone knows which files are committed, and this tree is no checkout")
    return {name for name in done.stdout.splitlines() if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    if DIST:
        (path,) = Path(DIST).glob("groupmamba-*.tar.gz")
        return path
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.partition(".")[0]) < 77:
        pytest.skip(f"needs setuptools >= 77, and this is {setuptools.__version__}")
    # From a copy, since setuptools writes beside the sources.
    source, out = tmp_path_factory.mktemp("source") / "tree", tmp_path_factory.mktemp("dist")
    for name in committed():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name)
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(out)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (path,) = out.iterdir()
    return path


def test_sdist_holds_the_sources_as_they_are(sdist):
    top = f"groupmamba-{__version__}"
    names = set()
    with tarfile.open(sdist) as archive:
        for member in archive:
            assert member.isfile() or member.isdir(), f"{member.name} is a link or device"
            path = Path(member.name)
            assert path.parts[0] == top and ".." not in path.parts, member.name
            if not member.isfile():
                continue
            name = str(path.relative_to(top))
            if name in ADDED or re.match(r"(python/)?groupmamba\.egg-info/", name):
                continue
            names.add(name)
            assert archive.extractfile(member).read() == (ROOT / name).read_bytes(), f"{name} differs"
    assert names == committed()


@pytest.fixture(scope="module")
def wheel() -> Path:
    if not DIST:
        pytest.skip("needs GROUPMAMBA_DIST, a folder with a wheel")
    (path,) = Path(DIST).glob("groupmamba-*.whl")
    return path


def test_wheel_holds_two_packages_and_nothing_else(wheel):
    info = f"groupmamba-{__version__}.dist-info/"
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        names = {name for name in archive.namelist() if not name.endswith("/")}
        packages = {name for name in names if not name.startswith(info)}
        sources = {name for name in packages if not re.fullmatch(BUILT, name)}
        expected = {
            name.removeprefix("python/")
            for name in committed()
            if re.match(r"(python/groupmamba|groupmamba_ext)/", name)
        }
        assert sources == expected
        assert len(packages) == len(sources) + 3, sorted(packages - sources)
        for name in sources:
            source = ROOT / (name if name.startswith("groupmamba_ext/") else f"python/{name}")
            assert archive.read(name) == source.read_bytes(), f"{name} differs"
        rows = {row[0]: row[1] for row in csv.reader(archive.read(f"{info}RECORD").decode().splitlines())}
        assert rows.keys() == names
        for name, digest in rows.items():
            if not name.endswith("RECORD"):
                kind, _, value = digest.partition("=")
                own = base64.urlsafe_b64encode(hashlib.new(kind, archive.read(name)).digest()).rstrip(b"=").decode()
                assert own == value, name
        metadata = archive.read(f"{info}METADATA").decode()
        needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
        assert sorted(needed) == ["Requires-Dist: numpy", "Requires-Dist: torch>=2.10"]
        assert "License-Expression: Apache-2.0" in metadata and f"{info}licenses/LICENSE" in names
