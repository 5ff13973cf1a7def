# SPDX-License-Identifier: Apache-2.0
"""What docs/evidence.md promises bit for bit: repeats, thread counts, places in a batch, streams, graphs, processes.

Outputs and all gradients of every op, of the layer and of the feed-forward network, in shapes of many tokens, where
work is split.
"""

import functools
import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from support.every_op import BATCH, MODULES, OPS, PER_IMAGE, make_case, results, same


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch."))
def dtype(request):
    return request.param


@pytest.mark.parametrize("name", [*OPS, *MODULES])
def test_repeats(device, dtype, name):
    case = make_case(name, device, dtype)
    first = results(case)
    assert all(t.isfinite().all() for t in first.values())
    for _ in range(2):
        same(results(case), first)


@pytest.mark.parametrize("name", OPS)
def test_thread_counts(name):
    """Of the ops on the CPU. The products of layers are torch's, whose library cuts them by the number of threads."""
    case = make_case(name, "cpu", torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = results(case)
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            same(results(case), first)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", OPS)
def test_places_in_a_batch(device, dtype, name):
    """Images in another order: the same results in that order. (Layers: the products are torch's.)"""
    function, tensors = make_case(name, device, dtype)
    batch = next(t.shape[0] for n, t in tensors.items() if n in PER_IMAGE)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(2)).tolist()
    assert order != list(range(batch))
    moved = {n: t[order] if t is not None and n in PER_IMAGE else t for n, t in tensors.items()}
    with torch.no_grad():
        expected, got = function(tensors), function(moved)
    for a, b in zip(*(o if isinstance(o, tuple) else (o,) for o in (expected, got)), strict=True):
        assert torch.equal(a[order], b)


@pytest.mark.parametrize("name", OPS)
def test_alone_or_in_a_batch(name):
    """On the CPU an image's result and its gradients do not depend on the others at all."""
    function, tensors = make_case(name, "cpu", torch.float32)
    images = [n for n in tensors if n in PER_IMAGE and tensors[n] is not None]

    def run(part):
        leaves = {n: t.detach().requires_grad_() if n in images else t for n, t in part.items()}
        out = function(leaves)
        outputs = out if isinstance(out, tuple) else (out,)
        grads = torch.autograd.grad([o.square().sum() for o in outputs], [leaves[n] for n in images])
        return [*outputs, *grads]

    whole = run(tensors)
    for i in range(BATCH):
        alone = run({n: t[i : i + 1] if n in images else t for n, t in tensors.items()})
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(whole, alone, strict=True))


def digests(device):
    """SHA-256 of the results of all cases in float32."""
    out = {}
    for name in (*OPS, *MODULES):
        digest = hashlib.sha256()
        for value in results(make_case(name, device, torch.float32)).values():
            digest.update(value.contiguous().cpu().numpy().tobytes())
        out[name] = digest.hexdigest()
    return out


def test_another_process(device):
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    code = f"import json, test_bitwise; print(json.dumps(test_bitwise.digests({device!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    assert theirs == digests(device)


@pytest.mark.cuda
@pytest.mark.parametrize("name", [*OPS, *MODULES])
def test_streams(dtype, name):
    """Of several streams at once, and from several threads: what the default stream computes."""
    case = make_case(name, "cuda", dtype)
    expected = results(case)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    got = []
    for stream in streams:
        with torch.cuda.stream(stream):
            got.append(results(case))
    torch.cuda.synchronize()
    for one in got:
        same(one, expected)
    from_threads = [None] * 3

    def work(i):
        with torch.cuda.stream(streams[i]):
            from_threads[i] = results(case)
            streams[i].synchronize()

    threads = [threading.Thread(target=functools.partial(work, i)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in from_threads:
        same(one, expected)


@pytest.mark.cuda
@pytest.mark.parametrize("name", [*OPS, *MODULES])
def test_graph_replay(dtype, name):
    """A captured forward and backward, replayed with the same data and with new ones, is what eager calls compute."""
    function, tensors = make_case(name, "cuda", dtype)
    static = {n: t if t is None or isinstance(t, torch.nn.Parameter) else t.clone() for n, t in tensors.items()}
    case = (function, static)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            results(case)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(case)
    for step in range(3):
        with torch.no_grad():
            for n, t in static.items():
                if t is not None and n in PER_IMAGE:
                    t.copy_(tensors[n] if step == 0 else tensors[n].roll(step, 1))
        graph.replay()
        replayed = {n: t.clone() for n, t in captured.items()}
        same(replayed, results(case))
