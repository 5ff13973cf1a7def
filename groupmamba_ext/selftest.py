# SPDX-License-Identifier: Apache-2.0
"""Every op against the plain PyTorch reference on the devices present: ``python -m groupmamba_ext.selftest``.

Takes a few seconds and needs no test files: the first thing to run after an installation. For each device, dtype and op
it prints the relative error of the output and the worst one of the gradients against the float64 reference, beside the
errors that plain PyTorch makes in the same dtype.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

import groupmamba_ext as ext

# An op passes below twice PyTorch's own error, or below a few roundings of the storage dtype.
FLOOR = {torch.float64: 1e-10, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def _cases(generator: torch.Generator) -> dict[str, tuple[str, dict[str, Tensor], dict]]:
    """Op name, float64 inputs and options of each case: odd widths, H != W, all four directions."""
    batch, height, width, groups, dim = 2, 9, 13, 4, 23

    def normal(*shape: int, mean: float = 0.0, scale: float = 1.0) -> Tensor:
        return mean + scale * torch.randn(*shape, dtype=torch.float64, generator=generator)

    def scan(states: int, rank: int) -> dict[str, Tensor]:
        tokens = (batch, height, width, groups)
        return {
            "u": normal(*tokens, dim),
            "dt": normal(*tokens, rank),
            "A": -normal(groups, dim, states).abs() - 0.1,
            "B": normal(*tokens, states),
            "C": normal(*tokens, states),
            "D": normal(groups, dim, mean=1.0),
            "dt_weight": normal(groups, dim, rank),
            "dt_bias": normal(groups, dim, mean=-2.0),
            "z": normal(*tokens, dim),
            "norm_weight": normal(groups, dim, mean=1.0, scale=0.1),
            "norm_bias": normal(groups, dim, scale=0.1),
            "gate": torch.rand(batch, groups, dim, dtype=torch.float64, generator=generator),
        }

    cross_names = ("u", "dt", "A", "B", "C", "D", "dt_weight", "dt_bias")
    cross = {name: scan(1, 2)[name] for name in cross_names}
    cross["u"] = cross["u"][:, :, :, 0]  # the groups' parameters become the directions'
    channels = groups * dim
    image = (batch, height, width)
    conv = {"x": normal(*image, channels), "weight": normal(channels, 3, 3), "bias": normal(channels)}
    norm = {"weight": normal(channels, mean=1.0, scale=0.1), "bias": normal(channels, scale=0.1)}
    modulated = {
        "o": normal(*image, groups, dim),
        "x": normal(*image, channels),
        "scale": normal(1, mean=1.0, scale=0.1),
        **norm,
        "gate": torch.rand(batch, channels, dtype=torch.float64, generator=generator),
    }
    return {
        "grouped_selective_scan": ("grouped_selective_scan", scan(1, 2), {}),
        "grouped_selective_scan, 4 states": ("grouped_selective_scan", scan(4, 1), {}),
        "cross_selective_scan": ("cross_selective_scan", cross, {}),
        "depthwise_conv3x3": ("depthwise_conv3x3", conv, {"activation": "silu"}),
        "layer_norm_pool": ("layer_norm_pool", {"x": normal(*image, channels), **norm}, {}),
        # with a small eps the gradient of scale cancels, since a norm follows it
        "modulated_layer_norm": ("modulated_layer_norm", modulated, {"eps": 0.5}),
    }


def _results(function: Callable, inputs: dict[str, Tensor], options: dict) -> list[Tensor]:
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    out = function(**leaves, **options)
    outputs = out if isinstance(out, tuple) else (out,)
    loss = sum((o.double() * torch.linspace(-1, 1, o.numel(), device=o.device).view(o.shape)).sum() for o in outputs)
    return [*outputs, *torch.autograd.grad(loss, list(leaves.values()))]


def _errors(results: list[Tensor], truth: list[Tensor], outputs: int) -> tuple[float, float]:
    """Worst relative error of the outputs and of the gradients; infinite where anything is not finite."""
    errors = []
    for got, expected in zip(results, truth, strict=True):
        difference = (got.detach().double().cpu() - expected.detach()).norm() / expected.norm()
        errors.append(difference.item() if torch.isfinite(difference) else float("inf"))
    return max(errors[:outputs]), max(errors[outputs:])


def main() -> int:
    """Runs the selftest and prints its table.

    Returns:
        0 if every op passed on every device present, else 1.
    """
    try:
        info = ext.build_info()
    except RuntimeError as error:
        print(f"groupmamba selftest: {error}")
        return 1
    devices = {"cpu": (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
    if torch.cuda.is_available() and info["cuda"]:
        devices["cuda"] = (torch.float32, torch.bfloat16, torch.float16)
    print(f"groupmamba {info['version']}, torch {torch.__version__}, CPU kernels {info['cpu_capability']}, ", end="")
    print(f"CUDA {info['cuda_version']} for {' '.join(info['cuda_archs'])}" if info["cuda"] else "no CUDA half")
    print(f"{'device':6} {'dtype':9} {'op':34} {'output':>9} {'gradients':>9}   PyTorch's own")
    failures = 0
    for device, dtypes in devices.items():
        for dtype in dtypes:
            for label, (name, inputs, options) in _cases(torch.Generator().manual_seed(0)).items():
                stored = {key: t.to(device, dtype) for key, t in inputs.items()}
                wide = {key: t.double().cpu() for key, t in stored.items()}
                reference = getattr(ext.reference, name)
                truth = _results(reference, wide, options)
                outputs = len(truth) - len(inputs)
                own = _errors(_results(reference, {k: t.cpu() for k, t in stored.items()}, options), truth, outputs)
                with ext.backend("native"):
                    got = _errors(_results(getattr(ext, name), stored, options), truth, outputs)
                passed = all(g <= max(2 * o, FLOOR[dtype]) for g, o in zip(got, own, strict=True))
                failures += not passed
                text = f"{device:6} {str(dtype)[6:]:9} {label:34} {got[0]:9.1e} {got[1]:9.1e}"
                print(f"{text}   {own[0]:.1e} {own[1]:.1e}  {'' if passed else 'FAILED'}")
    print(f"{failures} failed" if failures else "all passed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
