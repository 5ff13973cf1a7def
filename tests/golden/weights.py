# SPDX-License-Identifier: Apache-2.0
"""Deterministic parameters and inputs for golden comparisons: every tensor is a function of its name alone.

`fill(name, shape)` returns the float64 array for the parameter or buffer `name` of the authors' released
GroupMamba model; `image(name, shape)` returns a float64 standard-normal input. Both are stable across
machines and NumPy versions (PCG64 seeded with the CRC-32 of the name).
"""

import zlib

import numpy as np


def _rng(name):
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))


def image(name, shape):
    return _rng("input:" + name).standard_normal(shape)


def fill(name, shape):
    r, leaf = _rng(name), name.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if leaf == "running_var":
        return 0.5 + r.random(shape)
    if leaf == "A_logs":  # A = -exp(A_logs): log(1..N) plus noise
        return np.log(np.arange(1, shape[-1] + 1.0)) + 0.2 * r.standard_normal(shape)
    if leaf == "dt_projs_bias":  # inverse softplus of a log-uniform step in [1e-3, 1e-1]
        dt = np.exp(r.random(shape) * (np.log(0.1) - np.log(1e-3)) + np.log(1e-3))
        return dt + np.log(-np.expm1(-dt))
    if leaf in ("Ds", "skip_scale") or (leaf == "weight" and len(shape) == 1):
        return 1 + 0.1 * r.standard_normal(shape)
    if leaf in ("bias", "running_mean"):
        return 0.1 * r.standard_normal(shape)
    fan_in = int(np.prod(shape[1:])) if leaf != "dt_projs_weight" and leaf != "x_proj_weight" else shape[-1]
    return r.standard_normal(shape) / np.sqrt(max(fan_in, 1))
