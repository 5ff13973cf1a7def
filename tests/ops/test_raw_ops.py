# SPDX-License-Identifier: Apache-2.0
"""The compiled ops called without the public functions: wrong devices, integers, shapes and sizes of 0 are errors or
right empty results, never memory that nobody wrote."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import groupmamba_ext as ext
from support.inputs import cross_inputs
from support.raw_ops import NAMES, PAIRS, SCANS, arguments, feed_forward_arguments, op
from support.scan import inputs

RAISES = (ValueError, RuntimeError)  # of the fake kernels, of the compiled ops
HUGE = (-(2**63), -1, 2**31, 2**62, 2**63 - 1)
EMPTY = [(0, 3, 4, 2, 4), (2, 0, 4, 2, 4), (2, 3, 0, 2, 4), (2, 3, 4, 0, 4), (2, 3, 4, 2, 0), (0, 0, 0, 0, 0)]


@pytest.mark.parametrize("other", ["meta", "cpu"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "pixels_to_channels"])  # which has one tensor
def test_a_tensor_on_another_device(device, name, other):
    """One tensor on the meta device brings the call to the fake kernel, one on CUDA to the CUDA kernel."""
    if device == other:
        pytest.skip("the same device")
    made = arguments(name, device)
    tensors = [i for i, value in enumerate(made) if isinstance(value, torch.Tensor)]
    assert len(tensors) >= 2
    for i in tensors:
        changed = [value.to(other) if i == k else value for k, value in enumerate(made)]
        with pytest.raises(RAISES, match="device"):
            op(name)(*changed)


@pytest.mark.parametrize("name", NAMES)
def test_meta_tensors_alone(name):
    made = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in arguments(name, "cpu")]
    results = op(name)(*made)
    results = results if isinstance(results, tuple) else (results,)
    assert all(t.is_meta for t in results)


@pytest.mark.parametrize("name", PAIRS)
def test_backwards_on_meta(name):
    """Gradients are like what they are of, and without elements for an optional tensor that is not given."""
    made = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in arguments(f"{name}_bwd", "cpu")]
    backward = op(f"{name}_bwd").default
    names = [argument.name for argument in backward._schema.arguments]
    gradients = [result.name.removeprefix("d") for result in backward._schema.returns]
    optional = [a.name for a in backward._schema.arguments if a.type.kind() == "OptionalType" and a.name in gradients]
    for absent in (None, *optional):
        given = {k: None if k == absent else value for k, value in zip(names, made, strict=True)}
        for of, gradient in zip(gradients, backward(*given.values()), strict=True):
            wanted = (0,) if of == absent else given[of].shape
            assert gradient.shape == wanted and (of == absent or gradient.dtype == given[of].dtype), of


@pytest.mark.parametrize("name", PAIRS)
def test_gradients_on_meta(name):
    """Every image and parameter gets its own, through the ops' autograd, whichever optional one is absent."""
    made = [t.detach().to("meta") if isinstance(t, torch.Tensor) else t for t in arguments(f"{name}_fwd", "cpu")]
    schema = op(f"{name}_fwd").default._schema.arguments
    optional = [i for i, a in enumerate(schema) if a.type.kind() == "OptionalType" and a.name != "drop_path_mask"]
    for absent in (None, *optional):
        leaves = [None if i == absent else value for i, value in enumerate(made)]
        inputs = {a.name: t.requires_grad_() for a, t in zip(schema, leaves, strict=True)
                  if isinstance(t, torch.Tensor) and a.name != "drop_path_mask"}  # fmt: skip
        out = op(f"{name}_fwd")(*leaves)
        image = out[0] if isinstance(out, tuple) else out
        gradients = torch.autograd.grad(image.sum(), list(inputs.values()), allow_unused=True)
        assert [k for k, g in zip(inputs, gradients, strict=True) if g is None] == []


