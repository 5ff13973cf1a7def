# SPDX-License-Identifier: Apache-2.0
"""The benchmark: its ground truth, what it measures, its tables, files and arguments."""

import json

import pytest
import torch

import groupmamba_ext as ext
from groupmamba import GroupedMamba2d, convert_released_state_dict
from suite import ablation, layer_cases, markdown, measure, op_cases, report, truth  # noqa: E402
from suite.checkouts import copy_weights  # noqa: E402
from suite.problem import Calls, Shape  # noqa: E402
from suite.timing import Timer  # noqa: E402
from support.bench import CPU, ROOT, bench, quick, table  # noqa: E402

SHAPE = Shape(2, 12, 5, 7)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """A run of every op on the CPU, written to a file."""
    path = tmp_path_factory.mktemp("bench") / "results" / "cpu.json"
    assert quick("--op", "scan", "conv", "norm", "layer", "ffn", "--pass", "forward", "backward", "--json", path) == 0
    return path


# ground truth -------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3, 8, 9, 10, 35])
def test_two_level_recurrence(length):
    a, b = torch.rand(2, length, 3, dtype=torch.float64), torch.randn(2, length, 3, dtype=torch.float64)
    h, expected = torch.zeros(2, 3, dtype=torch.float64), []
    for t in range(length):
        h = a[:, t] * h + b[:, t]
        expected.append(h)
    torch.testing.assert_close(truth.linear_recurrence(a, b), torch.stack(expected, 1))


@pytest.mark.parametrize("storage", ["group-major", "token-major"])
def test_truth_of_the_scan_is_the_reference(storage):
    problem = op_cases._scan(SHAPE, torch.float64, storage, CPU)
    inputs = {name: t.double().requires_grad_() for name, t in problem.inputs.items()}
    got = problem.truth(**inputs)
    expected = ext.reference.grouped_selective_scan(**inputs, directions=op_cases.DIRECTIONS)
    torch.testing.assert_close(got, expected)
    dy = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad(y, list(inputs.values()), dy) for y in (got, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", [{}, {"affinity": False}])
def test_truth_of_the_layer_is_the_reference(options):
    problem = layer_cases.layer_problem(SHAPE, torch.float32, options, CPU)
    layer = GroupedMamba2d(SHAPE.channels, **options).double()
    layer.load_state_dict({name: p.double() for name, p in problem.parameters.items()})
    x = problem.inputs["x"].double()
    with ext.backend("reference"):
        expected = layer(x)
    parameters = dict(layer.named_parameters())
    torch.testing.assert_close(problem.truth(x=x, **parameters), expected)
    other = GroupedMamba2d(SHAPE.channels, **options)  # of another dtype and with other weights
    torch.testing.assert_close(layer_cases.by_reference(other)(x, **parameters), expected)


@pytest.mark.skipif(not hasattr(ext, "cross_selective_scan"), reason="this version has no cross_selective_scan")
def test_truth_of_the_cross_scan_is_the_reference():
    problem = op_cases._cross(SHAPE, torch.float64, CPU)
    inputs = {name: t.double() for name, t in problem.inputs.items()}
    expected = ext.reference.cross_selective_scan(**inputs, directions=op_cases.CROSS_DIRECTIONS)
    torch.testing.assert_close(problem.truth(**inputs), expected)


# what is measured ---------------------------------------------------------------------------


def test_compulsory_bytes_count_every_tensor_once():
    problem = op_cases._conv(SHAPE, torch.bfloat16, True, "silu", CPU)
    calls = Calls(problem, 2)
    image, weights = 2 * 12 * 5 * 7 * 2, (12 * 9 + 12) * 4
    assert calls.bytes("forward") == 2 * image + weights
    assert calls.bytes("backward") == 3 * image + 2 * weights  # x, dy, dx; weights and their gradients
    assert calls.bytes("forward+backward") == calls.bytes("forward") + calls.bytes("backward")


def test_sets_of_inputs_exceed_the_cache_and_keep_their_storage():
    timer = Timer(CPU)
    size = timer.cache // 2
    assert timer.sets(size) * size > timer.cache
    problem = op_cases._scan(SHAPE, torch.float32, "group-major", CPU)
    calls = Calls(problem, 3)
    for tensors in calls.sets:
        assert {name: t.stride() for name, t in tensors.items()} == {n: t.stride() for n, t in problem.inputs.items()}
    assert len({tensors["u"].data_ptr() for tensors in calls.sets}) == 3


def test_backward_pass_is_the_gradient_and_can_be_repeated():
    problem = op_cases._pool(SHAPE, torch.float32, CPU)
    calls = Calls(problem, 1)
    both, alone = calls.call("forward+backward")(0), calls.call("backward")
    for _ in range(2):
        for a, b in zip(alone(0), both, strict=True):
            torch.testing.assert_close(a, b)


def test_flops_of_the_layer_are_those_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    shape = Shape(1, 64, 7, 7)
    problem = layer_cases.layer_problem(shape, torch.float32, {"affinity": False}, CPU)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        problem.function(**problem.inputs)
    uncounted = 3 * 8 * shape.tokens * shape.channels  # norms
    assert problem.flops["forward"] - uncounted == counter.get_total_flops()


def test_growth_keeps_the_tokens():
    for shape in layer_cases.growth_shapes():
        assert abs(shape.tokens / 2**20 - 1) < 0.01
    assert [shape.height for shape in layer_cases.growth_shapes()][::4] == [56, 1024]


# reports ------------------------------------------------------------------------------------


def test_table_says_what_it_should(capsys):
    assert quick("--op", "scan", "--pass", "forward", "backward") == 0
    out = capsys.readouterr().out
    header = next(line for line in out.splitlines() if line.startswith("shape"))
    for column in ("dtype", "storage", "pass", "eager us", "GB/s", "% copy", "vs pytorch"):
        assert column in header
    assert "graph us" not in header and "launches" not in header  # not measured on the CPU
    assert "64x14x14" in out and "348x7x7" in out
    assert "geometric mean, float32, group-major, forward:" in out and "GB/s (Tensor.copy_" in out


def test_json_holds_what_the_figures_need(result):
    (run,) = report.read_json(result)
    assert run["device"]["type"] == "cpu" and run["versions"]["torch"] == torch.__version__
    assert run["copy"]["gb_s"] > 0 and run["gemm_tflops"]["float32"] > 0 and run["date"].startswith("20")
    assert {row["op"] for row in run["rows"]} == {"scan", "conv", "norm", "layer", "ffn"}
    for row in run["rows"]:
        assert row["check"]["passed"] and row["us"] > 0 and row["bytes"] > 0 and row["flops"] > 0
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["us"] * 1e-3)
        assert row["percent_of_copy"] == pytest.approx(100 * row["copy_us"] / row["us"])
        if row["series"] == "states":
            assert row["over"]["graph"] is None and row["over"]["eager"] > 0 and not row["peers"]
            continue
        peer = row["peers"]["pytorch"]
        assert peer["mode"] == "eager" and peer["ratio"] == pytest.approx(peer["eager_us"] / row["eager_us"])
    scan = [row for row in run["rows"] if row["op"] == "scan" and row["pass"] == "forward"]
    mean = next(m for m in run["geometric_means"] if m["op"] == "scan" and m["pass"] == "forward")
    product = scan[0]["peers"]["pytorch"]["ratio"] * scan[1]["peers"]["pytorch"]["ratio"]
    assert len(scan) == 2 and mean["ratios"]["pytorch"] == pytest.approx(product**0.5)


