# SPDX-License-Identifier: Apache-2.0
"""cross_selective_scan: native against the float64 reference, one factor at a time; identities; errors."""

import pytest
import torch

import groupmamba_ext as ext
from groupmamba_ext.layouts import cross_chunk
from support.common import FLOOR, check, group_major, padded_channels, relative_error, unaligned
from support.inputs import CROSS_ORDER as ORDER
from support.inputs import cross_inputs as inputs

IMAGES = ("u", "dt", "B", "C")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL = ("lr", "rl", "tb", "bt")
VMAMBA = ("lr", "tb", "rl", "bt")


def compare(tensors, **options):
    return check(ext.cross_selective_scan, ext.reference.cross_selective_scan, tensors, options)


def separate(tensors, directions):
    """The sum of one-group grouped scans, one a direction."""
    total = 0
    for k, direction in enumerate(directions):
        part = {name: t[:, :, :, k, None] for name, t in tensors.items() if name in ("dt", "B", "C")}
        part |= {name: t[k, None] for name, t in tensors.items() if name not in IMAGES and t is not None}
        total = total + ext.grouped_selective_scan(tensors["u"].unsqueeze(3), **part, directions=(direction,))
    return total.squeeze(3)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("groups", [None, 3])
@pytest.mark.parametrize("dim", [16, 87])
def test_dtypes(device, dtype, groups, dim):
    if dtype == torch.float64 and device == "cuda":
        pytest.skip("float64 runs through the reference on CUDA")
    compare(inputs(device, dtype, groups=groups, dim=dim, h=12, w=11))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 7, 8, 15, 17, 31, 32, 33, 64, 65, 112, 127, 128, 129, 300])
def test_widths(device, dtype, dim):
    compare(inputs(device, dtype, dim=dim))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "h, w",
    [(1, 1), (1, 7), (7, 1), (2, 3), (7, 7), (14, 14), (13, 29), (16, 28), (31, 37), (1, 500), (500, 1), (56, 56)],
)
def test_sizes(device, dtype, h, w):
    if device == "cpu" and h * w > 2000:
        pytest.skip("one kernel on the CPU: the small images are enough")
    compare(inputs(device, dtype, h=h, w=w, dim=32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "dim, h, w, n", [(16, 43, 37, 1), (4, 43, 43, 2), (128, 9, 13, 1), (40, 29, 31, 3), (8, 90, 91, 1)]
)
def test_several_tiles_and_slices(device, dtype, dim, h, w, n):
    """Several tiles of the path, the last of them partly filled."""
    if device == "cpu" and h * w > 2000:
        pytest.skip("one kernel on the CPU: the small images are enough")
    compare(inputs(device, dtype, batch=1, dim=dim, h=h, w=w, n=n))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize(
    "dim, rank, h, w",
    [
        (16, 1, 56, 56), (24, 2, 29, 31), (40, 4, 60, 50), (64, 4, 28, 28), (72, 6, 14, 14), (96, 6, 9, 17),
        (128, 8, 14, 16), (128, 14, 3, 70), (136, 4, 7, 7), (192, 6, 14, 14), (256, 8, 5, 33), (16, 1, 230, 5),
        (64, 1, 1, 1), (16, 1, 30, 300), (112, 28, 7, 7), (128, 30, 29, 5), (100, 7, 13, 9), (13, 1, 60, 50),
        (348, 22, 14, 14), (448, 28, 7, 7), (300, 19, 5, 33), (87, 6, 1, 1), (136, 9, 7, 7),
    ],
)  # fmt: skip
def test_channels_that_tma_moves(dtype, groups, dim, rank, h, w):
    """The sm_90 kernels on CUDA: whole columns and runs of them, slices of the channels, planes that blocks share."""
    compare(inputs("cuda", dtype, groups=groups, dim=dim, rank=rank, h=h, w=w))


def test_an_image_that_tma_cannot_move(device):
    """At an address that is no multiple of 16 bytes."""
    tensors = inputs(device, torch.bfloat16, dim=16, h=9, w=7)
    moved = torch.empty(tensors["u"].numel() + 3, dtype=torch.bfloat16, device=device)[3:]
    tensors["u"] = moved.view(tensors["u"].shape).copy_(tensors["u"])
    compare(tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 3, 16, 256])
