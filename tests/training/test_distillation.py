# SPDX-License-Identifier: Apache-2.0
"""The distillation loss against its definition, the released formulas, and timm's task."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from groupmamba import DistillationLoss


class Teacher(nn.Module):
    """Of a fixed opinion on each image; counts its calls and says in which state they came."""

    def __init__(self, classes=5):
        super().__init__()
        self.linear = nn.Linear(12, classes)
        self.drop = nn.Dropout(0.5)
        self.calls = []

    def forward(self, images):
        self.calls.append((self.training, torch.is_grad_enabled()))
        return self.drop(self.linear(images.flatten(1)))


def inputs(classes=5, batch=4):
    images = torch.randn(batch, 3, 2, 2)
    heads = tuple(torch.randn(batch, classes, requires_grad=True) for _ in range(2))
    return images, heads, torch.randint(0, classes, (batch,))


def test_hard(device):
    images, heads, labels = inputs()
    teacher = Teacher().train().to(device)
    loss = DistillationLoss(nn.CrossEntropyLoss(), teacher, alpha=0.3).train()
    images, labels, heads = images.to(device), labels.to(device), tuple(h.to(device) for h in heads)
    value = loss(images, heads, labels)
    opinion = teacher.linear(images.flatten(1)).argmax(1)
    expected = 0.7 * F.cross_entropy(heads[0], labels) + 0.3 * F.cross_entropy(heads[1], opinion)
    torch.testing.assert_close(value, expected)
    assert teacher.calls == [(False, False)] and not teacher.training
    value.backward()
    assert teacher.linear.weight.grad is None


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_soft(tau):
    images, heads, labels = inputs()
    teacher = Teacher()
    value = DistillationLoss(nn.CrossEntropyLoss(), teacher, kind="soft", alpha=0.5, tau=tau)(images, heads, labels)
    p = torch.softmax(teacher.linear(images.flatten(1)).detach().double() / tau, 1)
    q = torch.softmax(heads[1].detach().double() / tau, 1)
    divergence = sum(
        p[i, j] * math.log(p[i, j] / q[i, j]) for i in range(4) for j in range(5)
    )  # summed over images and classes, then divided by both counts, as released
    expected = 0.5 * F.cross_entropy(heads[0], labels).double() + 0.5 * tau**2 * divergence / 20
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)


def test_none_asks_no_teacher():
    images, heads, labels = inputs()
    teacher = Teacher()
    for given in (teacher, None):
        loss = DistillationLoss(nn.CrossEntropyLoss(), given, kind="none")
        assert torch.equal(loss(images, heads, labels), F.cross_entropy(heads[0], labels))
        assert torch.equal(loss(images, heads[0], labels), F.cross_entropy(heads[0], labels))
    assert teacher.calls == []


def test_the_teacher_is_no_submodule():
    criterion = nn.BatchNorm1d(3)
    loss = DistillationLoss(criterion, Teacher()).train().double()
    names = {f"base_criterion.{name}" for name in criterion.state_dict()}
    assert set(loss.state_dict()) == names and set(loss.parameters()) == set(criterion.parameters())
    assert not loss.teacher.training and loss.teacher.linear.weight.dtype == torch.float64
    loss.load_state_dict(loss.state_dict())
    holder = nn.ModuleDict({"loss": loss})
    holder.load_state_dict(holder.state_dict())
    assert set(holder.state_dict()) == {f"loss.{name}" for name in names}
    assert copy.deepcopy(loss).teacher is not loss.teacher


def test_equals_timms_task():
    task = pytest.importorskip("timm.task", reason="timm >= 1.0.25 has it")
    from groupmamba.models import groupmamba_tiny

    torch.manual_seed(0)
    model = groupmamba_tiny(num_classes=5).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()

    class Wide(nn.Module):
        pretrained_cfg = model.pretrained_cfg

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 5)

        def forward(self, images):
            return self.linear(images.mean((2, 3)))

    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([1, 3])
    teacher = Wide()
    theirs = task.TokenDistillationTask(
        model, teacher, criterion=nn.CrossEntropyLoss(), distill_type="hard", task_loss_weight=0.5, verbose=False
    )
    expected = theirs(images, labels)["loss"]
    value = DistillationLoss(nn.CrossEntropyLoss(), teacher, alpha=0.5)(images, model(images), labels)
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"kind": "medium"}, ValueError, "kind must be one of .* got 'medium'"),
        ({"teacher": None}, ValueError, "teacher must be a model for kind='hard', got None"),
        ({"teacher": "regnety_160"}, TypeError, "teacher must be a torch.nn.Module, got str"),
        ({"alpha": 1.5}, ValueError, "alpha must be 0 to 1, got 1.5"),
        ({"alpha": math.nan}, ValueError, "alpha must be 0 to 1, got nan"),
        ({"tau": 0.0}, ValueError, "tau must be greater than 0, got 0.0"),
        ({"tau": math.inf}, ValueError, "tau must be greater than 0, got inf"),
        ({"base_criterion": 3}, TypeError, "base_criterion must be callable, got 3"),
    ],
)
def test_arguments(options, error, words):
    given = {"base_criterion": nn.CrossEntropyLoss(), "teacher": Teacher(), **options}
    with pytest.raises(error, match=words):
        DistillationLoss(**given)


def test_wrong_outputs():
    images, heads, labels = inputs()
    with pytest.raises(ValueError, match=r"outputs must be the pair .* got one tensor of shape \(4, 5\)"):
        DistillationLoss(nn.CrossEntropyLoss(), Teacher())(images, heads[0], labels)
    with pytest.raises(ValueError, match=r"teacher must give \(4, 5\) logits .* got \(4, 7\)"):
        DistillationLoss(nn.CrossEntropyLoss(), Teacher(7))(images, heads, labels)
