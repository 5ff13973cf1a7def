# SPDX-License-Identifier: Apache-2.0
"""Every op against the plain PyTorch reference on the devices present: ``python -m groupmamba_ext.selftest``.

Takes a few seconds and needs no test files: the first thing to run after an installation. For each device, dtype and op
it prints the relative error of the output and the worst one of the gradients against the float64 reference, each beside
the error that is allowed: twice the one that plain PyTorch makes in the same dtype, or a few roundings of the dtype.
The table is Markdown, to be pasted into a bug report.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor

import groupmamba_ext as ext
from groupmamba_ext._command import CommandError, gpu_usable, one_line, run_command
from groupmamba_ext._load import load_error

ROW = "| {:6} | {:8} | {:32} | {:37} | {:6} |"

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


def _results(function: Callable, inputs: dict[str, Tensor], options: dict) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients, for random output gradients: even ones would cancel in sums over the image."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    out = function(**leaves, **options)
    outputs = list(out) if isinstance(out, tuple) else [out]
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(o.shape, dtype=torch.float64, generator=generator).to(o) for o in outputs]
    return outputs, list(torch.autograd.grad(outputs, list(leaves.values()), given))


def _errors(results: list[Tensor], truth: list[Tensor]) -> list[float]:
    """Relative errors; infinite where anything is not finite."""
    errors = []
    for got, expected in zip(results, truth, strict=True):
        difference = (got.detach().double().cpu() - expected.detach()).norm() / expected.norm()
        errors.append(difference.item() if torch.isfinite(difference) else float("inf"))
    return errors


def _row(device: str, dtype: torch.dtype, name: str, inputs: dict[str, Tensor], options: dict) -> tuple[str, bool]:
    """Of an op's outputs and gradients those nearest to their tolerance, as text for the table; whether all passed."""
    stored = {key: t.to(device, dtype) for key, t in inputs.items()}
    host = {key: t.cpu() for key, t in stored.items()}
    reference = getattr(ext.reference, name)
    truth = _results(reference, {key: t.double() for key, t in host.items()}, options)
    plain = _results(reference, host, options)
    try:
        with ext.backend("native"):
            results = _results(getattr(ext, name), stored, options)
    except Exception as error:  # whatever an op raises is a result of the test
        return f"{type(error).__name__}: {one_line(error)}", False
    figures, passed = [], True
    for got, own, expected in zip(results, plain, truth, strict=True):
        limits = [max(2 * e, FLOOR[dtype]) for e in _errors(own, expected)]
        worst, limit = max(zip(_errors(got, expected), limits, strict=True), key=lambda pair: pair[0] / pair[1])
        figures.append(f"{worst:7.1e} | {limit:7.1e}")
        passed = passed and worst <= limit
    return " | ".join(figures), passed


def main() -> int:
    """Compares every op with its reference on the devices present and prints a table.

    Returns:
        0 if every op passed on every device present, else 1.

    Raises:
        CommandError: the compiled ops are not installed, or cannot be loaded.
    """
    problem = load_error()
    if problem is not None:
        raise CommandError(problem)
    info = ext.build_info()
    devices: dict[str, tuple[torch.dtype, ...]] = {"cpu": (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
    if gpu_usable():
        devices["cuda"] = (torch.float32, torch.bfloat16, torch.float16)
    print(f"groupmamba {info['version']}, torch {torch.__version__}, CPU kernels {info['cpu_capability']}, ", end="")
    print(f"CUDA {info['cuda_version']} for {' '.join(info['cuda_archs'])}" if info["cuda"] else "no CUDA half")
    print(f"devices: {', '.join(devices)}; errors are relative, against the float64 reference\n")
    print(ROW.format("device", "dtype", "op", "output  | allowed | grads   | allowed", ""))
    print(ROW.format("---", "---", "---", "---     | ---     | ---     | ---", "---"))
    rows = failures = 0
    for device, dtypes in devices.items():
        for dtype in dtypes:
            for label, (name, inputs, options) in _cases(torch.Generator().manual_seed(0)).items():
                figures, passed = _row(device, dtype, name, inputs, options)
                rows, failures = rows + 1, failures + (not passed)
                verdict = "passed" if passed else "FAILED"
                print(ROW.format(device, str(dtype).removeprefix("torch."), label, figures, verdict), flush=True)
    if failures:
        print(f"\n{failures} of {rows} failed: results of this build are wrong on this machine.")
        print("Please report it to the project, with this table and the output of `groupmamba info`.")
    else:
        print(f"\nall {rows} passed")
    return 1 if failures else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m groupmamba_ext.selftest", description=(__doc__ or "").split("\n")[0]
    )
    parser.parse_args()
    sys.exit(run_command(parser.prog, main))