@pytest.mark.parametrize("place", ["as given", "meta"])
@pytest.mark.parametrize("way", ["fwd", "bwd"])
@pytest.mark.parametrize("name", [*SCANS, "grouped_mamba_layer"])
def test_chunk_and_directions(device, name, way, place):
    if device == "cpu" and place != "meta" and name not in SCANS:
        pytest.skip("the layer's op has no CPU kernel")
    made = arguments(f"{name}_{way}", device)
    if place == "meta":
        made = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in made]
    codes = next(i for i, value in enumerate(made) if isinstance(value, list))
    chunk = max(i for i, value in enumerate(made) if type(value) is int)
    for bad in (0, *HUGE):
        with pytest.raises(RAISES, match="chunk must be"):
            op(f"{name}_{way}")(*made[:chunk], bad, *made[chunk + 1 :])
    for bad in (4, *HUGE):
        with pytest.raises(RAISES, match=f"direction must be 0 to 3, got {bad}"):
            op(f"{name}_{way}")(*made[:codes], [bad, *made[codes][1:]], *made[codes + 1 :])


@pytest.mark.parametrize("place", ["as given", "meta"])
@pytest.mark.parametrize("way", ["fwd", "bwd"])
def test_activation(device, way, place):
    made = arguments(f"depthwise_conv3x3_{way}", device)
    if place == "meta":
        made = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in made]
    for bad in (3, *HUGE):
        with pytest.raises(RAISES, match=f"activation must be 0, 1 or 2, got {bad}"):
            op(f"depthwise_conv3x3_{way}")(*made[:-1], bad)


@pytest.mark.parametrize("name", SCANS)
def test_states_are_what_the_forward_saved(device, name):
    made = arguments(f"{name}_bwd", device)
    index = 13 if name == "grouped_selective_scan" else 9
    states = made[index]
    assert states.numel() > 0 and made[index + 1] == [0, 1, 2, 3]
    # Those first that would be read without harm if nobody checked.
    wrong = [torch.cat([states, states]), states.unsqueeze(0), torch.stack([states, states], -1)[..., 0]]
    wrong += [states.half(), states.flatten()[:-1], states[:0]]
    for bad in wrong:
        with pytest.raises(RuntimeError, match="states"):
            op(f"{name}_bwd")(*made[:index], bad, *made[index + 1 :])


@pytest.mark.parametrize("name", SCANS)
def test_other_chunks_on_the_cpu(name):
    """The CPU takes any: the fake kernel says what the op returns."""
    made = arguments(f"{name}_fwd", "cpu")
    for chunk in (1, 5, 12, 64, 2**31 - 1):
        states = op(f"{name}_fwd")(*made[:-2], chunk, True)[1]
        assert states.isfinite().all()
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in made]
            fake = op(f"{name}_fwd")(*fakes[:-2], chunk, True)[1]
        assert fake.shape == states.shape


# sizes of 0 ---------------------------------------------------------------------------------------------------------


def gradients_of(function, tensors):
    leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
    out = function(**leaves)
    out = out if isinstance(out, tuple) else (out,)
    sum(t.float().sum() for t in out).backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape and not leaf.grad.any(), name
    return out


