# SPDX-License-Identifier: Apache-2.0
"""The values that the layers compute: against a naive implementation of the equations, and by symmetries."""

import pytest
import torch
import torch.nn.functional as F

import groupmamba_ext as ext
from groupmamba import ChannelAffinity, GroupedMamba2d, VSSSBlock
from groupmamba.layers.group_core import GroupCore
from support.layers import VARIANTS, image, make, run


def naive_scan(u, dt, A, B, C, D, direction):
    """One group, one path by flips and transposes: u, dt (batch, H, W, D), A (D, N), B, C (batch, H, W, N)."""
    column, reverse = direction in ("tb", "bt"), direction in ("rl", "bt")

    def to_path(t):
        t = (t.transpose(1, 2) if column else t).flatten(1, 2)
        return t.flip(1) if reverse else t

    height, width = u.shape[1:3]
    u, dt, B, C = map(to_path, (u, dt, B, C))
    h, out = 0, []
    for t in range(u.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None, :]
        out.append((h * C[:, t, None, :]).sum(-1) + D * u[:, t])
    y = torch.stack(out, 1)
    y = y.flip(1) if reverse else y
    return y.unflatten(1, (width, height)).transpose(1, 2) if column else y.unflatten(1, (height, width))


def naive_mamba(core, g, x, gate=None):
    """Group g of a GroupCore on x (batch, H, W, D)."""

    def scan(own, direction):  # own: this scan's part of a parameter
        dt, B, C = F.linear(u, own(core.x_proj_weight)).split((rank, states, states), -1)
        step = F.softplus(F.linear(dt, own(core.dt_weight)) + own(core.dt_bias))
        return naive_scan(u, step, -own(core.A_log).exp(), B, C, own(core.D), direction)

    inner, rank, states = core.inner_dim, core.dt_rank, core.d_state
    u, z = F.linear(x, core.in_proj_weight[g]).split(inner, -1)
    if core.d_conv == 3:
        kernel = core.conv_weight[g].unsqueeze(1)
        u = F.conv2d(u.permute(0, 3, 1, 2), kernel, core.conv_bias[g], padding=1, groups=inner).permute(0, 2, 3, 1)
    u = F.silu(u)
    if core.scan == "cross":
        y = sum(scan(lambda p, k=k: p[g, k], direction) for k, direction in enumerate(core.directions))
    else:
        y = scan(lambda p: p[g], core.directions[g])
    y = F.layer_norm(y, (inner,), core.out_norm_weight[g], core.out_norm_bias[g]) * F.silu(z)
    if gate is not None:
        y = y * gate[:, None, None]
    return y if core.out_proj_weight is None else F.linear(y, core.out_proj_weight[g])


