# SPDX-License-Identifier: Apache-2.0
"""Gradients averaged over processes, against those of each process by itself."""

import copy
import datetime

import pytest
import torch
import torch.distributed as dist
from torch import nn

pytest.importorskip("timm")

from groupmamba.training import replicas
from groupmamba.training.replicas import Replicas


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.unused = nn.Linear(5, 5)
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.scale = nn.Parameter(torch.randn(8).double())
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.norm(self.depthwise(self.first(x))).relu().mean((2, 3))
        return self.head(x * self.scale.float())


def gradients(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def worker(rank, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    replicas.BUCKET_BYTES, replicas.LAST_BUCKET_BYTES = 600, 300  # several buckets of this little model
    torch.manual_seed(rank)
    model = Net().to(memory_format=torch.channels_last)
    mine = [p.clone() for p in model.parameters()]
    ours = Replicas(model, 2)
    assert len(ours.buckets) > 3
    assert sum(len(bucket.parameters) for bucket in ours.buckets) == len(mine) - 1
    assert rank == 0 or not torch.equal(mine[0], model.first.weight)
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        p._post_accumulate_grad_hooks = None
    names = {id(p): name for name, p in model.named_parameters()}
    torch.manual_seed(10 + rank)
    for i in range(3):
        x = torch.randn(2, 4, 3, 6, 5)
        for net in (model, twin):
            net.zero_grad(set_to_none=True)
        ours.begin()
        if i == 1:  # a backward pass that stops on its way on both processes
            handle = model.norm.weight.register_hook(lambda grad: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(x[0]).square().sum().backward()
            handle.remove()
            continue
        with ours.local():
            model(x[0]).square().sum().backward()
        model(x[1]).square().sum().backward()
        ours.finish()
        for part in x:
            twin(part).square().sum().backward()
        if i == 0:  # from now on in the order in which gradients came
            ours.regroup()
            found = [names[id(p)].partition(".")[0] for bucket in ours.buckets for p in bucket.parameters]
            assert list(dict.fromkeys(found)) == ["head", "scale", "norm", "depthwise", "first", "unused"]
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            if not p.requires_grad:
                assert p.grad is None
                continue
            both = [torch.empty(p.shape, dtype=p.dtype) for _ in range(2)]
            dist.all_gather(both, torch.zeros(p.shape, dtype=p.dtype) if q.grad is None else q.grad.contiguous())
            assert torch.equal(p.grad, (both[0] + both[1]) / 2), name
            assert p.grad.stride() == torch.empty_like(p).stride(), name
    dist.destroy_process_group()


def test_averages_of_gradients(tmp_path):
    torch.multiprocessing.start_processes(worker, (str(tmp_path),), nprocs=2, start_method="spawn")