@pytest.mark.parametrize("batch, h, w, groups, dim", EMPTY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty_norm_and_pool(device, dtype, batch, h, w, groups, dim):
    channels = groups * dim
    x = torch.randn(batch, h, w, channels, device=device, dtype=dtype)
    affine = {"weight": torch.ones(channels, device=device), "bias": torch.zeros(channels, device=device)}
    xn, pooled = gradients_of(ext.layer_norm_pool, {"x": x, **affine})
    assert xn.shape == x.shape and pooled.shape == (batch, channels) and not pooled.any()


@pytest.mark.parametrize("batch, h, w, groups, dim", EMPTY)
@pytest.mark.parametrize("gated", [False, True])
def test_empty_modulated_norm(device, gated, batch, h, w, groups, dim):
    channels = groups * dim
    tensors = {
        "o": torch.randn(batch, h, w, groups, dim, device=device),
        "x": torch.randn(batch, h, w, channels, device=device),
        "scale": torch.ones(1, device=device),
        "weight": torch.ones(channels, device=device),
        "bias": torch.zeros(channels, device=device),
    }
    if gated:
        tensors["gate"] = torch.ones(batch, channels, device=device)
    (y,) = gradients_of(ext.modulated_layer_norm, tensors)
    assert y.shape == tensors["x"].shape


@pytest.mark.parametrize("batch, h, w, groups, dim", EMPTY)
def test_empty_convolution(device, batch, h, w, groups, dim):
    x = torch.randn(batch, h, w, groups, dim, device=device)
    weight, bias = torch.randn(groups, dim, 3, 3, device=device), torch.randn(groups, dim, device=device)
    (y,) = gradients_of(ext.depthwise_conv3x3, {"x": x, "weight": weight, "bias": bias})
    assert y.shape == x.shape


@pytest.mark.parametrize("size", ["groups", "dim", "n", "rank"])
def test_scans_of_nothing_are_refused(device, size):
    """By the public function and, as an error of the compiled op, by what is behind it."""
    tensors = inputs(device, **{"dim": 8, size: 0} if size != "rank" else {"dim": 8})
    if size == "rank":
        tensors |= {name: tensors[name][..., :0] for name in ("dt", "dt_weight")}
    directions = () if size == "groups" else ("lr", "rl", "tb", "bt")
    with pytest.raises(ValueError, match="at least one|from 1 to 256|at least 1"):
        ext.grouped_selective_scan(**tensors, directions=directions)
    chunk = arguments("grouped_selective_scan_fwd", device)[-2]
    codes = list(range(len(directions)))
    with pytest.raises(RuntimeError, match="at least one|1 to 256|at least 1"):
        op("grouped_selective_scan_fwd")(*tensors.values(), codes, True, 1e-5, chunk, True)


@pytest.mark.cuda
def test_layers_of_nothing_are_refused():
    made = feed_forward_arguments("cuda", hidden=8)
    for i in (3, 4, 5, 6):  # fc1 and the convolution, hidden channels first
        made[i] = made[i][:0]
    made[7] = made[7][:, :0]
    with pytest.raises(RuntimeError, match="fc1_weight must be"):
        op("feed_forward")(*made)
    layer = arguments("grouped_mamba_layer_fwd", "cuda")
    for i, name in ((11, "dt_weight"), (13, "A_log")):  # no step feature, no state
        changed = list(layer)
        changed[i] = changed[i][..., :0]
        with pytest.raises(RuntimeError, match=name):
            op("grouped_mamba_layer_fwd")(*changed)
    for name in ("grouped_mamba_layer_fwd", "feed_forward_fwd"):
        made = arguments(name, "cuda")
        made[0] = made[0][:0]
        with pytest.raises(RuntimeError, match="with elements"):
            op(name)(*made)


# states are saved for a backward alone ------------------------------------------------------------------------------


class SavedStates(TorchDispatchMode):
    """Collects how many states each scan's forward returns."""

    def __init__(self):
        super().__init__()
        self.saved = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "selective_scan_fwd" in str(func):
            self.saved.append(out[1].numel())
        return out


@pytest.mark.parametrize("name", SCANS)
def test_states_are_saved_where_a_gradient_is_needed(device, name):
    made = inputs if name == "grouped_selective_scan" else cross_inputs
    tensors = made(device, h=3, w=4, dim=8)

    def states(**changes):
        with SavedStates() as mode:
            getattr(ext, name)(**{**tensors, **changes})
        assert len(mode.saved) == 1
        return mode.saved[0]

    assert states() == 0
    for key, value in tensors.items():
        wanted = {key: value.detach().clone().requires_grad_()}
        assert states(**wanted) > 0, key
        with torch.no_grad():
            assert states(**wanted) == 0, key
        with torch.inference_mode():
            assert states(**wanted) == 0, key
