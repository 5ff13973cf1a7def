# SPDX-License-Identifier: Apache-2.0
"""The modules of `groupmamba_ext.ops` against the schemas of the compiled ops, and FLOPs of the ops of whole layers."""

import copy
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import groupmamba_ext as ext
from groupmamba.layers.feed_forward import ConvFeedForward
from groupmamba_ext.directions import Directions, direction_codes
from groupmamba_ext.ops import OPS
from groupmamba_ext.ops.cross_selective_scan import CrossScanInputs
from groupmamba_ext.ops.feed_forward import FeedForwardParameters
from groupmamba_ext.ops.grouped_mamba_layer import LayerOptions, LayerParameters
from groupmamba_ext.ops.grouped_selective_scan import ScanInputs
from support.common import fakes_of_cuda
from support.layers import image, layer_arguments, make
from support.raw_ops import op


def argument_names(name):
    return [argument.name for argument in op(name).default._schema.arguments]


def test_every_compiled_op_is_described():
    op(OPS[0].name + "_fwd")  # loads the library
    described = set()
    for described_op in OPS:
        pair = hasattr(described_op, "backward")
        described |= {f"{described_op.name}_fwd", f"{described_op.name}_bwd"} if pair else {described_op.name}
        described |= {described_op.name} if getattr(described_op, "inference_fake", None) else set()
    compiled = {name.partition("::")[2].partition(".")[0] for name in torch._C._dispatch_get_all_op_names()
                if name.startswith("groupmamba::")}  # fmt: skip
    assert described == compiled


@pytest.mark.parametrize(
    "name, before, fields, behind",
    [
        ("grouped_selective_scan", [], ScanInputs._fields, 5),
        ("cross_selective_scan", [], CrossScanInputs._fields, 4),
        ("grouped_mamba_layer", ["x"], LayerParameters._fields + LayerOptions._fields, 0),
        ("feed_forward", ["x"], FeedForwardParameters._fields, 4),
    ],
)
def test_named_arguments_are_those_of_the_schema(name, before, fields, behind):
    names = argument_names(f"{name}_fwd")
    assert names[: len(names) - behind] == [*before, *fields]


def fake(mode, arguments):
    """These arguments on CUDA, without values."""
    return [mode.from_tensor(t).to("cuda") if isinstance(t, torch.Tensor) else t for t in arguments]


def test_core_parameters_in_the_order_of_the_schema():
    core = make(16).mamba
    names = [name for name in LayerParameters._fields if name in core._parameters and name != "out_proj_weight"]
    held = core.core_parameters()
    assert len(held) == len(names) and all(t is getattr(core, name) for t, name in zip(held, names, strict=True))


def test_directions_are_checked_once():
    """But for their number. Layers hold them as plain tuples, which torch.compile knows best."""
    held = Directions.of(["lr", "tb", "rl", "bt"], 4)
    assert held == ("lr", "tb", "rl", "bt") and held.codes == (0, 2, 1, 3)
    assert Directions.of(held, 4) is held
    layer = make(16, directions=held)
    assert type(layer.directions) is tuple and type(layer.mamba.directions) is tuple
    for twin in (copy.deepcopy(held), pickle.loads(pickle.dumps(held))):
        assert type(twin) is Directions and twin == held and twin.codes == held.codes
    with pytest.raises(ValueError, match=r"one direction a group \(2\), got \('lr', 'tb', 'rl', 'bt'\)"):
        direction_codes("op: ", held, 2)
    with pytest.raises(ValueError, match="got 'up'"):
        direction_codes("op: ", ("lr", "up"), 2)


def counted(call):
    with FlopCounterMode(display=False) as counter:
        y = call()
    return counter.get_total_flops(), y


def check_flops(name, composed, x, arguments, tensors):
    """Of an op's two forward forms and of its backward as of the ops that it replaces, on the CPU."""
    expected, y = counted(lambda: composed(x.requires_grad_()))
    expected_backward, _ = counted(lambda: y.sum().backward())
    with FakeTensorMode() as mode, torch.no_grad():
        inputs = fake(mode, arguments)
        assert counted(lambda: op(name)(*inputs))[0] == expected
        forward, (out, *saved) = counted(lambda: op(f"{name}_fwd")(*inputs))
        assert forward == expected
        backward = [out, *inputs[:tensors], *saved, *inputs[tensors:]]
        assert counted(lambda: op(f"{name}_bwd")(*backward))[0] == expected_backward


@fakes_of_cuda
@pytest.mark.parametrize("variant", ["released", "fused"])
@pytest.mark.parametrize("affinity", [True, False])
def test_flops_of_a_layer(variant, affinity):
    layer = make(24, variant=variant, affinity=affinity, d_state=2, expand=1.5, directions=("lr", "bt", "rl"))
    x = image(2, 24, 5, 7, dtype=torch.float32)
    arguments = layer_arguments(layer, x)
    check_flops("grouped_mamba_layer", layer, x, arguments, 1 + len(LayerParameters._fields))


@fakes_of_cuda
def test_flops_of_a_feed_forward_network():
    module, norm = ConvFeedForward(24, 40), torch.nn.LayerNorm(24)
    layers = (norm, module.fc1, module.dwconv, module.fc2)
    parameters = FeedForwardParameters(*(t for layer in layers for t in (layer.weight, layer.bias)))
    x = image(2, 5, 7, 24, dtype=torch.float32)
    arguments = [x, *parameters, 1e-6, False, None, 1.0]

    def composed(x):  # torch's formula for the gradient of its own depthwise convolution counts as if it had one group
        hidden = ext.depthwise_conv3x3(module.fc1(norm(x)), module.dwconv.weight, module.dwconv.bias)
        return module.fc2(hidden)

    check_flops("feed_forward", composed, x, arguments, 9)
