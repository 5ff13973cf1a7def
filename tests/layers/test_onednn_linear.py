# SPDX-License-Identifier: Apache-2.0
"""Products by oneDNN on a CPU: the values, gradients and operators of torch's own product, wherever it stands in."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from groupmamba.layers import onednn_linear
from groupmamba.layers.onednn_linear import GRADIENT_TOKENS, OneDnnLinear, takes_onednn
from groupmamba.layers.token_linear import image_linear, token_linear
from support.common import relative_error
from support.layers import VARIANTS, image, make

ONEDNN = torch.backends.mkldnn.is_available()
pytestmark = pytest.mark.skipif(not ONEDNN, reason="needs a torch with oneDNN")


@pytest.fixture
def taken(monkeypatch):
    """oneDNN for every product in float32, whoever made the processor; the list of those that it took."""
    calls = []
    linear = onednn_linear.onednn_linear

    def counted(*args):
        calls.append(args[0].shape)
        return linear(*args)

    monkeypatch.setattr(onednn_linear, "_is_faster", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(onednn_linear, "LEAST_PRODUCT", 1)
    monkeypatch.setattr(onednn_linear, "onednn_linear", counted)
    return calls


def tensors(groups=1, tokens=37, inner=20, outer=12, dtype=torch.float32):
    x, weight = image(groups, tokens, inner, seed=1, dtype=dtype), image(groups, outer, inner, seed=2, dtype=dtype)
    bias = image(outer, seed=3, dtype=dtype) if groups == 1 else None
    return x, weight, bias


def truth(x, weight, bias, residual=None):
    y = torch.einsum("gtk,gnk->gtn", x.double(), weight.double())
    y = y if bias is None else y + bias.double()
    return y if residual is None else y + residual.double()


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("strided", [False, True])
def test_values(taken, groups, strided):
    x, weight, bias = tensors(groups)
    if strided:
        x, weight = x.repeat_interleave(2, dim=2)[..., ::2], weight.mT.contiguous().mT
    with torch.no_grad():
        assert relative_error(token_linear(x, weight, bias), truth(x, weight, bias)) < 1e-6
    assert len(taken) == groups


@pytest.mark.parametrize("padded", [False, True])
def test_residual(taken, padded):
    x, weight, bias = tensors(tokens=2 * 3 * 5)
    x, weight = x.view(2, 3, 5, -1), weight[0]
    residual = image(2, 3, 5, 16 if padded else 12, seed=4, dtype=torch.float32)[..., :12]
    before = residual.clone()
    with torch.no_grad():
        y = image_linear(x, weight, bias, residual)
    expected = truth(x.flatten(0, 2)[None], weight[None], bias, residual.flatten(0, 2))
    assert relative_error(y.flatten(0, 2)[None], expected) < 1e-6
    assert len(taken) == 1 and torch.equal(residual, before)


def test_residual_of_another_dtype_or_shape(taken):
    """As torch adds them."""
    x, weight, bias = tensors(tokens=6)
    x, weight = x.view(1, 2, 3, -1), weight[0]
    with torch.no_grad():
        plain = image_linear(x, weight, bias)
        for residual in (torch.ones(1, 2, 3, 12, dtype=torch.float64), torch.ones(12)):
            y = image_linear(x, weight, bias, residual)
            assert y.dtype == residual.dtype
            assert torch.equal(y, residual + plain)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("tokens", [37, 2 * GRADIENT_TOKENS + 5])
def test_gradients(taken, groups, tokens):
    inputs = [t if t is None else t.requires_grad_() for t in tensors(groups, tokens, inner=6, outer=5)]
    needed = [t for t in inputs if t is not None]
    y = token_linear(*inputs)
    dy = image(*y.shape, seed=5, dtype=torch.float32)
    grads = torch.autograd.grad(y, needed, dy)
    assert taken and type(y.grad_fn).__name__ == "OneDnnLinearBackward"
    expected = torch.autograd.grad(truth(*inputs), needed, dy.double())
    for grad, right in zip(grads, expected, strict=True):
        assert grad.dtype == torch.float32 and relative_error(grad, right) < 2e-6


def test_gradients_of_some(taken):
    x, weight, bias = tensors()
    for wanted in ((True, False, False), (False, True, False), (False, False, True)):
        inputs = [t.detach().clone().requires_grad_(r) for t, r in zip((x, weight, bias), wanted, strict=True)]
        token_linear(*inputs).sum().backward()
        assert [t.grad is not None for t in inputs] == list(wanted)


def test_second_derivatives(taken):
    x, weight, bias = (t.requires_grad_() for t in tensors(tokens=4, inner=3, outer=2))

    def penalty(product, *inputs):
        (dx,) = torch.autograd.grad(product(*inputs).square().sum(), inputs[0], create_graph=True)
        return torch.autograd.grad(dx.square().sum(), inputs)

    plain = penalty(lambda x, w, b: F.linear(x[0], w[0], b)[None], x, weight, bias)
    for ours, right in zip(penalty(token_linear, x, weight, bias), plain, strict=True):
        assert relative_error(ours, right) < 1e-5


def test_strides(taken, monkeypatch):
    """oneDNN has kernels for what it is given, and nothing else is done by its reference, a thousand times slower."""
    given = []
    monkeypatch.setattr(
        onednn_linear, "_with_kernel", lambda t, f=onednn_linear._with_kernel: given.append(f(t)) or given[-1]
    )
    rows, padded = image(9, 7, dtype=torch.float32), image(9, 20, dtype=torch.float32)[:, 3:10]
    choices = [rows, padded, image(7, 9, dtype=torch.float32).mT, image(7, 20, dtype=torch.float32)[:, 3:12].mT,
               image(9, 1, dtype=torch.float32).expand(9, 7), image(1, 7, dtype=torch.float32).expand(9, 7),
               image(9, 14, dtype=torch.float32)[:, ::2], image(1, 1, dtype=torch.float32).expand(9, 7)]  # fmt: skip
    weight = image(5, 7, seed=2, dtype=torch.float32)
    for x in choices:
        assert relative_error(onednn_linear.onednn_linear(x, weight, None), x.double() @ weight.double().mT) < 1e-6
        y = onednn_linear.onednn_linear(weight, x, None, x.mT[:1].expand(5, 9))
        assert relative_error(y, weight.double() @ x.double().mT + x.double().mT[:1]) < 1e-6
    for t in given:
        assert t.stride(1) == 1 or (t.stride(0) == 1 and t.mT.is_contiguous())
    assert [onednn_linear._with_kernel(t) is t for t in choices[:4]] == [True, True, True, False]


VERBOSE = """
import torch
from groupmamba.layers import GroupedMamba2d, onednn_linear
onednn_linear._is_faster, onednn_linear.LEAST_PRODUCT = lambda dtype: dtype == torch.float32, 1
x = torch.randn(2, 24, 7, 5, requires_grad=True)
for variant in ("released", "fused"):
    layer = GroupedMamba2d(24, variant=variant)
    layer(x, residual=True).sum().backward()
    with torch.no_grad():
        layer(x, residual=True)
