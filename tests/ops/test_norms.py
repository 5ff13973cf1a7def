# SPDX-License-Identifier: Apache-2.0
"""layer_norm_pool and modulated_layer_norm: native against the float64 reference and torch's LayerNorm; errors."""

import pytest
import torch
import torch.nn.functional as F

import groupmamba_ext as ext
from support.common import FLOOR, check, group_major, padded_channels, relative_error, unaligned
from support.inputs import both, modulated_inputs, pool_inputs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [5, 8, 12, 31, 32, 33, 64, 96, 100, 128, 192, 255, 256, 260, 348, 424, 448, 512, 1000, 1024, 1028, 2052, 5000]
GROUPED = [(1, 8), (1, 13), (2, 16), (4, 3), (4, 16), (4, 24), (4, 87), (4, 106), (4, 112), (5, 7), (3, 400), (4, 513)]
SIZES = [(1, 1), (1, 7), (7, 1), (7, 7), (14, 13), (56, 56)]


def compare_pool(tensors, **options):
    return check(ext.layer_norm_pool, ext.reference.layer_norm_pool, tensors, options, probe=both)


def compare_modulated(tensors, **options):
    function, reference = ext.modulated_layer_norm, ext.reference.modulated_layer_norm
    # d(scale) nearly cancels (a norm follows it): compare it where it does not, with a large eps.
    return check(function, reference, tensors, {"eps": 0.5, **options})


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_dtypes(device, dtype):
    if dtype == torch.float64 and device == "cuda":
        pytest.skip("float64 runs through the reference on CUDA")
    compare_pool(pool_inputs(device, dtype))
    compare_modulated(modulated_inputs(device, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", WIDTHS)
def test_pool_widths(device, dtype, channels):
    compare_pool(pool_inputs(device, dtype, channels=channels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups, dim", GROUPED)
def test_modulated_widths(device, dtype, groups, dim):
    compare_modulated(modulated_inputs(device, dtype, groups=groups, dim=dim))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("h, w", SIZES)
def test_sizes(device, dtype, h, w):
    compare_pool(pool_inputs(device, dtype, h=h, w=w))
    compare_modulated(modulated_inputs(device, dtype, h=h, w=w))


@pytest.mark.parametrize("batch", [1, 3, 33])
def test_batches(device, batch):
    compare_pool(pool_inputs(device, batch=batch))
    compare_modulated(modulated_inputs(device, batch=batch))


def test_without_gate(device):
    compare_modulated(modulated_inputs(device, gate=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_parameters(device, dtype):
    """All of them, and one of them beside others of the image's dtype: a gradient has its parameter's."""
    for make, compare in ((pool_inputs, compare_pool), (modulated_inputs, compare_modulated)):
        wide, low = make(device, dtype, param=torch.float32), make(device, dtype)
        compare(wide)
        for name in wide.keys() - {"x", "o"}:
            compare({**low, name: wide[name]})
            compare({**wide, name: low[name]})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", ["pool", "modulated"])
def test_sums_that_a_16_bit_gradient_cannot_hold(device, dtype, op):
    """The gradient of a float32 bias beside a 16-bit weight: the sum over 160,000 pixels, as exact as float32."""
    x = torch.ones(1, 400, 400, 4, dtype=dtype, device=device)
    weight = torch.ones(4, dtype=dtype, device=device)
    bias = torch.zeros(4, device=device, requires_grad=True)
    if op == "pool":
        y = ext.layer_norm_pool(x, weight, bias)[0]
    else:
        y = ext.modulated_layer_norm(x.unflatten(-1, (2, 2)), x, torch.ones(1, device=device), weight, bias)
    y.backward(torch.ones_like(y))
    assert bias.grad.dtype == torch.float32
    assert torch.equal(bias.grad, torch.full_like(bias, 160_000))
    weight, bias = torch.ones(4, device=device, requires_grad=True), bias.detach().to(dtype).requires_grad_()
    if op == "pool":
        y = ext.layer_norm_pool(x, weight, bias)[0]
    else:
        y = ext.modulated_layer_norm(x.unflatten(-1, (2, 2)), x, torch.ones(1, device=device), weight, bias)
    y.backward(torch.full_like(y, 0.125))
    assert bias.grad.dtype == dtype and weight.grad.dtype == torch.float32
    assert torch.equal(bias.grad, torch.full_like(bias, 20_000))


@pytest.mark.parametrize("dim", [16, 17])
@pytest.mark.parametrize("layout", [unaligned, padded_channels, group_major], ids=lambda f: f.__name__)
def test_layouts(device, layout, dim):
    """Strided and unaligned inputs give bit for bit what contiguous ones give."""
    tensors = modulated_inputs(device, torch.bfloat16, dim=dim)
    viewed = {**tensors, "o": layout(tensors["o"])}
    if layout is not group_major:
        viewed["x"] = layout(tensors["x"])
    assert torch.equal(ext.modulated_layer_norm(**viewed), ext.modulated_layer_norm(**tensors))
    compare_modulated(viewed)
    pool = pool_inputs(device, torch.bfloat16, channels=dim)
    if layout is not group_major:
        expected = ext.layer_norm_pool(**pool)
        pool["x"] = layout(pool["x"])
        assert all(torch.equal(a, b) for a, b in zip(ext.layer_norm_pool(**pool), expected, strict=True))
        compare_pool(pool)


def test_nchw_input(device):
    """A contiguous (batch, C, H, W) tensor seen channels-last: channels are not adjacent."""
    tensors = pool_inputs(device)
    expected = ext.layer_norm_pool(**tensors)
    tensors["x"] = tensors["x"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert all(torch.equal(a, b) for a, b in zip(ext.layer_norm_pool(**tensors), expected, strict=True))


@pytest.mark.parametrize("mean", [1e2, 1e4])
def test_large_mean(device, mean):
    """The variance of 10,000 + small must not cancel."""
    tensors = pool_inputs(device)
    tensors["x"] = tensors["x"] * 0.5 + mean
    compare_pool(tensors)


def test_fp16_survives_what_overflows_it(device):
    tensors = modulated_inputs(device, torch.float16)
    tensors["o"] *= 1000
    tensors["x"] *= 1000
    y = ext.modulated_layer_norm(**tensors)
    truth = ext.reference.modulated_layer_norm(**{k: v.double().cpu() for k, v in tensors.items()})
    assert relative_error(y, truth) < FLOOR[torch.float16]


def test_against_layer_norm(device):
    tensors = pool_inputs(device)
    xn, pooled = ext.layer_norm_pool(**tensors)
    expected = F.layer_norm(tensors["x"], (64,), tensors["weight"], tensors["bias"])
    assert relative_error(xn, expected) < FLOOR[torch.float32]
    assert relative_error(pooled, expected.mean((1, 2))) < FLOOR[torch.float32]


def test_pooled_is_taken_before_rounding(device):
    tensors = pool_inputs(device, torch.bfloat16, h=16, w=16)
    _, pooled = ext.layer_norm_pool(**tensors)
    assert pooled.dtype == torch.float32
    truth = ext.reference.layer_norm_pool(**{k: v.double().cpu() for k, v in tensors.items()})[1]
    assert relative_error(pooled, truth) < 1e-5


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 4, 0)])
def test_empty(device, shape):
    batch, h, w = shape
    leaves = {k: v.requires_grad_() for k, v in pool_inputs(device, batch=batch, h=h, w=w).items()}
    xn, pooled = ext.layer_norm_pool(**leaves)
    assert xn.shape == leaves["x"].shape and not pooled.any()
    (xn.sum() + pooled.sum()).backward()
    more = {k: v.requires_grad_() for k, v in modulated_inputs(device, batch=batch, h=h, w=w).items()}
    y = ext.modulated_layer_norm(**more)
    assert y.shape == more["x"].shape
    y.sum().backward()
    for name, leaf in [*leaves.items(), *more.items()]:
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape and not leaf.grad.any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_repeatable(device, dtype):
    pool = pool_inputs(device, dtype, batch=9, h=30, w=31, channels=96)
    modulated = modulated_inputs(device, dtype, batch=9, h=30, w=31, dim=24)

    def once():
        results = []
        for function, tensors in ((ext.layer_norm_pool, pool), (ext.modulated_layer_norm, modulated)):
            leaves = {k: v.clone().requires_grad_() for k, v in tensors.items()}
            out = function(**leaves)
            outputs = out if isinstance(out, tuple) else (out,)
            sum(o.float().sin().sum() for o in outputs).backward()
            results += [*(o.detach() for o in outputs), *(leaf.grad for leaf in leaves.values())]
        return results

    first = once()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


def test_gradcheck():
    pool = [v.requires_grad_() for v in pool_inputs("cpu", torch.float64, batch=2, h=2, w=3, channels=6).values()]
    assert torch.autograd.gradcheck(ext.layer_norm_pool, pool)
    tensors = modulated_inputs("cpu", torch.float64, batch=2, h=2, w=3, groups=2, dim=3)
    names = list(tensors)
    assert torch.autograd.gradcheck(
        lambda *v: ext.modulated_layer_norm(**dict(zip(names, v, strict=True))),
        [v.requires_grad_() for v in tensors.values()],
    )


def test_autocast(device):
    tensors = modulated_inputs(device)
    low = {k: v.bfloat16() if k in ("o", "x") else v for k, v in tensors.items()}
    with torch.autocast(device, torch.bfloat16):
        y = ext.modulated_layer_norm(**tensors)
        xn, _ = ext.layer_norm_pool(tensors["x"], tensors["weight"], tensors["bias"])
    assert torch.equal(y, ext.modulated_layer_norm(**low))
    assert torch.equal(xn, ext.layer_norm_pool(low["x"], tensors["weight"], tensors["bias"])[0])


def test_opcheck(device):
    pool = [v.requires_grad_() for v in pool_inputs(device).values()]
    torch.library.opcheck(torch.ops.groupmamba.layer_norm_pool_fwd, (*pool, 1e-5))
    xn, pooled = ext.layer_norm_pool(*(v.detach() for v in pool))
    torch.library.opcheck(
        torch.ops.groupmamba.layer_norm_pool_bwd,
        (xn, pooled, *(v.detach() for v in pool), 1e-5),
        test_utils=("test_schema", "test_faketensor"),
    )
    t = {k: v.requires_grad_() for k, v in modulated_inputs(device).items()}
    o = group_major(t["o"].detach()).requires_grad_()
    torch.library.opcheck(
        torch.ops.groupmamba.modulated_layer_norm_fwd, (o, t["x"], t["scale"], t["gate"], t["weight"], t["bias"], 1e-5)
    )
    d = {k: v.detach() for k, v in t.items()}
    torch.library.opcheck(
        torch.ops.groupmamba.modulated_layer_norm_bwd,
        (torch.randn_like(d["x"]), o.detach(), d["x"], d["scale"], d["gate"], d["weight"], d["bias"], 1e-5),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("op", ["pool", "modulated"])
def test_double_backward_raises(device, op):
    tensors = pool_inputs(device) if op == "pool" else modulated_inputs(device)
    tensors = {k: v.requires_grad_() for k, v in tensors.items()}
    out = ext.layer_norm_pool(**tensors)[0] if op == "pool" else ext.modulated_layer_norm(**tensors)
    (dx,) = torch.autograd.grad(out.sin().sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        dx.sum().backward()


BAD_POOL = {
    "x type": ({"x": None}, TypeError, r"x must be a torch.Tensor, got NoneType"),
    "x dims": ({"x": torch.zeros(2, 35, 64)}, ValueError, r"x must be \(batch, H, W, C\), got shape \(2, 35, 64\)"),
    "weight": ({"weight": torch.ones(63)}, ValueError, r"weight must be \(C,\) = \(64,\), got shape \(63,\)"),
    "bias": ({"bias": None}, TypeError, r"bias must be a torch.Tensor, got NoneType"),
    "eps": ({"eps": "small"}, TypeError, r"eps must be a float, got 'small'"),
    "eps NaN": ({"eps": float("nan")}, ValueError, r"eps must be at least 0, got nan"),
    "eps inf": ({"eps": float("inf")}, ValueError, r"eps must be a finite float, got inf"),
    "eps huge": ({"eps": 10**400}, ValueError, r"eps must be a finite float, got 10+"),
}
BAD_MODULATED = {
    "o type": ({"o": 3}, TypeError, r"o must be a torch.Tensor, got int"),
    "o groups": ({"o": torch.zeros(2, 5, 7, 3, 16)}, ValueError, r"with G \* D = 64, got \(2, 5, 7, 3, 16\)"),
    "o dtype": ({"o": torch.zeros(2, 5, 7, 4, 16).half()}, TypeError, r"o must have the dtype of x"),
    "scale": ({"scale": torch.ones(())}, ValueError, r"scale must be \(1,\) = \(1,\), got shape \(\)"),
    "gate": ({"gate": torch.ones(64)}, ValueError, r"gate must be \(batch, C\) = \(2, 64\), got shape \(64,\)"),
    "eps": ({"eps": -1}, ValueError, r"eps must be at least 0, got -1"),
    "eps NaN": ({"eps": float("nan")}, ValueError, r"eps must be at least 0, got nan"),
    "eps tensor": ({"eps": torch.tensor(1e-5)}, TypeError, r"eps must be a float, got tensor"),
    "eps of digits": ({"eps": 10**5000}, ValueError, r"eps must be a finite float, got int too long to be shown"),
}


@pytest.mark.parametrize("case", BAD_POOL)
def test_pool_errors(case):
    change, error, message = BAD_POOL[case]
    with pytest.raises(error, match=message):
        ext.layer_norm_pool(**{**pool_inputs("cpu"), **change})


@pytest.mark.parametrize("case", BAD_MODULATED)
def test_modulated_errors(case):
    change, error, message = BAD_MODULATED[case]
    with pytest.raises(error, match=message):
        ext.modulated_layer_norm(**{**modulated_inputs("cpu"), **change})
