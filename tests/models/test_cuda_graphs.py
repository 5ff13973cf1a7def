# SPDX-License-Identifier: Apache-2.0
"""``use_cuda_graphs``: results, gradients and random numbers are those of eager calls.

Each test runs on a GPU, and on the CPU with graphs that run their function again.
"""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from groupmamba import CudaGraphs, use_cuda_graphs
from support.graphs import (
    assert_same,
    emulated,  # noqa: F401
    images,
    recorded_twins,
    small,
    state_of_numbers,
    step,
    twins,
)

pytest.importorskip("timm")


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_training_is_that_of_eager_calls(device, amp):
    """Two shapes in turn, with stochastic depth: losses, gradients, statistics and what is drawn next, bit for bit."""
    model, twin, graphs = twins(device, drop_path_rate=0.3)
    xs = [images(4, 3, 32, 64, device=device), images(2, 3, 64, 32, device=device)]
    for i in range(10):
        torch.manual_seed(i)
        loss, gradients = step(model, xs[i % 2], amp)
        drawn = state_of_numbers(device)
        torch.manual_seed(i)
        expected, expected_gradients = step(twin, xs[i % 2], amp)
        assert torch.equal(loss, expected), i
        assert_same(gradients, expected_gradients)
        assert torch.equal(drawn, state_of_numbers(device))
        assert_same(model.state_dict(), twin.state_dict())
        assert len(graphs) == (0 if i < 4 else 1 if i < 5 else 2)


def test_evaluation_is_that_of_eager_calls(device):
    model, twin, graphs = twins(device)
    model.eval(), twin.eval()
    x = images(2, 3, 32, 32, device=device)
    for context in (torch.no_grad, torch.inference_mode):
        before = len(graphs)
        with context():
            kept = [(model(x + i), twin(x + i)) for i in range(6)]
        assert len(graphs) == before + 1
        for ours, theirs in kept:  # earlier results are not overwritten
            assert torch.equal(ours, theirs)
            assert ours.is_inference() == theirs.is_inference()


def test_weights_are_those_of_now(device):
    """An optimizer's steps and loaded weights are seen, since both change parameters in place."""
    model, twin, graphs = twins(device)
    pair = [(m, torch.optim.SGD(m.parameters(), lr=0.1)) for m in (model, twin)]
    x = images(2, 3, 32, 32, device=device)
    for _ in range(6):
        losses = []
        for m, optimizer in pair:
            loss = m(x).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == losses[1]
    other = small(device).state_dict()
    model.load_state_dict(other), twin.load_state_dict(other)
    assert torch.equal(step(model, x)[0], step(twin, x)[0])
    assert len(graphs) == 1


def test_gradients_add_up_and_are_the_callers_own(device):
    model, twin, graphs, x = recorded_twins(device)
    held = []
    for m in (model, twin):
        for i in range(3):
            (m(x + i)).square().sum().backward()
            held.append([p.grad for p in m.parameters()])
    assert len(graphs) == 1
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
        assert a.grad.data_ptr() % 16 == 0
    assert all(a is b for a, b in zip(held[0], held[2], strict=True))


def test_hooks_of_parameters_and_of_the_module_itself_run(device):
    model, _, graphs = twins(device)
    x = images(2, 3, 32, 32, device=device)
    seen = []
    first = next(model.parameters())
    first.register_hook(lambda grad: seen.append("tensor") or grad * 2)
    first.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    model.register_forward_pre_hook(lambda m, args: seen.append("before"))
    model.register_forward_hook(lambda m, args, out: seen.append("after"))
    _, eager = step(model, x)
    step(model, x)
    seen.clear()
    _, replayed = step(model, x)
    assert len(graphs) == 1 and seen == ["before", "after", "tensor", "accumulated"]
    assert_same(eager, replayed)


