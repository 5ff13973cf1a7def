# SPDX-License-Identifier: Apache-2.0
"""convert_released_state_dict: renaming and stacking, nothing else, and clear errors."""

import pytest
import torch

from groupmamba import GroupedMamba2d, convert_released_state_dict

# Released entries of one group for 16 channels (4 a group), 2 states, rank 1.
GROUP = {
    "x_proj_weight": (1, 5, 4),
    "dt_projs_weight": (1, 4, 1),
    "dt_projs_bias": (1, 4),
    "A_logs": (4, 2),
    "Ds": (4,),
    "out_norm.weight": (4,),
    "out_norm.bias": (4,),
    "in_proj.weight": (8, 4),
    "conv2d.weight": (4, 1, 3, 3),
    "conv2d.bias": (4,),
    "out_proj.weight": (4, 4),
}
LAYER = {
    "skip_scale": (1,),
    "fc1.weight": (1, 16),
    "fc1.bias": (1,),
    "fc2.weight": (16, 1),
    "fc2.bias": (16,),
    "norm.weight": (16,),
    "norm.bias": (16,),
    **{f"mamba_g{g}.{name}": shape for g in range(1, 5) for name, shape in GROUP.items()},
    "proj.weight": (16, 16),
    "proj.bias": (16,),
}


def released(prefix="", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {prefix + name: torch.randn(shape, generator=generator).to(dtype) for name, shape in LAYER.items()}


def test_one_layer_loads_strictly():
    sd = released()
    layer = GroupedMamba2d(16, d_state=2)
    layer.load_state_dict(convert_released_state_dict(sd), strict=True)
    for g in range(4):
        name = f"mamba_g{g + 1}"
        assert torch.equal(layer.mamba.in_proj_weight[g], sd[f"{name}.in_proj.weight"])
        assert torch.equal(layer.mamba.conv_weight[g], sd[f"{name}.conv2d.weight"][:, 0])
        assert torch.equal(layer.mamba.x_proj_weight[g], sd[f"{name}.x_proj_weight"][0])
        assert torch.equal(layer.mamba.A_log[g], sd[f"{name}.A_logs"])
    assert torch.equal(layer.affinity.fc1.weight, sd["fc1.weight"])


def test_whole_model():
    rest = {  # released name, ours
        "patch_embed1.conv.1.num_batches_tracked": "stem.conv.1.num_batches_tracked",
        "patch_embed1.proj.weight": "stem.proj.weight",
        "patch_embed3.norm.bias": "stages.2.downsample.norm.bias",
        "block1.0.norm2.weight": "stages.0.blocks.0.norm2.weight",
        "block3.12.mlp.fc1.weight": "stages.2.blocks.12.mlp.fc1.weight",
        "block3.12.mlp.dwconv.dwconv.weight": "stages.2.blocks.12.mlp.dwconv.weight",
        "norm1.weight": "stage_norms.0.weight",
        "norm4.weight": "norm.weight",
        "post_network.0.norm1.bias": "class_block.norm1.bias",
        "head.weight": "head.weight",
        "something.else": "something.else",
    }
    values = {name: torch.rand(2, 3) for name in rest}
    sd = {**values, **released("block1.0.attn."), **released("post_network.0.attn.")}
    out = convert_released_state_dict(sd)
    for name, new in rest.items():
        assert out[new] is values[name]
    assert sum(value.numel() for value in out.values()) == sum(value.numel() for value in sd.values())
    layer = set(GroupedMamba2d(16, d_state=2).state_dict())
    prefixes = ("stages.0.blocks.0.attn.", "class_block.attn.")
    assert set(out) == set(rest.values()) | {prefix + name for prefix in prefixes for name in layer}


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.int64))
def test_dtypes_are_kept(dtype):
    assert {value.dtype for value in convert_released_state_dict(released(dtype=dtype)).values()} == {dtype}


def test_layers_without_entries_of_their_groups():
    """Gradients of a model whose first block has a frozen Mamba: the rest of its layer is renamed all the same."""
    sd = {
        **released("block1.1.attn."),
        "block1.0.attn.fc1.weight": torch.ones(1, 16),
        "block1.0.attn.skip_scale": torch.ones(1),
    }
    out = convert_released_state_dict(sd)
    assert torch.equal(out["stages.0.blocks.0.attn.affinity.fc1.weight"], torch.ones(1, 16))
    assert "stages.0.blocks.0.attn.skip_scale" in out and len(out) == len(convert_released_state_dict(released())) + 2