"""


def test_kernels():
    """Of all products of a layer, forward and backward, as oneDNN itself tells them."""
    environment = {**os.environ, "ONEDNN_VERBOSE": "1"}
    told = subprocess.run([sys.executable, "-c", VERBOSE], env=environment, capture_output=True, text=True, check=True)
    products = [line.split(",") for line in told.stdout.splitlines() if ",exec,cpu,inner_product," in line]
    assert len(products) > 10
    assert not [fields for fields in products if "ref" in fields[6]]


class Subclass(torch.Tensor):
    pass


def test_where_torch_must_be_seen(taken, monkeypatch):
    """Its own operators run where something looks on, and where oneDNN is turned off."""
    x, weight, bias = tensors()
    expected = F.linear(x[0], weight[0], bias)[None]
    with monkeypatch.context() as patched:  # as ptflops does
        patched.setattr(F, "linear", lambda *args, linear=F.linear: linear(*args))
        assert not takes_onednn(x, weight, bias)
    with torch.no_grad():
        assert takes_onednn(x, weight, bias)
        with FlopCounterMode(display=False) as counter:
            token_linear(x, weight, bias)
        assert counter.get_total_flops() == 2 * 37 * 20 * 12
        with torch.backends.mkldnn.flags(enabled=False):
            assert torch.equal(token_linear(x, weight, bias), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert token_linear(x, weight, bias).dtype == torch.bfloat16
        assert type(token_linear(x.as_subclass(Subclass), weight, bias)) is Subclass
        assert torch.equal(torch.func.vmap(lambda t: token_linear(t[None], weight, bias)[0])(x), expected)
        assert token_linear(x.to("meta"), weight.to("meta"), bias.to("meta")).shape == expected.shape
    for other in (torch.float64, torch.float16):
        assert not takes_onednn(x.to(other), weight.to(other), bias.to(other))
    assert not takes_onednn(x, weight.double(), bias)
    assert not taken
    tangent = torch.func.jvp(lambda t: token_linear(t, weight, bias), (x,), (x,))[1]
    assert relative_error(tangent, truth(x, weight, None)) < 1e-6
    assert not taken


def test_compiled(taken):
    x, weight, bias = tensors()
    with torch.no_grad():
        y = torch.compile(token_linear, backend="aot_eager", fullgraph=True)(x, weight, bias)
    assert relative_error(y, truth(x, weight, bias)) < 1e-6
    assert not taken


def test_small_products_are_left_to_torch(taken, monkeypatch):
    x, weight, bias = tensors(tokens=8, inner=4, outer=4)
    monkeypatch.setattr(onednn_linear, "LEAST_PRODUCT", 8 * 4 * 4 + 1)
    assert not takes_onednn(x, weight, bias)
    monkeypatch.setattr(onednn_linear, "LEAST_PRODUCT", 8 * 4 * 4)
    assert takes_onednn(x, weight, bias)


def test_which_processors(monkeypatch):
    """float32 where MKL has no AVX-512 kernels; 16 bits where torch itself takes oneDNN."""
    for vendor in ("amd", "intel", "other"):
        onednn_linear._is_faster.cache_clear()
        monkeypatch.setattr(onednn_linear._load, "build_info", lambda vendor=vendor: {"cpu_vendor": vendor})
        assert onednn_linear._is_faster(torch.float32) is (vendor == "amd")
        assert onednn_linear._is_faster(torch.bfloat16) is torch.ops.mkldnn._is_mkldnn_bf16_supported()
        assert not onednn_linear._is_faster(torch.float64)
    onednn_linear._is_faster.cache_clear()


@pytest.mark.parametrize("lacks", ["the compiled library", "oneDNN"])
def test_nothing_is_faster_without(lacks, monkeypatch):
    if lacks == "oneDNN":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    else:
        monkeypatch.setattr(onednn_linear._load, "load_error", lambda: "no library")
    monkeypatch.setattr(onednn_linear._load, "build_info", lambda: {"cpu_vendor": "amd"})
    onednn_linear._is_faster.cache_clear()
    try:
        assert not onednn_linear._is_faster(torch.float32) and not onednn_linear._is_faster(torch.bfloat16)
    finally:
        onednn_linear._is_faster.cache_clear()


@pytest.mark.skipif(not (ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()), reason="needs a CPU with AVX-512")
def test_bfloat16_rounds_once():
    """Bias and residual are added to the sum in float32, so that the result is no further off than torch's."""
    x, weight, bias = tensors(tokens=2048, inner=64, outer=64, dtype=torch.bfloat16)
    residual = image(1, 1, 2048, 64, seed=4, dtype=torch.bfloat16)
    expected = truth(x, weight, bias, residual[0])
    with torch.no_grad():
        assert takes_onednn(x, weight, bias)
        ours = image_linear(x[None], weight[0], bias, residual)[0]
        torchs = residual[0] + F.linear(x[0], weight[0], bias)[None]
    assert relative_error(ours, expected) < relative_error(torchs, expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("residual", [False, True])
def test_layers(taken, monkeypatch, variant, residual):
    """With and without oneDNN, forward and backward."""
    layer, x = make(24, variant=variant), image(2, 24, 7, 5, dtype=torch.float32).requires_grad_()

    def results():
        y = layer(x, residual=residual)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]

    ours = results()
    with torch.no_grad():
        without = layer(x, residual=residual)
    assert taken
    monkeypatch.setattr(onednn_linear, "_is_faster", lambda dtype: False)
    for a, b in zip([*ours, without], [*results(), layer(x, residual=residual)], strict=True):
        assert relative_error(a, b) < 1e-4


def test_saves_what_torch_saves(taken):
    x, weight, bias = (t.requires_grad_() for t in tensors())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        OneDnnLinear.apply(x, weight, bias)
    assert len(saved) == 2
