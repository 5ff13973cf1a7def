# SPDX-License-Identifier: Apache-2.0
"""One step of ``groupmamba train``: its parts, its rates, what is decayed, and its CUDA graph."""

import pytest
import torch

from support.training import PLAIN, losses, make_pictures, rows, train

pytest.importorskip("timm")

import timm
from safetensors.torch import load_file
from timm.utils import ModelEmaV3

import groupmamba.models
from groupmamba import DistillationLoss
from groupmamba.training import graph, options, step
from groupmamba.training.recipe import rates

SIZES = {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32), "stem_dim": 8, "mlp_ratios": (2, 2, 2, 2)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


def test_accumulated_steps_see_what_one_step_sees(data, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    more = ["--epochs", "1", *PLAIN, "--freeze-bn", "--clip-grad", "0"]
    assert train(data, one, *more) == 0
    assert train(data, two, *more, "-b", "4", "--grad-accum-steps", "2") == 0
    assert [float(x) for x in losses(one)] == pytest.approx([float(x) for x in losses(two)], abs=1e-5)


def test_rates_of_a_run(data, tmp_path):
    run = tmp_path / "run"
    assert train(data, run, "--epochs", "4", "--warmup-epochs", "2", *PLAIN, "--lr-base-size", "4") == 0
    found = [float(row["lr"]) for row in rows(run / "steps.csv")]
    high, first, last = rates(8, lr_base_size=4)
    assert len(found) == 20 and found[0] == first and found[10] == high
    assert found[:10] == pytest.approx([first + (high - first) * i / 10 for i in range(10)], rel=1e-9)
    cosine = [last + (high - last) * (1 + torch.cos(torch.tensor(torch.pi * i / 10)).item()) / 2 for i in range(10)]
    assert found[10:] == pytest.approx(cosine, rel=1e-5)


def test_what_is_decayed():
    model = timm.create_model("groupmamba_tiny", num_classes=3, **SIZES)
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def decayed(*argv):
        args = options.complete({"data": "", **argv[0]} if argv else {"data": ""})
        optimizer = step.make_optimizer(model, args, 1e-3)
        groups = [group for group in optimizer.param_groups if group["weight_decay"] > 0]
        assert {group["weight_decay"] for group in groups} == {0.05}
        return {names[id(parameter)] for group in groups for parameter in group["params"]}

    ours, released = decayed(), decayed({"decay_all": True})
    assert not any(name.endswith(("bias", "A_log", ".D", "norm_weight")) for name in ours)
    assert {name.rpartition(".")[2] for name in released - ours} == {"A_log", "dt_bias"}
    assert "head.weight" in ours and "stem.conv.0.weight" in ours and ours < released
    assert len(decayed({"layer_decay": 0.9})) == len(ours)


def test_a_step_is_what_its_parts_are():
    """A step by hand, from the parts of torch and timm, is the step."""
    torch.manual_seed(0)
    model = timm.create_model("groupmamba_tiny", num_classes=3, **SIZES).train()
    twin = timm.create_model("groupmamba_tiny", num_classes=3, **SIZES).train()
    twin.load_state_dict(model.state_dict())
    args = options.complete({"data": ""})
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    criterion = DistillationLoss(torch.nn.CrossEntropyLoss(), None, kind="none")
    ours = step.Step(model, criterion, step.make_optimizer(model, args, 1e-2), ema=ModelEmaV3(model, 0.5), clip=0.1)
    optimizer, average = step.make_optimizer(twin, args, 1e-2), ModelEmaV3(twin, 0.5)
    for i in range(3):
        loss = ours(i, [(images, labels)])
        optimizer.zero_grad()
        expected = torch.nn.functional.cross_entropy(twin(images), labels)
        expected.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        optimizer.step()
        average.update(twin)
        assert loss.item() == expected.item()
    for (name, a), b in zip(ours.ema.module.state_dict().items(), average.module.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_why_there_is_no_graph():
    args = options.complete({"data": ""})
    cpu, gpu, half = torch.device("cpu"), torch.device("cuda", 0), torch.bfloat16
    assert graph.why_not(args, gpu, half) is None
    assert graph.why_not(args, cpu, None) == "there is no GPU"
    assert "scaler" in graph.why_not(args, gpu, torch.float16)
    for given, words in (
        ({"no_cuda_graph": True}, "--no-cuda-graph"),
        ({"opt": "lion"}, "--opt lion"),
        ({"grad_accum_steps": 2}, "--grad-accum-steps 2"),
    ):
        assert words in graph.why_not(options.complete({"data": "", **given}), gpu, half)


@pytest.mark.cuda
def test_a_graph_computes_what_single_launches_compute(data, tmp_path):
    """50 steps across the end of the warm-up, with drop path, mixup, a moving average and a teacher, bit for bit."""
    model_path = tmp_path / "teacher"
    base = ["--device", "cuda", "--img-size", "64"]
    assert train(data, model_path, "--epochs", "1", "--lr", "1e-3", *base) == 0
    more = ["--epochs", "10", "--warmup-epochs", "5", "--lr", "1e-3", "--drop-path", "0.2", *base]
    more += ["--kd-model-path", str(model_path / "last.safetensors")]
    assert train(data, tmp_path / "graph", *more) == 0
    assert train(data, tmp_path / "eager", *more, "--no-cuda-graph") == 0
    assert len(losses(tmp_path / "graph")) == 50
    assert losses(tmp_path / "graph") == losses(tmp_path / "eager")
    for name in ("last.safetensors", "checkpoints/step-00000050/ema.safetensors"):
        ours, theirs = (load_file(tmp_path / run / name) for run in ("graph", "eager"))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.cuda
@pytest.mark.parametrize(
    "more, why",
    [
        (["--opt", "lion"], "--opt lion"),
        (["--amp-dtype", "float16"], "float16's scaler"),
        (["-b", "4", "--grad-accum-steps", "2"], "--grad-accum-steps 2"),
    ],
)
def test_where_a_step_is_no_graph_its_passes_are(data, tmp_path, capsys, more, why):
    """The losses of single launches, bit for bit, with drop path and mixing."""
    base = ["--device", "cuda", "--img-size", "64", "--epochs", "3", "--lr", "1e-3", "--drop-path", "0.2", *more]
    assert train(data, tmp_path / "graphs", *base) == 0
    assert f"the model's passes are CUDA graphs, not whole steps: {why}" in capsys.readouterr().err
    assert train(data, tmp_path / "eager", *base, "--no-cuda-graph") == 0
    assert "without a CUDA graph: --no-cuda-graph" in capsys.readouterr().err
    assert len(losses(tmp_path / "graphs")) == 15
    assert losses(tmp_path / "graphs") == losses(tmp_path / "eager")


@pytest.mark.cuda
def test_capture_leaves_everything_as_it_was():
    torch.manual_seed(0)
    model = timm.create_model("groupmamba_tiny", num_classes=3, drop_path_rate=0.2, **SIZES).train().cuda()
    args = options.complete({"data": ""})
    criterion = DistillationLoss(torch.nn.CrossEntropyLoss(), None, kind="none")
    optimizer = step.make_optimizer(model, args, 1e-2)
    ours = step.Step(model, criterion, optimizer, ema=ModelEmaV3(model, 0.5), clip=0.1, amp=torch.bfloat16)
    images, labels = torch.randn(4, 3, 32, 32, device="cuda"), torch.tensor([0, 1, 2, 0], device="cuda")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.cuda.get_rng_state()
    assert graph.capture(ours, images, labels) is None
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(before[name], value) for name, value in ours.ema.module.state_dict().items())
    assert all(not value.any() for state in optimizer.state.values() for value in state.values())
    assert torch.equal(generator, torch.cuda.get_rng_state())
    first = ours(0, [(images, labels)]).item()
    assert all(state["step"].item() == 1 for state in optimizer.state.values())
    shorter = ours(1, [(images[:3], labels[:3])]).item()  # of another shape: without the graph
    assert first == first and shorter == shorter


@pytest.mark.parametrize("begun", [False, True])
def test_warming_up_leaves_no_trace(begun):
    """What a graph's warm-up changes comes back bit for bit, in place; on the CPU, where there is no graph."""
    torch.manual_seed(0)
    model = timm.create_model("groupmamba_tiny", num_classes=3, **SIZES).train()
    args = options.complete({"data": ""})
    criterion = DistillationLoss(torch.nn.CrossEntropyLoss(), None, kind="none")
    ours = step.Step(model, criterion, step.make_optimizer(model, args, 1e-2), ema=ModelEmaV3(model, 0.5), clip=0.1)
    pieces = [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]))]
    if begun:
        ours(0, pieces)

    def state():
        found = {**model.state_dict(), **{f"ema.{k}": v for k, v in ours.ema.module.state_dict().items()}}
        for i, of_one in enumerate(ours.optimizer.state.values()):
            found.update({f"{i}.{name}": value for name, value in of_one.items()})
        return found

    before = {name: value.clone() for name, value in state().items()}
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    snapshot = graph.Snapshot(ours)
    for i in range(3):
        ours(1 + i, pieces)
    assert not any(torch.equal(before[name], value) for name, value in state().items() if name.endswith("head.weight"))
    snapshot.restore()
    for name, value in state().items():
        assert torch.equal(value, before.get(name, torch.zeros_like(value))), name
    assert addresses == [parameter.data_ptr() for parameter in model.parameters()]
    # Adam from zeros is Adam from nothing.
    twin = timm.create_model("groupmamba_tiny", num_classes=3, **SIZES).train()
    twin.load_state_dict(model.state_dict())
    fresh = step.Step(twin, criterion, step.make_optimizer(twin, args, 1e-2), clip=0.1)
    if not begun:
        for i in range(2):
            assert ours(i, pieces).item() == fresh(i, pieces).item()


assert groupmamba.models
