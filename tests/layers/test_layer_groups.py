# SPDX-License-Identifier: Apache-2.0
"""Layers of other numbers of groups than four, and those that gate by their output: what test_layer.py asks of all."""

import pytest
import torch
from torch.export import Dim, export

import groupmamba_ext as ext
from groupmamba import GroupedMamba2d, why_not_fused
from groupmamba.layers.drop_path import DropPathMask
from support.common import relative_error
from support.layers import VARIANTS, image, make, run

ALL = ("lr", "rl", "tb", "bt")
# Of widths that are odd for a group, for the image, or for both.
OPTIONS = {
    "one": {"dim": 17, "directions": ("tb",)},
    "one, wide": {"dim": 136, "directions": ("rl",)},  # more channels than a warp of the CUDA scan holds
    "two": {"dim": 26, "directions": ("bt", "lr")},
    "three": {"dim": 33, "directions": ("rl", "bt", "rl")},
    "eight": {"dim": 72, "directions": ALL * 2},
    "cross": {"dim": 15, "scan": "cross", "groups": 3, "directions": ("lr", "bt")},
    "output": {"dim": 36, "gate_source": "output"},
    "output, eight": {"dim": 72, "gate_source": "output", "directions": ALL * 2},
    "output, cross": {"dim": 24, "gate_source": "output", "scan": "cross", "groups": 1},
}

variants = pytest.mark.parametrize("variant", VARIANTS)
cores = pytest.mark.parametrize("variant", ("released", "fused"))
options = pytest.mark.parametrize("name", OPTIONS)
few = pytest.mark.parametrize("name", ["one", "three", "output", "output, eight"])


def layer_of(name, variant, **more):
    layer = make(**OPTIONS[name], variant=variant, reduction=4, **more)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.shape[-1] > 100 and parameter.dim() > 1:  # rounding of long sums would be all that shows
                parameter.mul_(0.3)
    return layer


def input_of(name, *size, batch=2, **more):
    return image(batch, OPTIONS[name]["dim"], *size, **more)


# At most a third of these is seen on the CPU; a wrong term makes 1.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 0.15, "autocast": 0.15}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@options
@variants
def test_dtypes(name, variant, dtype, device):
    """Values and all gradients against those in float64."""
    layer, x = layer_of(name, variant, dtype=torch.float64), input_of(name, 5, 7)
    truth = run(layer, x)
    autocast = dtype == "autocast"
    own, low = (torch.float32, torch.bfloat16) if autocast else (dtype, dtype)
    layer, x = layer.to(device, own), x.to(device, own)
    with ext.backend("native"), torch.autocast(device, torch.bfloat16, enabled=autocast):
        actual = run(layer, x)
    for key, value in actual.items():
        assert value.dtype == (low if key == "y" and variant != "paper" else own), key
        if key != "skip_scale":  # nearly cancels: a norm follows it
            error = relative_error(value, truth[key])
            assert error < TOLERANCES[dtype], f"{key}: {error:.1e}"


@options
@variants
def test_layouts_tokens_and_residual(name, variant, device):
    layer, x = layer_of(name, variant, device=device), input_of(name, 5, 7, dtype=torch.float32, device=device)
    y = layer(x)
    assert y.shape == x.shape and y.isfinite().all()
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer(x[0]), y[0], rtol=1e-4, atol=1e-4)
    tokens = layer(x.permute(0, 2, 3, 1), residual=True, tokens=True).permute(0, 3, 1, 2)
    torch.testing.assert_close(tokens, x + y, rtol=1e-4, atol=1e-4)
    drop_path = DropPathMask(torch.tensor([0.0, 1.0], device=device), 1.25)
    some = layer(x, residual=True, drop_path=drop_path)
    assert torch.equal(some[0], x[0])
    torch.testing.assert_close(some[1], x[1] + 1.25 * y[1], rtol=1e-4, atol=1e-4)