def test_append_keeps_earlier_runs_and_the_table_takes_the_latest(result, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "two.json"
    path.write_text(result.read_text())
    assert quick("--op", "conv", "--pass", "forward", "--peers", "none", "--json", path, "--append") == 0
    first, second = report.read_json(path)
    rows = markdown.latest([first, second])
    assert len(rows) == len(first["rows"])
    figures = [row["us"] for row in rows]
    assert all(row["us"] in figures for row in second["rows"]) and len(second["rows"]) == 4
    assert not any(row["peers"] for row in second["rows"])
    assert all("pytorch" in row["peers"] for row in rows if row["series"] == "stages")  # of the first run

    docs, picture = tmp_path / "docs.md", tmp_path / "picture.png"
    assert table.main([str(path), "--docs", str(docs), "--plot", str(picture)]) == 0
    text = docs.read_text()
    assert "**grouped_selective_scan**" in text and "| 64x14x14 | 1 | float32 | forward |" in text
    assert "**GroupedMamba2d(d_state=16)**" in text and "time over d_state=1, eager" in text
    assert picture.stat().st_size > 10_000


def test_growth_is_summed_up():
    def row(side, ns, memory):
        sizes = {"batch": 1, "height": side, "width": side}
        return {
            "pass": "forward",
            "series": "growth",
            "us": 1.0,
            "ns_per_token": ns,
            "peak_memory_bytes": memory,
        } | sizes

    (line,) = report.growth([row(10, 2.0, 600), row(20, 3.0, 1600)])
    assert "of 2 sizes, forward: time 1.50x, memory 1.50x" in line
    assert report.growth([row(10, 2.0, None) | {"series": "stages"}] * 2) == []


def test_plot(result, tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    from suite import plot

    (run,) = report.read_json(result)
    plot.draw(run, tmp_path / "roofline.png")
    picture = imread(tmp_path / "roofline.png")
    assert picture.shape[0] > 500 and len(set(map(tuple, picture[::7, ::7, :3].reshape(-1, 3).tolist()))) > 20


def test_ablation_ratios_are_to_the_row_before():
    def row(label, us):
        found = {"op": "ablation", "label": label, "shape": "s", "batch": 1, "dtype": "d", "pass": "forward"}
        return found | {"us": us, "graph_us": None, "eager_us": us, "error": None, "peers": {}}

    cross, grouped, affinity = row("4-D scanning", 30.0), row("grouped", 20.0), row("grouped + CAM", 25.0)
    ablation.compare([cross, grouped, affinity])
    assert grouped["peers"]["4-D scanning"]["ratio"] == 1.5 and affinity["peers"]["grouped"]["ratio"] == 0.8
    cross["graph_us"] = 24.0  # without the other's graph, both are as called
    ablation.compare([cross, grouped, affinity])
    assert grouped["peers"]["4-D scanning"]["ratio"] == 1.5 and grouped["peers"]["4-D scanning"]["mode"] == "eager"
    grouped |= {"us": None, "error": "wrong"}
    affinity["peers"] = {}
    ablation.compare([cross, grouped, affinity])
    assert affinity["peers"]["grouped"]["ratio"] is None and report.ratio_cell(affinity["peers"]["grouped"]) == "RED"


# arguments and peers ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--op", "scam"], ("--op", "'scam'")),
        (["--dtype", "int8"], ("--dtype", "'int8'")),
        (["--batch", "0"], ("--batch", "'0'")),
        (["--peers", "cuda"], ("--peers", "'cuda'")),
        (["--peers", "released"], ("--peers", "'released'", "--released PATH")),
        (["--released", "/nowhere"], ("--released", "'/nowhere'", "classification/models")),
        (["--vmamba", "/nowhere"], ("--vmamba", "'/nowhere'")),
        (["--append"], ("--append", "--json")),
        (["--json", "/"], ("--json", "'/'")),
        (["--json", "/proc/nothing.json"], ("--json", "'/proc/nothing.json'", "cannot be written")),
        (["--plot", "setup.py/picture.png"], ("--plot", "cannot be written")),
        (["--models", "groupmamba_tiny"], ("--models", "needs --op model")),
        (["--kinds", "step"], ("--kinds", "needs --op model")),
        (["--op", "scan", "layer", "--pass", "backward"], ("--pass", "'layer' has none of ['backward']")),
        (["--batch"], ("--batch", "expected at least one argument")),
        (["scan"], ("unrecognized arguments: scan",)),
    ],
)
def test_wrong_arguments_are_named(arguments, parts, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        quick(*arguments)
    (message,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("arguments", "part"),
    [(["/nowhere.json"], "'/nowhere.json'"), ([], "results"), (["x", "--readme", "/"], "--readme")],
)
def test_wrong_arguments_of_the_tables_are_named(arguments, part, capsys):
    with pytest.raises(SystemExit) as end:
        table.main(arguments)
    (message,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and part in message


def test_cuda_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench.main(["--device", "cuda"])
    assert "--device: 'cuda'" in capsys.readouterr().err


def test_unreadable_results_are_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match="schema"):
        report.read_json(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="no JSON"):
        report.read_json(path)


class ReleasedGroup(torch.nn.Module):
    """The names and shapes of one group of the released layer."""

    def __init__(self, dim):
        super().__init__()
        rank = -(-dim // 16)
        shapes = {
            "x_proj_weight": (1, rank + 2, dim),
            "dt_projs_weight": (1, dim, rank),
            "dt_projs_bias": (1, dim),
            "A_logs": (dim, 1),
            "Ds": (dim,),
        }
        for name, shape in shapes.items():
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(shape)))
        self.in_proj = torch.nn.Linear(dim, 2 * dim, bias=False)
        self.conv2d = torch.nn.Conv2d(dim, dim, 3, groups=dim)
        self.out_norm = torch.nn.LayerNorm(dim)
        self.out_proj = torch.nn.Linear(dim, dim, bias=False)


