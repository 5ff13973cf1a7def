# SPDX-License-Identifier: Apache-2.0
"""Generated inputs of every op, of the layer and of the feed-forward network against the float64 reference.

    pytest tests/ops/test_generated.py                    the same 210 cases in every run
    pytest tests/ops/test_generated.py --fuzz 20000       so many others on each device, drawn from a new seed
    pytest tests/ops/test_generated.py --case '{...}'     one of them again, as a failure prints it

What is drawn stands in generated_cases.py, where the tolerance comes from in generated_checks.py.
"""

import json
import math
import random
from collections import defaultdict

import pytest
import torch

pytest.importorskip("hypothesis", reason="needs the extra 'test'")

from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402

from support import generated_cases, generated_checks  # noqa: E402
from support.generated_cases import MODULES, OPS  # noqa: E402

QUICK = 30  # cases of each op
FIXED_SEED = 2407_13772
REPLAYS: dict = {}  # (device, op): command
WORST: dict = defaultdict(dict)  # (device, op): dtype: (cases, largest ratio, result)


def note(case, device, ratios):
    """Counts a case and keeps its worst ratio."""
    kept = WORST[device, case["op"]]
    count, worst, name = kept.get(case["dtype"], (0, 0.0, "-"))
    if ratios:
        top = max(ratios, key=lambda key: ratios[key])
        if ratios[top] > worst:
            worst, name = ratios[top], top
    kept[case["dtype"]] = (count + 1, worst, name)


def summary(config) -> str:
    """A Markdown table of all cases so far, and the replays of failures."""
    allowed = f"{generated_checks.LIMIT:g} are allowed"
    lines = [f"seed {fuzz_seed(config)}; errors in units of each case's own tolerance, of which {allowed}", ""]
    lines += ["| device | op | dtype | cases | worst | of |", "|---|---|---|---|---|---|"]
    total: dict[str, int] = defaultdict(int)
    for (device, op), kept in sorted(WORST.items()):
        for dtype, (count, worst, name) in sorted(kept.items()):
            total[device] += count
            lines.append(f"| {device} | {op} | {dtype} | {count} | {worst:.2f} | {name} |")
    lines += ["", ", ".join(f"{count} cases on {device}" for device, count in total.items())]
    return "\n".join([*lines, *REPLAYS.values()])


def fuzz_seed(config) -> int:
    given = config.getoption("fuzz_seed")
    if given is None and config.getoption("fuzz"):
        given = config.option.fuzz_seed = random.SystemRandom().randrange(2**31)
    return FIXED_SEED if given is None else given


def check(case, device):
    try:
        note(case, device, generated_checks.check(case, device))
    except Exception as error:
        # The last one is what hypothesis made of it, as small as it found. It would keep all tensors of all of them.
        line = f"pytest tests/ops/test_generated.py -k {device}-{case['op']} --case '{json.dumps(case)}'"
        REPLAYS[device, case["op"]] = line
        raise AssertionError(f"{type(error).__name__}: {error}\nreplay: {line}") from None


@pytest.mark.parametrize("op", [*OPS, *MODULES])
def test_generated(device, op, request, one_thread):
    if request.config.getoption("case"):
        case = json.loads(request.config.getoption("case"))
        if case["op"] != op:
            pytest.skip(f"the case is of {case['op']}")
        print(generated_checks.check(case, device))
        return
    wanted = request.config.getoption("fuzz")
    count = math.ceil(wanted / len([*OPS, *MODULES])) if wanted else QUICK

    @seed(fuzz_seed(request.config))
    @settings(
        max_examples=count, database=None, deadline=None, phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck), print_blob=False,
    )  # fmt: skip
    @given(generated_cases.cases(op))
    def run(case):
        check(case, device)

    run()


def test_a_wrong_result_is_found_and_replayed(monkeypatch):
    """One element of one gradient off by a hundredth, and a token that is not there."""
    import groupmamba_ext as ext

    case = {
        "op": "depthwise_conv3x3", "seed": 1, "dtype": "float32", "batch": 2, "height": 5, "width": 7, "groups": None,
        "dim": 9, "activation": "silu", "mixed": False, "scales": {}, "layouts": {"x": "padded"},
        "parameter_layout": "plain", "absent": [], "frozen": [], "output_gradient": "plain",
    }  # fmt: skip
    right = ext.depthwise_conv3x3

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, bias):
            return bias.clone()

        @staticmethod
        def backward(ctx, grad):
            grad = grad.clone()
            grad[3] *= 1.01
            return grad

    def wrong_gradient(x, weight, bias, **options):
        return right(x, weight, Gradient.apply(bias), **options)

    def wrong_token(x, weight, bias, **options):
        y = right(x, weight, bias, **options)
        return torch.cat([y[:, :4], torch.cat([y[:, 4:, :6], y[:, 4:, 6:] * 0], 2)], 1)

    generated_checks.check(case, "cpu")
    for wrong, name in ((wrong_gradient, "dbias is off"), (wrong_token, "out is off")):
        monkeypatch.setattr(ext, "depthwise_conv3x3", wrong)
        with pytest.raises(AssertionError, match=name):
            check(case, "cpu")
        line = REPLAYS.pop(("cpu", case["op"]))
        assert json.loads(line.partition("--case '")[2].rstrip("'")) == case
