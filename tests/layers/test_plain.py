# SPDX-License-Identifier: Apache-2.0
"""Submodules are called, or provably plain: hooks, replaced and changed modules, and the path that reads the rest."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

pytest.importorskip("timm", reason="needs the extra 'models'")

from groupmamba import GroupedMamba2d, why_not_fused  # noqa: E402
from groupmamba.layers import plain  # noqa: E402
from groupmamba.layers.feed_forward import ConvFeedForward  # noqa: E402
from support.common import relative_error  # noqa: E402
from support.layers import image, make  # noqa: E402
from support.layers import run as run_layer  # noqa: E402
from support.models import small  # noqa: E402

VARIANTS = (
    {},
    {"variant": "fused"},
    {"variant": "paper"},
    {"scan": "cross"},
    {"affinity": False},
    {"gate_source": "output"},
)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


@pytest.fixture(autouse=True)
def _exact_products(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def model(device, **options):
    """A model whose parameters all show in its output."""
    net = small(**options)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net.to(device)


def leaves(net):
    return {name: module for name, module in net.named_modules() if not any(module.children())}


def watch(net):
    """Hooks on all leaf modules; what they have seen."""
    seen = set()
    for name, module in leaves(net).items():
        module.register_forward_hook(lambda *_, name=name: seen.add(name))
    return seen


def assert_close(a, b):
    assert relative_error(a, b) < TOLERANCE[a.dtype]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_every_leaf_is_called_where_one_watches(device, options, training, gradients):
    net = model(device, drop_path_rate=0.0, **options).train(training)
    watched = copy.deepcopy(net)
    seen = watch(watched)
    assert why_not_fused(net) == {}
    x = torch.randn(2, 3, 64, 48, device=device)
    with torch.set_grad_enabled(gradients):
        expected, y = net(x), watched(x)
    assert seen == set(leaves(watched))
    assert_close(y, expected)
    if gradients:
        dy = torch.randn_like(y)
        ours = torch.autograd.grad(y, list(watched.parameters()), dy)
        theirs = torch.autograd.grad(expected, list(net.parameters()), dy)
        for (name, _), a, b in zip(net.named_parameters(), ours, theirs, strict=True):
            scale = max(b.norm().item(), 1e-3 * dy.norm().item())
            assert (a - b).norm().item() < 5e-4 * scale, name


def test_drop_path_is_called(device):
    net = model(device, drop_path_rate=0.5).train()
    seen = watch(net)
    net(torch.randn(2, 3, 32, 32, device=device))
    assert seen == set(leaves(net)) and sum("drop_path" in name for name in seen) == 5


@pytest.mark.parametrize("name", ["attn.norm", "attn.proj", "attn.affinity", "attn.affinity.fc1", "attn.affinity.fc2",
    "attn.mamba", "attn", "norm2", "mlp", "mlp.fc1", "mlp.dwconv", "mlp.fc2", "drop_path"])  # fmt: skip
def test_a_hook_changes_the_output(device, name):
    net = model(device).eval()
    block = net.stages[1].blocks[0]
    x = torch.randn(1, 3, 64, 64, device=device)
    before = net(x)
    handle = block.get_submodule(name).register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    assert (net(x) - before).norm() > 1e-6 * before.norm()
    owner, _, own_name = name.rpartition(".")
    assert why_not_fused(net)["stages.1.blocks.0" + ("." + owner if owner else "")] == f"{own_name} has hooks"
    handle.remove()
    assert why_not_fused(net) == {} and torch.equal(net(x), before)


def test_every_kind_of_hook(device):
    layer = make(16).to(device)
    x = torch.randn(1, 16, 5, 6, device=device, requires_grad=True)
    seen = []
    note = lambda *_: seen.append(1)  # noqa: E731
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
                     "register_full_backward_pre_hook"):  # fmt: skip
        for module in (layer.norm, layer.affinity.fc1, layer.affinity, layer.mamba, layer.proj):
            handle = getattr(module, register)(note)
            seen.clear()
            layer(x).sum().backward()
            assert seen, register
            assert "has hooks" in why_not_fused(layer)[""]
            handle.remove()
            assert why_not_fused(layer) == {}
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        layer(x)
        assert set(seen) >= set(layer.modules())
        assert "hooks for all modules" in why_not_fused(layer)[""]
    finally:
        handle.remove()
    layer.proj.forward = lambda rows: torch.zeros_like(rows)
    assert not layer(x).any()
    assert why_not_fused(layer)[""] == "proj has a forward of its own"


CHANGES = {
    "norm is torch.nn.modules.linear.Identity": ("norm", lambda m: nn.Identity()),
    "norm.weight is None": ("norm", lambda m: nn.LayerNorm(16, elementwise_affine=False)),
    "norm.normalized_shape is (7, 16)": ("norm", lambda m: nn.LayerNorm((7, 16))),
    "proj.bias is None": ("proj", lambda m: nn.Linear(16, 16, bias=False)),
    "proj.out_features is 24": ("proj", lambda m: nn.Linear(16, 24)),
    "affinity.fc1 is torch.nn.modules.container.Sequential": ("affinity.fc1", lambda m: nn.Sequential(m, nn.Tanh())),
    "weight is no parameter": ("proj", lambda m: prune.l1_unstructured(m, "weight", 0.5)),
    "proj is torch.nn.utils.parametrize.ParametrizedLinear": ("proj", parametrizations.spectral_norm),
    "mamba is torch.nn.utils.parametrize.ParametrizedGroupCore": (
        "mamba",
        lambda m: parametrize.register_parametrization(m, "in_proj_weight", nn.Tanh()),
    ),
}


@pytest.mark.parametrize("reason", CHANGES)
@pytest.mark.parametrize("variant", ["released", "fused"])
def test_what_took_a_submodules_place_is_called(device, variant, reason):
    name, change = CHANGES[reason]
    x = image(2, 16, 6, 7, dtype=torch.float64)

    def changed(*place):
        layer = make(16, variant=variant)
        torch.manual_seed(0)
        layer.set_submodule(name, change(layer.get_submodule(name)))
        return layer.to(*place)

    expected = run_layer(changed(torch.float64), x)
    layer = changed(device)
    found = why_not_fused(layer)[""]
    assert reason in found or found == "proj has hooks"  # pruning's hook is found before the parameter that is gone
    actual = run_layer(layer, x.to(device, torch.float32))
    if layer.proj.weight.shape[0] == 16:
        assert relative_error(make(16, variant=variant).double()(x), expected["y"]) > 1e-3
    assert len(expected) > 15
    for key, value in expected.items():
        # d(skip_scale) is one number, a sum over the image that cancels.
        terms = (expected["dx"].norm() * x.norm()).item() if value.numel() == 1 else 0.0
        assert relative_error(actual[key], value, terms) < 1e-4, key


def test_convolutions_of_another_kind_are_called(device):
    """A dilated convolution has the class and the parameters that the fused path reads, and computes something else."""
    mlp = make(16, cls=lambda dim: ConvFeedForward(dim, 24)).to(device)
    x = torch.randn(2, 6, 7, 16, device=device)
    for options in ({"dilation": 2, "padding": 2}, {"padding_mode": "reflect", "padding": 1}, {"padding": "same"}):
        conv = nn.Conv2d(24, 24, 3, groups=24, **options).to(device)
        conv.load_state_dict(mlp.dwconv.state_dict())
        changed = copy.deepcopy(mlp)
        changed.dwconv = conv
        hidden = conv(mlp.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        assert_close(changed(x), mlp.fc2(nn.functional.gelu(hidden)))
        assert why_not_fused(changed)[""].startswith("dwconv.padding")
    mlp.fc1.register_parameter("scale", nn.Parameter(torch.ones(1, device=device)))
    assert why_not_fused(mlp)[""] == "fc1 has a parameter scale, with which it was not built"
    del mlp.fc1.scale, mlp.dwconv.bias
    mlp.dwconv.bias = None
    assert why_not_fused(mlp)[""] == "dwconv.bias is no parameter of its own any more (pruned, parametrized or sharded)"


class Marked(torch.Tensor):
    """A subclass of the kind that quantization and sharding keep their numbers in."""


def test_tensor_subclasses_are_not_read():
    layer = make(16)
    layer.proj.weight = nn.Parameter(layer.proj.weight.detach().as_subclass(Marked))
    assert why_not_fused(layer) == {"": f"proj.weight is {Marked.__module__}.Marked, a subclass of torch.Tensor"}
    with pytest.raises(TypeError, match="module must be a torch.nn.Module, got int"):
        why_not_fused(3)


def test_backward_hooks_of_every_leaf(device):
    net = model(device, drop_path_rate=0.0).train()
    x = torch.randn(2, 3, 32, 32, device=device)
    expected = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    seen = set()
    for name, module in leaves(net).items():
        module.register_full_backward_hook(lambda *_, name=name: seen.add(name))
    net(x).square().sum().backward()
    assert seen == set(leaves(net))
    for (name, p), g in zip(net.named_parameters(), expected, strict=True):
        assert (p.grad - g).norm() <= 1e-3 * max(g.norm().item(), 1e-2), name


def change_bias(net):
    net.stem.conv[0].bias = nn.Parameter(torch.randn(8))


CHANGED_STEMS = {
    "a bias": (change_bias, "conv.0 has a parameter bias, with which it was not built"),
    "one more": (lambda net: net.stem.conv.append(nn.Tanh()), "conv holds other modules than it was built with"),
    "between": (lambda net: net.stem.conv.insert(3, nn.Tanh()), "conv holds other modules than it was built with"),
    "fewer": (
        lambda net: setattr(net.stem, "conv", net.stem.conv[:6]),
        "conv holds other modules than it was built with",
    ),
}


@pytest.mark.parametrize("change", CHANGED_STEMS)
def test_changed_stems(device, change):
    net = model("cpu").eval()
    x = torch.randn(1, 3, 32, 32)
    before = net.stem(x)
    apply, reason = CHANGED_STEMS[change]
    apply(net)
    assert why_not_fused(net)["stem"] == reason
    stem = net.stem
    expected = stem.norm(stem.proj(stem.conv(x)).permute(0, 2, 3, 1))
    assert relative_error(before, expected) > 1e-3
    net.to(device)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            assert_close(net.stem(x.to(device)), expected)


def test_changed_core(device):
    """Directions given anew are heeded by every path."""
    layer = make(16).to(device)
    x = torch.randn(1, 16, 5, 6, device=device)
    layer.mamba.directions = ("lr",) * 4
    truth = make(16, directions=("lr",) * 4).to(device)
    assert "mamba.directions is ('lr', 'lr', 'lr', 'lr')" in why_not_fused(layer)[""]
    assert_close(layer(x), truth(x))
    layer = make(16)
    layer.skip_scale = nn.Parameter(layer.skip_scale.detach().as_subclass(Marked))
    assert why_not_fused(layer)[""] == "skip_scale is Marked, a subclass of torch.Tensor"


def test_pruning(device):
    """As its documentation has it: several steps, evaluation that follows, made permanent."""
    layer = make(16).to(device)
    x = torch.randn(2, 16, 6, 5, device=device)
    dense = layer(x)
    prune.l1_unstructured(layer.proj, "weight", 0.5)
    prune.random_unstructured(layer.mamba, "in_proj_weight", 0.5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    for _ in range(3):
        before = layer(x)
        optimizer.zero_grad()
        before.square().sum().backward()
        assert layer.proj.weight_orig.grad.any() and not layer.proj.weight_orig.grad[layer.proj.weight_mask == 0].any()
        optimizer.step()
        with torch.no_grad():
            assert not torch.equal(layer(x), before)
    assert not torch.equal(dense, before)
    pruned = layer(x)
    for module, name in ((layer.proj, "weight"), (layer.mamba, "in_proj_weight")):
        prune.remove(module, name)
    assert why_not_fused(layer) == {} and list(layer.proj._parameters) == ["bias", "weight"]
    assert_close(layer(x), pruned)


def test_copies_stay_plain(device):
    net = model(device).eval()
    x = torch.randn(1, 3, 32, 32, device=device)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(net), torch.load(buffer, weights_only=False)):
        assert why_not_fused(twin) == {} and torch.equal(twin(x), net(x))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("mode", ["eager", "compiled", "exported", "functional"])
def test_plain_models_take_the_fused_path(monkeypatch, device, options, mode):
    """Nothing of a plain model is called one by one, also by compilers and through torch.func.functional_call."""
    net = model(device, drop_path_rate=0.2, **options).eval()
    x = torch.randn(2, 3, 64, 32, device=device)
    composed = []

    def spy(call):
        return lambda *args: composed.append(args) or call(*args)

    for module in ("variants", "feed_forward", "channel_affinity"):
        place = __import__(f"groupmamba.layers.{module}", fromlist=["call_on_rows"])
        monkeypatch.setattr(place, "call_on_rows", spy(plain.call_on_rows))
    expected = net(x)
    if mode == "compiled":
        y = torch.compile(net, backend="aot_eager", fullgraph=True)(x)
    elif mode == "exported":
        program = torch.export.export(net, (x,))
        ops = {node.target.name() for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
        ours = {"cuda": "grouped_mamba_layer", "cpu": "grouped_selective_scan"}[device]
        ours = "cross_selective_scan" if "scan" in options else ours
        several = "scan" in options or "gate_source" in options
        ours = "grouped_selective_scan" if "gate_source" in options else ours
        if "variant" not in options or options["variant"] != "paper":
            assert any(name.startswith(f"groupmamba::{ours}") for name in ops)
            assert ("groupmamba::layer_norm_pool_fwd" in ops) == (device == "cpu" or several)
        y = program.module()(x)
    elif mode == "functional":
        y = torch.func.functional_call(net, dict(net.named_parameters()) | dict(net.named_buffers()), (x,))
    else:
        y = expected
    assert composed == []
    assert_close(y, expected)


@pytest.mark.cuda
def test_plain_blocks_are_two_ops_on_cuda():
    block = model("cuda").stages[1].blocks[0].eval()
    x = torch.randn(2, 8, 8, 24, device="cuda")

    def kernels():
        with torch.no_grad(), torch.profiler.profile() as profile:
            block(x)
        return {event.key for event in profile.key_averages() if event.key.startswith(("groupmamba::", "aten::"))}

    ops = kernels()
    assert {"groupmamba::grouped_mamba_layer", "groupmamba::feed_forward"} <= ops and "aten::linear" not in ops
    block.attn.proj.register_forward_hook(lambda *_: None)
    ops = kernels()
    assert "groupmamba::grouped_mamba_layer" not in ops and {"groupmamba::feed_forward", "aten::linear"} <= ops


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_low_precision_agrees(device, options, autocast, dtype):
    layer = make(32, **options).to(device)
    x = torch.randn(2, 32, 9, 8, device=device)
    truth = copy.deepcopy(layer).double()(x.double())
    if not autocast:
        layer, x = layer.to(dtype), x.to(dtype)
    watched = copy.deepcopy(layer)
    seen = watch(watched)
    with torch.autocast(device, dtype, enabled=autocast):
        y, composed = layer(x), watched(x)
    assert seen == set(leaves(watched))
    assert y.dtype == composed.dtype
    assert relative_error(composed, truth) < max(
        2 * relative_error(y, truth), 0.02 if dtype == torch.bfloat16 else 0.003
    )


def test_parameters_of_another_dtype(device):
    """Float32 parameters in a bfloat16 layer, as some trainers keep them, whether the layer reads or calls."""
    layer = make(16).to(device, torch.bfloat16)
    for module in (layer.proj, layer.affinity.fc1, layer.affinity.fc2):
        module.float()
    x = torch.randn(1, 16, 5, 6, device=device, dtype=torch.bfloat16)
    if device == "cuda":  # on the CPU the product needs one dtype
        assert layer(x).dtype == torch.bfloat16
    watch(layer)
    assert layer(x).dtype == torch.bfloat16
    mlp = ConvFeedForward(16, 32).to(device, torch.bfloat16)
    mlp.dwconv.float()
    watch(mlp)
    assert mlp(x.permute(0, 2, 3, 1)).dtype == torch.bfloat16


class Quantized(nn.Module):
    """A product with its weight in 8 bits and a scale in float32, which takes what comes."""

    def __init__(self, linear):
        super().__init__()
        self.scale = nn.Parameter(linear.weight.detach().float().abs().amax(1, keepdim=True) / 127)
        self.register_buffer("weight", (linear.weight.detach() / self.scale).round().to(torch.int8))
        self.bias = linear.bias
        self.seen = []

    def forward(self, x):
        self.seen.append(x.dtype)
        return nn.functional.linear(x, (self.weight * self.scale).to(x.dtype), self.bias)


def test_quantized_modules_are_given_the_layers_dtype(device):
    layer = make(16).to(device, torch.bfloat16)
    for owner, name in ((layer, "proj"), (layer.affinity, "fc1"), (layer.affinity, "fc2")):
        setattr(owner, name, Quantized(getattr(owner, name)))
    assert layer(torch.randn(1, 16, 5, 6, device=device, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.proj.seen == layer.affinity.fc1.seen == layer.affinity.fc2.seen == [torch.bfloat16]


@pytest.mark.parametrize("shape", [(2, 16, 0, 5), (0, 16, 4, 4), (2, 16, 1, 1)])
def test_small_and_empty_images_with_hooks(device, shape):
    layer = GroupedMamba2d(16).to(device)
    mlp = ConvFeedForward(16, 32).to(device)
    watch(layer), watch(mlp)
    x = torch.zeros(shape, device=device)
    assert layer(x).shape == shape and mlp(x.permute(0, 2, 3, 1)).shape == x.permute(0, 2, 3, 1).shape
