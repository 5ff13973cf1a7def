# SPDX-License-Identifier: Apache-2.0
"""Models built as users build them: timm's options and this project's, feature extractors, heads, meta tensors."""

import copy
import os
import socket

import pytest
import torch

timm = pytest.importorskip("timm", reason="needs the extra 'models'")

from torch._subclasses import FakeTensorMode  # noqa: E402

import groupmamba.models  # noqa: E402
from groupmamba import GroupedMamba2d, no_weight_decay  # noqa: E402
from support.models import SMALL, small, tiny  # noqa: E402

OPTIONS = [
    {"variant": "paper"},
    {"variant": "fused"},
    {"scan": "cross"},
    {"affinity": False},
    {"d_state": 3},
    {"directions": ("bt", "lr", "lr", "rl")},
    {"distillation": False},
    {"drop_path_rate": 0.2},
]
IDS = [f"{name}={value}" for options in OPTIONS for name, value in options.items()]
OUTPUTS = {
    "classes": {"num_classes": 5},
    "pooled": {"num_classes": 0},
    "map": {"global_pool": ""},
    "headless map": {"num_classes": 0, "global_pool": ""},
    "features": {"features_only": True},
    "three features": {"features_only": True, "out_indices": (0, 2)},
    "hook": {"features_only": True, "feature_cls": "hook", "out_indices": (-3, 0)},
    "fx": {"features_only": True, "feature_cls": "fx", "out_indices": (1,)},
}


def flat(outputs):
    return outputs if isinstance(outputs, (tuple, list)) else (outputs,)


def without_gradient(model, x):
    model.zero_grad()
    sum(y.float().square().sum() for y in flat(model(x))).backward()
    return [name for name, p in model.named_parameters() if p.grad is None]


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_options_pass_timms_builder(options):
    """The same model as from the class itself, by name and by function."""
    expected = small(**options)
    for build in (
        lambda **kwargs: timm.create_model("groupmamba_tiny", **kwargs),
        groupmamba.models.groupmamba_small,
    ):
        model = build(num_classes=10, **SMALL, **options).eval()
        assert model.init_arguments == expected.init_arguments
        model.load_state_dict(expected.state_dict())
        x = torch.randn(1, 3, 64, 32)
        assert torch.equal(model(x), expected(x))
        assert model.pretrained_cfg["architecture"].startswith("groupmamba_")


def test_sizes_pass_timms_builder():
    model = timm.create_model("groupmamba_base", depths=[1, 1, 2, 1])
    assert [len(stage.blocks) for stage in model.stages] == [1, 1, 2, 1] and model.num_features == 512
    assert timm.create_model("groupmamba_tiny", dims=(16, 24, 32, 40), mlp_ratios=(1, 2, 3, 4)).init_arguments == {
        **groupmamba.models.GroupMamba(dims=(16, 24, 32, 40), mlp_ratios=(1, 2, 3, 4)).init_arguments
    }


