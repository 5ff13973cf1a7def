# SPDX-License-Identifier: Apache-2.0
"""The parts of a GroupMamba model: stem, downsampling, block, stage, class block. Images are (batch, H, W, C)."""

from __future__ import annotations

from typing import Any

import timm.layers
import torch
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.fx import Proxy
from torch.utils.checkpoint import checkpoint

from groupmamba.layers import GroupedMamba2d
from groupmamba.layers._checks import scaled_width
from groupmamba.layers.drop_path import DropPathMask
from groupmamba.layers.feed_forward import ConvFeedForward
from groupmamba.layers.plain import AFFINE, Plain, convolution, layer_norm, why_called
from groupmamba.layers.token_norm import LayerNorm, TokenNorm
from groupmamba.layers.tracing import Leaf, fx_call, keepable
from groupmamba.layers.variants import VARIANTS
from groupmamba.models.entry_conv import conv_on_blocks, pixel_blocks, taps_to_channels
from groupmamba_ext.backend import takes_image
from groupmamba_ext.layouts import BIASED_CHANNELS, PIXEL_UNIT
from groupmamba_ext.ops.batch_norm_fold import batch_norm_fold, takes_batch_norm_fold
from groupmamba_ext.ops.batch_norm_relu import batch_norm_relu, takes_batch_norm
from groupmamba_ext.ops.narrow_conv import narrow_conv, narrow_conv_relu, takes_narrow_conv
from groupmamba_ext.transforms import jit_traces, watched

BLOCK_EPS = 1e-6  # block, class-block and stage norms
CONV_EPS = 1e-5  # norms behind the stem and downsampling convolutions

_BATCH_NORM = Plain(nn.BatchNorm2d, AFFINE, config=(("track_running_stats", True),))
_SEQUENCE = Plain(nn.Sequential)


def _tokens(x: Tensor) -> Tensor:
    """(batch, C, H, W) to contiguous (batch, H, W, C): a view of a channels-last image."""
    tokens = x.permute(0, 2, 3, 1)
    if torch.compiler.is_exporting():  # in a program for any size: an image of one pixel is contiguous, others are not
        return tokens.clone(memory_format=torch.contiguous_format)
    return tokens.contiguous()


def _conv_norm_parts(dim: int) -> tuple[tuple[str, Plain], ...]:
    """What `_conv_norm` reads of ``proj`` and ``norm``."""
    return ("proj", convolution(3, 2, 1, bias=True)), ("norm", layer_norm(TokenNorm, dim))


def _conv_norm(x: Tensor, conv: nn.Module, norm: nn.Module, plain: bool) -> Tensor:
    """``norm`` of the tokens of ``conv(x)``.

    On CUDA the norm of up to 512 channels adds the convolution's bias where both are plain; cuDNN would take a pass
    over the image for it, and another in the backward.
    """
    if not (plain and conv.out_channels <= BIASED_CHANNELS and takes_image(x)):
        return norm(_tokens(conv(x)))
    assert isinstance(conv, nn.Conv2d)  # it is plain
    weight, casts = conv.weight, torch.is_autocast_enabled("cuda")
    dtype = torch.get_autocast_dtype("cuda") if casts else x.dtype
    whole = all(channels % PIXEL_UNIT == 0 for channels in weight.shape[:2])
    fits = x.dim() == 4 and x.shape[1] == weight.shape[1]  # else torch says what is wrong
    if whole or not fits or dtype.itemsize != 2 or torch.compiler.is_exporting() or jit_traces():
        return norm(_tokens(conv._conv_forward(x, weight, None)), conv.bias)
    if casts:
        x, weight = x.to(dtype), weight.to(dtype)
    return norm(_padded_conv(x, weight, conv.stride, conv.padding), conv.bias)


def _padded_conv(x: Tensor, weight: Tensor, stride: Any, padding: Any) -> Tensor:
    """Tokens of ``conv2d(x, weight, None, stride, padding)``, by a convolution whose channels are multiples of 8.

    In 16 bits cuDNN pads channels itself, by a copy before and behind each of three products: 12 of them around the 348
    channels of a GroupMamba-T. Here the padded image is what the backward reads again, and neither the result nor the
    image's gradient is copied.
    """
    outside, inside = (-channels % PIXEL_UNIT for channels in weight.shape[:2])
    if inside:
        tokens = x.permute(0, 2, 3, 1)
        x = torch.cat([tokens, tokens.new_zeros(*tokens.shape[:3], inside)], dim=3).permute(0, 3, 1, 2)
    weight = nn.functional.pad(weight, (0, 0, 0, 0, 0, inside, 0, outside))
    y = nn.functional.conv2d(x, weight, None, stride, padding)
    return y.permute(0, 2, 3, 1)[..., : y.shape[1] - outside]


