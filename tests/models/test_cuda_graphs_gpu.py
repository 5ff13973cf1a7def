# SPDX-License-Identifier: Apache-2.0
"""``use_cuda_graphs`` on a GPU alone: memory, streams, captures that fail, detectors."""

import copy
import gc
import threading
from contextlib import nullcontext, suppress

import pytest
import torch
from torch import nn

from groupmamba import use_cuda_graphs
from groupmamba.cuda_graphs.recorder import Garbage, capturing
from support.common import relative_error
from support.graphs import (
    SIZES,
    assert_same,
    emulated,  # noqa: F401
    images,
    small,
    step,
)

pytest.importorskip("timm")


@pytest.mark.parametrize("collects", [True, False])
def test_garbage_is_kept_while_someone_captures(collects):
    """Two at a time, one of which fails; then all is as before."""
    garbage, before = Garbage(), gc.isenabled()
    (gc.enable if collects else gc.disable)()
    try:
        first = garbage.kept()
        with first:
            with suppress(ValueError), garbage.kept():
                assert not gc.isenabled()
                raise ValueError
            assert not gc.isenabled()
        assert gc.isenabled() == collects
    finally:
        (gc.enable if before else gc.disable)()


class Dropping(nn.Module):
    """Lets go of what it holds while it is recorded, and makes so many objects that garbage would be collected."""

    def __init__(self, held):
        super().__init__()
        self.held, self.linear = held, nn.Linear(4, 4)

    def forward(self, x):
        if torch.cuda.is_current_stream_capturing():
            self.held.clear()
            assert len([[] for _ in range(10_000)]) == 10_000
        return self.linear(x)


@pytest.mark.cuda
def test_another_graph_is_not_freed_while_one_is_recorded():
    def with_a_graph():
        other = small("cuda").eval()
        other.itself = [other]  # so that only the collector frees it
        graphs = use_cuda_graphs(other, eager_calls=1)
        with torch.no_grad():
            for _ in range(3):
                other(images(1, 3, 64, 64, device="cuda"))
        assert len(graphs) == 1
        return other

    model = Dropping([with_a_graph()]).cuda().eval()
    graphs = use_cuda_graphs(model, eager_calls=1)
    x = torch.randn(2, 4, device="cuda")
    gc.collect()
    threshold = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        with torch.no_grad():
            results = [model(x) for _ in range(4)]
    finally:
        gc.set_threshold(*threshold)
    assert len(graphs) == 1
    assert all(torch.equal(y, results[0]) for y in results[1:])


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
            m.zero_grad()
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
    model.zero_grad()
    for name, gradient in step(model, x)[1].items():  # cuDNN and cuBLAS may have chosen with less memory
        assert relative_error(gradient, expected[name]) < 1e-2, name
