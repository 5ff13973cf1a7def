# SPDX-License-Identifier: Apache-2.0
"""grouped_selective_scan: identities, repeatability, autograd, compilation, errors."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import groupmamba_ext as ext
from groupmamba_ext.layouts import chunk_tokens
from support.common import group_major, relative_error
from support.scan import IMAGES, ORDER, inputs


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 4, 0)])
def test_empty(device, shape):
    batch, h, w = shape
    tensors = inputs(device, batch=batch, h=h, w=w)
    leaves = {k: v.requires_grad_() for k, v in tensors.items()}
    y = ext.grouped_selective_scan(**leaves)
    assert y.shape == leaves["u"].shape
    y.sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape, name
        assert not leaf.grad.any(), name


def test_length_one_has_no_gradient_for_A(device):
    tensors = {k: v.requires_grad_() for k, v in inputs(device, h=1, w=1).items()}
    ext.grouped_selective_scan(**tensors).sum().backward()
    assert torch.equal(tensors["A"].grad, torch.zeros_like(tensors["A"]))


@pytest.mark.parametrize("reverse, forward", [("rl", "lr"), ("bt", "tb")])
def test_reverse_is_flip_scan_flip(device, reverse, forward):
    tensors = inputs(device, groups=1)
    flipped = {k: v.flip(1, 2) if k in IMAGES else v for k, v in tensors.items()}
    a = ext.grouped_selective_scan(**tensors, directions=(reverse,))
    b = ext.grouped_selective_scan(**flipped, directions=(forward,)).flip(1, 2)
    assert torch.equal(a, b)


def test_columns_are_rows_of_the_transposed_image(device):
    tensors = inputs(device, groups=1)
    turned = {k: v.transpose(1, 2) if k in IMAGES else v for k, v in tensors.items()}
    a = ext.grouped_selective_scan(**tensors, directions=("tb",))
    b = ext.grouped_selective_scan(**turned, directions=("lr",)).transpose(1, 2)
    assert torch.equal(a, b)


def test_groups_are_independent(device):
    tensors = inputs(device)
    before = ext.grouped_selective_scan(**tensors)
    for name in IMAGES:
        tensors[name] = tensors[name].clone()
        tensors[name][..., 2, :] = torch.randn_like(tensors[name][..., 2, :])
    after = ext.grouped_selective_scan(**tensors)
    others = [0, 1, 3]
    assert torch.equal(before[..., others, :], after[..., others, :])
    assert not torch.equal(before[..., 2, :], after[..., 2, :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 4])
def test_bitwise_repeatable(device, dtype, n):
    def once():
        leaves = {k: v.clone().requires_grad_() for k, v in tensors.items()}
        y = ext.grouped_selective_scan(**leaves)
        y.backward(torch.ones_like(y))
        return [y.detach(), *(leaf.grad for leaf in leaves.values())]

    tensors = inputs(device, dtype, batch=5, h=20, w=19, n=n, dim=24)
    first = once()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


def test_autocast(device):
    tensors = inputs(device, torch.float32)
    low = {k: v.bfloat16() if k in IMAGES else v for k, v in tensors.items()}
    with torch.autocast(device, torch.bfloat16):
        y = ext.grouped_selective_scan(**tensors)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, ext.grouped_selective_scan(**low))


def test_gradcheck():
    tensors = {
        k: v.requires_grad_() for k, v in inputs("cpu", torch.float64, batch=1, h=2, w=3, dim=3, n=2, rank=2).items()
    }
    names = list(tensors)
    assert torch.autograd.gradcheck(
        lambda *values: ext.grouped_selective_scan(**dict(zip(names, values, strict=True))), tuple(tensors.values())
    )


def test_double_backward_raises(device):
    tensors = {k: v.requires_grad_() for k, v in inputs(device).items()}
    y = ext.grouped_selective_scan(**tensors)
    (du,) = torch.autograd.grad(y.sum(), tensors["u"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        du.sum().backward()


def test_backends(device):
    tensors = inputs(device)
    with ext.backend("reference"):
        a = ext.grouped_selective_scan(**tensors)
    with ext.backend("native"):
        b = ext.grouped_selective_scan(**tensors)
    assert relative_error(a, b) < 1e-5
    with pytest.raises(ValueError, match="backend must be one of .* got 'fast'"), ext.backend("fast"):
        pass


@pytest.mark.cuda
def test_float64_on_cuda_uses_the_reference():
    tensors = inputs("cuda", torch.float64, h=3, w=4)
    y = ext.grouped_selective_scan(**tensors)
    truth = ext.reference.grouped_selective_scan(**{k: v.cpu() for k, v in tensors.items()})
    assert relative_error(y, truth) < 1e-12
    with pytest.raises(ValueError, match="float64"), ext.backend("native"):
        ext.grouped_selective_scan(**tensors)


@pytest.mark.parametrize("dim, rank, h, w", [(16, 1, 7, 7), (112, 7, 7, 7), (32, 2, 20, 12)])
def test_images_are_independent(device, dim, rank, h, w):
    """So many planes that a block of the tensor-copy kernels has several: each as if it were alone. The gate's
    gradient, a sum over the image, is added up by several blocks where planes are few."""
    tensors = inputs(device, torch.bfloat16, batch=300, h=h, w=w, dim=dim, rank=rank)
    grad = torch.randn_like(tensors["u"])
    per_image = (*IMAGES, "gate")

    def gradients(some: slice):
        leaves = {k: (v[some] if k in per_image else v).detach().requires_grad_() for k, v in tensors.items()}
        y = ext.grouped_selective_scan(**leaves)
        return y, *torch.autograd.grad(y, [leaves[k] for k in per_image], grad[some])

    whole, first, last = gradients(slice(None)), gradients(slice(2)), gradients(slice(-3, None))
    assert all(torch.equal(a[:2], b) for a, b in zip(whole[:-1], first[:-1], strict=True))
    assert all(torch.equal(a[-3:], b) for a, b in zip(whole[:-1], last[:-1], strict=True))
    assert relative_error(first[-1], whole[-1][:2]) < 1e-5
    assert relative_error(last[-1], whole[-1][-3:]) < 1e-5


@pytest.mark.cuda
def test_first_backward_of_a_process():
    """Autograd's thread meets the driver for the first time in the backward."""
    program = (
        "import torch, groupmamba_ext as ext\n"
        "from support.scan import inputs\n"
        "tensors = inputs('cuda', torch.bfloat16, h=8, w=8)\n"
        "tensors['u'].requires_grad_()\n"
        "ext.grouped_selective_scan(**tensors).backward(torch.ones_like(tensors['u']))\n"
        "torch.cuda.synchronize()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.cuda
def test_more_than_two_to_the_31_elements():
    """Batch strides past 2^31: the last image equals the same image alone."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GB of GPU memory")
    batch, h, w, groups, dim = 33, 1024, 1024, 4, 16
    generator = torch.Generator("cuda").manual_seed(1)

    def image(last):
        return torch.randn(batch, h, w, groups, last, dtype=torch.bfloat16, device="cuda", generator=generator)

    u, dt, B, C = image(dim), image(1), image(1), image(1)
    assert u.numel() > 2**31
    small = inputs("cuda", torch.bfloat16, batch=1, h=1, w=1)
    parameters = {k: small[k] for k in ("A", "D", "dt_weight", "dt_bias", "norm_weight", "norm_bias")}
    u.requires_grad_()
    y = ext.grouped_selective_scan(u, dt, B=B, C=C, **parameters)
    y[-1].backward(torch.ones_like(y[-1]))
    last = u.detach()[-1:].clone().requires_grad_()
    y_last = ext.grouped_selective_scan(last, dt[-1:], B=B[-1:], C=C[-1:], **parameters)
    y_last.backward(torch.ones_like(y_last))
    assert torch.equal(y[-1:], y_last)
    assert torch.equal(u.grad[-1:], last.grad)


def test_opcheck(device):
    tensors = {k: v.requires_grad_() for k, v in inputs(device, h=3, w=4, dim=8).items()}
    arguments = tuple(tensors[k] for k in ORDER)
    chunk = chunk_tokens(8, tensors["A"].shape[-1], device)
    torch.library.opcheck(
        torch.ops.groupmamba.grouped_selective_scan_fwd, (*arguments, [0, 1, 2, 3], True, 1e-5, chunk, True)
    )
    layout = tuple(
        group_major(t.detach()) if k in IMAGES else t.detach() for k, t in zip(ORDER, arguments, strict=True)
    )
    y, states = torch.ops.groupmamba.grouped_selective_scan_fwd(*layout, [0, 1, 2, 3], True, 1e-5, chunk, True)
    torch.library.opcheck(
        torch.ops.groupmamba.grouped_selective_scan_bwd,
        (torch.randn_like(y), *layout, states, [0, 1, 2, 3], True, 1e-5, chunk),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compile_fullgraph(device):
    tensors = {k: v.requires_grad_() for k, v in inputs(device, h=4, w=6).items()}

    def f(kwargs):
        return ext.grouped_selective_scan(**kwargs, directions=("lr", "tb", "rl", "bt")) * 2

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    y, z = compiled(tensors), f(tensors)
    assert torch.equal(y, z)
    grads = [torch.autograd.grad(out.sum(), list(tensors.values())) for out in (y, z)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_flops(device):
    from torch.utils.flop_counter import FlopCounterMode

    tensors = {k: v.requires_grad_() for k, v in inputs(device, n=2, rank=3).items()}
    elements = tensors["u"].numel()
    with FlopCounterMode(display=False) as counter:
        y = ext.grouped_selective_scan(**tensors)
    forward = counter.get_total_flops()
    assert forward == elements * (1 + 7 * 2 + 2 + 2 * 3)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 3 * forward


BAD = {
    "u type": ({"u": [1.0]}, TypeError, r"u must be a torch.Tensor, got list"),
    "u dtype": ({"u": torch.zeros(2, 5, 7, 4, 16, dtype=torch.int32)}, TypeError, r"u must be .* got torch.int32"),
    "u dims": ({"u": torch.zeros(5, 7, 64)}, ValueError, r"u must be \(batch, H, W, G, D\), got shape \(5, 7, 64\)"),
    "dt dtype": ({"dt": torch.zeros(2, 5, 7, 4, 1).half()}, TypeError, r"dt must have the dtype of u .* torch.float16"),
    "dt shape": ({"dt": torch.zeros(2, 5, 7, 4, 2)}, ValueError, r"dt must be .* got shape \(2, 5, 7, 4, 2\)"),
    "no broadcast": ({"B": torch.zeros(1, 5, 7, 4, 1)}, ValueError, r"B must be .* got shape \(1, 5, 7, 4, 1\)"),
    "A dims": ({"A": torch.zeros(4, 16)}, ValueError, r"A must be \(G, D, N\), got shape \(4, 16\)"),
    "A states": ({"A": torch.zeros(4, 16, 257)}, ValueError, r"N from 1 to 256, got shape \(4, 16, 257\)"),
    "D shape": ({"D": torch.zeros(64)}, ValueError, r"D must be \(G, D\) = \(4, 16\), got shape \(64,\)"),
    "gate dtype": ({"gate": torch.zeros(2, 4, 16).double()}, TypeError, r"gate must be float32, got torch.float64"),
    "norm_bias alone": ({"norm_weight": None}, ValueError, r"norm_bias needs norm_weight"),
    "device": ({"z": torch.zeros(2, 5, 7, 4, 16, device="meta")}, ValueError, r"z must be on cpu .* meta"),
    "directions count": ({"directions": ("lr", "rl")}, ValueError, r"one direction a group \(4\), got \('lr', 'rl'\)"),
    "directions name": ({"directions": ("lr", "rl", "tb", "up")}, ValueError, r"directions must be from .* got 'up'"),
    "directions type": ({"directions": "lr"}, TypeError, r"directions must be a sequence .* got 'lr'"),
    "softplus": ({"softplus": 1}, TypeError, r"softplus must be a bool, got 1"),
    "norm_eps": ({"norm_eps": -1.0}, ValueError, r"norm_eps must be at least 0, got -1.0"),
    "norm_eps NaN": ({"norm_eps": float("nan")}, ValueError, r"norm_eps must be at least 0, got nan"),
    "norm_eps huge": ({"norm_eps": 10**400}, ValueError, r"norm_eps must be a finite float, got 10+"),
    "norm_eps bool": ({"norm_eps": True}, TypeError, r"norm_eps must be a float, got True"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_errors(case):
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        ext.grouped_selective_scan(**{**inputs("cpu"), **change})


def test_mixed_devices_raise_under_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    tensors = inputs("cpu")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {k: mode.from_tensor(v) for k, v in tensors.items()}
        fake["z"] = torch.empty(fake["z"].shape, device="meta")
        with pytest.raises(ValueError, match="z must be on cpu"):
            ext.grouped_selective_scan(**fake)
        order = ["u", "dt", "A", "B", "C", "D", "dt_weight", "dt_bias", "z", "norm_weight", "norm_bias", "gate"]
        with pytest.raises(Exception, match="device"):
            torch.ops.groupmamba.grouped_selective_scan_fwd(
                *(fake[k] for k in order), [0, 1, 2, 3], True, 1e-5, 64, True
            )


@pytest.mark.parametrize("op", ["grouped", "cross"])
def test_channels_in_unequal_tiles(op):
    """More threads than images share a scan's channels; the last, narrower tile once wrote past its memory, which
    a process of its own is given up for."""
    script = f"""
import torch
import groupmamba_ext as ext
torch.set_num_threads(2)
groups, states, dim, shape = 4 if {op!r} == "cross" else 1, 64, 40, (1, 29, 31)
u = torch.randn(*shape, dim) if {op!r} == "cross" else torch.randn(*shape, groups, dim)
A, B, C = -torch.rand(groups, dim, states), torch.randn(*shape, groups, states), torch.randn(*shape, groups, states)
dt = torch.randn(*shape, groups, dim)
scan = ext.cross_selective_scan if {op!r} == "cross" else ext.grouped_selective_scan
options = {{}} if {op!r} == "cross" else {{"directions": ("lr",)}}
kept = [scan(u, dt, A, B, C, **options) for _ in range(8)]
torch.set_num_threads(1)
alone = scan(u, dt, A, B, C, **options)
assert all(torch.equal(y, alone) for y in kept)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr or run.returncode
