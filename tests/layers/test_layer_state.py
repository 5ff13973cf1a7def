# SPDX-License-Identifier: Apache-2.0
"""State, initialisation and errors of the layers."""

import pytest
import torch
import torch.nn.functional as F

from groupmamba import GroupedMamba2d, VSSSBlock
from groupmamba.layers._checks import MAX_INT, scaled_width
from support.layers import SCANS, VARIANTS, image, make

CORE_STATE = {
    "in_proj_weight": (4, 16, 8),
    "conv_weight": (4, 8, 3, 3),
    "conv_bias": (4, 8),
    "x_proj_weight": (4, 5, 8),
    "dt_weight": (4, 8, 1),
    "dt_bias": (4, 8),
    "A_log": (4, 8, 2),
    "D": (4, 8),
    "out_norm_weight": (4, 8),
    "out_norm_bias": (4, 8),
    "out_proj_weight": (4, 8, 8),
}
LAYER_STATE = {
    "norm.weight": (32,),
    "norm.bias": (32,),
    "proj.weight": (32, 32),
    "proj.bias": (32,),
}
AFFINITY_STATE = {
    "affinity.fc1.weight": (2, 32),
    "affinity.fc1.bias": (2,),
    "affinity.fc2.weight": (32, 2),
    "affinity.fc2.bias": (32,),
}
VSSS_STATE = {
    **{f"norm{i}_{kind}": (4, 8) for i in (1, 2) for kind in ("weight", "bias")},
    "fc1_weight": (4, 32, 8),
    "fc1_bias": (4, 32),
    "fc2_weight": (4, 8, 32),
    "fc2_bias": (4, 8),
    **{f"mamba.{name}": shape for name, shape in CORE_STATE.items()},
}
STATES = {
    "released": {
        "skip_scale": (1,),
        **{f"mamba.{name}": shape for name, shape in CORE_STATE.items()},
        **LAYER_STATE,
        **AFFINITY_STATE,
    },
    "fused": {
        **{f"mamba.{name}": shape for name, shape in CORE_STATE.items() if name != "out_proj_weight"},
        **LAYER_STATE,
        **AFFINITY_STATE,
    },
    "paper": {**{f"vsss.{name}": shape for name, shape in VSSS_STATE.items()}, **AFFINITY_STATE},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict_names_and_shapes(variant):
    layer = GroupedMamba2d(32, variant=variant, d_state=2)
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == STATES[variant]


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict_of_a_cross_scan(variant):
    """As of a grouped scan, with all directions as a second dimension of what each has of its own."""
    layer = GroupedMamba2d(32, variant=variant, scan="cross", d_state=2, directions=("lr", "tb", "rl"))
    own = {"x_proj_weight", "dt_weight", "dt_bias", "A_log", "D"}
    expected = {
        name: (4, 3, *shape[1:]) if name.rsplit(".", 1)[-1] in own else shape for name, shape in STATES[variant].items()
    }
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == expected


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "directions, options",
    [(("tb",), {}), (("lr", "rl"), {}), (("lr", "tb") * 4, {}), (("lr", "tb") * 4, {"gate_source": "output"})],
)
def test_state_dict_of_other_groups(variant, directions, options):
    """Stacked entries have one row a group; what the affinity looks at changes no shape."""
    groups = len(directions)
    layer = GroupedMamba2d(32, variant=variant, d_state=2, directions=directions, **options)
    core = layer.vsss.mamba if variant == "paper" else layer.mamba
    assert (layer.groups, core.groups, core.dim, core.dt_rank) == (groups, groups, 32 // groups, -(-32 // groups // 16))
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert list(shapes) == list(GroupedMamba2d(32, variant=variant, d_state=2).state_dict())
    for name, shape in shapes.items():
        if name.startswith(("mamba.", "vsss.")):
            assert shape[0] == groups, name
        else:
            assert shape == STATES[variant][name], name


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_of_other_groups_are_refused_in_words(variant, strict):
    """As an error of values, whatever ``strict``: all names fit."""
    state = GroupedMamba2d(16, variant=variant).state_dict()
    layer = GroupedMamba2d(16, variant=variant, directions=("lr", "rl"))
    words = r"mamba.in_proj_weight is of 4 groups, and the layer has 2 \(directions "
    with pytest.raises(RuntimeError, match=words) as caught:
        layer.load_state_dict(state, strict=strict)
    assert "Unexpected key" not in str(caught.value)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict_round_trip(variant, scan):
    first, second = (make(variant=variant, scan=scan, seed=seed) for seed in (0, 5))
    x = image(2, 16, 5, 7, dtype=torch.float32)
    second.load_state_dict(first.state_dict(), strict=True)
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_meta_device(variant, scan):
    layer = GroupedMamba2d(32, variant=variant, scan=scan, device="meta")
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    layer.to_empty(device="cpu")
    torch.manual_seed(3)
    layer.reset_parameters()
    torch.manual_seed(3)
    expected = GroupedMamba2d(32, variant=variant, scan=scan)
    expected.reset_parameters()
    other = dict(expected.named_parameters())
    torch.manual_seed(3)
    expected.reset_parameters()
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, other[name]), name
    assert marked(layer)


