# SPDX-License-Identifier: Apache-2.0
"""The models against the authors' released code in float64, and what timm's users expect of them."""

import re

import numpy as np
import pytest
import torch

timm = pytest.importorskip("timm", reason="needs the extra 'models'")

from groupmamba import convert_released_state_dict  # noqa: E402
from groupmamba.model_info import multiply_adds  # noqa: E402
from groupmamba.models import blocks  # noqa: E402
from support.common import relative_error  # noqa: E402
from support.golden import GOLDEN, weights  # noqa: E402
from support.models import MODELS, released_state_dict, small  # noqa: E402

PARAMETERS = {"tiny": 23_361_917, "small": 34_781_555, "base": 57_150_838}  # with both heads


def golden(stem):
    """A model with the file's weights in float64, its input, and the file's arrays."""
    kind, height, width, batch = re.fullmatch(r"model_([a-z]+)(?:_train)?_(\d+)x(\d+)_b(\d+)", stem).groups()
    model = MODELS[kind]().double()
    model.load_state_dict(convert_released_state_dict(released_state_dict(kind)), strict=True)
    x = torch.from_numpy(weights.image(stem, (int(batch), 3, int(height), int(width))))
    with np.load(GOLDEN / f"{stem}.npz") as arrays:
        return model, x, {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.mark.parametrize("stem", ["model_tiny_64x64_b2", "model_small_64x96_b1", "model_base_64x64_b1"])
def test_golden_logits(stem):
    model, x, arrays = golden(stem)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[stem.split("_")[1]]
    model.eval()
    with torch.no_grad():
        assert relative_error(model(x), arrays["logits"]) < 1e-8
        assert relative_error(model.float()(x.float()), arrays["logits"]) < 5e-4


def test_golden_logits_at_224():
    model, x, arrays = golden("model_tiny_224x224_b1")
    with torch.no_grad():
        assert relative_error(model.float().eval()(x.float()), arrays["logits"]) < 5e-4


def test_golden_heads_in_training():
    model, x, arrays = golden("model_tiny_train_64x64_b2")
    model.train()
    model.set_distilled_training(True)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    with torch.no_grad():
        head, dist_head = model(x)
    assert relative_error(head, arrays["head"]) < 1e-8
    assert relative_error(dist_head, arrays["dist_head"]) < 1e-8


@pytest.fixture
def full_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    before = torch.get_float32_matmul_precision()  # pytest 9.2 can't set and restore torch.backends.cuda.matmul's own
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.cuda
@pytest.mark.parametrize("stem", ["model_tiny_224x224_b1", "model_small_64x96_b1", "model_base_64x64_b1"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_golden_logits_on_cuda(full_precision, stem, channels_last):
    model, x, arrays = golden(stem)
    model.float().eval().cuda()
    x = x.float().cuda()
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert relative_error(model(x), arrays["logits"]) < 5e-4


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["groupmamba_tiny", "groupmamba_small", "groupmamba_base"])
def test_low_precision_logits_on_cuda(name):
    """At initialisation (up to 0.11 on the CPU): the golden weights enlarge rounding a thousandfold."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval().cuda()
    x = torch.randn(2, 3, 96, 128, device="cuda")
    with torch.no_grad():
        expected = model.double()(x.double())
        with torch.autocast("cuda", torch.bfloat16):
            under_autocast = model.float()(x)
        assert relative_error(under_autocast, expected) < 0.2
        assert relative_error(model.bfloat16()(x.bfloat16()), expected) < 0.2


def test_variants_and_sizes(device):
    eight = ("lr", "rl", "tb", "bt") * 2
    for options in (
        {}, {"variant": "fused"}, {"variant": "paper"}, {"affinity": False}, {"distillation": False},
        {"directions": ("tb",)}, {"directions": eight}, {"directions": eight, "variant": "paper"},
        {"gate_source": "output"}, {"gate_source": "output", "variant": "fused", "directions": ("lr", "rl")},
        {"scan": "cross", "groups": 1},
    ):  # fmt: skip
        model = small(**options).to(device).train()
        for shape in ((2, 3, 32, 32), (1, 3, 45, 71), (1, 3, 64, 33)):
            model.zero_grad()
            x = torch.randn(shape, device=device, requires_grad=True)
            y = model(x)
            assert y.shape == (shape[0], 10)
            y.square().sum().backward()
            missing = [name for name, p in model.named_parameters() if p.grad is None]
            assert not missing, (options, missing)
            assert torch.isfinite(x.grad).all()


def test_autocast_keeps_the_stream_low(device):
    model = small().to(device)
    seen = []
    model.stages[1].blocks[0].register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, out.dtype)))
    with torch.autocast(device, torch.bfloat16), torch.no_grad():
        y = model(torch.randn(1, 3, 64, 64, device=device))
    assert torch.isfinite(y).all()
    if device == "cuda":
        assert seen == [(torch.bfloat16, torch.bfloat16)]


def test_heads():
    model = small().train()
    x = torch.randn(2, 3, 32, 32)
    mean = model.eval()(x)
    model.set_distilled_training(True)
    assert torch.equal(model(x), mean)  # in evaluation the mean all the same
    first, second = model.train()(x)
    assert first.shape == second.shape == (2, 10)
    with pytest.raises(ValueError, match="distillation"):
        small(distillation=False).set_distilled_training(True)
    model.eval().reset_classifier(7)
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert torch.equal(model(x), model.forward_head(model.forward_features(x), pre_logits=True))
    model.reset_classifier(0, "")
    assert torch.equal(model(x), model.forward_features(x))
    with pytest.raises(ValueError, match="global_pool .* got 'max'"):
        model.reset_classifier(3, "max")


@pytest.mark.parametrize("variant", ["released", "paper"])
@pytest.mark.parametrize("channels", [3, 6])  # the first convolution on blocks of pixels, or as it is
@pytest.mark.parametrize("precision", ["double", "bfloat16", "half", "autocast"])
def test_batch_norms_are_folded_without_gradients(monkeypatch, device, variant, channels, precision):
    # The expression in torch has one precision that shows every term, the op and cuDNN's convolution three they take.
    if (device == "cpu") != (precision == "double"):
        pytest.skip("float64 on the CPU, 16 bits on CUDA")
    dtype = {"double": torch.float64, "bfloat16": torch.bfloat16, "half": torch.half, "autocast": torch.float32}[
        precision
    ]
    stem = small(variant=variant, in_chans=channels).eval().stem.double()
    norms = [m for m in stem.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
            norm.weight.uniform_(0.5, 1.5), norm.bias.normal_()
    x = torch.randn(2, channels, 40, 47, dtype=torch.float64)
    expected = stem(x)
    assert expected.requires_grad
    stem.to(device, dtype)
    calls, fold = [], blocks.batch_norm_fold
    monkeypatch.setattr(blocks, "batch_norm_fold", lambda *a, **k: calls.append(k["blocks"]) or fold(*a, **k))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        calls.clear()
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=precision == "autocast"):
            folded = stem(x.to(device, dtype, memory_format=memory_format))
        assert relative_error(folded, expected) < (1e-12 if device == "cpu" else 0.03)
        assert calls == ([] if device == "cpu" else [channels == 3] + [False] * (len(norms) - 1))
    with torch.no_grad():
        stem.train()(x.to(device, dtype))
    assert all(norm.num_batches_tracked == 1 for norm in norms)


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_no_weight_decay(variant):
    from timm.optim import param_groups_weight_decay

    model = small(variant=variant)
    still, decayed = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    assert (still["weight_decay"], decayed["weight_decay"]) == (0, 0.05)
    decayed = {id(p) for p in decayed["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    batch_norms = {"stem.conv.1.weight", "stem.conv.4.weight", "stem.conv.7.weight"}
    vectors = ("bias", "A_log", ".D", "skip_scale")
    assert names == {
        name
        for name, _ in model.named_parameters()
        if not name.endswith(vectors) and "norm" not in name and name not in batch_norms
    }


def test_layer_decay_groups():
    from timm.models import group_parameters

    model = small()
    names = {name for name, _ in model.named_parameters()}
    for coarse, count in ((False, 1 + 5 + 1), (True, 1 + 4 + 1)):  # the stem, blocks or stages, the heads
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        assert len(groups) == count
        assert {name for group in groups.values() for name in group} == names
        layer = {name: i for i, group in groups.items() for name in group}
        last = "stages.3.blocks.0.mlp.fc1.weight"
        assert layer["stage_norms.2.weight"] == layer["stages.3.downsample.proj.weight"] == layer[last]
        assert layer["class_block.norm1.weight"] == layer["norm.weight"] == layer[last] < layer["head.weight"]


def test_pruned_to_intermediates():
    model = small()
    assert model.prune_intermediate_layers([1]) == [1]
    model.reset_classifier(0)
    x = torch.randn(1, 3, 32, 32)
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert len(maps) == 2 and torch.equal(model(x), maps[1])


def test_timm_entry_points(tmp_path):
    assert timm.is_model("groupmamba_tiny")
    model = timm.create_model("groupmamba_tiny", num_classes=5, in_chans=1, drop_path_rate=0.1)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 5)
    rates = [b.drop_path.drop_prob for s in model.stages for b in s.blocks if hasattr(b.drop_path, "drop_prob")]
    assert rates == pytest.approx([0.1 * i / 18 for i in range(1, 19)])
    config = model.pretrained_cfg
    assert (config["interpolation"], config["crop_pct"], config["classifier"]) == (
        "bicubic",
        0.875,
        ("head", "dist_head"),
    )
    assert config["hf_hub_id"] == "Abdelrahman-shaker/GroupMamba-Tiny"


def test_features():
    backbone = timm.create_model("groupmamba_tiny", features_only=True, out_indices=(0, 2, 3)).eval()
    x = torch.randn(1, 3, 64, 96)
    maps = backbone(x)
    assert [tuple(m.shape[1:]) for m in maps] == [(64, 16, 24), (348, 4, 6), (448, 2, 3)]
    assert backbone.feature_info.channels() == [64, 348, 448]
    assert backbone.feature_info.reduction() == [4, 16, 32]
    model = small()
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    assert torch.equal(maps[-1], final)
    last = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True, output_fmt="NHWC")
    assert torch.equal(last[0].permute(0, 3, 1, 2), maps[1])
    normed = maps[1].permute(0, 2, 3, 1)
    assert normed.mean(-1).abs().max() < 1e-4  # weight 1, bias 0
    with pytest.raises(ValueError, match="output_fmt .* got 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")
    for call in (model.forward_intermediates, lambda _x, i: model.prune_intermediate_layers(i)):
        for indices in (0, 5, [4], [-5], []):
            with pytest.raises(
                ValueError, match=rf"indices must choose some of 4 stages, got {re.escape(repr(indices))}"
            ):
                call(x, indices)


@pytest.mark.parametrize("kind, paper", [("tiny", 4.5e9), ("small", 7.0e9), ("base", 14e9)])
def test_multiply_adds_agree_with_the_paper(kind, paper):
    assert multiply_adds(MODELS[kind](), 224) == pytest.approx(paper, rel=0.05)


def test_gradient_checkpointing():
    x = torch.randn(2, 3, 32, 32)
    gradients = []
    for enable in (False, True):
        model = small(drop_path_rate=0.0).train()
        model.set_grad_checkpointing(enable)
        model(x).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_compile_and_trace():
    model = small()
    x = torch.randn(1, 3, 64, 32)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), expected, rtol=1e-4, atol=1e-5)
    pytest.importorskip("torchvision")
    from timm.models._features_fx import create_feature_extractor

    taps = create_feature_extractor(model, {"stages.1": "middle"})
    assert torch.equal(taps(x)["middle"], model.stages[1](model.stage_norms[0](model.stages[0](model.stem(x)))))


@pytest.mark.parametrize("training", [True, False])
def test_compiles_as_one_graph_under_autocast(device, training):
    torch.manual_seed(0)
    model = small(drop_path_rate=0.0).to(device, memory_format=torch.channels_last).train(training)
    x = torch.randn(2, 3, 64, 32, device=device).to(memory_format=torch.channels_last)
    results = []
    for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        with torch.set_grad_enabled(training), torch.autocast(device, torch.bfloat16):
            y = function(x)
        leaves = list(model.parameters())
        results.append([y.detach(), *(torch.autograd.grad(y.float().sum(), leaves) if training else ())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05 * b.abs().max().item())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"depths": (1, 2)}, r"depths must have one entry a stage \(4\), got \(1, 2\)"),
        ({"mlp_ratios": (1,)}, r"mlp_ratios must have one entry a stage"),
        ({"global_pool": "catavgmax"}, "global_pool .* got 'catavgmax'"),
        ({"variant": "new"}, "variant .* got 'new'"),
        ({"num_classes": -1}, "num_classes .* got -1"),
        ({"in_chans": 0}, "in_chans .* got 0"),
        ({"stem_dim": 0}, "stem_dim .* got 0"),
        ({"mlp_ratios": (1, 1, 1, float("inf"))}, "mlp_ratios .* got inf"),
        ({"drop_path_rate": 1.5}, "drop_path_rate .* got 1.5"),
        ({"dims": (16, 24, 32, 42)}, r"dims must be multiples of 4, .* got 42 in \(16, 24, 32, 42\): 40 and 44 are"),
        ({"directions": ("lr",) * 32}, r"dims must be multiples of 32, .* got 16 in .*: 32 is"),
        ({"directions": ("lr", "up")}, "directions .* got 'up'"),
        ({"groups": 2}, "groups must be 4 .* got 2"),
        ({"gate_source": "scan"}, "gate_source .* got 'scan'"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dims": 64}, "dims must be a sequence, got 64"),
        ({"dims": "abcd"}, "dims must be a sequence, got 'abcd'"),
        ({"dims": (16, 16, 32, 32.0)}, "dims must be an int, got 32.0"),
        ({"depths": 3}, "depths must be a sequence, got 3"),
        ({"mlp_ratios": 2}, "mlp_ratios must be a sequence, got 2"),
        ({"mlp_ratios": (1, 1, 1, "a")}, "mlp_ratios must be a number, got 'a'"),
        ({"drop_rate": "a"}, "drop_rate must be a number, got 'a'"),
        ({"drop_path_rate": "a"}, "drop_path_rate must be a number, got 'a'"),
    ],
)
def test_types(options, message):
    with pytest.raises(TypeError, match=message):
        small(**options)


@pytest.mark.cuda
@pytest.mark.parametrize("drop_path_rate", [0.0, 0.3])
def test_trains_in_a_graph(drop_path_rate):
    """`torch.cuda.make_graphed_callables` as the README has it: forward and backward from CUDA graphs."""
    torch.manual_seed(0)
    model = small(drop_path_rate=drop_path_rate).cuda().to(memory_format=torch.channels_last).train()
    eager = small(drop_path_rate=drop_path_rate).cuda().to(memory_format=torch.channels_last).train()
    x = torch.randn(4, 3, 64, 64, device="cuda").to(memory_format=torch.channels_last)
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        model = torch.cuda.make_graphed_callables(model, (x,))
    eager.load_state_dict(model.state_dict())
    x = torch.randn_like(x)
    results = []
    for net in (model, eager, model):
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            y = net(x)
        y = y if isinstance(y, torch.Tensor) else torch.stack(y)
        net.zero_grad()
        y.float().square().sum().backward()
        results.append([y.detach().clone(), *(p.grad.clone() for p in net.parameters())])
    graphed, expected, again = results
    if drop_path_rate > 0:  # drawn anew in every replay
        assert not torch.equal(graphed[0], again[0])
    else:
        assert all(torch.equal(a, b) for a, b in zip(graphed, expected, strict=True))
