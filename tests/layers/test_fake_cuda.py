# SPDX-License-Identifier: Apache-2.0
"""What layers call on CUDA, seen by fake tensors: types, shapes and the order of ops, on a machine without a GPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import groupmamba_ext as ext
from groupmamba import GroupedMamba2d
from groupmamba.layers.token_norm import TokenNorm
from groupmamba_ext.layouts import BIASED_CHANNELS, FUSED_CHANNELS
from groupmamba_ext.ops.token_norm import token_norm
from support.common import fakes_of_cuda

pytestmark = fakes_of_cuda

IMAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def fake_cuda(monkeypatch):
    monkeypatch.setattr("groupmamba_ext._load.check_device_supported", lambda *_: None)
    with FakeTensorMode(), torch.device("cuda"):
        yield


@pytest.fixture
def autocast():
    """``torch.autocast("cuda", torch.bfloat16)``, which turns itself off where there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield
    torch.set_autocast_enabled("cuda", before[0])
    torch.set_autocast_dtype("cuda", before[1])


class OwnOps(TorchDispatchMode):
    """Collects calls of this project's ops: name and arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "groupmamba":
            self.calls.append((func._opname, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("channels", [1, BIASED_CHANNELS, BIASED_CHANNELS + 1])
def test_norm_adds_the_bias_of_an_image_in_its_kernel(channels):
    """Where the kernel takes so many channels; beyond, the addition is an op before it."""
    norm = TokenNorm(channels)
    x, x_bias = torch.empty(2, 3, 5, channels), torch.empty(channels)
    with OwnOps() as mode:
        y = norm(x, x_bias)
    ((name, (_, added, *_)),) = mode.calls
    assert name == "token_norm_fwd" and y.shape == x.shape
    assert added is (x_bias if channels <= BIASED_CHANNELS else None)


@pytest.mark.parametrize("dim, tiles, width", [(FUSED_CHANNELS, 1, 128), (129, 2, 65), (300, 3, 100)])
def test_wide_groups_are_scanned_in_equal_tiles(dim, tiles, width):
    """As groups of their own, in one call."""
    u, B, A = torch.empty(1, 3, 5, 2, dim), torch.empty(1, 3, 5, 2, 1), torch.empty(2, dim, 1)
    with OwnOps() as mode:
        y = ext.grouped_selective_scan(u, u, A, B, B, directions=("lr", "bt"))
    ((name, (scanned, *_)),) = mode.calls
    assert name == "grouped_selective_scan_fwd" and scanned.shape == (1, 3, 5, 2 * tiles, width)
    assert y.shape == u.shape


@pytest.mark.parametrize("dtype", IMAGE_DTYPES)
def test_autocast_of_a_norm(autocast, dtype):
    """Of the image alone: kernels read parameters of either dtype."""
    x, weight = torch.empty(2, 3, 5, 16, dtype=dtype), torch.empty(16)
    with OwnOps() as mode:
        y = token_norm(x, weight, weight, 1e-5)
    ((_, (image, _, scale, *_)),) = mode.calls
    assert image.dtype == y.dtype == torch.bfloat16 and scale is weight


def test_no_autocast_of_float64(autocast):
    assert token_norm(torch.empty(2, 3, 5, 16).double(), *torch.empty(2, 16), 1e-5).dtype == torch.float64


@pytest.mark.parametrize("dtype", IMAGE_DTYPES)
def test_outside_autocast_an_image_keeps_its_dtype(dtype):
    assert token_norm(torch.empty(2, 3, 5, 16, dtype=dtype), *torch.empty(2, 16), 1e-5).dtype == dtype


@pytest.mark.parametrize("wanted", [True, False])
def test_a_layer_is_one_op_whose_first_result_is_the_image(wanted):
    """With a gradient that which keeps what the backward needs; it is not what comes back."""
    layer = GroupedMamba2d(64)
    x = torch.empty(2, 64, 5, 7, requires_grad=wanted).to(memory_format=torch.channels_last)
    with OwnOps() as mode, torch.set_grad_enabled(wanted):
        y = layer(x)
    assert [name for name, _ in mode.calls] == ["grouped_mamba_layer_fwd" if wanted else "grouped_mamba_layer"]
    assert y.shape == x.shape and y.dtype == x.dtype and y.requires_grad == wanted
