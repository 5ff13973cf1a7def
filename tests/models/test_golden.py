# SPDX-License-Identifier: Apache-2.0
"""The layer against the authors' released code in float64: output, input gradient and every parameter gradient.

A file holds these gradients and no weights, which `golden/weights.py` makes. In float64 they are 2 and 3 MB at 348 and
448 channels, the two stages of the field whose groups, of 87 and 112 channels, are no power of two.
"""

import re

import numpy as np
import pytest
import torch

from groupmamba import GroupedMamba2d, convert_released_state_dict
from support.common import relative_error
from support.golden import GOLDEN, weights

FILES = sorted(path.stem for path in GOLDEN.glob("layer_*.npz"))
TOLERANCE = 1e-8  # relative, ||a - b|| / ||b||


def golden_layer(stem):
    """The file's arrays as tensors, a layer with its weights, the input and the output gradient, (B, C, H, W)."""
    dim, height, width, batch, states = map(
        int, re.fullmatch(r"layer_c(\d+)_h(\d+)_w(\d+)_b(\d+)_n(\d+)", stem).groups()
    )
    with np.load(GOLDEN / f"{stem}.npz") as arrays:
        data = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    released = {
        name[2:]: torch.from_numpy(weights.fill(f"{stem}.{name[2:]}", tuple(value.shape)))
        for name, value in data.items()
        if name.startswith("d:")
    }
    layer = GroupedMamba2d(dim, d_state=states, dtype=torch.float64)
    layer.load_state_dict(convert_released_state_dict(released), strict=True)

    def image(name):
        tokens = torch.from_numpy(weights.image(name, (batch, height * width, dim)))
        return tokens.view(batch, height, width, dim).permute(0, 3, 1, 2)

    return data, layer, image(stem), image(f"{stem}:grad")


def test_files_are_there():
    assert len(FILES) == 4


@pytest.mark.parametrize("stem", FILES)
def test_layer_matches_released_code(stem):
    data, layer, x, grad = golden_layer(stem)
    assert layer.directions == ("lr", "tb", "rl", "bt")
    x.requires_grad_()
    y = layer(x)
    y.backward(grad)

    def tokens(image):
        return image.permute(0, 2, 3, 1).flatten(1, 2)

    errors = {"y": relative_error(tokens(y.detach()), data["y"]), "dx": relative_error(tokens(x.grad), data["dx"])}
    expected = convert_released_state_dict({name[2:]: value for name, value in data.items() if name.startswith("d:")})
    assert expected.keys() == dict(layer.named_parameters()).keys()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.shape == expected[name].shape
        errors[f"d {name}"] = relative_error(parameter.grad, expected[name])
    worst = max(errors, key=errors.get)
    print(f"{stem}: worst relative error {errors[worst]:.1e} ({worst})")
    assert errors[worst] < TOLERANCE, f"{worst}: {errors[worst]:.3e}"


def test_wrong_directions_do_not_match():
    data, layer, x, _ = golden_layer("layer_c64_h7_w5_b2_n1")
    layer.mamba.directions = ("lr", "rl", "tb", "bt")
    assert relative_error(layer(x).detach().permute(0, 2, 3, 1).flatten(1, 2), data["y"]) > 1e-3
