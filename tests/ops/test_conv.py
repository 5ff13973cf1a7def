# SPDX-License-Identifier: Apache-2.0
"""depthwise_conv3x3: native against the float64 reference and torch's own convolution; errors."""

import pytest
import torch
import torch.nn.functional as F

import groupmamba_ext as ext
from support.common import FLOOR, check, group_major, padded_channels, relative_error, unaligned
from support.inputs import conv_inputs as inputs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = [None, "silu", "gelu"]
SIZES = [(1, 1), (1, 7), (7, 1), (2, 2), (3, 17), (7, 7), (14, 14), (16, 33), (28, 28), (33, 65), (1, 300), (300, 1)]


def compare(tensors, activation="silu"):
    return check(ext.depthwise_conv3x3, ext.reference.depthwise_conv3x3, tensors, {"activation": activation})


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dtypes_and_activations(device, dtype, activation):
    if dtype == torch.float64 and device == "cuda":
        pytest.skip("float64 runs through the reference on CUDA")
    compare(inputs(device, dtype, h=12, w=11), activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 3, 4, 7, 8, 9, 15, 24, 31, 33, 64, 87, 100, 128, 257, 512, 1025])
def test_widths(device, dtype, channels):
    compare(inputs(device, dtype, channels=channels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("h, w", SIZES)
def test_sizes(device, dtype, h, w):
    compare(inputs(device, dtype, h=h, w=w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_several_channel_tiles(device, dtype, activation):
    """The backward on the CPU takes 80 channels of a tile 16 rows high and 40 columns wide: the second has its own
    weights and its own bias."""
    compare(inputs(device, dtype, batch=1, h=17, w=40, channels=200), activation)


@pytest.mark.parametrize("groups, channels", [(1, 5), (2, 16), (4, 16), (4, 24), (3, 87), (5, 6)])
@pytest.mark.parametrize("layout", [None, group_major], ids=["token-major", "group-major"])
def test_groups(device, groups, channels, layout):
    tensors = inputs(device, torch.bfloat16, groups=groups, channels=channels, h=9, w=8)
    expected = ext.depthwise_conv3x3(**tensors)
    if layout is not None:
        tensors["x"] = layout(tensors["x"])
        y = ext.depthwise_conv3x3(**tensors)
        assert torch.equal(y, expected)
        assert y.permute(3, 0, 1, 2, 4).is_contiguous()
    compare(tensors)


@pytest.mark.parametrize("batch", [1, 3, 17])
def test_batches(device, batch):
    compare(inputs(device, batch=batch))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_without_bias(device, activation):
    compare(inputs(device, bias=False), activation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_parameters(device, dtype):
    tensors = inputs(device, dtype, param=torch.float32)
    compare(tensors)
    compare({**tensors, "bias": tensors["bias"].to(dtype)})
    compare({**tensors, "weight": tensors["weight"].to(dtype)})


@pytest.mark.parametrize("channels", [16, 17])
@pytest.mark.parametrize("layout", [unaligned, padded_channels], ids=lambda f: f.__name__)
def test_layouts(device, layout, channels):
    """Strided and unaligned inputs give bit for bit what contiguous ones give; sentinels round them survive."""
    tensors = inputs(device, torch.bfloat16, channels=channels, h=6, w=10)
    viewed = {**tensors, "x": layout(tensors["x"])}
    assert torch.equal(ext.depthwise_conv3x3(**viewed), ext.depthwise_conv3x3(**tensors))
    compare(viewed)
    if layout is padded_channels:
        assert viewed["x"]._base[..., channels:].isnan().all()


def test_half_of_a_wider_tensor(device):
    """What the layer does: the first half of the channels of a group-major tensor."""
    tensors = inputs(device, torch.bfloat16, groups=4, channels=32, h=6, w=10)
    half = {
        "x": group_major(tensors["x"])[..., :16],
        "weight": tensors["weight"][:, :16],
        "bias": tensors["bias"][:, :16],
    }
    copied = {k: v.contiguous() for k, v in half.items()}
    assert torch.equal(ext.depthwise_conv3x3(**half), ext.depthwise_conv3x3(**copied))
    compare(half)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_against_conv2d(device, activation):
    tensors = inputs(device, channels=24)
    y = ext.depthwise_conv3x3(**tensors, activation=activation)
    conv = F.conv2d(tensors["x"].permute(0, 3, 1, 2), tensors["weight"][:, None], tensors["bias"], padding=1, groups=24)
    expected = {None: conv, "silu": F.silu(conv), "gelu": F.gelu(conv)}[activation]
    assert relative_error(y, expected.permute(0, 2, 3, 1)) < FLOOR[torch.float32]


def test_conv2d_weight_layout(device):
    tensors = inputs(device)
    y = ext.depthwise_conv3x3(**tensors)
    tensors["weight"] = tensors["weight"][:, None]
    assert torch.equal(ext.depthwise_conv3x3(**tensors), y)


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 4, 0)])
def test_empty(device, shape):
    batch, h, w = shape
    leaves = {k: v.requires_grad_() for k, v in inputs(device, batch=batch, h=h, w=w).items()}
    y = ext.depthwise_conv3x3(**leaves, activation="gelu")
    assert y.shape == leaves["x"].shape
    y.sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None and not leaf.grad.any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_repeatable(device, dtype):
    tensors = inputs(device, dtype, batch=9, h=30, w=31, channels=40)

    def once():
        leaves = {k: v.clone().requires_grad_() for k, v in tensors.items()}
        y = ext.depthwise_conv3x3(**leaves, activation="silu")
        y.backward(torch.ones_like(y))
        return [y.detach(), *(leaf.grad for leaf in leaves.values())]

    first = once()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


MANY_IMAGES = [  # batch, h, w, groups, channels of a group: one tile of columns and several, of 8, 4 and 2 octets
    (140, 5, 14, None, 64), (133, 3, 27, None, 88), (140, 9, 14, None, 136), (40, 6, 56, 4, 32), (36, 7, 56, 4, 16),
    (150, 1, 12, None, 128), (70, 14, 14, 4, 88), (33, 2, 30, None, 520),
]  # fmt: skip


def takes_tensor_cores(tensors, activation="silu") -> dict[str, bool]:
    """Which of the passes do, by their notes."""
    leaf = tensors["x"].detach().requires_grad_()
    notes = ext.explain(
        lambda: ext.depthwise_conv3x3(**{**tensors, "x": leaf}, activation=activation).sum().backward()
    ).notes
    return {way: f"depthwise_conv3x3 {way}: tensor cores" in notes for way in ("forward", "backward")}


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("batch, h, w, groups, channels", MANY_IMAGES)
def test_tensor_cores(dtype, activation, batch, h, w, groups, channels):
    param = torch.float32 if dtype == torch.bfloat16 else dtype
    tensors = inputs("cuda", dtype, batch=batch, h=h, w=w, groups=groups, channels=channels, param=param)
    if groups is not None:
        tensors["x"] = group_major(tensors["x"])
    if torch.cuda.get_device_capability() == (9, 0):
        # Groups of 16 channels fill the forward's tiles badly.
        assert takes_tensor_cores(tensors, activation) == {"forward": channels != 16, "backward": True}
    compare(tensors, activation)
    compare({**tensors, "bias": None}, activation)
    if groups is None:
        wide = {**tensors, "x": F.pad(tensors["x"], (0, 8))[..., :channels]}
        assert torch.equal(ext.depthwise_conv3x3(**wide), ext.depthwise_conv3x3(**tensors))


@pytest.mark.cuda
@pytest.mark.parametrize("change, tensor_cores", [
    ({}, True), ({"batch": 20}, False), ({"w": 7}, False), ({"channels": 20}, False), ({"dtype": torch.float32}, False),
    ({"param": torch.float32}, True), ({"dtype": torch.float16}, True),
    ({"dtype": torch.float16, "param": torch.float32}, False),  # may be smaller than what float16 holds
])  # fmt: skip
def test_where_tensor_cores_pay(change, tensor_cores):
    tensors = inputs("cuda", **{"dtype": torch.bfloat16, "batch": 140, "h": 5, "w": 14, "channels": 64, **change})
    tensor_cores = tensor_cores and torch.cuda.get_device_capability() == (9, 0)
    assert takes_tensor_cores(tensors) == {"forward": tensor_cores, "backward": tensor_cores}


@pytest.mark.cuda
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_tensor_cores_cannot_move_is_right_too(activation):
    """Images that TMA can't move: one image for all, and pixels that begin anywhere."""
    tensors = inputs("cuda", torch.bfloat16, batch=140, h=5, w=14, channels=64)
    for x in (tensors["x"][:1].expand(140, -1, -1, -1), unaligned(tensors["x"])):
        changed = {**tensors, "x": x}
        assert not takes_tensor_cores(changed)["forward"]
        compare(changed, activation)


@pytest.mark.cuda
def test_infinity_stays_in_its_image_and_octet():
    """By tensor cores a value that is not finite reaches eight channels, and no other image."""
    tensors = inputs("cuda", torch.bfloat16, batch=140, h=5, w=14, channels=64)
    expected = ext.depthwise_conv3x3(**tensors)
    x = tensors["x"].clone()
    x[7, 2, 3, 19] = torch.inf
    y = ext.depthwise_conv3x3(**{**tensors, "x": x})
    assert not y[7, 1:4, 2:5, 19].isfinite().all()
    y[7, 1:4, 2:5, 16:24] = expected[7, 1:4, 2:5, 16:24]
    assert torch.equal(y, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    tensors = [v.requires_grad_() for v in inputs("cpu", torch.float64, batch=1, h=3, w=4, channels=2).values()]
    assert torch.autograd.gradcheck(lambda x, w, b: ext.depthwise_conv3x3(x, w, b, activation=activation), tensors)


def test_autocast(device):
    tensors = inputs(device)
    with torch.autocast(device, torch.bfloat16):
        y = ext.depthwise_conv3x3(**tensors)
    assert torch.equal(y, ext.depthwise_conv3x3(tensors["x"].bfloat16(), tensors["weight"], tensors["bias"]))


def test_opcheck(device):
    tensors = inputs(device, groups=2, channels=4)
    x = group_major(tensors["x"]).requires_grad_()
    torch.library.opcheck(
        torch.ops.groupmamba.depthwise_conv3x3_fwd, (x, tensors["weight"].requires_grad_(), tensors["bias"], 1)
    )
    torch.library.opcheck(
        torch.ops.groupmamba.depthwise_conv3x3_bwd,
        (torch.randn_like(x), x.detach(), tensors["weight"].detach(), tensors["bias"], 2),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_double_backward_raises(device):
    tensors = {k: v.requires_grad_() for k, v in inputs(device).items()}
    (dx,) = torch.autograd.grad(ext.depthwise_conv3x3(**tensors).sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        dx.sum().backward()


def test_flops(device):
    from torch.utils.flop_counter import FlopCounterMode

    tensors = inputs(device)
    with FlopCounterMode(display=False) as counter:
        ext.depthwise_conv3x3(**tensors)
    assert counter.get_total_flops() == 18 * tensors["x"].numel()


BAD = {
    "x type": ({"x": 1.0}, TypeError, r"x must be a torch.Tensor, got float"),
    "x dims": ({"x": torch.zeros(5, 7, 16)}, ValueError, r"x must be .* got shape \(5, 7, 16\)"),
    "x dtype": ({"x": torch.zeros(2, 5, 7, 16).long()}, TypeError, r"x must be .* got torch.int64"),
    "weight": (
        {"weight": torch.zeros(16, 5, 5)},
        ValueError,
        r"weight must be \(C, 3, 3\) = .* got shape \(16, 5, 5\)",
    ),
    "bias": ({"bias": torch.zeros(15)}, ValueError, r"bias must be \(C,\) = \(16,\), got shape \(15,\)"),
    "bias dtype": ({"bias": torch.zeros(16).half()}, TypeError, r"bias must be float32, got torch.float16"),
    "activation": ({"activation": "relu"}, ValueError, r"activation must be one of .* got 'relu'"),
    "device": ({"weight": torch.zeros(16, 3, 3, device="meta")}, ValueError, r"weight must be on cpu .* meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors(case):
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        ext.depthwise_conv3x3(**{**inputs("cpu"), **change})
