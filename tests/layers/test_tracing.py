# SPDX-License-Identifier: Apache-2.0
"""torch.jit.trace, torch.export with dynamic sizes, torch.compile(dynamic=True): one trace for other sizes."""

import io

import pytest
import sympy
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import groupmamba_ext as ext
from groupmamba_ext.ops import narrow_conv
from support.common import fakes_of_cuda, relative_error
from support.layers import SCANS, VARIANTS, image, make
from support.scan import inputs
from support.transforms import small

SIZES = [(2, 16, 12, 14), (3, 16, 12, 14), (1, 16, 9, 33), (2, 16, 3, 5), (1, 16, 40, 40)]
IMAGES = [(2, 3, 64, 96), (1, 3, 32, 32), (3, 3, 33, 40), (2, 3, 224, 224), (1, 3, 128, 36)]

LAYERS = pytest.mark.parametrize(
    "variant, scan, grad", [*((v, s, True) for v in VARIANTS for s in SCANS), ("released", "grouped", False)]
)


def results(call, module, x):
    """Output and, where gradients are on, those of the input and of the module's parameters that it reaches."""
    if not torch.is_grad_enabled():
        return [call(x)]
    x = x.detach().requires_grad_()
    parameters = list(module.parameters())
    y = call(x)
    weights = image(*y.shape, seed=2, dtype=y.dtype, device=y.device)
    gradients = torch.autograd.grad(y, [x, *parameters], weights, allow_unused=True)
    return [y.detach(), *(g for g in gradients if g is not None)]


