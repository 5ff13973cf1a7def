# SPDX-License-Identifier: Apache-2.0
"""The layers as modules: memory layouts, dtypes, autocast, gradients, compilation."""

import subprocess
import sys

import pytest
import torch

import groupmamba_ext as ext
from groupmamba import VSSSBlock
from groupmamba.layers import token_linear
from groupmamba.layers.drop_path import DropPathMask
from support.layers import SCANS, VARIANTS, image, make, run


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (5, 7), (8, 8)])
@pytest.mark.parametrize("scan", SCANS)
def test_shapes(variant, scan, size):
    layer = make(variant=variant, scan=scan)
    x = image(2, 16, *size, dtype=torch.float32)
    y = layer(x)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert y.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 16, 5, 7), (2, 16, 0, 7), (2, 16, 5, 0), (16, 0, 7)])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scan", SCANS)
def test_empty_images(variant, scan, shape):
    results = run(make(variant=variant, scan=scan), image(*shape, dtype=torch.float32))
    assert results["y"].shape == shape
    for name, value in results.items():
        assert value.numel() == 0 or not value.any(), name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scan", SCANS)
def test_unbatched(variant, scan):
    layer = make(variant=variant, scan=scan)
    x = image(16, 5, 7, dtype=torch.float32)
    torch.testing.assert_close(layer(x), layer(x.unsqueeze(0)).squeeze(0), rtol=0, atol=0)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scan", SCANS)
def test_tokens(variant, scan, residual):
    """The same layer on (batch, H, W, dim), value and gradient."""
    layer = make(variant=variant, scan=scan)
    x = image(2, 16, 5, 7, dtype=torch.float32)
    images = run(lambda t: layer(t, residual=residual), x, layer)
    tokens = run(lambda t: layer(t.permute(0, 2, 3, 1), residual=residual, tokens=True).permute(0, 3, 1, 2), x, layer)
    for name, value in images.items():
        torch.testing.assert_close(tokens[name], value, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"x must be \(batch, H, W, 16\), got shape \(2, 16, 5, 7\)"):
        layer(x, tokens=True)
    with pytest.raises(ValueError, match=r"got shape \(5, 7, 16\)"):
        layer(torch.zeros(5, 7, 16), tokens=True)


@pytest.mark.parametrize("variant", ("released", "fused"))
@pytest.mark.parametrize("batch", (1, 2))
def test_channels_last_is_not_copied(variant, batch, monkeypatch):
    seen = []

    def spy(x, *rest):
        seen.append((x.data_ptr(), x.stride()))
        return original(x, *rest)

    original = ext.layer_norm_pool
    monkeypatch.setattr(ext, "layer_norm_pool", spy)
    x = image(batch, 16, 5, 7, dtype=torch.float32).to(memory_format=torch.channels_last)
    y = make(variant=variant)(x)
    assert seen == [(x.data_ptr(), x.permute(0, 2, 3, 1).stride())]
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ("channels_last", "strided"))
@pytest.mark.parametrize("scan", SCANS)
def test_result_does_not_depend_on_layout(variant, scan, layout):
    layer = make(variant=variant, scan=scan)
    x = image(2, 16, 5, 7, dtype=torch.float32)
    if layout == "channels_last":
        other = x.to(memory_format=torch.channels_last)
    else:
        other = torch.zeros(2, 18, 6, 9)[:, 1:17, 1:, 1:8].copy_(x)
    y = layer(other)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, layer(x), rtol=0, atol=0)


def test_group_core_works_in_group_major_storage(monkeypatch):
    seen = {}

    def spy(u, dt, A, B, C, D, **rest):
        seen.update(u=u, z=rest["z"], dt=dt)
        return original(u, dt, A, B, C, D, **rest)

    original = ext.grouped_selective_scan
    monkeypatch.setattr(ext, "grouped_selective_scan", spy)
    with ext.backend("native"):
        make()(image(2, 16, 5, 7, dtype=torch.float32))
    batch, height, width, dim = 2, 5, 7, 4
    for name, row in (("u", dim), ("z", 2 * dim), ("dt", 3)):  # channels of a row of the tensor that it is a view of
        plane = height * width * row
        assert seen[name].stride() == (plane, width * row, row, batch * plane, 1), name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-2), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scan", SCANS)
def test_module_dtypes(variant, scan, dtype, tolerance, device):
    layer = make(32, variant=variant, scan=scan, dtype=torch.float64)
    x = image(2, 32, 5, 7)
    expected = run(layer, x)
    actual = run(layer.to(device, dtype), x.to(device, dtype))
    for name, value in actual.items():
        assert value.dtype == dtype, name
        if name != "skip_scale":  # nearly cancels: a norm follows it
            error = (value.cpu().double() - expected[name]).norm() / expected[name].norm()
            assert error < tolerance, f"{name}: {error}"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scan", SCANS)