def test_states(device, dtype, n):
    compare(inputs(device, dtype, n=n, dim=8, h=6, w=9))


@pytest.mark.parametrize("n", [1, 2, 16])
def test_without_gradient(device, n):
    """No saved states."""
    tensors = inputs(device, n=n, dim=40, h=33, w=31, batch=1)
    with torch.no_grad():
        y = ext.cross_selective_scan(**tensors)
        truth = ext.reference.cross_selective_scan(**{k: v.double().cpu() for k, v in tensors.items()})
    assert relative_error(y, truth) < FLOOR[torch.float32]


@pytest.mark.parametrize("rank", [None, 1, 2, 6, 7, 9, 16, 65])
def test_ranks(device, rank):
    compare(inputs(device, rank=rank, dim=20))


@pytest.mark.parametrize("groups", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 4])
def test_groups(device, groups, count):
    compare(inputs(device, groups=groups, count=count, dim=6), directions=ALL[:count])


@pytest.mark.parametrize(
    "directions", [("lr",), ("bt",), ("tb", "lr"), ("rl", "rl"), VMAMBA, (*ALL, "tb"), ALL * 5], ids="-".join
)
def test_directions(device, directions):
    compare(inputs(device, count=len(directions), h=6, w=11), directions=directions)


@pytest.mark.parametrize("batch", [1, 3, 9])
def test_batches(device, batch):
    compare(inputs(device, batch=batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("drop", [("D",), ("dt_bias",), ("D", "dt_bias")], ids="-".join)
def test_optional_arguments(device, dtype, drop):
    compare(inputs(device, dtype, drop=drop))


@pytest.mark.parametrize("rank", [None, 2])
def test_without_softplus(device, rank):
    tensors = inputs(device, rank=rank)
    for name in ("dt", "dt_bias", "dt_weight"):
        tensors[name] = None if tensors[name] is None else tensors[name].abs()
    compare(tensors, softplus=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["A", "D", "dt_weight", "dt_bias", "all"])
def test_low_precision_parameters(device, dtype, name):
    tensors = inputs(device, dtype)
    for key in tensors:
        if key not in IMAGES and name in (key, "all"):
            tensors[key] = tensors[key].to(dtype)
    compare(tensors)


@pytest.mark.parametrize("dim", [16, 18])
@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("layout", [unaligned, padded_channels], ids=lambda f: f.__name__)
def test_layouts(device, layout, rank, dim):
    """Strided and unaligned inputs give bit for bit what contiguous ones give."""
    tensors = inputs(device, torch.bfloat16, dim=dim, rank=rank, h=9, w=12)
    viewed = {k: layout(v) if k in IMAGES else v for k, v in tensors.items()}
    assert torch.equal(ext.cross_selective_scan(**viewed), ext.cross_selective_scan(**tensors))
    compare(viewed)


@pytest.mark.parametrize("dim", [8, 9, 136])
def test_group_major_storage(device, dim):
    tensors = inputs(device, torch.bfloat16, groups=3, dim=dim, h=9, w=12)
    viewed = tensors | {"u": group_major(tensors["u"])}
    y = ext.cross_selective_scan(**viewed)
    assert torch.equal(y, ext.cross_selective_scan(**tensors))
    assert y.permute(3, 0, 1, 2, 4).is_contiguous()
    compare(viewed)


def test_features_as_slices_of_one_tensor(device):
    """dt, B and C as a projection leaves them: parts of one row a token, for each group and direction."""
    tensors = inputs(device, groups=2, rank=3, n=2)
    both = torch.cat([tensors[k] for k in ("dt", "B", "C")], -1).permute(3, 0, 1, 2, 4, 5).contiguous()
    parts = both.permute(1, 2, 3, 0, 4, 5).split((3, 2, 2), -1)
    viewed = tensors | dict(zip(("dt", "B", "C"), parts, strict=True))
    assert torch.equal(ext.cross_selective_scan(**viewed), ext.cross_selective_scan(**tensors))
    compare(viewed)


def test_cropped_image(device):
    """A crop's rows do not follow one another in memory."""
    tensors = inputs(device, h=9, w=12)
    cropped = {k: v[:, 1:7, 2:9] if k in IMAGES else v for k, v in tensors.items()}
    copied = {k: v.contiguous() if k in IMAGES else v for k, v in cropped.items()}
    assert torch.equal(ext.cross_selective_scan(**cropped), ext.cross_selective_scan(**copied))
    compare(cropped)


def test_only_its_own_output_is_written(device):
    """Sentinels round the inputs survive forward and backward."""
    tensors = inputs(device, torch.bfloat16, dim=17)
    views = {k: padded_channels(v) if k in IMAGES else v for k, v in tensors.items()}
    compare(views)
    for name in IMAGES:
        buffer = views[name]._base
        assert buffer[..., -3:].isnan().all() and not buffer[..., :-3].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_steps(device, dtype):
    """Steps from e^-18 to 80: softplus and decay neither overflow nor turn into NaN."""
    tensors = inputs(device, dtype, rank=None, dim=8)
    tensors["dt"] = torch.linspace(-18, 80, tensors["dt"].numel()).reshape(tensors["dt"].shape).to(device, dtype)
    compare(tensors)


def test_rounding_of_the_sum(device):
    """Two directions that cancel, each hundreds of times larger than what is left. The CPU rounds the sum alone; CUDA
    rounds each direction's result, once."""
    tensors = inputs(device, torch.bfloat16, count=2, h=9, w=9)
    for name in ("dt", "B", "C"):
        tensors[name][..., 1, :] = tensors[name][..., 0, :]
    tensors["C"][..., 1, :] *= -1
    for name in ("A", "D", "dt_weight", "dt_bias"):
        tensors[name][1] = tensors[name][0]
    tensors["D"][1] = -tensors["D"][0] + 1e-3
    y = ext.cross_selective_scan(**tensors, directions=("tb", "tb"))
    first = {name: t[..., :1, :] for name, t in tensors.items() if name in ("dt", "B", "C")}
    first |= {name: t[:1] for name, t in tensors.items() if name not in IMAGES and t is not None}
    single = ext.cross_selective_scan(tensors["u"], **first, directions=("tb",))
    terms = 0.0 if device == "cpu" else single.double().norm().item()
    assert relative_error(y, 1e-3 * tensors["u"].double(), terms) < FLOOR[torch.bfloat16]


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 4, 0)])
def test_empty(device, shape):
    batch, h, w = shape
    leaves = {k: v.requires_grad_() for k, v in inputs(device, batch=batch, h=h, w=w).items()}
    y = ext.cross_selective_scan(**leaves)
    assert y.shape == leaves["u"].shape
    y.sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape, name
        assert not leaf.grad.any(), name