@pytest.fixture(autouse=True)
def _exact_convolutions(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def check(traced, holder, module, sizes, device, tolerance=1e-5):
    """``traced``, whose parameters ``holder`` has, gives what ``module`` gives, for every size."""
    assert [name for name, _ in holder.named_parameters()] == [name for name, _ in module.named_parameters()]
    for size in sizes:
        x = image(*size, seed=sum(size), device=device, dtype=torch.float32)
        for a, b in zip(results(traced, holder, x), results(module, module, x), strict=True):
            assert a.shape == b.shape and (a - b).norm() <= tolerance * max(b.norm().item(), 1.0), size


# torch.jit.trace ---------------------------------------------------------------------------


def check_jit(module, sizes, device):
    x = image(*sizes[0], device=device, dtype=torch.float32)
    traced = torch.jit.trace(module, x)
    assert "groupmamba::" in str(traced.inlined_graph) and "PythonOp" not in str(traced.inlined_graph)
    check(traced, traced, module, sizes, device, 1e-5)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    check(loaded, loaded, module, sizes, device, 1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_jit_trace_layer(device, variant, scan, grad):
    with torch.set_grad_enabled(grad):
        check_jit(make(16, variant=variant, scan=scan, device=device), SIZES, device)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit")
@pytest.mark.parametrize("grad", [True, False])
def test_jit_trace_model(device, grad):
    with torch.set_grad_enabled(grad):
        check_jit(small().to(device), [(2, 3, 64, 64), (1, 3, 96, 80), (3, 3, 32, 32)], device)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit")
def test_jit_trace_of_what_needs_no_gradient():
    """Traced without gradients, a layer that has some keeps them; one that needs none keeps nothing, and says so."""
    layer = make(16)
    x = image(*SIZES[0], dtype=torch.float32)
    with torch.no_grad():
        traced = torch.jit.trace(layer, x)
    check(traced, traced, layer, SIZES[:2], "cpu", 1e-5)
    with torch.no_grad():
        traced = torch.jit.trace(layer.requires_grad_(False), x)
    assert torch.equal(traced(x), layer(x))
    with pytest.raises(RuntimeError, match="traced where nothing required a gradient"):
        traced(x.requires_grad_()).sum().backward()


# torch.export ------------------------------------------------------------------------------


class Op(torch.nn.Module):
    """The scan with parameters of its own."""

    IMAGES = ("u", "dt", "B", "C", "z")

    def __init__(self, device):
        super().__init__()
        drop = (*self.IMAGES, "gate")
        tensors = inputs(device, n=2)
        self.parameters_ = torch.nn.ParameterDict({k: v for k, v in tensors.items() if k not in drop})

    def forward(self, u, dt, B, C, z):
        return ext.grouped_selective_scan(u, dt, B=B, C=C, z=z, **dict(self.parameters_.items()))


@pytest.mark.parametrize("grad", [True, False])
def test_export_op(device, grad):
    op = Op(device)
    batch, height, width = Dim("batch", max=64), Dim("height", min=2, max=512), Dim("width", min=2, max=512)

    def images(*size):
        tensors = inputs(device, batch=size[0], h=size[1], w=size[2], n=2)
        return [tensors[k] for k in Op.IMAGES]

    with torch.set_grad_enabled(grad):
        shapes = ({0: batch, 1: height, 2: width},) * len(Op.IMAGES)
        program = export(op, tuple(images(2, 32, 40)), dynamic_shapes=shapes).module()
        for size in ((2, 32, 32), (1, 33, 70), (3, 4, 5), (2, 8, 8), (1, 90, 33)):
            args = images(*size)
            y = op(*args)
            assert relative_error(program(*args).detach(), y.detach()) < 1e-6
            if grad:
                actual = torch.autograd.grad(program(*args).square().sum(), list(program.parameters()))
                expected = torch.autograd.grad(y.square().sum(), list(op.parameters()))
                assert all(relative_error(a, b) < 1e-6 for a, b in zip(actual, expected, strict=True))


def exported(module, x, least):
    dims = {0: Dim("batch", max=64), 2: Dim("height", min=least, max=1024), 3: Dim("width", min=least, max=1024)}
    return export(module, (x,), dynamic_shapes=(dims,))


@LAYERS
def test_export_layer(device, variant, scan, grad):
    layer = make(16, variant=variant, scan=scan, device=device)
    with torch.set_grad_enabled(grad):
        program = exported(layer, image(*SIZES[0], device=device, dtype=torch.float32), 2).module()
        check(program, program, layer, [*SIZES, (2, 16, 2, 2)], device)


@pytest.mark.parametrize("grad, options", [(True, {}), (False, {}), (True, {"variant": "paper"})], ids=str)
def test_export_model(device, options, grad):
    """One program from 32 x 32 on, where the last stage is a single pixel."""
    model = small(depths=(1, 1, 1, 1), **options).to(device)
    with torch.set_grad_enabled(grad):
        program = exported(model, image(*IMAGES[0], device=device, dtype=torch.float32), 32)
        check(program.module(), program.module(), model, IMAGES, device)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    with torch.set_grad_enabled(grad):
        check(loaded, loaded, model, IMAGES[1:3], device)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("dim", [16, 256, 512])
def test_export_fixes_no_size_of_cuda(dim, scan):
    """The fake kernels for devices other than the CPU, whose saved states have no closed form."""
    layer = make(dim, scan=scan).to("meta")
    exported(layer, torch.empty(2, dim, 16, 24, device="meta"), 2)


@fakes_of_cuda
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "options, one_op",
    [
        ({}, True),
        ({"variant": "paper"}, False),
        ({"directions": ("lr", "tb") * 4}, True),
        ({"directions": ("bt",), "variant": "fused"}, True),
        ({"gate_source": "output"}, False),
    ],
)
def test_export_model_for_cuda(options, one_op, grad):
    """By fake tensors, which need no GPU: the fused ops, in one program from 32 x 32 on."""
    with FakeTensorMode(shape_env=ShapeEnv()), torch.device("cuda"):
        model, x = small(depths=(1, 1, 1, 1), **options), torch.empty(2, 3, 64, 96)
    with torch.set_grad_enabled(grad):
        program = exported(model, x, 32)
    ops = {node.target.name() for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    fused = {"groupmamba::feed_forward" + "_fwd" * grad, "groupmamba::token_norm_fwd"}
    layer = "grouped_mamba_layer" + "_fwd" * grad if one_op else "grouped_selective_scan_fwd"
    assert fused | {f"groupmamba::{layer}"} <= ops
    sizes = [size for node in program.graph.nodes if node.op == "placeholder" for size in node.meta["val"].shape]
    shapes = next(size.node.shape_env for size in sizes if isinstance(size, torch.SymInt))
    assert not [guard.expr for guard in shapes.guards if guard.expr.func is sympy.Ne]


@fakes_of_cuda
@pytest.mark.parametrize("grad", [True, False])
def test_exported_program_is_for_any_gpu(grad, monkeypatch):
    """In 16 bits the stem's convolutions have kernels that one kind of GPU runs: not in a program that others load."""
    monkeypatch.setattr(narrow_conv, "has_sm90a", lambda device: True)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode(shape_env=ShapeEnv()), torch.device("cuda"):
            model, x = small(depths=(1, 1, 1, 1), stem_dim=32).train(grad), torch.empty(2, 3, 64, 96)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.set_grad_enabled(grad):
        program = exported(model, x, 32)
    ops = {node.target.name() for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    assert not [name for name in ops if "narrow_conv" in name] and "groupmamba::token_norm_fwd" in ops


# torch.compile(dynamic=True) ---------------------------------------------------------------


def check_dynamic(module, sizes, device, grad, backend="aot_eager"):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    with torch.set_grad_enabled(grad):
        check(compiled, module, module, sizes, device, 1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@LAYERS
def test_compile_dynamic_layer(device, variant, scan, grad):
    check_dynamic(make(16, variant=variant, scan=scan, device=device), [s for s in SIZES if s[0] > 1], device, grad)


def test_compile_dynamic_model(device):
    model = small(depths=(1, 1, 1, 1)).to(device)
    check_dynamic(model, [s for s in IMAGES if s[0] > 1], device, True, "eager")


class Features(torch.nn.Module):
    """The maps of a backbone, or what a model returns, as one matrix."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        outputs = self.model(x)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        return torch.cat([y.flatten(1).float() for y in outputs], 1)


STAGES = {"dims": (16, 24), "depths": (1, 1), "mlp_ratios": (2, 2)}
# The first map's sides differ from its channels: dynamo has one symbol for sizes that are equal at first.
TRAINED = [(2, 3, 72, 104), (3, 3, 96, 64), (2, 3, 80, 160), (4, 3, 33, 47)]


def trained_model(**options):
    pytest.importorskip("timm", reason="needs the extra 'models'")
    from support import models as model_tools

    maps = {"out_indices": (0, 1)} if options.get("features_only") else {}
    return Features(model_tools.tiny(**STAGES, **maps, **options)).train()


@pytest.mark.parametrize(
    "options", [{"features_only": True}, {"variant": "fused", "features_only": True}, {"variant": "paper"}], ids=str
)
def test_compile_dynamic_training(device, options):
    """One graph for batches, heights and widths of training; the last stage of the last image has a side of 5."""
    check_dynamic(trained_model(**options).to(device), TRAINED, device, True)


def test_compile_marked_sizes(device):
    """torch raises where a size is fixed that the caller marks as dynamic."""
    module = trained_model(features_only=True).to(device).to(memory_format=torch.channels_last)
    x = image(*TRAINED[0], device=device, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    for dim in (0, 2, 3):
        torch._dynamo.mark_dynamic(x, dim)
    torch._dynamo.reset()
    with torch.autocast(device, torch.bfloat16):
        torch.compile(module, backend="aot_eager", fullgraph=True)(x).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_inductor_around_convolutions():
    """Inductor can't keep 4-D views of symbolic size for the backward of what has convolutions; there are none."""
    pytest.importorskip("timm", reason="needs the extra 'models'")
    from groupmamba.models.blocks import Downsample, GroupMambaBlock

    torch.manual_seed(0)
    kinds = ({}, {"variant": "paper"}, {"variant": "fused", "gate_source": "output"}, {})
    blocks = [GroupMambaBlock(16, 2, 0.0, **options) for options in kinds]
    for module in (blocks[-1].attn.proj, blocks[-1].mlp.fc1):  # calls its submodules one by one
        module.register_forward_hook(lambda module, inputs, output: output * 2)
    network = torch.nn.Sequential(*blocks, Downsample(16, 24)).train()
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, dynamic=True)
    check(compiled, network, network, [(2, 12, 14, 16)], "cpu", 1e-5)


def test_a_view_stays_one_in_eager_calls():
    """What `keepable` changes is for inductor alone."""
    from groupmamba.layers.tracing import keepable

    x = torch.randn(2, 4, 5, 3).permute(0, 3, 1, 2)
    assert keepable(x) is x


def test_inductor_stem_of_plain_images():
    """It makes images channels-last itself, and a backward keeps what it has made."""
    pytest.importorskip("timm", reason="needs the extra 'models'")
    from groupmamba.models.blocks import Stem

    torch.manual_seed(0)
    stem = Stem(3, 8, 16, paper=False).train()
    torch._dynamo.reset()
    compiled = torch.compile(stem, fullgraph=True, dynamic=True)
    x = torch.randn(2, 3, 32, 48)
    wanted = results(stem, stem, x)
    for a, b in zip(results(compiled, stem, x), wanted, strict=True):
        assert (a - b).norm() <= 1e-5 * max(b.norm().item(), 1.0)


def test_inductor_dynamic_blocks():
    """The blocks of a stage, which have none of torch's convolutions, are one compiled program for all sizes."""
    module, eager = trained_model(features_only=True), trained_model(features_only=True)
    eager.load_state_dict(module.state_dict())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for stage in (m for m in module.modules() if hasattr(m, "blocks")):
        stage.blocks.compile(fullgraph=True, dynamic=True)
    for size in TRAINED:
        x = image(*size, dtype=torch.float32)
        for a, b in zip(results(module, module, x), results(eager, eager, x), strict=True):
            assert (a - b).norm() <= 1e-5 * max(b.norm().item(), 1.0), size
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(STAGES["depths"])