def test_layers_inside_others():
    """Whatever the order of names, an entry belongs to the innermost layer that it can belong to."""
    out = convert_released_state_dict({**released(), **released("inner.")})
    assert set(out) == {
        prefix + name for prefix in ("", "inner.") for name in GroupedMamba2d(16, d_state=2).state_dict()
    }


def test_names_that_only_look_released_stay():
    sd = {
        **released("block1.0.attn."),
        "block0.0.norm2.weight": torch.zeros(1),
        "patch_embed5.proj.weight": torch.ones(1),
    }
    assert {"block0.0.norm2.weight", "patch_embed5.proj.weight"} <= set(convert_released_state_dict(sd))


def test_partial_dictionaries():
    """Gradients of a layer with a frozen convolution: a missing entry is missing in the result."""
    sd = {name: value for name, value in released().items() if "conv2d" not in name and "fc" not in name}
    missing = {
        "mamba.conv_weight",
        "mamba.conv_bias",
        *(f"affinity.fc{i}.{k}" for i in (1, 2) for k in ("weight", "bias")),
    }
    assert set(convert_released_state_dict(sd)) == set(GroupedMamba2d(16, d_state=2).state_dict()) - missing


def without(*names):
    return {name: value for name, value in released().items() if name not in names}


@pytest.mark.parametrize(
    ("sd", "error", "words"),
    [
        (without("mamba_g3.Ds"), ValueError, ("mamba_g3.Ds",)),
        (without("mamba_g1.Ds", "mamba_g2.Ds"), ValueError, ("mamba_g1.Ds", "mamba_g2.Ds")),
        ({**released(), "mamba_g1.gamma": torch.zeros(4)}, ValueError, ("mamba_g1.gamma",)),
        ({**released(), "mamba_g5.Ds": torch.zeros(4)}, ValueError, ("mamba_g5.Ds",)),
        ({**released(), "mamba_g01.Ds": torch.zeros(4)}, ValueError, ("mamba_g01.Ds",)),
        ({**released(), "mamba_g\u0661.Ds": torch.zeros(4)}, ValueError, ("mamba_g\u0661.Ds",)),
        ({"mamba_g01.Ds": torch.zeros(4), **released()}, ValueError, ("mamba_g01.Ds",)),
        (
            {"stages.0.blocks.0.attn.mamba.D": torch.zeros(4, 4), **released("block1.0.attn.")},
            ValueError,
            ("block1.0.attn.mamba_g1.Ds", "stages.0.blocks.0.attn.mamba.D"),
        ),
        (
            {**released("block1.0.attn."), "stages.0.blocks.0.attn.mamba.D": torch.zeros(4, 4)},
            ValueError,
            ("both become", "stages.0.blocks.0.attn.mamba.D"),
        ),
        ({**released("block1.0.attn."), "block1.1.attn.gamma": torch.zeros(4)}, ValueError, ("block1.1.attn.gamma",)),
        ({**released(), 3: torch.zeros(4)}, TypeError, ("the name 3",)),
        ({**released(), "mamba_g2.Ds": torch.zeros(4, device="meta")}, ValueError, ("mamba_g2.Ds", "meta", "cpu")),
        ({**released(), "gamma": torch.zeros(4)}, ValueError, ("'gamma'",)),
        ({**released(), "mamba_g2.Ds": torch.zeros(5)}, ValueError, ("mamba_g2.Ds", "(5,)", "(4,)")),
        ({**released(), "mamba_g2.Ds": torch.zeros(4).double()}, TypeError, ("mamba_g2.Ds", "float64")),
        (
            {**released(), **{f"mamba_g{g}.x_proj_weight": torch.zeros(4, 5, 4) for g in range(1, 5)}},
            ValueError,
            ("x_proj_weight", "(4, 5, 4)"),
        ),
        ({"model": released()}, TypeError, ("'model'", "dict", "pass it")),
        ({**released(), "epoch": 3}, TypeError, ("'epoch'", "int")),
        ({"head.weight": torch.zeros(3)}, ValueError, ("head.weight",)),
        (GroupedMamba2d(16).state_dict(), ValueError, ("mamba_g1",)),
        ([1], TypeError, ("list",)),
    ],
    ids=range(21),
)
def test_errors(sd, error, words):
    with pytest.raises(error) as caught:
        convert_released_state_dict(sd)
    for word in words:
        assert word in str(caught.value)