def marked(layer):
    """Names of the parameters without weight decay; they must be these three in every core."""
    names = {name for name, p in layer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    return {name.rsplit(".", 1)[-1] for name in names} == {"A_log", "D", "dt_bias"}


@pytest.mark.parametrize("layer", [*VARIANTS, "block"])
def test_no_weight_decay_marks(layer):
    module = VSSSBlock(16) if layer == "block" else GroupedMamba2d(16, variant=layer)
    assert marked(module)
    assert marked(module.half())


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_initialisation(variant, scan):
    torch.manual_seed(0)
    layer = GroupedMamba2d(256, variant=variant, scan=scan, d_state=3)
    core = layer.vsss.mamba if variant == "paper" else layer.mamba
    torch.testing.assert_close(core.A_log.exp(), torch.tensor([1.0, 2.0, 3.0]).expand_as(core.A_log))
    steps = F.softplus(core.dt_bias)
    assert 1e-3 <= steps.min() < 2e-3 and 0.05 < steps.max() <= 0.1001
    assert core.x_proj_weight.abs().max() <= 64**-0.5 and core.dt_weight.abs().max() <= 4**-0.5
    assert abs(core.conv_weight.std() - (2 / 9) ** 0.5) < 0.02
    for name, parameter in layer.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if name.endswith(("skip_scale", "mamba.D")) or "norm" in name and leaf.endswith("weight"):
            assert (parameter == 1).all(), name
        elif leaf.endswith("bias") and leaf != "dt_bias":
            assert not parameter.any(), name
        elif leaf in ("in_proj_weight", "out_proj_weight", "fc1_weight", "fc2_weight", "weight"):
            assert 0.018 < parameter.std() < 0.022, name


def test_repr_names_the_configuration():
    assert "scan='cross'" in repr(GroupedMamba2d(16, scan="cross"))
    text = repr(GroupedMamba2d(64, d_state=2))
    for part in ("dim=64", "variant='released'", "d_state=2", "('lr', 'tb', 'rl', 'bt')", "dt_rank=1", "groups=4"):
        assert part in text
    assert "gate_source='output'" in repr(GroupedMamba2d(16, gate_source="output"))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"dim": 30}, ValueError, ("dim", "30")),
        ({"dim": 0}, ValueError, ("dim", "0")),
        ({"dim": 16.0}, TypeError, ("dim", "16.0")),
        ({"variant": "new"}, ValueError, ("variant", "'new'")),
        ({"scan": "zigzag"}, ValueError, ("scan", "'grouped', 'cross'", "'zigzag'")),
        ({"scan": "cross", "directions": ()}, ValueError, ("directions", "()")),
        ({"scan": "cross", "directions": ("lr", "up")}, ValueError, ("directions", "('lr', 'up')")),
        ({"directions": ("lr", "rl", "tb")}, ValueError, ("dim must be a multiple of 3", "groups", "16")),
        ({"directions": ("lr",) * 32}, ValueError, ("dim must be a multiple of 32", "16")),
        ({"directions": ()}, ValueError, ("directions", "at least one", "()")),
        ({"groups": 8}, ValueError, ("groups must be 4", "('lr', 'tb', 'rl', 'bt')", "got 8")),
        ({"groups": 2, "directions": ("lr",)}, ValueError, ("groups must be 1", "('lr',)", "got 2")),
        ({"groups": 0, "scan": "cross"}, ValueError, ("groups", "0")),
        ({"groups": 3, "scan": "cross"}, ValueError, ("dim must be a multiple of 3", "16")),
        ({"groups": "4"}, TypeError, ("groups", "'4'")),
        ({"gate_source": "both"}, ValueError, ("gate_source", "'input', 'output'", "'both'")),
        ({"gate_source": "output", "affinity": False}, ValueError, ("gate_source='output'", "affinity=False")),
        ({"directions": ("lr", "rl", "tb", "up")}, ValueError, ("directions", "'up'")),
        ({"directions": "lrrl"}, TypeError, ("directions", "'lrrl'")),
        ({"d_state": 0}, ValueError, ("d_state", "0")),
        ({"d_conv": 5}, ValueError, ("d_conv", "5")),
        ({"expand": 0.1}, ValueError, ("expand", "0.1")),
        ({"expand": "2"}, TypeError, ("expand", "'2'")),
        ({"dt_rank": "full"}, ValueError, ("dt_rank", "'full'")),
        ({"dt_rank": 0}, ValueError, ("dt_rank", "0")),
        ({"reduction": 0}, ValueError, ("reduction", "0")),
    ],
    ids=str,
)
def test_constructor_errors(options, error, words):
    with pytest.raises(error) as caught:
        GroupedMamba2d(**{"dim": 16, **options})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.zeros(2, 12, 5, 7), ValueError, ("x", "16", "(2, 12, 5, 7)")),
        (torch.zeros(16, 5), ValueError, ("x", "(16, 5)")),
        (torch.zeros(2, 16, 5, 7, dtype=torch.float64), TypeError, ("x", "torch.float64", "torch.float32")),
        ([1.0], TypeError, ("x", "list")),
    ],
    ids=("width", "dims", "dtype", "type"),
)
def test_input_errors(variant, x, error, words):
    with pytest.raises(error) as caught:
        GroupedMamba2d(16, variant=variant)(x)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("options", [{"direction": "up"}, {"mlp_ratio": 0.0}, {"dim": 0}], ids=str)
def test_block_errors(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=name) as caught:
        VSSSBlock(**{"dim": 16, **options})
    assert repr(value) in str(caught.value)


def test_the_largest_width_that_a_ratio_makes():
    assert scaled_width("mlp_ratio", MAX_INT, 1) == MAX_INT
    with pytest.raises(ValueError, match=f"mlp_ratio must be finite and make at most {MAX_INT} channels of 1"):
        scaled_width("mlp_ratio", MAX_INT + 1, 1)
