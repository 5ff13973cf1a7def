# SPDX-License-Identifier: Apache-2.0
"""``use_cuda_graphs``: results, gradients and random numbers are those of eager calls; where there is no graph.

Each test runs on a GPU, and on the CPU with graphs that run their function again.
"""

import copy
import io
import pickle
import threading
import warnings
from contextlib import nullcontext, suppress

import pytest
import torch
from torch import nn

from groupmamba import CudaGraphs, use_cuda_graphs
from groupmamba.cuda_graphs import arguments
from groupmamba.cuda_graphs.recorder import capturing
from support.graphs import emulate

timm = pytest.importorskip("timm")

import groupmamba.models  # noqa: E402, F401

SIZES = {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32), "stem_dim": 8, "mlp_ratios": (2, 2, 2, 2)}


@pytest.fixture(autouse=True)
def _emulated(request, monkeypatch):
    """For tests on the CPU; on a GPU cuDNN's kernels that repeat bit for bit."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    if "device" in request.fixturenames and request.getfixturevalue("device") == "cpu":
        emulate(monkeypatch)


def small(device, **options):
    torch.manual_seed(0)
    return timm.create_model("groupmamba_tiny", num_classes=3, **SIZES, **options).to(device)


def images(*shape, device, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def state_of_numbers(device):
    return torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()


def step(model, x, amp=None):
    """Loss and gradients of a call in training, which are then None again."""
    with torch.autocast(x.device.type, amp, enabled=amp is not None):
        loss = sum(y.float().square().sum() for y in [model(x)])
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = None
    return loss.detach(), found


def twins(device, **options):
    model = small(device, **options)
    twin = copy.deepcopy(model)
    return model, twin, use_cuda_graphs(model)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].stride() == b[name].stride() or a[name].numel() == 1, name
        assert torch.equal(a[name], b[name]), name


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
    model, twin, graphs = twins(device)
    x = images(2, 3, 32, 32, device=device)
    for _ in range(3):
        step(model, x)
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


def test_a_hook_inside_makes_calls_eager(device):
    model, twin, graphs = twins(device)
    x = images(2, 3, 32, 32, device=device)
    for _ in range(3):
        step(model, x)
    seen = []
    handle = model.norm.register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(step(model, x)[0], step(twin, x)[0]) and seen == [1]
    handle.remove()
    step(model, x)
    assert seen == [1] and len(graphs) == 1


def test_what_changes_is_noticed(device):
    """Frozen parameters, a frozen part in evaluation mode, another head, parameters elsewhere."""
    model, twin, graphs = twins(device, drop_path_rate=0.1)
    x = images(4, 3, 32, 32, device=device)

    def check(count):
        for i in range(4):
            results = []
            for m in (model, twin):
                torch.manual_seed(i)
                loss = m(x).square().sum()
                loss.backward()
                results.append((loss, [p.grad for p in m.parameters()]))
                for p in m.parameters():
                    p.grad = None
            assert torch.equal(results[0][0], results[1][0])
            for a, b in zip(results[0][1], results[1][1], strict=True):
                assert (a is None) == (b is None) and (a is None or torch.equal(a, b))
        assert len(graphs) == count

    check(1)
    for m in (model, twin):
        m.stem.requires_grad_(False)
    check(2)
    for m in (model, twin):
        m.stem.eval()
    check(3)
    for m in (model, twin):
        torch.manual_seed(5)
        m.reset_classifier(7)
        m.to(x.device)
    check(1)  # all are made anew
    for m in (model, twin):
        for p in m.parameters():
            p.data = p.data * 2
    check(1)


def test_attributes_are_looked_at(device):
    """Distilled training, that of a part, and one that was not there before."""

    class Scaled(nn.Module):
        def forward(self, x):
            return x * getattr(self, "scale", 1.0)

    model = nn.Sequential(Scaled())
    graphs = use_cuda_graphs(model, eager_calls=1)
    x = images(2, 3, device=device)
    for scale in (None, 2.0, 3.0, 2.0):
        if scale is not None:
            model[0].scale = scale
        for _ in range(3):
            assert torch.equal(model(x), x * (1.0 if scale is None else scale))
    assert len(graphs) == 2
    model, _, graphs = twins(device)
    y = images(2, 3, 32, 32, device=device)
    for distilled in (True, False, True):
        model.set_distilled_training(distilled)
        for _ in range(4):
            assert isinstance(model(y), tuple) == distilled
    assert len(graphs) == 2


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
                for p in m.parameters():
                    p.grad = None
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


def test_backward_through_an_earlier_call_is_an_error(device):
    model, twin, _ = twins(device)
    x = images(2, 3, 32, 32, device=device)
    for _ in range(3):
        step(model, x)
    first = model(x).sum()
    model(x).sum().backward()
    with pytest.raises(RuntimeError, match="only through its last call"):
        first.backward()
    for p in model.parameters():
        p.grad = None
    assert_same(step(model, x)[1], step(twin, x)[1])
    y = model(x)
    with torch.no_grad():
        model(x)  # evaluation in between does no harm
    y.square().sum().backward()


def test_a_second_backward_is_an_error(device):
    """What the first one read is overwritten by then."""
    model, twin, _ = twins(device)
    x = images(2, 3, 32, 32, device=device)
    for _ in range(3):
        step(model, x)
    y = model(x)
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        y.square().sum().backward()
    for p in model.parameters():
        p.grad = None
    assert_same(step(model, x)[1], step(twin, x)[1])


def test_second_derivatives_are_an_error(device):
    model, _, _ = twins(device)
    x = images(2, 3, 32, 32, device=device)
    for _ in range(3):
        step(model, x)
    x = x.requires_grad_()
    for _ in range(3):
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


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


def test_what_cannot_be_recorded_runs_as_ever(device, monkeypatch):
    class Reads(nn.Module):
        def forward(self, x):
            if x.is_cuda:
                return x * x.sum().item()  # waits for the GPU
            if getattr(arguments._thread, "recording", False):
                raise RuntimeError("operation not permitted when stream is capturing")
            return x * x.sum()

    model = Reads()
    graphs = use_cuda_graphs(model)
    x = images(3, device=device)
    model(x), model(x)
    with pytest.warns(UserWarning, match=r"Reads runs without a CUDA graph for \(3,\): .*captur"):
        y = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.allclose(model(x), y) and torch.allclose(y, x * x.sum())
    assert len(graphs) == 0 and len(graphs.reasons) == 1
    other = small(device).eval()  # nothing is left behind
    use_cuda_graphs(other, eager_calls=1)
    with torch.no_grad():
        z = images(1, 3, 32, 32, device=device)
        assert torch.equal(other(z), other(z))


class Leaves(nn.Module):
    """Does, by name, what a graph can't do again, and counts its calls from Python."""

    def __init__(self, what, device):
        super().__init__()
        self.what, self.calls = what, []
        self.a = nn.Linear(4, 4).to(device)
        self.list = [nn.Linear(4, 4).to(device)]
        self.aux = torch.zeros((), device=device)

    def forward(self, x):
        self.calls.append(1)
        if self.what == "writes":
            x.relu_()
        y = self.a(x)
        if self.what == "another module":
            y = y + self.list[0](x)
        if self.what == "attribute":
            self.aux = y.square().mean()
        return y