class Several(nn.Module):
    """Arguments and results of many kinds."""

    def __init__(self):
        super().__init__()
        self.a, self.unused = nn.Linear(4, 4), nn.Linear(2, 2)
        self.b = nn.Linear(4, 4).to(torch.bfloat16)
        self.scalar = nn.Parameter(torch.tensor(2.0))

    def forward(self, x, y=None, *, scale=1.0, name="n"):
        z = self.a(x) * scale * self.scalar
        if y is not None:
            z = z + y
        return {"z": z, "rest": (z.detach() + 1, None, name), "long": z.argmax(-1), "half": self.b(x.bfloat16())}


def test_arguments_and_results_of_many_kinds(device):
    torch.manual_seed(0)
    model = Several().to(device)
    twin = copy.deepcopy(model)
    graphs = use_cuda_graphs(model)
    x, y = images(3, 4, device=device), images(3, 4, device=device, seed=2)
    for _ in range(4):
        for scale, wants in ((1.0, False), (2.0, True)):
            found = []
            for m in (model, twin):
                a, b = x.clone().requires_grad_(wants), y.clone().requires_grad_()
                out = m(a, y=b, scale=scale, name="m")
                assert out["rest"][1:] == (None, "m")
                assert [t.requires_grad for t in (out["z"], out["rest"][0], out["long"])] == [True, False, False]
                (out["z"].sum() + out["half"].float().sum()).backward()
                grads = [a.grad, b.grad, *(p.grad for p in m.parameters())]
                found.append([out["z"], out["rest"][0], out["long"], out["half"], *grads])
                m.zero_grad()
            for ours, theirs in zip(*found, strict=True):
                assert (ours is None) == (theirs is None)
                assert ours is None or (torch.equal(ours, theirs) and ours.dtype == theirs.dtype)
    assert len(graphs) == 2
    only = model(x, scale=1.0)  # another set of arguments
    (only["half"].sum()).backward()  # a result without a gradient counts as zero
    assert len(graphs) == 2


def test_strides_are_told_apart(device):
    model, twin, graphs = twins(device)
    model.eval(), twin.eval()
    x = images(2, 3, 32, 32, device=device)
    with torch.no_grad():
        for _ in range(4):
            for layout in (torch.contiguous_format, torch.channels_last):
                assert torch.equal(model(x.to(memory_format=layout)), twin(x.to(memory_format=layout)))
            expanded = x[:1].expand(2, -1, -1, -1)
            assert torch.equal(model(expanded), twin(expanded))
    assert len(graphs) == 3


def test_copies_have_none_and_remove_takes_them_away(device):
    model, twin, graphs = twins(device)
    model.eval(), twin.eval()
    x = images(1, 3, 32, 32, device=device)
    with torch.no_grad():
        for _ in range(4):
            expected = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert not isinstance(other.forward, CudaGraphs)
            for p in other.parameters():
                p.zero_()
            assert not torch.equal(other(x), expected) and torch.equal(model(x), expected)
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        assert model.state_dict().keys() == twin.state_dict().keys()
        assert use_cuda_graphs(model) is not graphs and len(graphs) == 0  # the earlier ones are gone
        model.forward.remove()
        assert "forward" not in model.__dict__ and torch.equal(model(x), expected)


def test_a_forward_of_its_own_comes_back(device):
    model = nn.Linear(2, 2).to(device)
    model.forward = lambda x: x + 1
    before, graphs = model.forward, use_cuda_graphs(model, eager_calls=1)
    x = images(1, 2, device=device)
    for _ in range(3):
        assert torch.equal(model(x), x + 1)
    assert len(graphs) == 1
    graphs.remove()
    assert model.forward is before


