# SPDX-License-Identifier: Apache-2.0
"""Tools that attach to modules, as their documentation uses them: adapters, counters, quantization, offloading,
Grad-CAM, tracers of graphs. `pip install '.[test,tools]'` brings them."""

import copy

import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm", reason="needs the extra 'models'")

from groupmamba import GroupedMamba2d, counters, why_not_fused  # noqa: E402
from groupmamba.model_info import multiply_adds  # noqa: E402
from support.common import relative_error  # noqa: E402
from support.models import small  # noqa: E402


def filled(device="cpu"):
    """A model whose parameters all show in its output."""
    net = small()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.add_(0.1 * torch.randn_like(p) + name.endswith("affinity.fc1.bias"))
    return net.to(device)


@pytest.fixture
def tiny():
    return timm.create_model("groupmamba_tiny").eval()


TARGETS = ["attn.proj", "mlp.fc1", "mlp.fc2", "affinity.fc1", "affinity.fc2"]


@pytest.mark.parametrize("target", TARGETS)
def test_lora(device, target):
    peft = pytest.importorskip("peft", reason="needs the extra 'tools'")
    net = filled(device)
    x = torch.randn(2, 3, 32, 32, device=device)
    before = net(x)
    adapted = peft.get_peft_model(
        copy.deepcopy(net), peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
    )
    changed = adapted(x)
    assert relative_error(changed, before) > 1e-6
    changed.square().sum().backward()
    gradients = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert gradients and all(target in name and g is not None and g.any() for name, g in gradients.items())
    merged = adapted.merge_and_unload()
    assert why_not_fused(merged) == {}
    assert relative_error(merged(x), changed) < 1e-4


@pytest.mark.parametrize("name", ["in_proj_weight", "x_proj_weight", "out_proj_weight"])
def test_lora_of_stacked_parameters(device, name):
    """The groups' weights are parameters of one module, which peft reaches by ``target_parameters``."""
    peft = pytest.importorskip("peft", reason="needs the extra 'tools'")
    net = filled(device)
    x = torch.randn(1, 3, 32, 32, device=device)
    before = net(x)
    config = peft.LoraConfig(
        r=2, target_modules=[], target_parameters=[f"stages.0.blocks.0.attn.mamba.{name}"], init_lora_weights=False
    )
    adapted = peft.get_peft_model(copy.deepcopy(net), config)
    changed = adapted(x)
    assert relative_error(changed, before) > 1e-6
    changed.square().sum().backward()
    gradients = [p.grad for p in adapted.parameters() if p.requires_grad]
    assert gradients and all(g is not None and g.any() for g in gradients)


def test_thop(tiny):
    thop = pytest.importorskip("thop", reason="needs the extra 'tools'")
    x = torch.randn(1, 3, 224, 224)
    modules, _ = thop.profile(copy.deepcopy(tiny), (x,), verbose=False)
    assert 4.3e9 < modules < 4.5e9
    counted, _ = thop.profile(copy.deepcopy(tiny), (x,), custom_ops=counters.THOP, verbose=False)
    assert counted == pytest.approx(multiply_adds(tiny, 224), rel=0.01)


def test_torchinfo(tiny):
    torchinfo = pytest.importorskip("torchinfo", reason="needs the extra 'tools'")
    summary = torchinfo.summary(tiny, (1, 3, 224, 224), verbose=0)
    assert 4.3e9 < summary.total_mult_adds < 4.7e9
    assert summary.total_params == 23_361_917


def test_ptflops(tiny):
    ptflops = pytest.importorskip("ptflops", reason="needs the extra 'tools'")

    def count(**options):
        options = {"backend": "pytorch", "as_strings": False, "print_per_layer_stat": False, **options}
        return ptflops.get_model_complexity_info(copy.deepcopy(tiny), (3, 224, 224), **options)[0]

    truth = multiply_adds(copy.deepcopy(tiny), 224)
    assert count() > 4.3e9
    assert count(custom_modules_hooks=counters.PTFLOPS) == pytest.approx(truth, rel=0.015)


@pytest.mark.parametrize("options", [
    {}, {"variant": "fused"}, {"variant": "paper"}, {"scan": "cross"}, {"d_state": 4}, {"directions": ("lr",)},
    {"directions": ("lr", "tb") * 4}, {"gate_source": "output"}, {"scan": "cross", "groups": 1},
])  # fmt: skip
def test_counters_of_variants(options):
    thop = pytest.importorskip("thop", reason="needs the extra 'tools'")
    net = small(**options)
    counted, _ = thop.profile(copy.deepcopy(net), (torch.randn(1, 3, 64, 64),), custom_ops=counters.THOP, verbose=False)
    assert counted == pytest.approx(multiply_adds(net, 64), rel=0.04)  # thop counts norms as well