@pytest.mark.parametrize(
    "what, words",
    [
        ("writes", "writes into an argument"),
        ("another module", "neither an argument nor a parameter"),
        ("attribute", "keeps a tensor in an attribute"),
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_what_a_graph_would_lose_stays_eager(device, what, words, grad):
    """Values written into an argument, gradients of other modules, a loss on the side."""
    torch.manual_seed(0)
    model = Leaves(what, device)
    graphs = use_cuda_graphs(model)
    x = images(3, 4, device=device)
    with torch.set_grad_enabled(grad), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            model.calls.clear()
            given = x.clone()
            y = model(given)
            if what == "writes":
                assert torch.equal(given, x.relu())
            if grad:
                (y.sum() + model.aux).backward()
                if what == "another module":
                    assert model.list[0].weight.grad is not None
                    model.list[0].weight.grad = None
    if what == "another module" and not grad:
        assert len(graphs) == 1
    elif what == "attribute":  # every call makes another one
        assert len(graphs) == 0 and model.calls == [1]
    else:
        assert any(words in str(warning.message) for warning in caught), [str(w.message) for w in caught]
        assert len(graphs) == 0 and model.calls == [1]


def test_writes_in_inference_mode_are_seen(device):
    model = nn.Sequential(nn.ReLU(inplace=True)).to(device)
    graphs = use_cuda_graphs(model)
    with torch.inference_mode(), pytest.warns(UserWarning, match="writes into an argument"):
        for _ in range(4):
            x = images(5, device=device)
            model(x)
            assert x.min() == 0
    assert len(graphs) == 0


class Cached(nn.Module):
    """Keeps a bias for evaluation, as some of timm's models do."""

    def __init__(self, device):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, device=device))
        self.cache = {}

    def train(self, mode=True):
        self.cache = {}
        return super().train(mode)

    def forward(self, x):
        if self.training:
            return x * self.weight
        if "bias" not in self.cache:
            self.cache["bias"] = self.weight * 2
        return x + self.cache["bias"]