def test_distributed_data_parallel(device, tmp_path):
    """Its hooks get the gradients, and the model behind it takes the same steps."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model, twin, graphs = twins(device)
        model.set_distilled_training(True), twin.set_distilled_training(True)  # with both heads all parameters have one
        wrapped = DistributedDataParallel(model)
        seen = []

        def averaged(state, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
            seen.append(bucket.index())
            return allreduce_hook(None, bucket)

        wrapped.register_comm_hook(None, averaged)
        x = images(2, 3, 32, 32, device=device)
        for i in range(5):
            seen.clear()
            found = []
            for m in (wrapped, twin):
                sum(y.square().sum() for y in m(x + i)).backward()
                found.append([p.grad.clone() for p in m.parameters()])
                m.zero_grad()
            assert seen and len(graphs) == (i >= 2)
            for a, b in zip(*found, strict=True):
                torch.testing.assert_close(a, b)
    finally:
        torch.distributed.destroy_process_group()


def test_hooks_of_what_has_no_gradient(device):
    model = Several().to(device)
    use_cuda_graphs(model)
    model.unused.weight.register_hook(lambda grad: grad * 2)
    x = images(3, 4, device=device)
    for _ in range(5):
        model(x)["z"].sum().backward()
    assert model.unused.weight.grad is None


def test_recording_disturbs_no_backward_that_is_still_to_come(device):
    """Statistics of the first call's BatchNorm are put back unseen."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).to(device)
    use_cuda_graphs(model, eager_calls=1)
    x, other = images(2, 3, 8, 8, device=device), images(2, 3, 4, 4, device=device)
    model(other).sum().backward()
    model.eval()
    with torch.no_grad():
        model(other)
    model.train()
    y = model(x)  # eager
    model.eval()
    with torch.no_grad():
        model(other)  # records
    y.sum().backward()


def test_modules_of_a_plain_function_are_pickled():
    model = nn.Linear(2, 2)
    model.forward = torch.sin
    use_cuda_graphs(model)
    assert pickle.loads(pickle.dumps(model)).forward is torch.sin


def test_a_compiled_forward_can_be_recorded(device):
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)).to(device)
    twin = copy.deepcopy(model)
    model.forward = torch.compile(model.forward, backend="aot_eager")
    graphs = use_cuda_graphs(model)
    x = images(5, 4, device=device)
    for _ in range(5):
        ours, theirs = step(model, x), step(twin, x)
        torch.testing.assert_close(ours, theirs)
    assert len(graphs) == 1


def test_modules_inside_one_another(device):
    model, twin, outer = twins(device)
    inner = use_cuda_graphs(model.stem)
    x = images(2, 3, 32, 32, device=device)
    for i in range(8):
        assert_same(step(model, x + i)[1], step(twin, x + i)[1])
    assert len(outer) == 1 and len(inner) <= 1


def test_compile_export_and_trace_see_the_module():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    x = torch.randn(2, 3)
    expected = model(x)
    use_cuda_graphs(model)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), expected)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), expected)


def test_no_more_graphs_than_asked_for(device):
    model = small(device).eval()
    graphs = use_cuda_graphs(model, max_graphs=2, eager_calls=1)
    with torch.no_grad():
        for i in range(3):
            for side in (32, 64, 96):
                model(images(1, 3, side, 32, device=device))
            assert len(graphs) == (0 if i == 0 else 2)
    assert repr(graphs) == "CudaGraphs(GroupMamba, 2 of at most 2)"
    graphs.clear()
    assert len(graphs) == 0


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (("groupmamba_tiny",), TypeError, "module must be a torch.nn.Module, got str"),
        ((nn.ReLU(), "64"), TypeError, "max_graphs must be an integer, got '64'"),
        ((nn.ReLU(), True), TypeError, "max_graphs must be an integer, got True"),
        ((nn.ReLU(), 0), ValueError, "max_graphs must be at least 1, got 0"),
        ((nn.ReLU(), 2, 0), ValueError, "eager_calls must be at least 1, got 0"),
    ],
)
def test_wrong_arguments(arguments, error, words):
    names = dict(zip(("max_graphs", "eager_calls"), arguments[1:], strict=False))
    with pytest.raises(error, match=words):
        use_cuda_graphs(arguments[0], **names)