def test_grad_cam(device):
    cam = pytest.importorskip("pytorch_grad_cam", reason="needs the extra 'tools'")
    net = filled(device)
    x = torch.randn(2, 3, 64, 96, device=device)

    def channels_first(image):  # (batch, H, W, C); rows (batch * H * W, C) of an nn.Linear
        image = image if image.dim() == 4 else image.unflatten(0, (2, 8, 12))
        return image.permute(0, 3, 1, 2)

    block = net.stages[1].blocks[1]
    for target in (block, block.attn, block.attn.norm, block.norm2, block.mlp, block.mlp.fc2, block.drop_path):
        with cam.GradCAM(net, [target], reshape_transform=channels_first) as grad_cam:
            maps = grad_cam(x, None)
        assert maps.shape == (2, 64, 96) and maps.max() > 0.9 and maps.std() > 0, target
    with cam.GradCAM(net, [block.mlp.dwconv]) as grad_cam:
        assert grad_cam(x, None).max() > 0.9
    assert why_not_fused(net) == {}


def test_dynamic_quantization():
    net = filled()
    x = torch.randn(2, 3, 64, 64)
    expected = net(x)
    quantized = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
    count = sum(isinstance(m, torch.ao.nn.quantized.dynamic.Linear) for m in quantized.modules())
    assert count == sum(isinstance(m, nn.Linear) for m in net.modules()) == 32
    with torch.no_grad():
        y = quantized(x)
    assert not torch.equal(y, expected) and relative_error(y, expected) < 0.2


def test_offloading(monkeypatch, device):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    accelerate = pytest.importorskip("accelerate", reason="needs the extra 'tools'")
    net = filled()
    x = torch.randn(1, 3, 64, 64)
    expected = net(x)
    offloaded = accelerate.cpu_offload(net, execution_device=device)
    assert all(p.is_meta for p in offloaded.parameters())
    with torch.no_grad():
        y = offloaded(x.to(device))
    assert relative_error(y, expected) < 1e-3


def test_fx_sees_the_layers_as_leaves(device):
    net = small().to(device)
    x = torch.randn(2, 3, 64, 32, device=device)
    traced = torch.fx.symbolic_trace(net)
    called = {node.target for node in traced.graph.nodes if node.op == "call_module"}
    assert {"stem", "stages.0.blocks.0.attn", "stages.1.blocks.1.mlp", "stage_norms.2"} <= called
    assert torch.equal(traced(x), net(x))
    assert torch.equal(torch.fx.symbolic_trace(traced)(x), net(x))
    wrapped = nn.Sequential(nn.Conv2d(3, 16, 1), GroupedMamba2d(16)).to(device)
    assert torch.equal(torch.fx.symbolic_trace(wrapped)(x), wrapped(x))
    with pytest.raises(RuntimeError, match="torch.fx can't trace GroupedMamba2d by itself"):
        torch.fx.symbolic_trace(wrapped[1])


def test_torchvision_feature_extractor():
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    net = small()
    x = torch.randn(1, 3, 64, 64)
    names, _ = extraction.get_graph_node_names(net)
    assert {"stem", "stages.0.blocks.0.attn", "stages.0.blocks.0.mlp"} <= set(names)
    nodes = {"stages.1.blocks.0.attn": "attn", "stages.2": "stage"}
    maps = extraction.create_feature_extractor(net, nodes)(x)
    block = net.stages[1].blocks[0]
    before = net.stages[1].downsample(net.stage_norms[0](net.stages[0](net.stem(x))))
    assert torch.equal(maps["attn"], block.attn(before, residual=True, tokens=True))
    assert torch.equal(maps["stage"], net.stages[2](net.stage_norms[1](net.stages[1].blocks(before))))


@pytest.mark.parametrize("build", [small, lambda: GroupedMamba2d(8), lambda: nn.Sequential(GroupedMamba2d(8))])
def test_script_says_what_works(build):
    with pytest.raises(
        RuntimeError, match="torch.jit.script can't compile .* torch.jit.trace, torch.export.export and"
    ):
        torch.jit.script(build())
