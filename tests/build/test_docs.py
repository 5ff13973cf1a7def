# SPDX-License-Identifier: Apache-2.0
"""What README and docs/ promise: each block of Python runs by itself, links lead somewhere, hub and citation work."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import groupmamba_ext as ext

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "csrc").rglob("*.md")),
    ROOT / "bench" / "README.md",
    ROOT / "examples" / "README.md",
    ROOT / "CONTRIBUTING.md",
]
BLOCK = re.compile(r"^```python([^\n]*)\n(.*?)^```", re.M | re.S)


def blocks():
    for page in PAGES:
        text = page.read_text()
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start()) + 2
            # The word "cuda" behind "python" says that a block needs a GPU.
            marks = [pytest.mark.cuda] if "cuda" in match[1].split() else []
            yield pytest.param(page, line, match[2], id=f"{page.relative_to(ROOT)}:{line}", marks=marks)


@pytest.mark.parametrize("page, line, code", list(blocks()))
def test_block_runs_by_itself(page, line, code, tmp_path):
    pytest.importorskip("timm", reason="needs the extra 'models'")
    pytest.importorskip("segmentation_models_pytorch", reason="needs the extra 'vision'")
    script = tmp_path / "block.py"
    script.write_text("\n" * (line - 1) + code)  # so that a traceback shows the page's line
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, f"{page}:{line}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)|src=\"([^\"]+)\"", page.read_text()):
        target = target[0] or target[1]
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_torch_hub():
    pytest.importorskip("timm", reason="needs the extra 'models'")
    model = torch.hub.load(str(ROOT), "groupmamba_tiny", source="local", num_classes=3)
    assert model.head.out_features == 3
    with pytest.raises(RuntimeError, match="groupmamba_huge"):
        torch.hub.load(str(ROOT), "groupmamba_huge", source="local")


def test_citation():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == ext.__version__ and citation["license"] == "Apache-2.0"
    assert citation["preferred-citation"]["year"] == 2025
