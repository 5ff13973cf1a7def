# SPDX-License-Identifier: Apache-2.0
"""grouped_selective_scan: native against the float64 reference, one factor at a time; identities; errors."""

import pytest
import torch

import groupmamba_ext as ext
from common import FLOOR, check, group_major, padded_channels, relative_error, unaligned
from groupmamba_ext.ops import chunk_tokens

IMAGES = ("u", "dt", "B", "C", "z")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MIXED = ("lr", "rl", "tb", "bt")
SIZES = [(1, 1), (1, 7), (7, 1), (2, 3), (7, 7), (14, 14), (13, 29), (28, 28), (31, 37), (1, 500), (500, 1)]
ORDER = ("u", "dt", "A", "B", "C", "D", "dt_weight", "dt_bias", "z", "norm_weight", "norm_bias", "gate")


def inputs(
    device, dtype=torch.float32, *, batch=2, h=5, w=7, groups=4, dim=16, n=1, rank=1, param=torch.float32, drop=()
):
    def image(*last, scale=1.0):
        return (scale * torch.randn(batch, h, w, groups, *last, dtype=torch.float64)).to(device, dtype)

    param = torch.float64 if dtype == torch.float64 else torch.float32

    def parameter(*shape, scale=1.0, mean=0.0):
        return (mean + scale * torch.randn(*shape, dtype=torch.float64)).to(device, param)

    tensors = {
        "u": image(dim),
        "dt": image(dim if rank is None else rank),
        "A": -(0.2 + torch.rand(groups, dim, n, dtype=torch.float64) * 2).to(device, param),
        "B": image(n),
        "C": image(n),
        "D": parameter(groups, dim, mean=1.0, scale=0.2),
        "dt_weight": None if rank is None else parameter(groups, dim, rank, scale=rank**-0.5),
        "dt_bias": parameter(groups, dim, mean=-2.0),
        "z": image(dim),
        "norm_weight": parameter(groups, dim, mean=1.0, scale=0.2),
        "norm_bias": parameter(groups, dim, scale=0.2),
        "gate": torch.rand(batch, groups, dim, dtype=torch.float64).to(device, param),
    }
    return {k: None if k in drop else v for k, v in tensors.items()}


def compare(tensors, directions=MIXED, **options):
    # A norm over a handful of channels is ill-conditioned where they agree; a larger eps makes errors comparable again.
    options = {"directions": directions, "norm_eps": 0.1 if tensors["u"].shape[-1] <= 4 else 1e-5, **options}
    return check(ext.grouped_selective_scan, ext.reference.grouped_selective_scan, tensors, options)


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
def test_many_slabs(device, dim, h, w, n):
    """Several slabs and saved states, the last of them partly filled."""
    compare(inputs(device, batch=1, dim=dim, h=h, w=w, n=n))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 3, 16, 256])
def test_states(device, dtype, n):
    compare(inputs(device, dtype, n=n, dim=8, h=6, w=9))


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
    "dim, rank", [(16, 1), (16, 2), (24, 2), (32, 4), (48, 3), (64, 6), (88, 6), (112, 7), (128, 14)]
)
@pytest.mark.parametrize("h, w", [*SIZES, (56, 56), (60, 50), (5, 230), (230, 5), (450, 3), (29, 113)])
def test_inference(device, h, w, dim, rank, layout):
    """Without gradients, in bfloat16: the shapes that the tensor-copy kernels take, exact and ragged."""
    if device == "cpu" and (h, w) not in ((14, 14), (60, 50)):
        pytest.skip("one kernel on the CPU: two sizes are enough")
    tensors = inputs(device, torch.bfloat16, batch=3, h=h, w=w, dim=dim, rank=rank)
    if layout is not None:
        tensors = {k: layout(v) if k in IMAGES else v for k, v in tensors.items()}
    y = ext.grouped_selective_scan(**tensors)
    with ext.backend("reference"):
        truth = ext.grouped_selective_scan(**{k: v.double() for k, v in tensors.items()})
    assert relative_error(y, truth) < 3e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [None, group_major], ids=["token-major", "group-major"])
