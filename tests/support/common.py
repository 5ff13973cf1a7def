# SPDX-License-Identifier: Apache-2.0
"""Inputs, ground truth and the comparison shared by the op tests.

Tolerances are measured, not chosen: an op's error against the float64 reference may be at most twice the error that
plain PyTorch makes in the same dtype on the same inputs.
"""

import functools

import pytest
import torch

from groupmamba_ext import _load

# Tests of fake tensors on CUDA, which need no GPU, but a torch with CUDA: without it, torch's own views of them raise.
fakes_of_cuda = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs a torch that is built with CUDA")

# Images on CUDA of more tokens than this have their truth from the compiled op in float64 on the CPU, which the same
# tests compare with the reference to FLOOR[float64]: the reference goes through the tokens one by one.
MANY_TOKENS = 200

# Below this relative error two results agree to the rounding of the storage dtype, whatever PyTorch itself makes of it.
FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def skip_without_sm90a() -> None:
    """For tests of kernels that one kind of GPU runs; on others the same calls go other ways, which other tests try."""
    _load.load_ops()
    if not _load.has_sm90a(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("needs a GPU of compute capability 9.0, and a build for it")


def relative_error(actual: torch.Tensor, expected: torch.Tensor, terms: float = 0.0) -> float:
    """||actual - expected|| / max(||expected||, terms); NaN or a wrong shape never passes."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    if expected.numel() == 0:
        return 0.0
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert torch.isfinite(actual).all(), "not finite"
    scale = max(expected.norm().item(), terms)
    error = (actual - expected).norm().item()
    return error if scale == 0 else error / scale


def worst(actual: torch.Tensor, expected: torch.Tensor) -> str:
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    flat = (actual - expected).abs().flatten().argmax().item()
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), expected.shape))
    return f"worst at {index}: {actual[index].item():.8g} instead of {expected[index].item():.8g}"


def run(function, tensors: dict, options: dict, grad: torch.Tensor, probe=None) -> dict[str, torch.Tensor]:
    """Output and every gradient of ``function(**tensors, **options)`` for the output gradient ``grad``."""
    leaves = {k: v.detach().requires_grad_() for k, v in tensors.items() if v is not None}
    out = function(**{k: leaves.get(k) for k in tensors}, **options)
    first = out if probe is None else probe(out)
    gradients = torch.autograd.grad(first, list(leaves.values()), grad.to(first.dtype))
    return {"out": first, **{f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}}


def check(native, reference, tensors: dict, options: dict, *, factor: float = 2.0, probe=None) -> dict[str, float]:
    """Compares ``native`` with ``reference`` in float64; returns the errors."""
    image = next(v for v in tensors.values() if v is not None and v.dim() >= 4)
    dtype = image.dtype
    wide = {k: None if v is None else v.detach().double().cpu() for k, v in tensors.items()}
    shape_probe = native(**tensors, **options)
    shape_probe = shape_probe if probe is None else probe(shape_probe)
    grad = torch.randn(shape_probe.shape, dtype=torch.float64).to(dtype)
    truth_by = native if image.is_cuda and image.shape[1] * image.shape[2] > MANY_TOKENS else reference
    expected = run(truth_by, wide, options, grad.double(), probe)
    actual = run(native, tensors, options, grad.to(shape_probe.device), probe)

    @functools.cache
    def plain() -> dict[str, torch.Tensor]:
        """What plain PyTorch makes of it in the same dtype, asked only where the storage's rounding is exceeded."""
        return run(reference, {k: None if v is None else v.cpu() for k, v in tensors.items()}, options, grad, probe)

    errors = {}
    for name, truth in expected.items():
        got = actual[name]
        if name != "out":
            source = tensors[name[1:]]
            assert got.dtype == source.dtype, f"{name} has dtype {got.dtype} instead of {source.dtype}"
        # A single number that is a sum over the image, d(scale) = sum(x dx) / scale, may cancel: it is compared with
        # the size that such a sum has by chance.
        terms = (wide["x"] * expected["dx"]).norm().item() if truth.numel() == 1 and "dx" in expected else 0.0
        errors[name] = error = relative_error(got, truth, terms)
        allowed = FLOOR[dtype]
        if error > allowed and dtype != torch.float64:
            own = plain()[name].detach().double()
            allowed = max(allowed, factor * relative_error(own, truth, terms)) if torch.isfinite(own).all() else allowed
        assert error <= allowed, f"{name}: relative error {error:.3e}, allowed {allowed:.3e}; {worst(got, truth)}"
    return errors


def group_major(x: torch.Tensor) -> torch.Tensor:
    """The same (batch, H, W, G, D) tensor stored as (G, batch, H, W, D)."""
    return x.permute(3, 0, 1, 2, 4).contiguous().permute(1, 2, 3, 0, 4)


def unaligned(x: torch.Tensor) -> torch.Tensor:
    """The same values in a buffer that starts one element off alignment."""
    buffer = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return buffer[1:].view(x.shape).copy_(x)


def padded_channels(x: torch.Tensor, pad: int = 3) -> torch.Tensor:
    """The same values as a view of a buffer whose rows are ``pad`` elements longer, filled with NaN."""
    buffer = torch.full((*x.shape[:-1], x.shape[-1] + pad), float("nan"), dtype=x.dtype, device=x.device)
    buffer[..., : x.shape[-1]] = x
    return buffer[..., : x.shape[-1]]
