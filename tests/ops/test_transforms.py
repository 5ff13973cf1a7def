# SPDX-License-Identifier: Apache-2.0
"""The ops inside the transforms of torch.func: gradients, vmap, ensembles, and what they compose to."""

import pytest
import torch
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vjp, vmap

import groupmamba_ext as ext
from support.common import relative_error
from support.layers import SCANS, VARIANTS, image, make
from support.transforms import CASES, RAW, case, leaves_equal, loss_of, small, stacked

OPS = list(CASES)


def per_sample(f, args, in_dims, count):
    """What vmap(f, in_dims) computes, by a loop."""
    results = [
        f(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True))) for i in range(count)
    ]
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))


def gradients(function, options):
    """Gradients by plain autograd of the loss in all tensors."""

    def f(*tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        return torch.autograd.grad(loss_of(function, options)(*leaves), leaves)

    return f


@pytest.mark.parametrize("op", OPS)
def test_gradient(device, op):
    function, _, tensors, options = case(op, device)
    args = list(tensors.values())
    every = tuple(range(len(args)))
    expected = gradients(function, options)(*args)
    leaves_equal(grad(loss_of(function, options), every)(*args), expected)
    out, pull = vjp(loss_of(function, options), *args)
    leaves_equal(pull(torch.ones_like(out)), expected)
    leaves_equal(jacrev(loss_of(function, options), every)(*args), expected)
    with torch.no_grad():  # the transform's own mode counts
        leaves_equal(grad(loss_of(function, options), every)(*args), expected)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("mapped", ["images", "parameters", "all", "last dimension"])
def test_per_sample_gradients(device, op, mapped):
    function, _, tensors, options = case(op, device)
    args, in_dims = [], []
    for i, t in enumerate(tensors.values()):
        a_map = mapped in ("all", "last dimension") or (t.dim() >= 4 and t.shape[0] == 2) == (mapped == "images")
        dim = t.dim() if mapped == "last dimension" and i % 2 else 0
        args.append(stacked(t, 3, dim) if a_map else t)
        in_dims.append(dim if a_map else None)
    f = grad(loss_of(function, options), tuple(range(len(args))))
    actual = vmap(f, tuple(in_dims))(*args)
    leaves_equal(actual, per_sample(gradients(function, options), args, in_dims, 3))
    values = vmap(loss_of(function, options), tuple(in_dims))(*args)
    (expected,) = per_sample(lambda *a: (loss_of(function, options)(*a),), args, in_dims, 3)
    leaves_equal(values, expected)


@pytest.mark.parametrize("op", OPS)
def test_gradient_of_vmap(device, op):
    """By grad around vmap, and by plain autograd through vmap."""
    function, _, tensors, options = case(op, device)
    first, *others = tensors.values()
    args = [stacked(first, 3, 0), *others]
    f = loss_of(function, options)

    def loop(samples, *others):
        return sum(f(sample, *others) for sample in samples)

    def mapped(samples, *others):
        return vmap(f, (0, *(None for _ in others)))(samples, *others).sum()

    def plain(f):
        leaves = [a.detach().requires_grad_() for a in args]
        return torch.autograd.grad(f(*leaves), leaves)

    expected = plain(loop)
    leaves_equal(grad(mapped, tuple(range(len(args))))(*args), expected, 1e-5)
    leaves_equal(plain(mapped), expected, 1e-5)


def test_nested(device):
    """Levels that do not know of one another: each records what depends on its own tensors."""
    function, reference, tensors, options = case("grouped_selective_scan", device)
    u, *others = tensors.values()
    v = torch.randn_like(u)
    two, three = (torch.tensor(value, dtype=u.dtype, device=device) for value in (2.0, 3.0))

    def mixed(f, inner_mode=torch.enable_grad):
        def inner(a, b):
            with inner_mode():
                y = loss_of(f, options)(u + a * v, *others)
            return b * y

        return grad(lambda a: grad(inner, 1)(a, a))(two)

    def value_inside(f):  # a result of the inner transform's own function, which depends on both
        def inner(a, b):
            y = loss_of(f, options)(u + a * b * v, *others)
            return y, y

        return grad(lambda a: grad(inner, 1, has_aux=True)(a, two)[1])(three)

    def forward_constant(f):
        return jvp(lambda a: a * loss_of(f, options)(u, *others), (three,), (two,))

    leaves_equal(mixed(function), mixed(reference), 1e-4)
    leaves_equal(mixed(function, torch.no_grad), mixed(reference, torch.no_grad))
    leaves_equal(value_inside(function), value_inside(reference), 1e-4)
    leaves_equal(forward_constant(function), forward_constant(reference), 1e-5)
    twice = vmap(vmap(grad(loss_of(function, options)), (0, *(None,) * len(others))), (1, *(None,) * len(others)))
    pairs = stacked(stacked(u, 2, 0), 3, 1)
    of_pair = lambda i, j: gradients(function, options)(pairs[i, j], *others)[0]  # noqa: E731
    expected = torch.stack([torch.stack([of_pair(i, j) for i in range(2)]) for j in range(3)])
    leaves_equal(twice(pairs, *others), expected)


@pytest.mark.parametrize("op", OPS)
def test_second_derivatives(device, op):
    function, _, tensors, options = case(op, device)
    first, *others = tensors.values()
    f = lambda t: loss_of(function, options)(t, *others)  # noqa: E731
    for twice in (grad(lambda t: grad(f)(t).sum()), jacrev(jacrev(f))):
        with pytest.raises(RuntimeError, match=rf"{op}: second derivatives .*backend\('reference'\)"):
            twice(first)
    with ext.backend("reference"):
        grad(lambda t: grad(f)(t).square().sum())(first)


def test_no_samples():
    function, _, tensors, options = case("layer_norm_pool", "cpu")
    x, weight, bias = tensors.values()
    y, pooled = vmap(lambda t: function(t, weight, bias))(x.new_empty(0, *x.shape))
    assert y.shape == (0, *x.shape) and pooled.shape == (0, 2, x.shape[-1])


@pytest.mark.parametrize("op", OPS)
def test_raw_ops(device, op, recwarn):
    """A registered op that is called directly does the same."""
    _, _, tensors, options = case(op, device)
    function = case(op, device)[0]
    first, *others = tensors.values()
    raw = loss_of(RAW[op], options)
    expected = gradients(function, options)(first, *others)
    leaves_equal(grad(raw)(first, *others), expected[0])
    samples = stacked(first, 3, 0)
    f = grad(raw, tuple(range(len(tensors))))
    in_dims = (0, *(None for _ in others))
    actual = vmap(f, in_dims)(samples, *others)
    leaves_equal(actual, per_sample(gradients(function, options), [samples, *others], in_dims, 3))
    assert not [w for w in recwarn if "performance drop" in str(w.message)]


@pytest.mark.parametrize("op", ["grouped_selective_scan", "layer_norm_pool"])
def test_compiled(device, op):
    function, _, tensors, options = case(op, device)
    first, *others = tensors.values()
    samples = stacked(first, 3, 0)
    in_dims = (0, *(None for _ in others))
    every = tuple(range(len(tensors)))
    inside = vmap(grad(loss_of(function, options), every), in_dims)
    outside = grad(lambda *a: vmap(loss_of(function, options), in_dims)(*a).sum(), every)
    for f in (inside, outside):
        torch._dynamo.reset()
        leaves_equal(torch.compile(f, backend="aot_eager", fullgraph=True)(samples, *others), f(samples, *others))


# modules -----------------------------------------------------------------------------------


def check_per_sample(module, x):
    """Per-sample gradients of a module's parameters and input equal those of a loop."""
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    buffers = {name: b.detach() for name, b in module.named_buffers()}

    def loss(parameters, sample):
        y = functional_call(module, (parameters, buffers), (sample.unsqueeze(0),))
        return (y * torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).view_as(y)).sum()

    actual, dx = vmap(grad(loss, (0, 1)), (None, 0))(parameters, x)
    for i, sample in enumerate(x):
        leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
        sample = sample.clone().requires_grad_()
        found = torch.autograd.grad(loss(leaves, sample), [*leaves.values(), sample], allow_unused=True)
        *expected, dsample = found
        assert relative_error(dx[i], dsample) < 1e-4
        for name, g in zip(leaves, expected, strict=True):
            g = torch.zeros_like(leaves[name]) if g is None else g
            assert (actual[name][i] - g).norm() <= 1e-4 * g.norm() + 1e-5, name


def check_ensemble(modules, x):
    """Stacked parameters of several modules on one input."""
    parameters, buffers = stack_module_state(modules)
    call = lambda p, b, x: functional_call(modules[0], (p, b), (x,))  # noqa: E731
    with torch.no_grad():
        together = vmap(call, (0, 0, None))(parameters, buffers, x)
        expected = torch.stack([module(x) for module in modules])
    assert relative_error(together, expected) < 1e-5


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_layer(device, variant, scan):
    options = {"variant": variant, "scan": scan, "device": device}
    x = image(3, 16, 6, 5, device=device, dtype=torch.float32)
    check_per_sample(make(16, **options), x)
    check_ensemble([make(16, seed=seed, **options) for seed in range(2)], x)


def test_model(monkeypatch, device):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    x = image(2, 3, 64, 32, device=device, dtype=torch.float32)
    model = small(num_classes=3).to(device)
    check_per_sample(model, x)
    other = small(num_classes=3).to(device)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    check_ensemble([model, other], x)