def test_a_cache_that_is_emptied(device):
    model = Cached(device).eval()
    graphs = use_cuda_graphs(model)
    x = images(3, 4, device=device)
    with torch.no_grad():
        for factor in (1.0, 3.0):
            model.train().weight.fill_(factor)
            model.eval()
            for _ in range(5):
                assert torch.equal(model(x), x + 2 * factor)
            assert len(graphs) == 1


def test_tensors_of_a_functional_call(device):
    """Gradients go to the tensors that were given, not to the parameters whose memory they share."""
    model = nn.Linear(4, 4).to(device)
    use_cuda_graphs(model)
    x = images(3, 4, device=device)
    for _ in range(4):
        model(x).sum().backward()
    model.weight.grad = model.bias.grad = None
    given = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    for _ in range(4):
        torch.func.functional_call(model, given, (x,)).sum().backward()
    assert model.weight.grad is None and given["weight"].grad is not None
    detached = {name: p.detach() for name, p in model.named_parameters()}
    for _ in range(4):
        assert not torch.func.functional_call(model, detached, (x,)).requires_grad


def test_attributes_of_any_kind(device):
    """None that becomes a list or a tensor, and back."""
    model = nn.Sequential(nn.Linear(4, 4)).to(device)
    model.note = None
    graphs = use_cuda_graphs(model)
    x = images(3, 4, device=device)
    expected = model(x)
    for value in (None, [1, 2], x.clone().requires_grad_() * 2, None):
        model.note = value
        for _ in range(4):
            assert torch.equal(model(x), expected)
    assert len(graphs.seen) <= 3


def test_arguments_that_never_come_again(device):
    class Scaled(nn.Module):
        def forward(self, x, scale):
            return x * scale

    model = Scaled()
    graphs = use_cuda_graphs(model, max_graphs=1)
    x = images(3, device=device)
    for i in range(100):
        assert torch.equal(model(x, float(i)), x * i)
    assert len(graphs) == 0 and len(graphs.seen) <= 17


def test_checkpointing_around_a_module(device):
    from torch.utils.checkpoint import checkpoint

    model, twin, _ = twins(device)
    x = images(2, 3, 32, 32, device=device)
    for _ in range(5):
        found = []
        for m in (model, twin):
            checkpoint(m, x, use_reentrant=False).square().sum().backward()
            found.append({name: p.grad for name, p in m.named_parameters()})
            for p in m.parameters():
                p.grad = None
        assert_same(*found)


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
                for p in m.parameters():
                    p.grad = None
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


def test_results_without_gradients_of_arguments_with_them(device):
    class Tokens(nn.Module):
        def forward(self, x):
            return x.argmax(-1)

    model = Tokens()
    graphs = use_cuda_graphs(model)
    for _ in range(6):
        x = images(3, 4, device=device).requires_grad_()
        assert torch.equal(model(x * 2), x.argmax(-1))
    assert len(graphs) == 1
    (graph,) = graphs.graphs.values()
    assert all(place.grad_fn is None for place in graph.inputs)


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


def test_the_backend_in_force_is_asked(device):
    import groupmamba_ext as ext

    model, twin, graphs = twins(device)
    model.eval(), twin.eval()
    x = images(1, 3, 32, 32, device=device)
    with torch.no_grad():
        for _ in range(4):
            model(x)
        with ext.backend("reference"):
            assert torch.equal(model(x), twin(x))
        report = ext.explain(model, x)
    assert "grouped_selective_scan" in str(report) or "GroupedMamba2d" in str(report)