def test_weights_go_back_to_the_released_names():
    dim = 64
    released = torch.nn.Module()
    for group in range(1, 5):
        released.add_module(f"mamba_g{group}", ReleasedGroup(dim // 4))
    released.fc1, released.fc2 = torch.nn.Linear(dim, dim // 16), torch.nn.Linear(dim // 16, dim)
    released.norm, released.proj = torch.nn.LayerNorm(dim), torch.nn.Linear(dim, dim)
    released.skip_scale = torch.nn.Parameter(torch.zeros(1))
    ours = layer_cases.make_layer(dim, CPU).state_dict()
    copy_weights(released, ours)
    back = convert_released_state_dict(released.state_dict())
    assert back.keys() == ours.keys()
    for name, value in back.items():
        assert torch.equal(value, ours[name]), name


def test_compile_peer_is_compared(capsys):
    assert quick("--op", "norm", "--pass", "forward", "--peers", "compile") == 0
    assert "x compile" in capsys.readouterr().out


def test_copy_moves_what_it_says():
    copy = measure.Copy(Timer(CPU, quick=True))
    (x, y), *_ = copy._buffers(1 << 20)
    assert measure.nbytes((x, y)) == 1 << 20
    assert copy.us(1 << 20) == copy.us(1 << 20) > 0


def test_command_says_nothing_of_the_machine():
    arguments = [
        "--models",
        "groupmamba_tiny, compiled",
        "--json",
        "/somewhere/out/results.json",
        "--released",
        "GroupMamba",
    ]
    expected = "bench/run.py --models 'groupmamba_tiny, compiled' --json results.json --released GroupMamba"
    assert report._command("bench/run.py", arguments) == expected