def test_autocast(variant, scan, device):
    layer = make(32, variant=variant, scan=scan, device=device)
    x = image(2, 32, 5, 7, dtype=torch.float32, device=device)
    expected = run(layer, x)
    with torch.autocast(device, torch.bfloat16):
        y = layer(x)
    assert y.dtype == (torch.float32 if variant == "paper" else torch.bfloat16)
    x = x.detach().requires_grad_()
    layer.zero_grad()
    with torch.autocast(device, torch.bfloat16):
        y = layer(x)
    y.backward(image(*y.shape, seed=2, dtype=y.dtype, device=device))
    actual = {"y": y.detach(), "dx": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    for name, value in actual.items():
        assert name == "y" or value.dtype == torch.float32, name
        if name != "skip_scale":
            error = (value.double() - expected[name].double()).norm() / expected[name].double().norm()
            assert error < 0.1, f"{name}: {error}"


@pytest.mark.parametrize("options", [{}, {"affinity": False}, {"d_conv": 1}, {"d_state": 4}, {"expand": 2.0}], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scan", SCANS)
def test_every_parameter_gets_a_gradient(variant, scan, options, device):
    layer = make(32, variant=variant, scan=scan, device=device, **options)
    for name, value in run(layer, image(2, 32, 5, 7, dtype=torch.float32, device=device)).items():
        assert value.isfinite().all() and value.any(), name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scan", SCANS)
def test_backward_is_bitwise_repeatable(variant, scan, device):
    layer = make(64, variant=variant, scan=scan, device=device)
    x = image(3, 64, 17, 23, dtype=torch.float32, device=device)
    first, second = run(layer, x), run(layer, x)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scan", SCANS)
def test_native_matches_reference(variant, scan, device):
    layer = make(32, variant=variant, scan=scan, device=device)
    x = image(2, 32, 9, 6, dtype=torch.float32, device=device)
    with ext.backend("native"):
        actual = run(layer, x)
    with ext.backend("reference"):
        expected = run(layer, x)
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scan", SCANS)
def test_compiles_as_one_graph(variant, scan, device):
    layer = make(variant=variant, scan=scan, device=device)
    x = image(2, 16, 3, 4, dtype=torch.float32, device=device)
    expected = run(layer, x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for name, value in run(compiled, x).items():
        torch.testing.assert_close(value, expected[name.removeprefix("_orig_mod.")], rtol=1e-5, atol=1e-6)


def test_block_unbatched_and_layout():
    block = make(12, cls=VSSSBlock, direction="bt")
    x = image(2, 12, 5, 7, dtype=torch.float32)
    y = block(x)
    assert y.shape == x.shape and y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(block(x[1]), y[1])


def test_import_needs_the_core_alone():
    code = "import sys, groupmamba; print({'timm', 'matplotlib', 'sklearn', 'torchvision'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("variant", ["released", "fused", "paper"])
def test_stochastic_depth(variant):
    """Images left out are returned as they are; the others get the branch, scaled."""
    layer = make(16, variant=variant).double()
    x = image(3, 16, 4, 5)
    drop_path = DropPathMask(torch.tensor([1.0, 0.0, 1.0]), 1.25)
    y = layer(x, residual=True, drop_path=drop_path)
    assert torch.equal(y[1], x[1])
    torch.testing.assert_close(y[::2], x[::2] + 1.25 * layer(x[::2]))
    with pytest.raises(ValueError, match="drop_path needs residual=True, got residual=False"):
        layer(x, drop_path=drop_path)
    with pytest.raises(ValueError, match=r"drop_path must be \(2,\) in torch.float32 for this batch, got \(3,\)"):
        layer(x[:2], residual=True, drop_path=drop_path)
    with pytest.raises(ValueError, match=r"drop_path needs a batch of images, got x of shape \(16, 4, 5\)"):
        layer(x[0], residual=True, drop_path=drop_path)


def test_drop_path_masks_are_drawn():
    torch.manual_seed(0)
    x = torch.zeros(4000, 1)
    mask, scale = DropPathMask.draw(x, 0.25)
    assert scale == 1 / 0.75 and set(mask.tolist()) == {0.0, 1.0} and abs(mask.mean().item() - 0.75) < 0.03
    mask, scale = DropPathMask.draw(x, 0.25, scale_by_keep=False)
    assert scale == 1.0
    mask, scale = DropPathMask.draw(x, 1.0)
    assert scale == 1.0 and not mask.any()


@pytest.mark.parametrize(
    "tokens, parts", [(1, 1), (511, 1), (512, 2), (6272, 16), (6273, 1), (32768, 128), (2**20, 128), (2**20 + 64, 64)]
)
def test_parts_of_a_weight_gradient(tokens, parts):
    """The largest power of two up to 128 that divides the tokens and leaves 256 of them to a part."""
    assert token_linear._splits(tokens) == parts