@options
@variants
def test_submodules_called_one_by_one(name, variant, device):
    """A hook on the core, the affinity and the norm: the same values and gradients."""
    layer, x = layer_of(name, variant, device=device), input_of(name, 5, 7, dtype=torch.float32, device=device)
    assert why_not_fused(layer) == {}
    expected = run(layer, x)
    seen = []
    for part in ("mamba", "affinity", "norm", "proj", "vsss"):
        if hasattr(layer, part):
            layer.get_submodule(part).register_forward_hook(lambda module, *_, part=part: seen.append(part))
    actual = run(layer, x)
    assert seen == (["vsss", "affinity"] if variant == "paper" else seen) and len(seen) >= 2
    if variant != "paper":
        assert (seen.index("affinity") > seen.index("mamba")) == name.startswith("output")
    for key, value in actual.items():
        if key != "skip_scale":  # nearly cancels: a norm follows it
            assert relative_error(value, expected[key]) < 1e-3, key


@pytest.mark.parametrize("size", [(0, 7), (5, 0)])
@few
@variants
def test_empty_images(name, variant, size):
    for key, value in run(layer_of(name, variant), input_of(name, *size, dtype=torch.float32)).items():
        assert value.numel() == 0 or not value.any(), key


@few
@variants
def test_bitwise_repeatable(name, variant, device):
    layer, x = layer_of(name, variant, device=device), input_of(name, 17, 11, dtype=torch.float32, device=device)
    first, second = run(layer, x), run(layer, x)
    assert all(torch.equal(value, second[key]) for key, value in first.items())


@few
@variants
def test_compiles_as_one_graph(name, variant, device):
    layer, x = layer_of(name, variant, device=device), input_of(name, 3, 4, dtype=torch.float32, device=device)
    expected = run(layer, x)
    torch._dynamo.reset()
    for key, value in run(torch.compile(layer, fullgraph=True, backend="aot_eager"), x).items():
        torch.testing.assert_close(value, expected[key.removeprefix("_orig_mod.")], rtol=1e-4, atol=1e-5)


@few
@variants
def test_exports_for_any_size(name, variant, device):
    layer = layer_of(name, variant, device=device)
    dims = {0: Dim("batch", max=64), 2: Dim("height", min=2, max=512), 3: Dim("width", min=2, max=512)}
    x = input_of(name, 12, 14, dtype=torch.float32, device=device)
    program = export(layer, (x,), dynamic_shapes=(dims,)).module()
    for size, batch in (((3, 5), 1), ((40, 33), 3), ((2, 2), 2)):
        x = input_of(name, *size, batch=batch, dtype=torch.float32, device=device)
        torch.testing.assert_close(program(x), layer(x), rtol=1e-4, atol=1e-5)


@cores
def test_a_group_of_its_own_for_each_direction(variant):
    """Groups that repeat directions, with the weights of fewer groups twice, are these groups twice."""
    torch.manual_seed(0)
    four, eight = (
        GroupedMamba2d(dim, variant=variant, affinity=False, directions=d).mamba
        for dim, d in ((16, ALL), (32, ALL * 2))
    )
    eight.load_state_dict({key: value.repeat(2, *[1] * (value.dim() - 1)) for key, value in four.state_dict().items()})
    x = torch.randn(2, 5, 7, 4, 4)
    torch.testing.assert_close(eight(torch.cat([x, x], 3)), torch.cat([four(x), four(x)], 3))


@variants
def test_output_gate_sees_what_comes_out(variant):
    """With the same state; a gate of one value a channel is the same gate wherever it looks."""
    layers = [make(16, variant=variant, gate_source=source, reduction=2) for source in ("input", "output")]
    layers[1].load_state_dict(layers[0].state_dict())
    x = image(2, 16, 5, 7, dtype=torch.float32)
    assert relative_error(layers[1](x), layers[0](x)) > 1e-3
    for layer in layers:
        torch.nn.init.zeros_(layer.affinity.fc2.weight)
    torch.testing.assert_close(layers[1](x), layers[0](x))


@cores
def test_a_gate_by_an_output_of_zeros_is_the_same_for_all_images(variant):
    x = image(2, 16, 5, 7, dtype=torch.float32)
    for source in ("input", "output"):
        layer = make(16, variant=variant, gate_source=source, reduction=2)
        torch.nn.init.zeros_(layer.mamba.out_norm_weight)
        torch.nn.init.zeros_(layer.mamba.out_norm_bias)
        gates = []
        layer.affinity.register_forward_hook(lambda module, args, out, gates=gates: gates.append(out))
        layer(x)
        assert torch.equal(gates[0][0], gates[0][1]) == (source == "output")
