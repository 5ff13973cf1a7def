# SPDX-License-Identifier: Apache-2.0
"""The feed-forward network of a block and the norm of tokens, as ops on CUDA: against the composed ones and float64."""

import concurrent.futures
import contextlib
import copy
import functools

import pytest
import torch

import groupmamba_ext as ext
from groupmamba.layers import feed_forward as layers_feed_forward
from groupmamba.layers import token_norm as layers_token_norm
from groupmamba.layers.token_norm import TokenNorm
from groupmamba_ext.ops.token_norm import token_norm
from support.common import FLOOR, relative_error, skip_without_sm90a
from support.inputs import ONE_BACKWARD, ONE_KERNEL, feed_forward
from support.layers import check_stochastic_depth, check_training_op

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize(
    "batch, dim, hidden, shape",
    [
        (2, 64, 512, (9, 14)),
        (2, 348, 1392, (7, 7)),
        (2, 44, 20, (3, 5)),
        (2, 16, 9, (1, 1)),
        (2, 96, 64, (1, 70)),
        # tokens of eight vectors a thread, and wider than the norms' registers
        (2, 600, 72, (5, 3)),
        (2, 1100, 40, (3, 3)),
        (152, 200, 264, (10, 14)),  # its convolution by tensor cores, its products without a workspace
        *ONE_KERNEL,
        *ONE_BACKWARD,
    ],  # fmt: skip
)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_feed_forward_equals_the_composed_one(monkeypatch, dtype, batch, dim, hidden, shape, residual):
    modules = feed_forward(dim, hidden)
    x, dy = (torch.randn(batch, *shape, dim, dtype=torch.float64) for _ in range(2))

    def results(dtype, device):
        modules.to(device, dtype).zero_grad()
        t = x.detach().clone().to(device, dtype).requires_grad_()
        y = modules["mlp"](t, modules["norm"], residual=residual)
        y.backward(dy.to(device, dtype))
        return {"y": y.detach(), "dx": t.grad} | {k: p.grad.clone() for k, p in modules.named_parameters()}

    truth = results(torch.float64, "cpu")
    fused = results(dtype, "cuda")
    for module in (layers_feed_forward, layers_token_norm):
        monkeypatch.setattr(module, "takes_image", lambda _: False)
    composed = results(dtype, "cuda")
    for name, expected in truth.items():
        own = relative_error(composed[name], expected)
        error = relative_error(fused[name], expected)
        assert error <= max(2 * own, FLOOR[dtype]), f"{name}: {error:.2e}, composed {own:.2e}"


