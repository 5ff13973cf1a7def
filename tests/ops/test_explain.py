# SPDX-License-Identifier: Apache-2.0
"""groupmamba_ext.explain: what ran, and why not something faster."""

import os
import subprocess
import sys
import threading

import pytest
import torch

import groupmamba_ext as ext
from groupmamba import GroupedMamba2d
from groupmamba_ext import _explain, _load


def scan_inputs(dim=16, states=1, rank=1, device="cpu", dtype=torch.float32, batch=1):
    g = torch.Generator().manual_seed(0)

    def draw(*shape, kind=dtype):
        return torch.randn(*shape, generator=g).to(device, kind)

    size = (batch, 4, 5, 4)
    return {
        "u": draw(*size, dim),
        "dt": draw(*size, rank),
        "A": -draw(4, dim, states, kind=torch.float32).abs(),
        "B": draw(*size, states),
        "C": draw(*size, states),
        "dt_weight": draw(4, dim, rank, kind=torch.float32),
        "z": draw(*size, dim),
        "norm_weight": torch.ones(4, dim, device=device),
    }


def test_result_and_notes():
    inputs = scan_inputs()
    explained = ext.explain(ext.grouped_selective_scan, **inputs)
    assert torch.equal(explained.result, ext.grouped_selective_scan(**inputs))
    capability = _load.build_info()["cpu_capability"]
    assert explained.notes == [f"grouped_selective_scan: CPU kernels ({capability}), torch.float32"]
    assert str(explained) == explained.notes[0]


def test_reference_says_why():
    with ext.backend("reference"):
        notes = ext.explain(ext.grouped_selective_scan, **scan_inputs()).notes
    assert notes == ["grouped_selective_scan: the plain PyTorch reference: the backend is 'reference'"]


def test_equal_notes_are_counted():
    inputs = scan_inputs()
    (note,) = ext.explain(lambda: [ext.grouped_selective_scan(**inputs) for _ in range(3)]).notes
    assert note.endswith("torch.float32 (3 times)")


def test_layers_say_why_they_are_not_one_op():
    x = torch.randn(1, 16, 4, 5)
    layer = GroupedMamba2d(16)
    assert "GroupedMamba2d(16): op by op: one op is for images on CUDA" in ext.explain(layer, x).notes
    layer = GroupedMamba2d(16, scan="cross")
    assert "scan='cross'" in ext.explain(layer, x).notes[0]
    layer.proj.register_forward_hook(lambda *args: None)
    assert ext.explain(layer, x).notes[0] == "GroupedMamba2d(16): calls its submodules one by one: proj has hooks"


def test_nothing_is_noted_outside():
    ext.explain(ext.grouped_selective_scan, **scan_inputs())
    assert not _explain.active or _explain._PRINTS
    before = list(_explain._recorded)
    ext.grouped_selective_scan(**scan_inputs())
    assert _explain._recorded == before


def test_compiled_functions():
    """They run as ever while they are explained; what was traced takes no notes."""
    inputs = scan_inputs()
    compiled = torch.compile(ext.grouped_selective_scan, fullgraph=True, backend="eager")
    explained = ext.explain(compiled, **inputs)
    assert explained.notes == [] and torch.equal(explained.result, ext.grouped_selective_scan(**inputs))


def test_errors():
    with pytest.raises(TypeError, match="explain: function must be callable, got int"):
        ext.explain(3)
    with pytest.raises(RuntimeError, match="explain: another call is being explained"):
        ext.explain(lambda: ext.explain(int))
    with pytest.raises(ZeroDivisionError):  # of the call; the next one is explained again
        ext.explain(lambda: 1 / 0)
    assert ext.explain(int).result == 0


def test_environment_variable_prints_each_note_once():
    code = (
        "import torch, groupmamba_ext as ext\n"
        "for _ in range(2): ext.depthwise_conv3x3(torch.randn(1, 3, 4, 8), torch.randn(8, 3, 3))\n"
    )
    environment = {**os.environ, "GROUPMAMBA_EXPLAIN": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("groupmamba: ")]
    assert len(lines) == 1 and "depthwise_conv3x3: CPU kernels" in lines[0]


def test_notes_of_other_threads():
    """Such as autograd's, in which backwards run."""
    inputs = scan_inputs()

    def call():
        thread = threading.Thread(target=lambda: ext.grouped_selective_scan(**inputs))
        thread.start()
        thread.join()

    assert len(ext.explain(call).notes) == 1


SM90 = "grouped_selective_scan forward: the sm_90 kernel"
PORTABLE = "grouped_selective_scan forward: the portable kernel, not the sm_90 one: "


@pytest.mark.cuda
@pytest.mark.parametrize(
    "changes, options, why",
    [
        ({}, {}, None),
        ({"dtype": torch.float32}, {}, "images are float32, not float16 or bfloat16"),
        ({"states": 2}, {}, "there is more than one state"),
        ({"rank": 2}, {}, "there are too many step features for the channels of a group"),
        ({"dim": 8}, {}, "a group has 8 channels or fewer"),
        ({}, {"z": None}, "z is absent"),
        ({}, {"norm_weight": None}, "norm_weight is absent"),
        ({}, {"softplus": False}, "softplus is off"),
    ],
)
def test_scan_kernel(changes, options, why):
    inputs = scan_inputs(**{"device": "cuda", "dtype": torch.bfloat16, **changes}) | options
    notes = ext.explain(ext.grouped_selective_scan, **inputs).notes
    if why is None and torch.cuda.get_device_capability() != (9, 0):
        why = "the GPU is not of compute capability 9.0"
    assert (SM90 if why is None else PORTABLE + why) in notes


@pytest.mark.cuda
@pytest.mark.parametrize("batch, many", [(200, True), (1, False)])
def test_scan_of_several_states(batch, many):
    inputs = scan_inputs(states=16, device="cuda", dtype=torch.bfloat16, batch=batch)
    inputs["u"].requires_grad_()
    notes = ext.explain(lambda: ext.grouped_selective_scan(**inputs).sum().backward()).notes
    portable = "the portable kernel, not that for several states: too few planes and channels to occupy this GPU"
    kernel = "the kernel for several states" if many else portable
    for way in ("forward", "backward"):
        assert f"grouped_selective_scan {way}: {kernel}" in notes


@pytest.mark.cuda
def test_layer_on_cuda():
    layer = GroupedMamba2d(64).cuda()
    x = torch.randn(2, 64, 14, 14, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        notes = ext.explain(lambda: layer(x).float().sum().backward()).notes
    assert "GroupedMamba2d(64): one op" in notes
    passes = [note.split(":")[0] for note in notes if note.startswith("grouped_selective_scan ")]
    assert passes == ["grouped_selective_scan forward", "grouped_selective_scan backward"]
    assert any(note.startswith("tokens (4, 392, 16) times weight (4, 32, 16): ") for note in notes)
