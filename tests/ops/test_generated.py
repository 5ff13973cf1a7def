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
from support.generated_cases import DTYPES, MODULES, OPS  # noqa: E402

QUICK = 30  # cases of each op
FIXED_SEED = 2407_13772
REPLAYS: dict = {}  # (device, op): command
WORST: dict = defaultdict(dict)  # (device, op): dtype: (cases, largest ratio, result)
WORST_CASE: dict = {}  # (device, op): (largest ratio, command)


def note(case, device, ratios):
    """Counts a case and keeps its worst ratio."""
    key = device, case["op"]
    kept = WORST[key]
    count, worst, name = kept.get(case["dtype"], (0, 0.0, "-"))
    if ratios:
        top = max(ratios, key=lambda key: ratios[key])
        if ratios[top] > worst:
            worst, name = ratios[top], top
        if ratios[top] > WORST_CASE.get(key, (0.0,))[0]:
            WORST_CASE[key] = ratios[top], replay(case, device)
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
    lines += ["", "the worst of each op:", *(command for _, (_, command) in sorted(WORST_CASE.items()))]
    return "\n".join([*lines, *REPLAYS.values()])


def fuzz_seed(config) -> int:
    given = config.getoption("fuzz_seed")
    if given is None and config.getoption("fuzz"):
        given = config.option.fuzz_seed = random.SystemRandom().randrange(2**31)
    return FIXED_SEED if given is None else given


def replay(case, device) -> str:
    return f"pytest tests/ops/test_generated.py -k {device}-{case['op']} --case '{json.dumps(case)}'"


def check(case, device):
    try:
        note(case, device, generated_checks.check(case, device))
    except Exception as error:
        # The last one is what hypothesis made of it, as small as it found. It would keep all tensors of all of them.
        line = REPLAYS[device, case["op"]] = replay(case, device)
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


_SCAN = {
    "op": "grouped_selective_scan", "seed": 3, "dtype": "float32", "batch": 2, "height": 5, "width": 7,
    "directions": ["lr", "bt"], "dim": 87, "states": 1, "rank": 3, "softplus": True, "masked": 0, "eps": 1e-5,
    "mixed": False, "scales": {}, "layouts": dict.fromkeys(("u", "dt", "B", "C", "z"), "plain"),
    "parameter_layout": "plain", "absent": [], "frozen": [], "output_gradient": "plain",
}  # fmt: skip
_CONV = {
    "op": "depthwise_conv3x3", "seed": 1, "dtype": "float32", "batch": 2, "height": 5, "width": 7, "groups": None,
    "dim": 87, "activation": None, "mixed": False, "scales": {}, "layouts": {"x": "plain"}, "parameter_layout": "plain",
    "absent": [], "frozen": [], "output_gradient": "plain",
}  # fmt: skip
_ONE_TOKEN = {"batch": 1, "height": 1, "width": 1}
# The tolerance of these is measured a second time, with rounded intermediates.
_CANCELLING = {
    **_SCAN, **_ONE_TOKEN, "seed": 0, "directions": ["lr"], "dim": 3, "rank": None, "eps": 1e-6, "absent": ["D"],
}  # fmt: skip
_FEED_FORWARD = {
    "op": "feed_forward", **_ONE_TOKEN, "seed": 176, "dtype": "float32", "groups": 8, "dim": 87, "layout": "contiguous",
    "residual": False, "frozen": [], "ratio": 1,
}  # fmt: skip
_LAYER = {
    "op": "layer", **_ONE_TOKEN, "seed": 0, "dtype": "float32", "groups": 1, "dim": 87, "layout": "contiguous",
    "residual": False, "frozen": [], "variant": "paper", "scan": "grouped", "affinity": False, "states": 1, "conv": 3,
    "expand": 1.0, "gate_source": "input", "directions": ["lr"] * 8,
}  # fmt: skip
_ONE_CHANNEL = {
    "op": "modulated_layer_norm", "seed": 1609, "dtype": "float32", "batch": 1, "height": 1, "width": 5, "groups": None,
    "dim": 1, "eps": 0.01, "mixed": False, "scales": {}, "layouts": {"o": "plain", "x": "plain"},
    "parameter_layout": "plain", "absent": ["gate"], "frozen": [], "output_gradient": "plain",
}  # fmt: skip
_ONE_CHANNEL_LAYER = {**_LAYER, "groups": 3, "dim": 1, "variant": "released", "scan": "cross"}


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "case", [_CANCELLING, _FEED_FORWARD, _LAYER, _ONE_CHANNEL, _ONE_CHANNEL_LAYER], ids=lambda case: case["op"]
)
def test_what_cancels_passes(case, dtype):
    """The gradient of what a norm takes out again, GELU far below 0, one token that decides a row of a gradient."""
    generated_checks.check({**case, "dtype": dtype}, "cpu")


