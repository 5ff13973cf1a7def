# SPDX-License-Identifier: Apache-2.0
"""grouped_selective_scan: native against the float64 reference, one factor at a time."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import groupmamba_ext as ext
from groupmamba_ext.layouts import MAX_GROUPS
from groupmamba_ext.ops import grouped_selective_scan
from support.common import FLOOR, check, group_major, padded_channels, relative_error, unaligned
from support.scan import DTYPES, IMAGES, MIXED, compare, filling_batch, inputs

SIZES = [(1, 1), (1, 7), (7, 1), (2, 3), (7, 7), (14, 14), (13, 29), (28, 28), (31, 37), (1, 500), (500, 1)]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("dim", [16, 87])
def test_dtypes(device, dtype, dim):
    if dtype == torch.float64 and device == "cuda":
        pytest.skip("float64 runs through the reference on CUDA")
    compare(inputs(device, dtype, dim=dim, h=12, w=11))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 7, 8, 15, 17, 31, 32, 33, 64, 65, 106, 112, 127, 128, 129, 300])
def test_widths(device, dtype, dim):
    compare(inputs(device, dtype, dim=dim))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("h, w", SIZES)
def test_sizes(device, dtype, h, w):
    compare(inputs(device, dtype, h=h, w=w, dim=32))


@pytest.mark.parametrize("dim, h, w", [(16, 21, 43), (4, 43, 43), (128, 9, 13)])
@pytest.mark.parametrize("n", [1, 2])
def test_many_tiles(device, dim, h, w, n):
    """Several tiles and saved states, the last of them partly filled."""
    compare(inputs(device, batch=1, dim=dim, h=h, w=w, n=n))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 3, 16, 256])
def test_states(device, dtype, n):
    compare(inputs(device, dtype, n=n, dim=8, h=6, w=9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "dim, n, rank, h, w",
    [
        (16, 16, 1, 9, 43), (32, 16, 2, 29, 13), (64, 16, 4, 9, 14), (88, 16, 6, 14, 14), (112, 16, 7, 7, 7),
        (128, 16, 8, 6, 9), (1, 5, 1, 3, 3), (2, 64, 1, 4, 9), (6, 64, None, 5, 7), (3, 8, 1, 9, 30), (21, 7, 1, 1, 1),
        (87, 17, 6, 9, 11), (127, 12, 3, 13, 5), (32, 56, 2, 14, 14), (16, 120, 1, 5, 7), (17, 14, None, 1, 57),
        (6, 64, 2, 5, 7), (1, 40, 1, 3, 3), (13, 60, 3, 9, 11), (5, 16, 65, 5, 7),
    ],
)  # fmt: skip
def test_many_states(device, dtype, dim, n, rank, h, w):
    """The kernels for several states: 2 to 8 of a thread, 2 to 16 threads a channel, one and several tiles."""
    compare(inputs(device, dtype, batch=filling_batch(device, dim), dim=dim, n=n, rank=rank, h=h, w=w))


@pytest.mark.parametrize("drop", [("z",), ("norm_weight", "norm_bias"), ("D", "dt_bias", "gate"), ("norm_bias",)])
def test_many_states_without_options(device, drop):
    compare(inputs(device, batch=filling_batch(device, 20), dim=20, n=14, h=9, w=13, drop=drop))


@pytest.mark.parametrize("n", [2, 16])
def test_states_without_gradient(device, n):
    """No saved states: the carries of N > 1 go through scratch memory."""
    tensors = inputs(device, n=n, dim=32, h=33, w=31, batch=1)
    with torch.no_grad():
        y = ext.grouped_selective_scan(**tensors)
        truth = ext.reference.grouped_selective_scan(**{k: v.double().cpu() for k, v in tensors.items()})
    assert relative_error(y, truth) < FLOOR[torch.float32]


@pytest.mark.parametrize("layout", [None, group_major], ids=["token-major", "group-major"])
@pytest.mark.parametrize(
    "dim, rank",
    [
        (16, 1), (16, 2), (24, 2), (32, 4), (48, 3), (64, 6), (72, 5), (88, 1), (88, 6), (88, 7), (96, 6), (112, 7),
        (128, 14),
        (13, 1), (30, 2), (63, 6), (87, 6), (125, 8),  # padded on the way to the kernel
    ],
)  # fmt: skip
@pytest.mark.parametrize("h, w", [*SIZES, (56, 56), (60, 50), (5, 230), (230, 5), (450, 3), (29, 113)])
def test_inference(device, h, w, dim, rank, layout):
    """Without gradients, in bfloat16: the shapes that the tensor-copy kernels take, exact and ragged."""
    if device == "cpu" and (h, w) not in ((14, 14), (60, 50)):
        pytest.skip("one kernel on the CPU: two sizes are enough")
    tensors = inputs(device, torch.bfloat16, batch=3, h=h, w=w, dim=dim, rank=rank)
    if layout is not None:
        tensors = {k: layout(v) if k in IMAGES else v for k, v in tensors.items()}
    y = ext.grouped_selective_scan(**tensors)
    # The truth for CUDA by the CPU op in float64, as in `check`: here are some 400 cases of up to 3,300 tokens.
    with ext.backend("reference" if device == "cpu" else "native"):
        truth = ext.grouped_selective_scan(**{k: v.double().cpu() for k, v in tensors.items()})
    assert relative_error(y, truth) < 3e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [None, group_major], ids=["token-major", "group-major"])
@pytest.mark.parametrize(
    "dim, rank, h, w",
    [
        (16, 1, 56, 56), (16, 1, 28, 16), (24, 2, 28, 28), (32, 2, 14, 16), (48, 3, 28, 28), (64, 6, 56, 2),
        (88, 6, 14, 14), (80, 3, 9, 14), (88, 7, 14, 9), (112, 7, 14, 14), (128, 14, 56, 14),
        # tiles that are not full, columns that are no multiple of a chunk, columns in runs
        (16, 1, 60, 50), (24, 2, 29, 31), (16, 1, 13, 9), (112, 7, 7, 7), (48, 3, 1, 1), (16, 1, 230, 5),
        (16, 1, 500, 3), (32, 2, 150, 2), (88, 6, 40, 3),
        # channels that are no multiple of 8
        (87, 6, 14, 14), (87, 6, 40, 3), (13, 1, 60, 50), (30, 2, 29, 31), (111, 7, 7, 7),
    ],
)  # fmt: skip
def test_gradients_of_tiles(device, dtype, layout, dim, rank, h, w):
    """The tensor-copy kernels."""
    if device == "cpu" and h * w > 500:
        pytest.skip("one kernel on the CPU: the small planes are enough")
    tensors = inputs(device, dtype, h=h, w=w, dim=dim, rank=rank)
    if layout is not None:
        tensors = {k: layout(v) if k in IMAGES else v for k, v in tensors.items()}
    compare(tensors)
    compare(tensors, directions=("lr", "tb", "rl", "bt"))


@pytest.mark.parametrize("rank", [None, 1, 2, 6, 7, 9, 16, 65])
def test_ranks(device, rank):
    compare(inputs(device, rank=rank, dim=20))


@pytest.mark.cuda
def test_most_groups():
    """As many as the kernels' parameters have directions for."""
    compare(inputs("cuda", groups=MAX_GROUPS, dim=1, batch=1, h=2, w=3), directions=MIXED * (MAX_GROUPS // 4))


def test_more_groups_than_cuda_takes(monkeypatch):
    """Named before anything runs: by sizes alone, so that no GPU is needed to see it."""
    monkeypatch.setattr("groupmamba_ext._load.check_device_supported", lambda *_: None)
    most = f"must have at most {MAX_GROUPS}"
    with torch.device("cuda"), FakeTensorMode():
        for op, groups, dim, words in (
            (ext.grouped_selective_scan, MAX_GROUPS + 1, 1, f"{most} groups, .* got {MAX_GROUPS + 1}"),
            (ext.grouped_selective_scan, MAX_GROUPS // 2 + 1, 129, f"{most} .* tiles .* got {MAX_GROUPS + 2}"),
            (ext.cross_selective_scan, MAX_GROUPS // 4 + 1, 1, f"{most} groups times directions .* {MAX_GROUPS + 4}"),
        ):
            scans = () if op is ext.grouped_selective_scan else (4,)
            u, dt, B = (torch.empty(1, 1, 1, groups, *more) for more in ((dim,), (*scans, dim), (*scans, 1)))
            with pytest.raises(ValueError, match=f"u {words}"):
                op(u, dt, torch.empty(groups, *scans, dim, 1), B, B, directions=MIXED if scans else ("lr",) * groups)


@pytest.mark.parametrize("groups", [1, 2, 3, 5, 17, 33])
def test_groups(device, groups):
    compare(inputs(device, groups=groups, dim=6), directions=(MIXED * 9)[:groups])


@pytest.mark.parametrize("direction", MIXED)
def test_one_direction(device, direction):
    compare(inputs(device, groups=2, h=6, w=11), directions=(direction, direction))


@pytest.mark.parametrize("batch", [1, 3, 9])
def test_batches(device, batch):
    compare(inputs(device, batch=batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "drop",
    [
        ("D",), ("dt_bias",), ("z",), ("gate",), ("norm_bias",), ("norm_weight", "norm_bias"),
        ("norm_weight", "norm_bias", "z"), ("D", "dt_bias", "z", "norm_weight", "norm_bias", "gate"),
    ],
    ids="-".join,
)  # fmt: skip
def test_optional_arguments(device, dtype, drop):
    compare(inputs(device, dtype, drop=drop))


@pytest.mark.parametrize("n", [1, 10])
@pytest.mark.parametrize("rank", [None, 2])
def test_without_softplus(device, rank, n):
    tensors = inputs(device, rank=rank, n=n)
    tensors["dt"] = tensors["dt"].abs()
    tensors["dt_bias"] = tensors["dt_bias"].abs()
    if rank is not None:
        tensors["dt_weight"] = tensors["dt_weight"].abs()
    compare(tensors, softplus=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["A", "D", "dt_weight", "dt_bias", "norm_weight", "norm_bias", "gate", "all"])
@pytest.mark.parametrize("dim", [16, 136])
def test_low_precision_parameters(device, dtype, name, dim):
    tensors = inputs(device, dtype, dim=dim, h=5 if dim == 16 else 2)
    for key in tensors:
        if key not in IMAGES and name in (key, "all"):
            tensors[key] = tensors[key].to(dtype)
    compare(tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("dim", [130, 256])
def test_tiles_of_wide_groups(dtype, rank, dim):
    """What CUDA does with more than 128 channels a group, by the CPU's kernels: parameters of any dtype."""

    def tiled(*, directions, norm_eps, **tensors):
        codes = tuple(ext.DIRECTIONS.index(direction) for direction in directions)
        return grouped_selective_scan._tiled(grouped_selective_scan.ScanInputs(**tensors), codes, True, norm_eps)

    tensors = inputs("cpu", dtype, dim=dim, rank=rank, h=3, w=4)
    tensors = {key: value if key in IMAGES or value is None else value.to(dtype) for key, value in tensors.items()}
    check(tiled, ext.reference.grouped_selective_scan, tensors, {"directions": MIXED, "norm_eps": 1e-5})


def images_apart(x: torch.Tensor) -> torch.Tensor:
    """The same values as every second image of a batch."""
    return x.repeat_interleave(2, dim=0)[::2]


@pytest.mark.parametrize("dim", [12, 13, 16, 18, 20])
@pytest.mark.parametrize("layout", [group_major, unaligned, padded_channels, images_apart], ids=lambda f: f.__name__)
def test_layouts(device, layout, dim):
    """Strided and unaligned inputs give bit for bit what contiguous ones give."""
    tensors = inputs(device, torch.bfloat16, dim=dim, h=9, w=12)
    viewed = {k: layout(v) if k in IMAGES else v for k, v in tensors.items()}
    expected = ext.grouped_selective_scan(**tensors)
    y = ext.grouped_selective_scan(**viewed)
    assert torch.equal(y, expected)
    if layout is group_major:
        assert y.permute(3, 0, 1, 2, 4).is_contiguous()
    compare(viewed)


def test_cropped_image(device):
    """A crop's rows do not follow one another in memory."""
    tensors = inputs(device, h=9, w=12)
    cropped = {k: v[:, 1:7, 2:9] if k in IMAGES else v for k, v in tensors.items()}
    copied = {k: v.contiguous() if k in IMAGES else v for k, v in cropped.items()}
    assert torch.equal(ext.grouped_selective_scan(**cropped), ext.grouped_selective_scan(**copied))
    compare(cropped)


@pytest.mark.parametrize("dim", [13, 17])
def test_only_its_own_output_is_written(device, dim):
    """Sentinels round the inputs survive forward and backward; of 13 channels and 3 NaN TMA reads 13."""
    tensors = inputs(device, torch.bfloat16, dim=dim)
    views = {k: padded_channels(v) if k in IMAGES else v for k, v in tensors.items()}
    compare(views)
    for name in IMAGES:
        buffer = views[name]._base
        assert buffer[..., -3:].isnan().all() and not buffer[..., :-3].isnan().any()


def test_large_mean(device):
    """The variance of a norm over y = 1000 + small must not cancel."""
    tensors = inputs(device, dim=16)
    tensors["D"] = torch.ones_like(tensors["D"])
    tensors["u"] = tensors["u"] * 1e-2 + 100
    tensors["B"] = tensors["B"] * 1e-3
    compare(tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_steps(device, dtype):
    """Steps from e^-20 to 80: softplus and decay neither overflow nor turn into NaN."""
    tensors = inputs(device, dtype, rank=None, dim=8)
    tensors["dt"] = (torch.linspace(-18, 80, tensors["dt"].numel()).reshape(tensors["dt"].shape)).to(device, dtype)
    compare(tensors)


def test_fp16_survives_what_overflows_it(device):
    """y reaches 1e6 before the norm: nothing is rounded to float16 on the way."""
    tensors = inputs(device, torch.float16, dim=16)
    tensors["u"] = tensors["u"] * 2000
    tensors["C"] = tensors["C"] * 300
    y = ext.grouped_selective_scan(**tensors)
    truth = ext.reference.grouped_selective_scan(**{k: v.double().cpu() for k, v in tensors.items()})
    assert relative_error(y, truth) < FLOOR[torch.float16]