@pytest.mark.parametrize(
    "dim, rank, h, w",
    [
        (16, 1, 56, 56), (16, 1, 28, 16), (24, 2, 28, 28), (32, 2, 14, 16), (48, 3, 28, 28), (64, 6, 56, 2),
        (88, 6, 14, 14), (112, 7, 14, 14), (128, 14, 56, 14),
    ],
)  # fmt: skip
def test_gradients_in_whole_slabs(device, dtype, layout, dim, rank, h, w):
    """Planes that slabs tile exactly: the tensor-copy backward's."""
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


@pytest.mark.parametrize("rank", [None, 2])
def test_without_softplus(device, rank):
    tensors = inputs(device, rank=rank)
    tensors["dt"] = tensors["dt"].abs()
    tensors["dt_bias"] = tensors["dt_bias"].abs()
    if rank is not None:
        tensors["dt_weight"] = tensors["dt_weight"].abs()
    compare(tensors, softplus=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["A", "D", "dt_weight", "dt_bias", "norm_weight", "norm_bias", "gate", "all"])
def test_low_precision_parameters(device, dtype, name):
    tensors = inputs(device, dtype)
    for key in tensors:
        if key not in IMAGES and name in (key, "all"):
            tensors[key] = tensors[key].to(dtype)
    compare(tensors)


@pytest.mark.parametrize("dim", [16, 18])
@pytest.mark.parametrize("layout", [group_major, unaligned, padded_channels], ids=lambda f: f.__name__)
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


def test_only_its_own_output_is_written(device):
    """Sentinels round the inputs survive forward and backward."""
    tensors = inputs(device, torch.bfloat16, dim=17)
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


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 4, 0)])
def test_empty(device, shape):
    batch, h, w = shape
    tensors = inputs(device, batch=batch, h=h, w=w)
    leaves = {k: v.requires_grad_() for k, v in tensors.items()}
    y = ext.grouped_selective_scan(**leaves)
    assert y.shape == leaves["u"].shape
    y.sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape, name
        assert not leaf.grad.any(), name


def test_length_one_has_no_gradient_for_A(device):
    tensors = {k: v.requires_grad_() for k, v in inputs(device, h=1, w=1).items()}
    ext.grouped_selective_scan(**tensors).sum().backward()
    assert torch.equal(tensors["A"].grad, torch.zeros_like(tensors["A"]))


@pytest.mark.parametrize("reverse, forward", [("rl", "lr"), ("bt", "tb")])
def test_reverse_is_flip_scan_flip(device, reverse, forward):
    tensors = inputs(device, groups=1)
    flipped = {k: v.flip(1, 2) if k in IMAGES else v for k, v in tensors.items()}
    a = ext.grouped_selective_scan(**tensors, directions=(reverse,))
    b = ext.grouped_selective_scan(**flipped, directions=(forward,)).flip(1, 2)
    assert torch.equal(a, b)


def test_columns_are_rows_of_the_transposed_image(device):
    tensors = inputs(device, groups=1)
    turned = {k: v.transpose(1, 2) if k in IMAGES else v for k, v in tensors.items()}
    a = ext.grouped_selective_scan(**tensors, directions=("tb",))
    b = ext.grouped_selective_scan(**turned, directions=("lr",)).transpose(1, 2)
    assert torch.equal(a, b)


def test_groups_are_independent(device):
    tensors = inputs(device)
    before = ext.grouped_selective_scan(**tensors)
    for name in IMAGES:
        tensors[name] = tensors[name].clone()
        tensors[name][..., 2, :] = torch.randn_like(tensors[name][..., 2, :])
    after = ext.grouped_selective_scan(**tensors)
    others = [0, 1, 3]
    assert torch.equal(before[..., others, :], after[..., others, :])
    assert not torch.equal(before[..., 2, :], after[..., 2, :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 4])
def test_bitwise_repeatable(device, dtype, n):
    def once():
        leaves = {k: v.clone().requires_grad_() for k, v in tensors.items()}
        y = ext.grouped_selective_scan(**leaves)
        y.backward(torch.ones_like(y))
        return [y.detach(), *(leaf.grad for leaf in leaves.values())]

    tensors = inputs(device, dtype, batch=5, h=20, w=19, n=n, dim=24)
    first = once()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