def _scaled(factor):
    return lambda t, given: t * factor


def _swapped(t, given):
    order = list(range(t.shape[-1]))
    order[40], order[41] = 41, 40
    return t[..., order]


def _without_last_token(t, given):
    t = t.clone()
    t[:, -1, -1] = 0
    return t


def _without_last_row(t, given):
    return t - given[0][:, -1].sum((0, 1))


@pytest.mark.parametrize(
    ("case", "name", "fault"),
    [
        *[(_SCAN, name, _scaled(1.001)) for name in ("out", "du", "ddt", "dA", "dB", "dC", "dD", "ddt_weight")],
        *[(_SCAN, name, _swapped) for name in ("out", "du", "dD", "ddt_bias", "dnorm_weight", "dgate")],
        *[(_SCAN, name, _without_last_token) for name in ("out", "du", "ddt", "dB", "dz")],
        *[({**_SCAN, "dtype": "bfloat16"}, name, _swapped) for name in ("out", "du", "dz")],
        *[({**_SCAN, "dtype": "float16"}, name, _swapped) for name in ("out", "dD", "ddt_bias", "dnorm_weight")],
        *[({**_SCAN, "dtype": "float16"}, name, _scaled(1.1)) for name in ("out", "du", "dC", "dnorm_weight")],
        *[({**_SCAN, "dtype": "float16"}, name, _without_last_token) for name in ("out", "du", "dB")],
        *[({**_CONV, "dtype": dtype}, "dbias", _without_last_row) for dtype in DTYPES],
        *[(_CANCELLING, name, _scaled(1.001)) for name in ("out", "du", "ddt", "dB", "dz", "dnorm_weight")],
        (_FEED_FORWARD, "dmlp.dwconv.weight", _scaled(1.001)),
        *[(_LAYER, f"dlayer.vsss.{name}", _scaled(1.001)) for name in ("fc1_weight", "fc2_weight")],
        (_LAYER, "dlayer.vsss.fc2_weight", _swapped),
        (_ONE_CHANNEL, "dbias", _scaled(1.001)),
    ],
    ids=lambda value: value["op"] if isinstance(value, dict) else None,
)  # fmt: skip
def test_a_small_fault_is_found(case, name, fault, monkeypatch):
    """One result of the op is changed; also where the tolerance is measured twice."""
    run = generated_checks._run

    def faulty(function, tensors, wanted, given, *, layout=None):
        results = run(function, tensors, wanted, given, layout=layout)
        if layout is not None:  # the op, not the reference
            results[name] = fault(results[name], given)
        return results

    monkeypatch.setattr(generated_checks, "_run", faulty)
    with pytest.raises(AssertionError, match=f"^{name} is off"):
        generated_checks.check(case, "cpu")


def test_a_result_that_is_not_finite_is_found():
    """But where the result, or a part that was added up to it, does not fit its type."""
    got, truth = torch.tensor([torch.nan, 1.0], dtype=torch.float16), torch.tensor([1e3, 1.0], dtype=torch.float64)
    movements = [torch.full_like(truth, 1e-3)]
    part = torch.tensor([1e5, 1.0], dtype=torch.float64)
    assert generated_checks._ratio(got, truth, movements, 1) == math.inf
    assert generated_checks._ratio(got, truth, movements, 1, part=part) < 1
    assert generated_checks._ratio(got, truth * 100, movements, 1, part=part) > generated_checks.LIMIT
    assert generated_checks._ratio(got[1:], truth[1:], [torch.tensor([torch.nan])], 1) == math.inf
