# SPDX-License-Identifier: Apache-2.0
"""The backbone under the name by which forks of mmdetection and mmsegmentation call it, in mmengine's registry."""

import pytest
import torch

for _module in ("timm", "torchvision", "segmentation_models_pytorch", "mmengine"):
    pytest.importorskip(_module, reason="needs the extra 'vision' and mmengine")

import timm  # noqa: E402
from mmengine.registry import MODELS, Registry  # noqa: E402

import groupmamba.vision.mm as mm  # noqa: E402

TINY = {"embed_dims": (16, 16, 32, 32), "depths": (1, 1, 2, 1), "mlp_ratios": (2, 2, 2, 2), "stem_hidden_dim": 8}
OURS = {"dims": (16, 16, 32, 32), "depths": (1, 1, 2, 1), "mlp_ratios": (2, 2, 2, 2), "stem_dim": 8}


def test_configurations_of_forks_build_it():
    """The arguments that public configurations give, in a registry whose parent is mmengine's, as mmdetection's is."""
    registry = Registry("model", parent=MODELS, scope="mmdet")
    backbone = registry.build(
        {
            "type": "MM_GroupMamba",
            "out_indices": (0, 1, 2, 3),
            "pretrained": "",
            "embed_dims": [64, 128, 348, 448],
            "depths": [3, 4, 9, 3],
            "mlp_ratios": [8, 8, 4, 4],
            "stem_hidden_dim": 32,
            "drop_path_rate": 0.2,
            "frozen_stages": -1,
            "distillation": False,
            "use_v2d": True,
            "num_classes": 80,
            "num_stages": 4,
        }
    )
    assert isinstance(backbone, mm.MMGroupMamba)
    backbone.init_weights()
    maps = backbone.eval()(torch.randn(1, 3, 64, 96))
    assert isinstance(maps, tuple)
    assert [tuple(feature.shape[1:]) for feature in maps] == [(64, 16, 24), (128, 8, 12), (348, 4, 6), (448, 2, 3)]


def test_a_checkpoint_fills_it_with_the_last_norm(tmp_path):
    torch.manual_seed(0)
    whole = timm.create_model("groupmamba_tiny", num_classes=5, **OURS)
    for parameter in whole.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    torch.save({"model": whole.state_dict()}, tmp_path / "tiny.pth")
    x = torch.randn(2, 3, 64, 64)
    expected = whole.eval().forward_intermediates(x, intermediates_only=True)
    last = torch.nn.functional.layer_norm(
        expected[-1].permute(0, 2, 3, 1), (32,), whole.norm.weight, whole.norm.bias, whole.norm.eps
    ).permute(0, 3, 1, 2)
    for given in (
        {"pretrained": str(tmp_path / "tiny.pth")},
        {"init_cfg": {"type": "Pretrained", "checkpoint": str(tmp_path / "tiny.pth")}},
    ):
        backbone = MODELS.build({"type": "MM_GroupMamba", **TINY, **given}).eval()
        found = backbone(x)
        for ours, theirs in zip(found, [*expected[:-1], last], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert MODELS.build({"type": "MM_GroupMamba", **TINY, "out_indices": (0, 2)}).norm is None
    with pytest.raises(RuntimeError, match="of another size"):
        MODELS.build({"type": "MM_GroupMamba", "pretrained": str(tmp_path / "tiny.pth")})


@pytest.mark.parametrize("frozen", [-1, 0, 2, 4])
def test_frozen_stages(frozen):
    backbone = mm.MMGroupMamba(**TINY, frozen_stages=frozen, norm_eval=frozen == -1).train()
    body = backbone.body.model
    assert all(p.requires_grad == (frozen < 0) for p in body.stem.parameters())
    for i, stage in enumerate(body.stages):
        assert all(p.requires_grad == (i >= frozen) for p in stage.parameters())
        assert stage.training == (i >= frozen)
    assert all(not m.training for m in body.stem.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert backbone.norm.weight.requires_grad == (frozen < 4)
    maps = backbone(torch.randn(2, 3, 64, 64))
    if frozen < 4:
        sum(feature.sum() for feature in maps).backward()
        assert all((p.grad is not None) == p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"frozen_stages": 5}, "frozen_stages must be from -1 to 4, got 5"),
        ({"frozen_stages": None}, "frozen_stages must be from -1 to 4, got None"),
        ({"num_stages": 3}, "num_stages must be 4, got 3"),
        ({"out_indices": (4,)}, r"out_indices must choose some of 4 stages, got \(4,\)"),
        ({"init_cfg": {"type": "Normal"}}, "init_cfg must be None or"),
        ({"init_cfg": {"type": "Pretrained", "checkpoint": "a"}, "pretrained": "b"}, "pretrained must be None"),
    ],
)
def test_wrong_arguments(given, words):
    with pytest.raises(ValueError, match=words):
        mm.MMGroupMamba(**{**TINY, **given})


def test_blocks_are_computed_again():
    torch.manual_seed(0)
    plain, again = (
        mm.MMGroupMamba(**TINY, drop_path_rate=0.0),
        mm.MMGroupMamba(**TINY, drop_path_rate=0.0, with_cp=True),
    )
    again.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 64)
    for backbone in (plain, again):
        sum(feature.square().sum() for feature in backbone(x)).backward()
    for (name, p), q in zip(plain.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