def _conv_norm_relu(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, relu: nn.ReLU) -> Tensor:
    """``relu(norm(conv(x)))`` of plain modules in fewer passes over the image.

    In evaluation without a gradient, where statistics stay and nothing is learnt about weights, the norm becomes part
    of the convolution's weights. With the statistics of the batch, on CUDA, norm and ReLU are kernels of our own, which
    read an image twice and write it once, and their backward in the same way; torch's take several times as long for an
    image of few channels in bfloat16.
    """
    held = norm._buffers
    if held["running_mean"] is None or held["running_var"] is None:
        return relu(norm(conv(x)))
    blocks = pixel_blocks(x, conv) if conv.stride == (2, 2) else None
    if not (norm.training or torch.is_grad_enabled() or watched()):
        return _folded(x, blocks, conv, norm)
    if blocks is not None:
        x = conv_on_blocks(blocks, conv.weight)
    elif conv.stride == (1, 1) and takes_narrow_conv(x, conv.weight, conv.padding[0]):
        x = narrow_conv(x, conv.weight, conv.padding[0])
    else:
        x = conv(x)
    several = x.dim() == 4 and x.numel() > x.shape[1]  # torch raises otherwise
    usual = norm.training and norm.momentum is not None
    if not (several and usual and takes_batch_norm(x, norm.weight, norm.bias)):
        return nn.functional.relu_(norm(x))
    y, stats = batch_norm_relu(x, norm.weight, norm.bias, norm.eps)
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        norm.running_mean.lerp_(stats[0].to(norm.running_mean.dtype), norm.momentum)
        norm.running_var.lerp_(stats[1].to(norm.running_var.dtype), norm.momentum)
    return y