@pytest.mark.parametrize(
    "options, message",
    [
        ({"global_pool": "max"}, "global_pool must be 'avg' or '', got 'max'"),
        ({"global_pool": "avgmax"}, "global_pool must be 'avg' or '', got 'avgmax'"),
        ({"global_pool": "catavgmax"}, "global_pool must be 'avg' or '', got 'catavgmax'"),
        ({"global_pool": "max", "features_only": True}, "global_pool must be .* got 'max'"),
        ({"output_stride": 16}, "output_stride must be 32, .* got 16"),
        ({"output_stride": 8, "features_only": True}, "output_stride must be 32, .* got 8"),
        ({"img_size": 256}, "img_size .* any size of at least 32 x 32, got 256"),
        ({"features_only": True, "feature_cls": "list"}, "feature_cls must be .* got 'list'"),
        ({"features_only": True, "feature_cls": "dict"}, "feature_cls must be .* got 'dict'"),
        ({"features_only": True, "out_indices": (1, 4)}, r"out_indices must .* got \(1, 4\)"),
        ({"features_only": True, "out_indices": ()}, r"out_indices must .* got \(\)"),
        (
            {"features_only": True, "feature_cls": "hook", "feature_cfg": {"output_fmt": "NHWC"}},
            "output_fmt must be 'NCHW' with feature_cls='hook', got 'NHWC'",
        ),
    ],
)
def test_options_that_cannot_be_had(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_the_stride_it_has_is_accepted():
    assert tiny(output_stride=32, num_classes=3)(torch.randn(1, 3, 32, 32)).shape == (1, 3)


def test_options_of_no_model_are_named():
    for option in ("pretrained_strict", "pruned", "patch_size"):
        with pytest.raises(TypeError, match=option):
            tiny(**{option: False})


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("options", [{}, *OPTIONS], ids=["", *IDS])
def test_every_parameter_gets_a_gradient(outputs, options):
    model = tiny(**OUTPUTS[outputs], **options).train()
    assert without_gradient(model, torch.randn(2, 3, 32, 64)) == []


@pytest.mark.parametrize("indices", [1, 4, [0], [1], [2, 0], [-1], [-2]])
@pytest.mark.parametrize("prune_norm, prune_head", [(False, True), (True, True)])
def test_every_parameter_left_by_pruning_gets_a_gradient(indices, prune_norm, prune_head):
    model = small().train()
    x = torch.randn(2, 3, 32, 32)
    expected = model.eval().forward_intermediates(x, indices, intermediates_only=True)
    take = model.prune_intermediate_layers(indices, prune_norm=prune_norm, prune_head=prune_head)
    maps = model.forward_intermediates(x, take, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
    sum(y.square().sum() for y in maps).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert torch.equal(model(x), model.forward_features(x)) and model.num_classes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_class_block_comes_back(device, dtype):
    model = small(variant="fused", d_state=2).to(device, dtype).train()
    trained = copy.deepcopy(model.class_block.state_dict())
    shapes = {name: p.shape for name, p in model.named_parameters()}
    model.reset_classifier(7)
    assert all(torch.equal(value, trained[name]) for name, value in model.class_block.state_dict().items())
    model.reset_classifier(0, "")
    gone = ("class_block.", "norm.", "head.", "dist_head.")
    assert not [name for name in model.state_dict() if name.startswith(gone)]
    with pytest.raises(ValueError, match="num_classes must be 0 with global_pool='', .* got 10"):
        model.reset_classifier(10)
    torch.manual_seed(3)
    model.reset_classifier(10, "avg")
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {(device, dtype)}
    assert all(module.training for module in model.modules())
    assert torch.equal(model.class_block.norm1.weight, torch.ones_like(model.class_block.norm1.weight))
    assert 0.015 < model.class_block.mlp.fc1.weight.float().std() < 0.025  # the released initialisation, not torch's
    assert not model.class_block.mlp.fc1.bias.any()
    x = torch.randn(2, 3, 32, 32, device=device, dtype=dtype)
    assert model(x).shape == (2, 10) and without_gradient(model, x) == []


def test_heads_are_not_there_without_pooling():
    model = tiny(global_pool="")
    assert model.num_classes == 0 and not [name for name in model.state_dict() if "head" in name]
    again = tiny(**model.init_arguments)
    assert again.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("options", [{}, *OPTIONS], ids=["", *IDS])
@pytest.mark.parametrize("training", [False, True])
def test_feature_classes_agree(options, training):
    """The same maps, from hooks and from a traced graph, at a size that it was not traced at."""
    backbone = tiny(features_only=True, out_indices=(0, 2, 3), **options)
    weights = {name.removeprefix("model."): value for name, value in backbone.state_dict().items()}
    x = torch.randn(2, 3, 64, 96)
    for feature_cls, prefix in (("hook", "body."), ("fx", "graph_module.")):
        other = tiny(features_only=True, feature_cls=feature_cls, out_indices=(0, 2, 3), **options)
        other.load_state_dict({prefix + name: value.clone() for name, value in weights.items()}, strict=True)
        for network in (backbone, other):
            network.train(training)
        torch.manual_seed(1)
        expected = copy.deepcopy(backbone)(x)
        torch.manual_seed(1)
        maps = other(x)
        assert [tuple(m.shape[1:]) for m in maps] == [(16, 16, 24), (32, 4, 6), (40, 2, 3)]
        for a, b in zip(maps, expected, strict=True):
            torch.testing.assert_close(a, b)
        assert other.feature_info.channels() == [16, 32, 40] and other.output_fmt == timm.layers.Format.NCHW


def test_stage_maps_are_seen_and_heeded(device):
    """A hook sees the map that leaves the model, and what a call puts in its place is used."""
    model = small().to(device)
    x = torch.randn(1, 3, 64, 32, device=device)
    expected = model.forward_intermediates(x, intermediates_only=True)
    seen = []
    handles = [m.register_forward_hook(lambda _m, _args, out: seen.append(out)) for m in model.stage_maps]
    assert torch.equal(model.forward_features(x), expected[-1])
    assert len(seen) == 4 and all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    for handle in handles:
        handle.remove()
    calls = []
    model.stage_maps[1].forward = lambda t: calls.append(t.shape) or t * 0
    assert not torch.equal(model(x), small().to(device)(x)) and len(calls) == 1


@pytest.mark.parametrize("options", [{}, {"variant": "fused", "scan": "cross"}, {"variant": "paper"}])
def test_meta_models_get_all_their_values(device, options):
    with torch.device("meta"):
        model = tiny(drop_path_rate=0.1, **options)
    assert all(t.is_meta for t in model.state_dict().values())
    model.to_empty(device=device)
    with torch.no_grad():
        for t in model.state_dict().values():
            t.fill_(float("nan") if t.is_floating_point() else 7)
    model.init_weights()
    expected = tiny(**options).state_dict()
    for name, value in model.state_dict().items():
        assert torch.isfinite(value).all(), name
        assert value.device.type == device
        usual = expected[name]
        if usual.unique().numel() <= 1:  # a constant
            assert torch.equal(value.cpu(), usual), name
        elif usual.numel() > 100:
            assert 0.5 < value.float().std() / usual.float().std() < 2, name


def test_fake_tensors():
    with FakeTensorMode():
        model = tiny(drop_path_rate=0.1, num_classes=7)
        assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)
        assert tiny(features_only=True)(torch.randn(1, 3, 64, 64))[3].shape == (1, 40, 2, 2)


def test_drop_path_rates_rise_over_all_blocks():
    model = tiny(depths=(1, 3, 1, 1), drop_path_rate=0.5)
    rates = [getattr(block.drop_path, "drop_prob", 0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert isinstance(tiny(depths=(1, 1, 1, 1)).stages[3].blocks[0].drop_path, torch.nn.Identity)


@pytest.mark.parametrize("variant", ["released", "fused", "paper"])
def test_no_weight_decay_goes_by_names(variant):
    model = small(variant=variant)
    names = model.no_weight_decay()
    assert {"A_log", "D", "dt_bias"} <= {name.split(".")[-1] for name in names}
    with torch.device("meta"):
        assigned = small(variant=variant)
    assert assigned.no_weight_decay() == names
    assigned.load_state_dict(model.state_dict(), assign=True)
    emptied = copy.deepcopy(model).half().to_empty(device="cpu")
    for other in (copy.deepcopy(model), assigned, emptied):
        assert other.no_weight_decay() == names
    layer = copy.deepcopy(GroupedMamba2d(16, variant=variant))
    of_layer = {name.removeprefix("stages.0.blocks.0.attn.") for name in names if name.startswith("stages.0.blocks.0.")}
    assert no_weight_decay(layer) == of_layer
    assert no_weight_decay(torch.nn.Sequential(torch.nn.Linear(2, 2), layer)) == {f"1.{name}" for name in of_layer}


def _shard_and_train(rank, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        for options in ({"num_classes": 0, "global_pool": ""}, {"features_only": True, "out_indices": (0, 2)}, {}):
            torch.manual_seed(0)
            model = torch.nn.parallel.DistributedDataParallel(tiny(**options).train())
            for _ in range(2):  # the second step fails where a parameter got no gradient in the first
                assert without_gradient(model, torch.randn(2, 3, 32, 32)) == []
        from torch.distributed.fsdp import fully_shard

        model = tiny()
        names = model.no_weight_decay()
        for stage in model.stages:
            fully_shard(stage, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
        assert model.no_weight_decay() == names and len(names) > 0
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_two_processes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_shard_and_train, (port,), nprocs=2)
