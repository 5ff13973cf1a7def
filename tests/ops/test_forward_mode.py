# SPDX-License-Identifier: Apache-2.0
"""Forward-mode differentiation: a right tangent from the reference, or an error; never a tangent of zero."""

import importlib
import warnings

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

import groupmamba_ext as ext
from support.layers import SCANS, VARIANTS, image, make
from support.transforms import CASES, RAW, case, leaves_equal, loss_of, small, stacked

OPS = list(CASES)
pytestmark = pytest.mark.filterwarnings("ignore:.*runs through the plain PyTorch reference")


def tangents_of(tensors):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in tensors]


@pytest.mark.parametrize("op", OPS)
def test_tangents(device, op):
    """Equal to the reference's, in every way to ask for them."""
    function, reference, tensors, options = case(op, device, torch.float64)
    args = list(tensors.values())
    tangents = tangents_of(args)
    every = tuple(range(len(args)))
    f, truth = loss_of(function, options), loss_of(reference, options)
    expected = jvp(truth, tuple(args), tuple(tangents))
    assert expected[1].abs() > 1e-3
    leaves_equal(jvp(f, tuple(args), tuple(tangents)), expected, 1e-12)
    for mode in (torch.enable_grad, torch.no_grad):
        for leaves in (args, [a.clone().requires_grad_() for a in args]):
            with mode(), forward_ad.dual_level():
                duals = [forward_ad.make_dual(a, t) for a, t in zip(leaves, tangents, strict=True)]
                leaves_equal(forward_ad.unpack_dual(f(*duals)).tangent, expected[1], 1e-12)
    leaves_equal(jacfwd(f, every)(*args), jacrev(truth, every)(*args), 1e-10)
    samples = stacked(args[0], 2, 0)
    mapped = vmap(lambda t: jvp(lambda t: f(t, *args[1:]), (t,), (tangents[0],))[1])(samples)
    each = [jvp(lambda t: truth(t, *args[1:]), (s,), (tangents[0],))[1] for s in samples]
    leaves_equal(mapped, torch.stack(each), 1e-12)


@pytest.mark.parametrize("op", OPS)
def test_second_derivatives(device, op):
    """Forward over reverse, in both ways to write it, and reverse over forward."""
    function, reference, tensors, options = case(op, device, torch.float64)
    first, *others = tensors.values()
    (tangent,) = tangents_of([first])
    f = lambda t: loss_of(function, options)(t, *others)  # noqa: E731
    truth = lambda t: loss_of(reference, options)(t, *others)  # noqa: E731
    expected = vjp(grad(truth), first)[1](tangent)[0]
    assert expected.norm() > 1e-3
    leaves_equal(jvp(grad(f), (first,), (tangent,))[1], expected, 1e-10)
    leaves_equal(grad(lambda t: jvp(f, (t,), (tangent,))[1])(first), expected, 1e-10)
    if op == "layer_norm_pool":
        leaves_equal(jacfwd(jacrev(f))(first), jacrev(jacrev(truth))(first), 1e-10)


@pytest.mark.parametrize("op", OPS)
def test_native_backend_raises(device, op):
    function, _, tensors, options = case(op, device)
    args = tuple(tensors.values())
    refused = pytest.raises(RuntimeError, match=rf"{op}: .*no forward-mode derivative.*backend\('reference'\)")
    with refused, ext.backend("native"):
        jvp(loss_of(function, options), args, args)


@pytest.mark.parametrize("op", OPS)
def test_raw_ops_raise(device, op):
    """What would lose a tangent, at whatever level, says so; what has none to lose runs."""
    _, _, tensors, options = case(op, device)
    first, *others = tensors.values()
    raw = lambda t: loss_of(RAW[op], options)(t, *others)  # noqa: E731
    refused = pytest.raises(RuntimeError, match=rf"groupmamba::{op}_fwd has no forward-mode derivative")
    for f, x in ((raw, first), (grad(raw), first), (vmap(raw), stacked(first, 2, 0))):
        with refused:
            jvp(f, (x,), (x,))
    for leaf in (first, first.clone().requires_grad_()):
        for mode in (torch.enable_grad, torch.no_grad):
            with refused, mode(), forward_ad.dual_level():
                raw(forward_ad.make_dual(leaf, first))
    with forward_ad.dual_level():
        assert torch.isfinite(raw(first))
    scaled = jvp(lambda a: a * raw(first), (torch.ones_like(raw(first)),), (torch.ones_like(raw(first)),))
    leaves_equal(scaled, (raw(first), raw(first)))