def test_complex_numbers_stay_eager(device):
    class Conjugate(nn.Module):
        def forward(self, x):
            return torch.view_as_complex(x).conj()

    model = Conjugate()
    x = images(3, 2, device=device)
    graphs = use_cuda_graphs(model)
    with pytest.warns(UserWarning, match="other than plain real tensors"):
        for _ in range(4):
            assert torch.equal(model(x), torch.view_as_complex(x).conj())
    assert len(graphs) == 0


def test_a_capture_that_fails_gives_the_generator_its_state_back(monkeypatch):
    """With a generator that is made up: that of a GPU can't be had here."""

    class Generator:
        device = torch.device("cuda", 0)

        def __init__(self):
            self.capturing = False

        def clone_state(self):
            return Generator()

        def graphsafe_set_state(self, other):
            self.capturing = other.capturing

    generator = Generator()
    monkeypatch.setattr(torch.cuda, "default_generators", [generator])
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    with capturing(generator.device):
        generator.capturing = True
    assert generator.capturing
    with pytest.raises(KeyboardInterrupt), capturing(generator.device):
        raise KeyboardInterrupt
    assert not generator.capturing


def test_errors_of_the_module_are_its_own(device):
    """One that comes only while a graph is recorded is a reason, not an error."""

    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, device=device))

        def forward(self, x):
            if not isinstance(self.weight, nn.Parameter):
                raise TypeError("weight must be a Parameter")
            if len(x) == 2:
                raise ValueError("x must have 3 numbers")
            return x * self.weight

    model = Picky()
    graphs = use_cuda_graphs(model, eager_calls=1)
    x = images(3, device=device)
    with pytest.warns(UserWarning, match="weight must be a Parameter"):
        for _ in range(4):
            assert torch.equal(model(x), x)
    for _ in range(4):
        with pytest.raises(ValueError, match="x must have 3 numbers"):
            model(x[:2])
    assert len(graphs) == 0


def test_modules_of_a_plain_function_are_pickled():
    model = nn.Linear(2, 2)
    model.forward = torch.sin
    use_cuda_graphs(model)
    assert pickle.loads(pickle.dumps(model)).forward is torch.sin