def test_autocast(device):
    tensors = inputs(device, torch.float32)
    low = {k: v.bfloat16() if k in IMAGES else v for k, v in tensors.items()}
    with torch.autocast(device, torch.bfloat16):
        y = ext.grouped_selective_scan(**tensors)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, ext.grouped_selective_scan(**low))


def test_gradcheck():
    tensors = {
        k: v.requires_grad_() for k, v in inputs("cpu", torch.float64, batch=1, h=2, w=3, dim=3, n=2, rank=2).items()
    }
    names = list(tensors)
    assert torch.autograd.gradcheck(
        lambda *values: ext.grouped_selective_scan(**dict(zip(names, values, strict=True))), tuple(tensors.values())
    )


def test_double_backward_raises(device):
    tensors = {k: v.requires_grad_() for k, v in inputs(device).items()}
    y = ext.grouped_selective_scan(**tensors)
    (du,) = torch.autograd.grad(y.sum(), tensors["u"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        du.sum().backward()


def test_backends(device):
    tensors = inputs(device)
    with ext.backend("reference"):
        a = ext.grouped_selective_scan(**tensors)
    with ext.backend("native"):
        b = ext.grouped_selective_scan(**tensors)
    assert relative_error(a, b) < 1e-5
    with pytest.raises(ValueError, match="backend must be one of .* got 'fast'"), ext.backend("fast"):
        pass


@pytest.mark.cuda
def test_float64_on_cuda_uses_the_reference():
    tensors = inputs("cuda", torch.float64, h=3, w=4)
    y = ext.grouped_selective_scan(**tensors)
    truth = ext.reference.grouped_selective_scan(**{k: v.cpu() for k, v in tensors.items()})
    assert relative_error(y, truth) < 1e-12
    with pytest.raises(ValueError, match="float64"), ext.backend("native"):
        ext.grouped_selective_scan(**tensors)


@pytest.mark.cuda
def test_more_than_two_to_the_31_elements():
    """Batch strides past 2^31: the last image equals the same image alone."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GB of GPU memory")
    batch, h, w, groups, dim = 33, 1024, 1024, 4, 16
    generator = torch.Generator("cuda").manual_seed(1)

    def image(last):
        return torch.randn(batch, h, w, groups, last, dtype=torch.bfloat16, device="cuda", generator=generator)

    u, dt, B, C = image(dim), image(1), image(1), image(1)
    assert u.numel() > 2**31
    small = inputs("cuda", torch.bfloat16, batch=1, h=1, w=1)
    parameters = {k: small[k] for k in ("A", "D", "dt_weight", "dt_bias", "norm_weight", "norm_bias")}
    u.requires_grad_()
    y = ext.grouped_selective_scan(u, dt, B=B, C=C, **parameters)
    y[-1].backward(torch.ones_like(y[-1]))
    last = u.detach()[-1:].clone().requires_grad_()
    y_last = ext.grouped_selective_scan(last, dt[-1:], B=B[-1:], C=C[-1:], **parameters)
    y_last.backward(torch.ones_like(y_last))
    assert torch.equal(y[-1:], y_last)
    assert torch.equal(u.grad[-1:], last.grad)


def test_opcheck(device):
    tensors = {k: v.requires_grad_() for k, v in inputs(device, h=3, w=4, dim=8).items()}
    arguments = tuple(tensors[k] for k in ORDER)
    chunk = chunk_tokens(8, device)
    torch.library.opcheck(
        torch.ops.groupmamba.grouped_selective_scan_fwd, (*arguments, [0, 1, 2, 3], True, 1e-5, chunk, True)
    )
    layout = tuple(
        group_major(t.detach()) if k in IMAGES else t.detach() for k, t in zip(ORDER, arguments, strict=True)
    )
    y, states = torch.ops.groupmamba.grouped_selective_scan_fwd(*layout, [0, 1, 2, 3], True, 1e-5, chunk, True)
    torch.library.opcheck(
        torch.ops.groupmamba.grouped_selective_scan_bwd,
        (torch.randn_like(y), *layout, states, [0, 1, 2, 3], True, 1e-5, chunk),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compile_fullgraph(device):
    tensors = {k: v.requires_grad_() for k, v in inputs(device, h=4, w=6).items()}

    def f(kwargs):
        return ext.grouped_selective_scan(**kwargs, directions=("lr", "tb", "rl", "bt")) * 2

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    y, z = compiled(tensors), f(tensors)
    assert torch.equal(y, z)
    grads = [torch.autograd.grad(out.sum(), list(tensors.values())) for out in (y, z)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_flops(device):
    from torch.utils.flop_counter import FlopCounterMode

    tensors = {k: v.requires_grad_() for k, v in inputs(device, n=2, rank=3).items()}
    elements = tensors["u"].numel()
    with FlopCounterMode(display=False) as counter:
        y = ext.grouped_selective_scan(**tensors)
    forward = counter.get_total_flops()
    assert forward == elements * (1 + 7 * 2 + 2 + 2 * 3)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 3 * forward


BAD = {
    "u type": ({"u": [1.0]}, TypeError, r"u must be a torch.Tensor, got list"),
    "u dtype": ({"u": torch.zeros(2, 5, 7, 4, 16, dtype=torch.int32)}, TypeError, r"u must be .* got torch.int32"),
    "u dims": ({"u": torch.zeros(5, 7, 64)}, ValueError, r"u must be \(batch, H, W, G, D\), got shape \(5, 7, 64\)"),
    "dt dtype": ({"dt": torch.zeros(2, 5, 7, 4, 1).half()}, TypeError, r"dt must have the dtype of u .* torch.float16"),
    "dt shape": ({"dt": torch.zeros(2, 5, 7, 4, 2)}, ValueError, r"dt must be .* got shape \(2, 5, 7, 4, 2\)"),
    "no broadcast": ({"B": torch.zeros(1, 5, 7, 4, 1)}, ValueError, r"B must be .* got shape \(1, 5, 7, 4, 1\)"),
    "A dims": ({"A": torch.zeros(4, 16)}, ValueError, r"A must be \(G, D, N\), got shape \(4, 16\)"),
    "A states": ({"A": torch.zeros(4, 16, 257)}, ValueError, r"N from 1 to 256, got shape \(4, 16, 257\)"),
    "D shape": ({"D": torch.zeros(64)}, ValueError, r"D must be \(G, D\) = \(4, 16\), got shape \(64,\)"),
    "gate dtype": ({"gate": torch.zeros(2, 4, 16).double()}, TypeError, r"gate must be float32, got torch.float64"),
    "norm_bias alone": ({"norm_weight": None}, ValueError, r"norm_bias needs norm_weight"),
    "device": ({"z": torch.zeros(2, 5, 7, 4, 16, device="meta")}, ValueError, r"z must be on cpu .* meta"),
    "directions count": ({"directions": ("lr", "rl")}, ValueError, r"one direction a group \(4\), got \('lr', 'rl'\)"),
    "directions name": ({"directions": ("lr", "rl", "tb", "up")}, ValueError, r"directions must be from .* got 'up'"),
    "directions type": ({"directions": "lr"}, TypeError, r"directions must be a sequence .* got 'lr'"),
    "softplus": ({"softplus": 1}, TypeError, r"softplus must be a bool, got 1"),
    "norm_eps": ({"norm_eps": -1.0}, ValueError, r"norm_eps must be at least 0, got -1.0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_errors(case):
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        ext.grouped_selective_scan(**{**inputs("cpu"), **change})


def test_mixed_devices_raise_under_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    tensors = inputs("cpu")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {k: mode.from_tensor(v) for k, v in tensors.items()}
        fake["z"] = torch.empty(fake["z"].shape, device="meta")
        with pytest.raises(ValueError, match="z must be on cpu"):
            ext.grouped_selective_scan(**fake)
        order = ["u", "dt", "A", "B", "C", "D", "dt_weight", "dt_bias", "z", "norm_weight", "norm_bias", "gate"]
        with pytest.raises(Exception, match="device"):
            torch.ops.groupmamba.grouped_selective_scan_fwd(
                *(fake[k] for k in order), [0, 1, 2, 3], True, 1e-5, 64, True
            )