def naive_layer(layer, x):
    x = x.permute(0, 2, 3, 1)

    groups, by_input = layer.groups, layer.gate_source == "input"

    def affinity(t):
        if layer.affinity is None:
            return t.new_ones(1, groups if layer.variant == "fused" else layer.dim)
        return torch.sigmoid(layer.affinity.fc2(F.relu(layer.affinity.fc1(t.mean((1, 2))))))

    if layer.variant == "paper":
        block, out = layer.vsss, []
        for g, z in enumerate(x.chunk(groups, -1)):
            n = F.layer_norm(z, z.shape[-1:], block.norm1_weight[g], block.norm1_bias[g], 1e-6)
            z = z + naive_mamba(block.mamba, g, n)
            n = F.layer_norm(z, z.shape[-1:], block.norm2_weight[g], block.norm2_bias[g], 1e-6)
            hidden = F.gelu(F.linear(n, block.fc1_weight[g], block.fc1_bias[g]))
            out.append(z + F.linear(hidden, block.fc2_weight[g], block.fc2_bias[g]))
        y = torch.cat(out, -1)
        y = y * affinity(x if by_input else y)[:, None, None]
    else:
        xn = layer.norm(x)
        gate = affinity(xn) if by_input else None
        gates = gate.chunk(groups, -1) if layer.variant == "fused" and by_input else (None,) * groups
        o = torch.cat([naive_mamba(layer.mamba, g, t, gates[g]) for g, t in enumerate(xn.chunk(groups, -1))], -1)
        gate = affinity(o) if gate is None else gate
        if layer.variant == "released":
            o = layer.norm(o * layer.skip_scale * xn * gate[:, None, None])
        elif not by_input:
            o = o * gate[:, None, None]
        y = layer.proj(o)
    return y.permute(0, 3, 1, 2)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"affinity": False},
        {"d_state": 3},
        {"d_conv": 1},
        {"expand": 2.0},
        {"expand": 0.5},
        {"dt_rank": 3},
        {"reduction": 4},
        {"directions": ("bt", "bt", "rl", "lr")},
        {"scan": "cross"},
        {"scan": "cross", "affinity": False, "d_state": 3, "d_conv": 1, "dt_rank": 3},
        {"scan": "cross", "expand": 2.0, "directions": ("bt", "lr", "tb")},
        {"dim": 28},
        {"dim": 80},
        {"dim": 4},
        {"dim": 7, "directions": ("tb",)},
        {"dim": 14, "directions": ("bt", "lr")},
        {"dim": 27, "directions": ("rl", "bt", "rl")},
        {"dim": 40, "directions": ("lr", "rl", "tb", "bt", "bt", "tb", "rl", "lr"), "expand": 1.5},
        {"dim": 3, "directions": ("lr", "tb", "rl")},
        {"scan": "cross", "groups": 1},
        {"dim": 15, "scan": "cross", "groups": 3, "directions": ("lr", "bt")},
        {"gate_source": "output"},
        {"gate_source": "output", "scan": "cross", "groups": 2},
        {"gate_source": "output", "expand": 1.5, "reduction": 2, "d_conv": 1},
        {"gate_source": "output", "dim": 27, "directions": ("rl", "bt", "rl"), "d_state": 3},
    ],
    ids=str,
)
def test_matches_a_naive_implementation(variant, options):
    layer = make(variant=variant, dtype=torch.float64, **options)
    x = image(2, layer.dim, 5, 3)
    actual = run(layer, x)
    monkey = type("Naive", (torch.nn.Module,), {"forward": lambda self, x: naive_layer(self.layer, x)})()
    monkey.layer = layer
    expected = run(monkey, x)
    for name, value in actual.items():
        reference = expected[name if name in ("y", "dx") else f"layer.{name}"]
        torch.testing.assert_close(value, reference, rtol=1e-9, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


def test_paper_variant_is_four_vsss_blocks():
    layer = make(variant="paper", affinity=False, dtype=torch.float64)
    x = image(2, 16, 5, 3)
    parts = []
    for g, direction in enumerate(("lr", "rl", "tb", "bt")):
        block = VSSSBlock(4, direction=direction, dtype=torch.float64)
        block.load_state_dict({name: value[g : g + 1] for name, value in layer.vsss.state_dict().items()})
        parts.append(block(x[:, 4 * g : 4 * g + 4]))
    torch.testing.assert_close(layer(x), torch.cat(parts, 1), rtol=1e-10, atol=1e-12)


def test_groups_are_independent_and_can_be_reordered():
    order = [2, 0, 3, 1]
    core = make(4, cls=lambda dim: GroupCore(4, dim, directions=ext.DIRECTIONS, dtype=torch.float64))
    directions = [core.directions[g] for g in order]
    other = GroupCore(4, 4, directions=directions, dtype=torch.float64)
    other.load_state_dict({name: value[order] for name, value in core.state_dict().items()})
    x = image(2, 5, 3, 4, 4)
    torch.testing.assert_close(other(x[..., order, :]), core(x)[..., order, :], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("directions", "move"),
    [
        (("rl", "lr", "bt", "tb"), lambda t, rows, columns: t.flip(rows, columns)),
        (("tb", "bt", "lr", "rl"), lambda t, rows, columns: t.transpose(rows, columns)),
    ],
    ids=("reverse", "transpose"),
)
def test_directions_are_symmetries_of_the_image(directions, move):
    core = make(4, cls=lambda dim: GroupCore(4, dim, directions=("lr", "rl", "tb", "bt"), dtype=torch.float64))
    other = GroupCore(4, 4, directions=directions, dtype=torch.float64)
    state = core.state_dict()
    other.load_state_dict({**state, "conv_weight": move(state["conv_weight"], 2, 3)})
    x = image(2, 5, 3, 4, 4)
    torch.testing.assert_close(other(move(x, 1, 2)), move(core(x), 1, 2), rtol=1e-10, atol=1e-12)


def test_default_directions():
    orders = {variant: GroupedMamba2d(16, variant=variant).directions for variant in VARIANTS}
    paper = ("lr", "rl", "tb", "bt")
    assert orders == {"released": ("lr", "tb", "rl", "bt"), "fused": paper, "paper": paper}


def test_channel_affinity():
    affinity = make(32, cls=ChannelAffinity)
    x = image(2, 32, 5, 7, dtype=torch.float32)
    hidden = F.relu(F.linear(x.mean((2, 3)), affinity.fc1.weight, affinity.fc1.bias))
    expected = torch.sigmoid(F.linear(hidden, affinity.fc2.weight, affinity.fc2.bias))
    torch.testing.assert_close(affinity(x), expected)
    torch.testing.assert_close(affinity.from_pooled(x.mean((2, 3))), expected)
    torch.testing.assert_close(affinity(x[0]), expected[0])
    assert affinity.fc1.weight.shape == (2, 32)
    assert ChannelAffinity(8).fc1.weight.shape == (1, 8)
    assert affinity.half()(x.half()).dtype == torch.float32
