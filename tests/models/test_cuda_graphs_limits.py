# SPDX-License-Identifier: Apache-2.0
"""``use_cuda_graphs``: what makes calls eager, what makes new graphs, and what is an error."""

import warnings

import pytest
import torch
from torch import nn

from groupmamba import use_cuda_graphs
from groupmamba.cuda_graphs import arguments
from support.graphs import (
    assert_same,
    emulated,  # noqa: F401
    images,
    recorded_twins,
    small,
    step,
    twins,
)

pytest.importorskip("timm")


def test_a_hook_inside_makes_calls_eager(device):
    model, twin, graphs, x = recorded_twins(device)
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
                m.zero_grad()
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


def test_backward_through_an_earlier_call_is_an_error(device):
    model, twin, _, x = recorded_twins(device)
    first = model(x).sum()
    model(x).sum().backward()
    with pytest.raises(RuntimeError, match="only through its last call"):
        first.backward()
    model.zero_grad()
    assert_same(step(model, x)[1], step(twin, x)[1])
    y = model(x)
    with torch.no_grad():
        model(x)  # evaluation in between does no harm
    y.square().sum().backward()


def test_a_second_backward_is_an_error(device):
    """What the first one read is overwritten by then."""
    model, twin, _, x = recorded_twins(device)
    y = model(x)
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        y.square().sum().backward()
    model.zero_grad()
    assert_same(step(model, x)[1], step(twin, x)[1])


def test_second_derivatives_are_an_error(device):
    model, _, _, x = recorded_twins(device)
    x = x.requires_grad_()
    for _ in range(3):
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


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
        if self.what == "another's weight":
            return y, self.list[0].weight
        if self.what == "attribute":
            self.aux = y.square().mean()
        return y


@pytest.mark.parametrize(
    "what, words",
    [
        ("writes", "writes into an argument"),
        ("another module", "neither an argument nor a parameter"),
        ("another's weight", "neither an argument nor a parameter"),
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
                (sum(part.sum() for part in (y if isinstance(y, tuple) else (y,))) + model.aux).backward()
                if what.startswith("another"):
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
            m.zero_grad()
        assert_same(*found)


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


def test_on_the_cpu_nothing_changes():
    model, twin = small("cpu"), small("cpu")
    graphs = use_cuda_graphs(model, eager_calls=1)
    x = torch.randn(2, 3, 32, 32)
    for _ in range(4):
        assert_same(step(model, x)[1], step(twin, x)[1])
    assert len(graphs) == 0