@pytest.mark.cuda
def test_deterministic_algorithms(monkeypatch):
    """With them torch fills empty memory with NaN, which a graph would do in each replay."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU()).cuda()
    twin = copy.deepcopy(model)
    graphs = use_cuda_graphs(model)
    x = images(3, 4, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(5):
            assert_same(step(model, x)[1], step(twin, x)[1])
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(graphs) == 1


@pytest.mark.cuda
def test_a_recording_that_fails_leaves_nothing_behind():
    """The current stream, the allocator and the generator are as they were; other shapes of the module have graphs."""

    class Reads(nn.Module):
        def forward(self, x):
            return torch.nn.functional.dropout(x, 0.5) * (x.sum().item() if len(x) == 3 else 2)

    model = Reads()
    graphs = use_cuda_graphs(model, eager_calls=1)
    before, x, other = torch.cuda.current_stream(), torch.ones(3, device="cuda"), torch.ones(4, device="cuda")
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        for _ in range(3):
            model(x)
    assert torch.cuda.current_stream() == before and len(graphs) == 0
    values = {tuple(model(other).tolist()) for _ in range(20)}
    assert len(graphs) == 1 and len(values) > 2
    torch.cuda.empty_cache()
    reserved = torch.cuda.memory_reserved()
    large = torch.empty(2**28, device="cuda")
    large.record_stream(torch.cuda.Stream())
    del large
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= reserved
    assert torch.rand(8, device="cuda").unique().numel() == 8


def test_where_something_looks_on_calls_are_eager(device):
    from torch.utils.flop_counter import FlopCounterMode

    model, twin, graphs = twins(device)
    model.eval(), twin.eval()
    x = images(2, 3, 32, 32, device=device)
    with torch.no_grad():
        for _ in range(3):
            model(x)
    counts = []
    for m in (model, twin):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            m(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    linear = nn.Linear(4, 4).to(device)
    use_cuda_graphs(linear, eager_calls=1)
    y = images(5, 4, device=device)
    for _ in range(3):
        expected = linear(y)
    assert torch.allclose(torch.func.vmap(linear)(y), expected, atol=1e-6)
    jacobian = torch.func.jacrev(linear)(y[0])
    assert torch.allclose(jacobian, linear.weight, atol=1e-6)


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


def test_on_the_cpu_nothing_changes():
    model, twin = small("cpu"), small("cpu")
    graphs = use_cuda_graphs(model, eager_calls=1)
    x = torch.randn(2, 3, 32, 32)
    for _ in range(4):
        assert_same(step(model, x)[1], step(twin, x)[1])
    assert len(graphs) == 0


def test_compile_export_and_trace_see_the_module():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    x = torch.randn(2, 3)
    expected = model(x)
    use_cuda_graphs(model)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), expected)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), expected)


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


@pytest.mark.cuda
def test_detectors_on_images_of_many_sizes():
    """Mask R-CNN with a backbone in graphs: losses are those of eager calls, and memory does not grow with sizes."""
    pytest.importorskip("segmentation_models_pytorch")
    from groupmamba.vision import mask_rcnn

    options = {"backbone_options": {**SIZES, "drop_path_rate": 0.2}, "min_size": 96, "max_size": 200}
    torch.manual_seed(0)
    model = mask_rcnn("groupmamba_tiny", 3, **options).cuda().train()
    twin = copy.deepcopy(model)
    graphs = use_cuda_graphs(model.backbone, eager_calls=1)
    sizes = [(96, 128), (96, 160), (128, 96)]
    batches = []
    for height, width in sizes:
        box = torch.tensor([[10.0, 12.0, 60.0, 70.0]], device="cuda")
        mask = torch.zeros(1, height, width, dtype=torch.uint8, device="cuda")
        mask[:, 12:70, 10:60] = 1
        target = {"boxes": box, "labels": torch.tensor([1], device="cuda"), "masks": mask}
        batches.append(([images(3, height, width, device="cuda").sigmoid()], [target]))
    for i in range(9):
        values = []
        for m in (model, twin):
            torch.manual_seed(i)
            with torch.autocast("cuda", torch.bfloat16):
                losses = m(*batches[i % 3])
            sum(losses.values()).backward()
            values.append({name: loss.detach() for name, loss in losses.items()})
            grads = [p.grad for p in m.backbone.parameters()]
            values[-1].update({str(n): g for n, g in enumerate(grads) if g is not None})
            for p in m.parameters():
                p.grad = None
        assert values[0].keys() == values[1].keys()
        for name in values[0]:
            torch.testing.assert_close(values[0][name], values[1][name], atol=2e-2, rtol=2e-2)
    assert len(graphs) == 3


@pytest.mark.cuda
def test_two_streams_and_two_threads_take_turns():
    model = small("cuda").eval()
    use_cuda_graphs(model, eager_calls=1)
    xs = [images(8, 3, 64, 64, device="cuda", seed=i) for i in range(4)]
    with torch.no_grad():
        expected = [model(x).clone() for x in xs]
    torch.cuda.synchronize()
    found = {}

    def work(number):
        stream = torch.cuda.Stream()
        with torch.no_grad(), torch.cuda.stream(stream):
            for i in range(50):
                found[number, i] = model(xs[(i + number) % 4])
        stream.synchronize()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(found) == 100
    for (number, i), y in found.items():
        assert torch.equal(y, expected[(i + number) % 4])


@pytest.mark.cuda
def test_many_shapes_share_memory():
    model = small("cuda").train()
    graphs = use_cuda_graphs(model, eager_calls=1)

    def reserved(sides):
        for side in sides:
            for _ in range(3):
                step(model, images(16, 3, side, 256, device="cuda"))
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    one, many = reserved([512]), reserved(range(64, 512, 32))
    assert len(graphs) == 15
    assert many - one < 0.35 * one


@pytest.mark.cuda
def test_memory_that_runs_out_ends_recording_alone():
    model = small("cuda").train()
    x = images(16, 3, 128, 128, device="cuda")
    expected = step(copy.deepcopy(model), x)[1]
    graphs = use_cuda_graphs(model, eager_calls=1)
    step(model, x)
    torch.cuda.empty_cache()
    used = torch.cuda.memory_reserved()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((used + 2 * 2**20) / total)
    try:
        with pytest.warns(UserWarning, match="not enough memory"), suppress(torch.OutOfMemoryError):
            step(model, x)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(graphs) == 0
    for p in model.parameters():
        p.grad = None
    torch.testing.assert_close(step(model, x)[1], expected)  # cuDNN may have chosen with less memory