@pytest.mark.parametrize("dim, shape", [
    (64, (9, 14)), (11, (3, 5)), (96, (1, 70)), (348, (7, 7)), (512, (1, 1)), (640, (5, 3)), (1100, (2, 3)),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_token_norm_of_a_biased_image(dtype, dim, shape):
    """Up to 512 channels by the norm's kernels, beyond by an addition: against float64, with a bias far from 0."""
    torch.manual_seed(0)
    norm = TokenNorm(dim, eps=1e-5)
    with torch.no_grad():
        for p in norm.parameters():
            p.add_(0.1 * torch.randn_like(p))
    bias = torch.nn.Parameter(3 + torch.randn(dim))
    x, dy = (torch.randn(3, *shape, dim).to(dtype).double() for _ in range(2))

    def results(dtype, device):
        norm.to(device, dtype).zero_grad()
        b = bias.detach().to(device, dtype if dtype == torch.float64 else torch.float32).requires_grad_()
        t = x.detach().clone().to(device, dtype).requires_grad_()
        y = norm(t, b)
        y.backward(dy.to(device, dtype))
        gradients = {k: p.grad.clone() for k, p in norm.named_parameters()}  # .to() casts what it finds
        return {"y": y.detach(), "dx": t.grad, "dx_bias": b.grad, **gradients}

    truth, found = results(torch.float64, "cpu"), results(dtype, "cuda")
    for name, expected in truth.items():
        error = relative_error(found[name], expected)
        assert error <= 4 * FLOOR[dtype], f"{name}: {error:.2e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_token_norm_sums_that_a_16_bit_gradient_cannot_hold(dtype):
    """The gradient of a float32 bias beside a 16-bit weight: the sum over 160,000 pixels, as exact as float32."""
    x, weight = torch.ones(1, 400, 400, 8, dtype=dtype, device="cuda"), torch.ones(8, dtype=dtype, device="cuda")
    bias, x_bias = (torch.zeros(8, device="cuda", requires_grad=True) for _ in range(2))
    for more in (None, x_bias):
        bias.grad = None
        y = token_norm(x, weight, bias, 1e-5, more)
        y.backward(torch.ones_like(y))
        assert torch.equal(bias.grad, torch.full_like(bias, 160_000))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_products_take_no_workspace(dtype):
    modules = feed_forward(200, 264).to("cuda", dtype)

    def run(batch):
        x = torch.randn(batch, 10, 14, 200, device="cuda", dtype=dtype, requires_grad=True)
        modules["mlp"](x, modules["norm"], residual=True).sum().backward()

    products = [note for note in ext.explain(run, 152).notes if "without a workspace" in note]
    assert products == [  # forward and backward
        "product (21280, 200) by (200, 264): cuBLASLt without a workspace (2 times)",
        "product (21280, 264) by (264, 200): cuBLASLt without a workspace (2 times)",
    ]
    assert not any("without a workspace" in note for note in ext.explain(run, 8).notes)


def test_a_gradient_in_another_order():
    """Such as that of a mean over (batch, C, H, W): the same results, bit for bit."""
    modules = feed_forward(72, 144).to("cuda", torch.bfloat16)
    x, dy = (torch.randn(2, 5, 7, 72, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x.requires_grad_()
    inputs = [x, *modules.parameters()]
    y = modules["mlp"](x, modules["norm"], residual=True)
    expected = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    channels_first = dy.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
    for a, b in zip(torch.autograd.grad(y, inputs, channels_first), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("captured", [False, True])
def test_products_chosen_by_time(captured, monkeypatch):
    """With torch.backends.cudnn.benchmark; sizes that no other test has, since a choice stays. Times of a product that
    is added to its result must not add to it. What is captured is not timed."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    side = 18 if captured else 17
    modules = feed_forward(208, 264).to("cuda", torch.bfloat16)
    exact = copy.deepcopy(modules).double().cpu()
    x, dy = (torch.randn(96, side, side, 208, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def results(modules, x, dy):
        x = x.requires_grad_()
        y = modules["mlp"](x, modules["norm"], residual=True)
        return y, *torch.autograd.grad(y, [x, *modules.parameters()], dy)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph) if captured else contextlib.nullcontext():
        found, notes = ext.explain(results, modules, x, dy)
    if captured:
        graph.replay()
    timed = [note for note in notes if note.endswith("by time")]
    assert len(timed) == (0 if captured else 4), notes  # forward and backward
    with concurrent.futures.ThreadPoolExecutor(1) as other:  # takes the same choices
        assert not any("by time" in note for note in other.submit(ext.explain, results, modules, x, dy).result().notes)
    for actual, expected in zip(found, results(exact, x.double().cpu(), dy.double().cpu()), strict=True):
        assert relative_error(actual, expected) <= 4 * FLOOR[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bias_at_an_odd_address(dtype):
    """As in models whose parameters are parts of one flat tensor."""
    modules = feed_forward(200, 264).to("cuda", dtype)
    x = torch.randn(152, 10, 14, 200, device="cuda", dtype=dtype)
    with torch.no_grad():
        expected = modules["mlp"](x, modules["norm"], residual=True)
        for linear in (modules["mlp"].fc1, modules["mlp"].fc2):
            flat = torch.cat([linear.bias.new_zeros(1), linear.bias])
            linear.bias = torch.nn.Parameter(flat[1:])
            assert linear.bias.data_ptr() % 16 != 0
        y = modules["mlp"](x, modules["norm"], residual=True)
    assert relative_error(y, expected) < FLOOR[dtype]


@pytest.mark.parametrize("batch, dim, hidden, shape", ONE_KERNEL)
def test_feed_forward_is_one_kernel(batch, dim, hidden, shape):
    """On 9.0 in 16 bits, where that pays; elsewhere, as for parameters that TMA can't read, it is several.

    Parameters in pieces of one buffer, as some optimisers keep them, may begin anywhere.
    """
    # Elsewhere there is no such kernel, and the results are tested above.
    skip_without_sm90a()
    modules = feed_forward(dim, hidden).to("cuda", torch.bfloat16).requires_grad_(False)
    mlp, norm = modules["mlp"], modules["norm"]
    x = torch.randn(batch, *shape, dim, device="cuda", dtype=torch.bfloat16)
    runs_alone = lambda x: "feed_forward forward: one kernel" in ext.explain(mlp, x, norm).notes  # noqa: E731
    assert runs_alone(x)
    assert not runs_alone(x[:1, :, :7])
    assert not runs_alone(x[:1].expand(batch, -1, -1, -1))
    strided = torch.zeros(batch, *shape, 2 * dim, device="cuda", dtype=torch.bfloat16)[..., :dim].copy_(x)
    assert runs_alone(strided) and torch.equal(mlp(strided, norm), mlp(x, norm))
    expected = mlp(x, norm)
    buffer = torch.empty(mlp.fc1.weight.numel() + 1, device="cuda", dtype=torch.bfloat16)
    mlp.fc1.weight.data = buffer[1:].view_as(mlp.fc1.weight).copy_(mlp.fc1.weight)
    assert not runs_alone(x)
    assert relative_error(mlp(x, norm), expected) < FLOOR[torch.bfloat16]


@pytest.mark.parametrize("batch, dim, hidden, shape", [ONE_KERNEL[0], *ONE_BACKWARD])
def test_hidden_gradients_are_one_kernel(batch, dim, hidden, shape):
    """On 9.0 in 16 bits with up to 64 channels, where that pays and TMA can read what comes in."""
    skip_without_sm90a()
    modules = feed_forward(dim, hidden).to("cuda", torch.bfloat16)
    mlp, norm = modules["mlp"], modules["norm"]
    x = torch.randn(batch, *shape, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn_like(x)

    def is_one(x, dy):
        run = lambda: torch.autograd.grad(mlp(x, norm), [x, *modules.parameters()], dy)  # noqa: E731
        return "feed_forward backward: the hidden image on the chip" in ext.explain(run).notes

    assert is_one(x, dy) and is_one(x, dy[:1].expand_as(dy))
    assert not is_one(x[:1, :, :7], dy[:1, :, :7])
    expected = torch.autograd.grad(mlp(x, norm), [x, *modules.parameters()], dy)
    flat = torch.empty(mlp.fc2.weight.numel() + 1, device="cuda", dtype=torch.bfloat16)
    mlp.fc2.weight.data = flat[1:].view_as(mlp.fc2.weight).copy_(mlp.fc2.weight)
    assert not is_one(x, dy)
    several = torch.autograd.grad(mlp(x, norm), [x, *modules.parameters()], dy)
    for a, b in zip(several, expected, strict=True):
        assert relative_error(a, b) < 2 * FLOOR[torch.bfloat16]


@pytest.mark.parametrize("batch, dim, hidden, shape", [
    (4, 64, 512, (9, 14)), (4, 348, 1392, (7, 7)), (4, 44, 20, (3, 5)), (4, 16, 9, (1, 1)), (4, 600, 72, (5, 3)),
    (4, 1100, 40, (3, 3)), (140, 200, 264, (5, 14)), *ONE_KERNEL, *ONE_BACKWARD,
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_feed_forward_stochastic_depth(monkeypatch, dtype, batch, dim, hidden, shape):
    modules = feed_forward(dim, hidden)
    function = functools.partial(modules["mlp"], norm=modules["norm"])
    patches = [(place, "takes_image") for place in (layers_feed_forward, layers_token_norm)]
    check_stochastic_depth(monkeypatch, modules, function, (*shape, dim), dtype, patches, batch)


def test_feed_forward_opcheck():
    modules = feed_forward(44, 20).cuda()
    x = torch.randn(2, 3, 5, 44, device="cuda", requires_grad=True)
    mlp, norm = modules["mlp"], modules["norm"]
    parameters = (t for m in (norm, mlp.fc1, mlp.dwconv, mlp.fc2) for t in (m.weight, m.bias))
    inputs = (x, *parameters, 1e-6, True, torch.tensor([0.0, 1.0], device="cuda"), 1.5)
    check_training_op(torch.ops.groupmamba.feed_forward_fwd, inputs)
    detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in inputs]
    torch.library.opcheck(torch.ops.groupmamba.feed_forward, detached)
    with torch.no_grad():
        inference = mlp(x, norm, residual=True)
    assert torch.equal(mlp(x, norm, residual=True).detach(), inference)
    for x_bias in (None, mlp.fc2.bias):
        torch.library.opcheck(torch.ops.groupmamba.token_norm_fwd, (x, x_bias, norm.weight, norm.bias, 1e-6))
    with pytest.raises(RuntimeError, match="fc2_weight"):
        torch.ops.groupmamba.feed_forward_fwd(*inputs[:7], inputs[7][:, :4], *inputs[8:])