@pytest.mark.parametrize("op", OPS)
def test_backward_of_a_tangent_raises(device, op):
    """A graph made by the compiled op is no way around: its backward has no forward mode either."""
    function, _, tensors, options = case(op, device)
    first, *others = tensors.values()
    leaf = first.clone().requires_grad_()
    y = function(leaf, *others, **options)
    y = y if isinstance(y, torch.Tensor) else y[0]
    for create_graph in (False, True):
        refused = pytest.raises(RuntimeError, match=rf"groupmamba::{op}_bwd has no forward-mode derivative")
        with refused, forward_ad.dual_level():
            dy = forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y))
            torch.autograd.grad(y, leaf, dy, create_graph=create_graph, retain_graph=True)


def test_one_warning(monkeypatch):
    monkeypatch.setattr(importlib.import_module("groupmamba_ext.backend"), "_warned", set())
    function, _, tensors, options = case("depthwise_conv3x3", "cpu")
    args = tuple(tensors.values())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            jvp(loss_of(function, options), args, args)
    texts = [str(w.message) for w in caught if "reference" in str(w.message)]
    assert texts == ["depthwise_conv3x3: forward-mode AD runs through the plain PyTorch reference, which is slow"]


def test_compiled(device):
    function, reference, tensors, options = case("layer_norm_pool", device)
    args = tuple(tensors.values())

    def tangent(f):
        return lambda *args: jvp(loss_of(f, options), args, args)

    torch._dynamo.reset()
    compiled = torch.compile(tangent(function), backend="aot_eager", fullgraph=True)
    leaves_equal(compiled(*args), tangent(reference)(*args), 1e-5)


def check_module(module, x):
    """<dy, J dx> = <J^T dy, dx>: tangents against the compiled ops' gradients."""
    parameters = dict(module.named_parameters())
    names = list(parameters)
    leaves = [p.detach() for p in parameters.values()]

    def f(x, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    dx, *dvalues = tangents_of([x, *leaves])
    y, dy = jvp(f, (x, *leaves), (dx, *dvalues))
    weights = image(*y.shape, seed=5, dtype=y.dtype, device=y.device)
    inputs = [x.clone().requires_grad_(), *(p.clone().requires_grad_() for p in leaves)]
    out = f(*inputs)
    gradients = torch.autograd.grad(out, inputs, weights, allow_unused=True)
    back = sum((g * t).sum() for g, t in zip(gradients, (dx, *dvalues), strict=True) if g is not None)
    assert (y - out).norm() <= 1e-5 * out.norm()
    scale = dy.norm() * weights.norm()
    assert ((dy * weights).sum() - back).abs() <= 1e-5 * scale and dy.norm() > 1e-3 * y.norm()


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_layer(device, variant, scan):
    layer = make(16, variant=variant, scan=scan, device=device)
    check_module(layer, image(2, 16, 5, 4, device=device, dtype=torch.float32))


def test_model(monkeypatch, device):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    check_module(small(num_classes=3).to(device), image(2, 3, 32, 40, device=device, dtype=torch.float32))


def check_gradient_of_a_tangent(module, x):
    """In float64 against the difference of two gradients of the compiled ops."""
    dx = image(*x.shape, seed=7)
    weights = image(*module(x).shape, seed=8)

    def gradient(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad((module(x) * weights).sum(), x)[0]

    step = 1e-6 / dx.abs().max()
    expected = (gradient(x + step * dx) - gradient(x - step * dx)) / (2 * step)
    actual = torch.func.grad(lambda x: (jvp(module, (x,), (dx,))[1] * weights).sum())(x)
    assert (actual - expected).norm() <= 1e-5 * expected.norm() and expected.norm() > 0


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_of_a_layers_tangent(variant, scan):
    check_gradient_of_a_tangent(make(16, variant=variant, scan=scan).double(), image(1, 16, 3, 4))


def test_gradient_of_a_models_tangent():
    check_gradient_of_a_tangent(small(num_classes=3).double(), image(1, 3, 32, 40))
