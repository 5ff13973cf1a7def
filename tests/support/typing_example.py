# SPDX-License-Identifier: Apache-2.0
# mypy: warn-unused-ignores
"""The public API as a user with types writes it, for mypy; nothing runs this file. An ignored line must be an error."""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import groupmamba
import groupmamba_ext as ext
from groupmamba import (
    ChannelAffinity,
    CudaGraphs,
    GroupedMamba2d,
    VSSSBlock,
    convert_released_state_dict,
    use_cuda_graphs,
    why_not_fused,
)
from groupmamba.models import GroupMamba
from groupmamba.vision import PyramidBackbone


def ops(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, weight: Tensor, bias: Tensor) -> None:
    assert_type(ext.grouped_selective_scan(u, dt, A, B, C, None, z=u, directions=("lr", "rl", "tb", "bt")), Tensor)
    assert_type(ext.cross_selective_scan(u, dt, A, B, C, dt_bias=None, directions=["lr"], softplus=False), Tensor)
    assert_type(ext.depthwise_conv3x3(u, weight, bias, activation="silu"), Tensor)
    assert_type(ext.layer_norm_pool(u, weight, bias), tuple[Tensor, Tensor])
    assert_type(ext.modulated_layer_norm(u, u, weight, bias, weight), Tensor)
    assert_type(ext.reference.grouped_selective_scan(u, dt, A, B, C), Tensor)
    with ext.backend("reference"):
        pass
    version: str = ext.build_info()["version"]
    assert version == ext.__version__ == groupmamba.__version__

    ext.grouped_selective_scan(u, dt, A, B)  # type: ignore[call-arg]
    ext.grouped_selective_scan(u, dt, A, B, 1.0)  # type: ignore[arg-type]
    ext.grouped_selective_scan(u, dt, A, B, C, directions=0)  # type: ignore[arg-type]
    ext.cross_selective_scan(u, dt, A, B, C, softmax=True)  # type: ignore[call-arg]
    ext.depthwise_conv3x3("x", weight)  # type: ignore[arg-type]
    ext.layer_norm_pool(u, weight, bias).sum()  # type: ignore[attr-defined]
    ext.backend(None)  # type: ignore[arg-type]


def layers(state: dict[str, Tensor]) -> nn.Module:
    graphs = assert_type(use_cuda_graphs(nn.Linear(2, 2), max_graphs=8), CudaGraphs)
    use_cuda_graphs("model")  # type: ignore[arg-type]
    count: int = len(graphs)
    graphs.remove(count)  # type: ignore[call-arg]
    layer = GroupedMamba2d(64, variant="paper", d_state=4, directions=("lr", "rl"), device="cpu", dtype=torch.float32)
    assert_type(layer.directions, tuple[str, ...])
    assert_type(layer.affinity, ChannelAffinity | None)
    reasons = why_not_fused(layer)
    assert_type(reasons, dict[str, str])
    layer.load_state_dict(convert_released_state_dict(state))
    VSSSBlock(16, direction="tb", mlp_ratio=2.0)

    GroupedMamba2d("64")  # type: ignore[arg-type]
    GroupedMamba2d(64, kernel=3)  # type: ignore[call-arg]
    VSSSBlock(16, direction=3)  # type: ignore[arg-type]
    convert_released_state_dict([1, 2])  # type: ignore[arg-type]
    return layer


def models(images: Tensor) -> OrderedDict[str, Tensor]:
    model = GroupMamba()
    model.set_grad_checkpointing(True)
    assert_type(model.no_weight_decay(), set[str])
    model.set_grad_checkpointing(enable="yes")  # type: ignore[arg-type]
    return PyramidBackbone("groupmamba_tiny", drop_path_rate=0.1).forward(images)