def _folded(x: Tensor, blocks: Tensor | None, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """``relu(norm(conv(x)))`` by the norm's running statistics, the norm as part of the convolution's weights."""
    casts = x.is_cuda and torch.is_autocast_enabled("cuda")
    stride, padding = conv.stride, conv.padding
    if blocks is not None:
        x, stride, padding, casts = blocks, (1, 1), (0, 0), True
    elif casts:
        x = x.to(torch.get_autocast_dtype("cuda"))
    statistics = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    fits = casts or conv.weight.dtype == x.dtype  # torch refuses any other image for these weights
    if fits and takes_batch_norm_fold(x, conv.weight, *statistics):
        weight, bias = batch_norm_fold(x, conv.weight, statistics, norm.eps, blocks=blocks is not None)
    else:
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        weight, bias = conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
        weight = weight if blocks is None else taps_to_channels(weight)
        if fits:
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if stride == (1, 1) and takes_narrow_conv(x, weight, padding[0]):
        return narrow_conv_relu(x, weight, bias, padding[0])
    if x.is_cuda and torch.backends.cudnn.enabled and x.dtype in (torch.float16, torch.bfloat16):
        if x.stride(1) == 1:
            weight = weight.contiguous(memory_format=torch.channels_last)
        return torch.cudnn_convolution_relu(x, weight, bias, stride, padding, (1, 1), 1)
    return nn.functional.conv2d(x, weight, bias, stride, padding).relu_()


class Stem(Leaf, nn.Module):
    """(batch, in_chans, H, W) to (batch, H / 4, W / 4, dim), sizes rounded up.

    As released: 7x7 convolution of stride 2, two of 3x3 (no bias; each with BatchNorm and ReLU), 3x3 of stride 2,
    LayerNorm. ``paper``: two 3x3 convolutions of stride 2, the first with BatchNorm and ReLU, then LayerNorm.
    """

    def __init__(self, in_chans: int, stem_dim: int, dim: int, *, paper: bool):
        super().__init__()
        layers: list[nn.Module] = []
        parts: list[Plain] = []
        shapes = [(in_chans, 3, 2)] if paper else [(in_chans, 7, 2), (stem_dim, 3, 1), (stem_dim, 3, 1)]
        for channels, kernel, stride in shapes:
            conv = nn.Conv2d(channels, stem_dim, kernel, stride, kernel // 2, bias=False)
            layers += [conv, nn.BatchNorm2d(stem_dim), nn.ReLU()]
            parts += [convolution(kernel, stride, 1, bias=False), _BATCH_NORM, Plain(nn.ReLU)]
        self.conv = nn.Sequential(*layers)
        self.proj = nn.Conv2d(stem_dim, dim, 3, 2, 1)
        self.norm = TokenNorm(dim, eps=CONV_EPS)
        named = [(str(i), part) for i, part in enumerate(parts)]
        self._triples = tuple(tuple(named[i : i + 3]) for i in range(0, len(named), 3))
        self._parts = _conv_norm_parts(dim)

    def _why_sequence_called(self) -> str | None:
        names = tuple(name for triple in self._triples for name, _ in triple)
        if (reason := why_called(self._modules, (("conv", _SEQUENCE),))) is not None:
            return reason
        return None if tuple(self.conv._modules) == names else "conv holds other modules than it was built with"

    def _why_called(self) -> str | None:
        if (reason := self._why_sequence_called()) is not None:
            return reason
        triples = (why_called(self.conv._modules, triple) for triple in self._triples)
        inner = next((f"conv.{reason}" for reason in triples if reason is not None), None)
        return inner or why_called(self._modules, self._parts)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return fx_call(self, x)
        if x.device.type == "cpu" and x.dim() == 4:
            x = keepable(_tokens(x).permute(0, 3, 1, 2))  # channels last: oneDNN is up to four times as fast
        if self._why_sequence_called() is None:
            for triple in self._triples:
                conv, norm, relu = (self.conv._modules[name] for name, _ in triple)
                if why_called(self.conv._modules, triple) is None:
                    x = _conv_norm_relu(x, conv, norm, relu)
                else:
                    x = relu(norm(conv(x)))
        else:
            x = self.conv(x)
        return _conv_norm(x, self.proj, self.norm, why_called(self._modules, self._parts) is None)


class Downsample(Leaf, nn.Module):
    """(batch, H, W, in_dim) to (batch, H / 2, W / 2, dim), sizes rounded up: 3x3 convolution of stride 2, LayerNorm."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, 3, 2, 1)
        self.norm = TokenNorm(dim, eps=CONV_EPS)
        self._parts = _conv_norm_parts(dim)

    def _why_called(self) -> str | None:
        return why_called(self._modules, self._parts)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return fx_call(self, x)
        return _conv_norm(keepable(x.permute(0, 3, 1, 2)), self.proj, self.norm, self._why_called() is None)


class GroupMambaBlock(nn.Module):
    """``x = x + attn(x); x = x + mlp(norm2(x))`` with drop path on both branches; the layer has its own norm.

    The paper's variant has one branch: ``x = x + mlp(norm2(attn(x)))``.
    """

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float, **layer_options: Any):
        super().__init__()
        self.attn = GroupedMamba2d(dim, **layer_options)
        self.norm2 = TokenNorm(dim, eps=BLOCK_EPS)
        self.mlp = ConvFeedForward(dim, scaled_width("mlp_ratios", mlp_ratio, dim))
        self.drop_path = timm.layers.DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.residual = VARIANTS[self.attn.variant].residual_block
        second = (("norm2", layer_norm(TokenNorm, dim)), ("mlp", Plain(ConvFeedForward)))
        first = () if not self.residual else (("attn", Plain(GroupedMamba2d, None)),)
        self._parts = (*first, *second, ("drop_path", Plain(type(self.drop_path))))

    def _why_called(self) -> str | None:
        return why_called(self._modules, self._parts)

    def forward(self, x: Tensor) -> Tensor:
        plain = self._why_called() is None
        if not self.residual:
            mixed = self.attn(x, tokens=True).contiguous()
            return x + self.drop_path(self.mlp(mixed, self.norm2) if plain else self.mlp(self.norm2(mixed)))
        if plain:
            x = self.attn(x, residual=True, tokens=True, drop_path=self._drop_path_mask(x))
            return self.mlp(x, self.norm2, residual=True, drop_path=self._drop_path_mask(x))
        x = x + self.drop_path(self.attn(x, tokens=True))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _drop_path_mask(self, x: Tensor) -> DropPathMask | None:
        """What `drop_path` would draw for one branch; the branch then counts it on its way to the residual stream."""
        drop = self.drop_path
        if isinstance(drop, nn.Identity) or not drop.training or not drop.drop_prob:
            return None
        return DropPathMask.draw(x, drop.drop_prob, scale_by_keep=drop.scale_by_keep)


class Stage(nn.Module):
    """Downsampling (but in the first) and blocks."""

    def __init__(
        self,
        in_dim: int,
        dim: int,
        depth: int,
        mlp_ratio: float,
        drop_path: list[float],
        downsample: bool,
        **options: Any,
    ):
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = Downsample(in_dim, dim) if downsample else nn.Identity()
        self.blocks = nn.Sequential(*(GroupMambaBlock(dim, mlp_ratio, drop_path[i], **options) for i in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if not self.grad_checkpointing:
            return self.blocks(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


class ClassBlock(nn.Module):
    """On the pooled image as an image of one token: ``t = t + norm1(attn(t)); t = t + mlp(norm2(t))``.

    Shape: (batch, dim) in and out.
    """

    def __init__(self, dim: int, mlp_ratio: float, **layer_options: Any):
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=BLOCK_EPS)
        self.norm2 = LayerNorm(dim, eps=BLOCK_EPS)
        self.attn = GroupedMamba2d(dim, **layer_options)
        self.mlp = timm.layers.Mlp(dim, scaled_width("mlp_ratios", mlp_ratio, dim))

    def forward(self, t: Tensor) -> Tensor:
        mixed = self.attn(t[:, None, None], tokens=True)[:, 0, 0]
        t = t + self.norm1(mixed)
        return t + self.mlp(self.norm2(t))


for _module in (GroupedMamba2d, ConvFeedForward, TokenNorm, Stem, Downsample):
    register_notrace_module(_module)