def test_length_one_has_no_gradient_for_A(device):
    tensors = {k: v.requires_grad_() for k, v in inputs(device, h=1, w=1).items()}
    ext.cross_selective_scan(**tensors).sum().backward()
    assert torch.equal(tensors["A"].grad, torch.zeros_like(tensors["A"]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("direction", ALL)
def test_one_direction_is_a_grouped_scan(device, direction, dtype):
    tensors = inputs(device, dtype, count=1, dim=20, n=2, rank=3)
    a = ext.cross_selective_scan(**tensors, directions=(direction,))
    assert relative_error(a, separate(tensors, (direction,))) < FLOOR[dtype]


@pytest.mark.parametrize("directions", [ALL, VMAMBA], ids="-".join)
def test_is_the_sum_of_grouped_scans(device, directions):
    tensors = inputs(device, dim=20, n=2, rank=3, h=6, w=11)
    a = ext.cross_selective_scan(**tensors, directions=directions)
    assert relative_error(a, separate(tensors, directions)) < FLOOR[torch.float32]


def test_order_of_directions_goes_with_the_parameters(device):
    """The same scans under another order, as for VMamba's weights, are the same sum."""
    tensors = inputs(device)
    order = [ALL.index(name) for name in VMAMBA]
    other = {k: v if k == "u" else v[..., order, :] if k in IMAGES else v[order] for k, v in tensors.items()}
    a = ext.cross_selective_scan(**tensors, directions=ALL)
    assert relative_error(ext.cross_selective_scan(**other, directions=VMAMBA), a) < FLOOR[torch.float32]
    assert relative_error(ext.cross_selective_scan(**tensors, directions=VMAMBA), a) > 1e-2


def test_transposed_image_swaps_rows_and_columns(device):
    tensors = inputs(device)
    turned = {k: v.transpose(1, 2) if k in IMAGES else v for k, v in tensors.items()}
    a = ext.cross_selective_scan(**tensors, directions=("tb", "bt", "lr", "rl"))
    assert torch.equal(a, ext.cross_selective_scan(**turned).transpose(1, 2))


def test_groups_are_independent(device):
    tensors = inputs(device, groups=3)
    before = ext.cross_selective_scan(**tensors)
    tensors["u"] = tensors["u"].clone()
    tensors["u"][..., 1, :] = torch.randn_like(tensors["u"][..., 1, :])
    after = ext.cross_selective_scan(**tensors)
    assert torch.equal(before[..., [0, 2], :], after[..., [0, 2], :])
    assert not torch.equal(before[..., 1, :], after[..., 1, :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 4])
def test_bitwise_repeatable(device, dtype, n):
    def once():
        leaves = {k: v.clone().requires_grad_() for k, v in tensors.items()}
        y = ext.cross_selective_scan(**leaves)
        y.backward(torch.ones_like(y))
        return [y.detach(), *(leaf.grad for leaf in leaves.values())]

    tensors = inputs(device, dtype, batch=5, h=20, w=19, n=n, dim=40)
    first = once()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


def test_autocast(device):
    tensors = inputs(device)
    low = {k: v.bfloat16() if k in IMAGES else v for k, v in tensors.items()}
    with torch.autocast(device, torch.bfloat16):
        y = ext.cross_selective_scan(**tensors)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, ext.cross_selective_scan(**low))


@pytest.mark.parametrize("groups", [None, 2])
def test_gradcheck(groups):
    tensors = inputs("cpu", torch.float64, batch=1, h=2, w=3, groups=groups, dim=3, n=2, rank=2)
    leaves = {k: v.requires_grad_() for k, v in tensors.items()}
    assert torch.autograd.gradcheck(
        lambda *values: ext.cross_selective_scan(**dict(zip(leaves, values, strict=True))), tuple(leaves.values())
    )


def test_double_backward_raises(device):
    tensors = {k: v.requires_grad_() for k, v in inputs(device).items()}
    y = ext.cross_selective_scan(**tensors)
    (du,) = torch.autograd.grad(y.sum(), tensors["u"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        du.sum().backward()


def test_backends(device):
    tensors = inputs(device, groups=2)
    with ext.backend("reference"):
        a = ext.cross_selective_scan(**tensors)
    with ext.backend("native"):
        b = ext.cross_selective_scan(**tensors)
    assert relative_error(a, b) < 1e-5


@pytest.mark.cuda
def test_float64_on_cuda_uses_the_reference():
    tensors = inputs("cuda", torch.float64, h=3, w=4)
    y = ext.cross_selective_scan(**tensors)
    truth = ext.reference.cross_selective_scan(**{k: v.cpu() for k, v in tensors.items()})
    assert relative_error(y, truth) < 1e-12
    with pytest.raises(ValueError, match="float64"), ext.backend("native"):
        ext.cross_selective_scan(**tensors)


def test_opcheck(device):
    tensors = {k: v.requires_grad_() for k, v in inputs(device, groups=2, h=3, w=4, dim=8).items()}
    arguments = tuple(tensors[k] for k in ORDER)
    chunk = cross_chunk(8, tensors["A"].shape[-1], device)
    torch.library.opcheck(torch.ops.groupmamba.cross_selective_scan_fwd, (*arguments, [0, 1, 2, 3], True, chunk, True))
    layout = tuple(group_major(t.detach()) if k == "u" else t.detach() for k, t in zip(ORDER, arguments, strict=True))
    y, states = torch.ops.groupmamba.cross_selective_scan_fwd(*layout, [0, 1, 2, 3], True, chunk, True)
    torch.library.opcheck(
        torch.ops.groupmamba.cross_selective_scan_bwd,
        (torch.randn_like(y), *layout, states, [0, 1, 2, 3], True, chunk),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compile_fullgraph(device):
    tensors = {k: v.requires_grad_() for k, v in inputs(device, h=4, w=6).items()}

    def f(kwargs):
        return ext.cross_selective_scan(**kwargs, directions=VMAMBA) * 2

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    y, z = compiled(tensors), f(tensors)
    assert torch.equal(y, z)
    grads = [torch.autograd.grad(out.sum(), list(tensors.values())) for out in (y, z)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_flops(device):
    from torch.utils.flop_counter import FlopCounterMode

    tensors = {k: v.requires_grad_() for k, v in inputs(device, count=3, n=2, rank=3).items()}
    with FlopCounterMode(display=False) as counter:
        y = ext.cross_selective_scan(**tensors, directions=ALL[:3])
    forward = counter.get_total_flops()
    assert forward == tensors["u"].numel() * (3 * (1 + 7 * 2 + 2 + 2 * 3) + 2)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 3 * forward


BAD = {
    "u type": ({"u": [1.0]}, TypeError, r"u must be a torch.Tensor, got list"),
    "u dtype": ({"u": torch.zeros(2, 5, 7, 16, dtype=torch.int32)}, TypeError, r"u must be .* got torch.int32"),
    "u dims": ({"u": torch.zeros(5, 7, 16)}, ValueError, r"u must be \(batch, H, W, D\) or .* got shape \(5, 7, 16\)"),
    "u empty": ({"u": torch.zeros(2, 5, 7, 0)}, ValueError, r"at least one group and one channel, got .* 7, 0\)"),
    "dt dtype": ({"dt": torch.zeros(2, 5, 7, 4, 1).half()}, TypeError, r"dt must have the dtype of u .* torch.float16"),
    "dt shape": ({"dt": torch.zeros(2, 5, 7, 4, 2)}, ValueError, r"dt must be .* got shape \(2, 5, 7, 4, 2\)"),
    "no broadcast": ({"B": torch.zeros(2, 5, 7, 1, 1)}, ValueError, r"B must be .* got shape \(2, 5, 7, 1, 1\)"),
    "A dims": ({"A": torch.zeros(16, 1)}, ValueError, r"A must be \(K, D, N\), got shape \(16, 1\)"),
    "A states": ({"A": torch.zeros(4, 16, 257)}, ValueError, r"N from 1 to 256, got shape \(4, 16, 257\)"),
    "D shape": ({"D": torch.zeros(16)}, ValueError, r"D must be \(K, D\) = \(4, 16\), got shape \(16,\)"),
    "rank": ({"dt_weight": torch.zeros(4, 16, 0), "dt": torch.zeros(2, 5, 7, 4, 0)}, ValueError, r"R at least 1"),
    "dt_bias dtype": ({"dt_bias": torch.zeros(4, 16).double()}, TypeError, r"dt_bias must be float32, got torch.f.*64"),
    "device": ({"C": torch.zeros(2, 5, 7, 4, 1, device="meta")}, ValueError, r"C must be on cpu .* meta"),
    "directions count": ({"directions": ("lr", "rl")}, ValueError, r"= \(2, 16, 1\), got shape \(4, 16, 1\)"),
    "directions none": ({"directions": ()}, ValueError, r"directions must name at least one direction, got \(\)"),
    "directions name": ({"directions": ("lr", "rl", "tb", "up")}, ValueError, r"directions must be from .* got 'up'"),
    "directions type": ({"directions": "lr"}, TypeError, r"directions must be a sequence .* got 'lr'"),
    "softplus": ({"softplus": 1}, TypeError, r"softplus must be a bool, got 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_errors(case):
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        ext.cross_selective_scan(**{**inputs("cpu"), **change})


def test_errors_with_groups():
    tensors = inputs("cpu", groups=2)
    with pytest.raises(ValueError, match=r"B must be \(batch, H, W, G, K, N\) = \(2, 5, 7, 2, 4, 1\), got shape"):
        ext.cross_selective_scan(**{**tensors, "B": tensors["B"][:, :, :, :1]})
    with pytest.raises(ValueError, match=r"A must be \(G, K, D, N\), got shape \(4, 16, 1\)"):
        ext.cross_selective_scan(**{**tensors, "A": tensors["A"][0]})
