# SPDX-License-Identifier: Apache-2.0
"""The benchmark of whole models: what is checked, timed and compared, published accuracy, the README's table."""

import sys

import pytest
import torch

pytest.importorskip("timm")

from suite import accuracy, layer_cases, markdown, model_calls, model_entries, model_table, models, report  # noqa: E402
from suite.runner import on_stream  # noqa: E402
from suite.timing import Timer  # noqa: E402
from support.bench import CPU, ROOT, TinyNet, quick, table, tiny_models  # noqa: E402

MODELS = ("--op", "model", "--models", "groupmamba_tiny", "test_convnext", "--peers", "timm")


def test_models_side_by_side(monkeypatch, capsys, tmp_path):
    tiny_models(monkeypatch)
    path = tmp_path / "models.json"
    assert quick(*MODELS, "--json", path) == 0
    out = capsys.readouterr().out
    for kind in ("eval", "train", "latency", "step"):
        assert f"groupmamba_tiny, {kind} (batch 1, float32): " in out
    rows = {(row["label"], row["pass"]): row for row in report.read_json(path)[0]["rows"]}
    assert set(rows) == {(m, k) for m in ("groupmamba_tiny", "test_convnext") for k in models.KINDS}
    for kind in models.KINDS:
        row, other = (rows[name, kind] for name in ("groupmamba_tiny", "test_convnext"))
        assert row["peers"]["test_convnext"]["ratio"] == pytest.approx(other["us"] / row["us"])
        assert row["images_per_s"] == pytest.approx(1e6 / row["us"]) and row["check"]["passed"]
        assert row["parameters"] == sum(p.numel() for p in TinyNet().parameters())
    text = markdown.tables(report.read_json(path))
    assert text.count("| groupmamba_tiny |") == 1 and "x test_convnext" in text and "step img/s, eager" in text
    assert "83.3" in text and "- Top-1 on ImageNet-1K as published" in text


def test_kinds_and_batches_are_chosen(monkeypatch, tmp_path):
    tiny_models(monkeypatch)
    path = tmp_path / "some.json"
    arguments = ("--op", "model", "--models", "groupmamba_tiny", "--batch", "2", "3", "2", "--json", path)
    assert quick(*arguments, "--kinds", "step", "latency") == 0
    rows = report.read_json(path)[0]["rows"]
    assert [(row["pass"], row["batch"]) for row in rows] == [("latency", 1), ("step", 2), ("step", 3)]
    (line, other) = model_table.lines(rows)[1:]
    assert line[0].startswith("groupmamba_tiny (2 x ") and other[0].startswith("groupmamba_tiny (3 x ")
    assert line[-1] == other[-1] != "-"  # the latency of one image is with both


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scale": 1.01}, "logits: relative error"),
        ({"slope": 1.01}, "gradient: relative error"),
        ({"idle": True}, "ValueError: 1 parameters get no gradient, 'idle' first (models.py:"),
    ],
)
def test_wrong_models_are_red(options, said, monkeypatch, capsys):
    tiny_models(monkeypatch, **options)
    assert quick(*MODELS) == 1
    out = capsys.readouterr().out
    assert f"RED: groupmamba_tiny: {said}" in out and "x test_convnext" not in out
    line = next(line for line in out.splitlines() if line.startswith("groupmamba_tiny "))
    assert line.split()[1:] == ["83.3", "-", *["RED"] * 4]
    assert "RED: 4 of this project's rows failed" in out


class Failing(torch.nn.Linear):
    """A peer whose weights or outputs are not numbers, or that raises."""

    def __init__(self, how):
        super().__init__(3, 10)
        self.how = how

    def forward(self, x):
        if self.how == "raises" and self.training:
            raise ValueError("no training")
        y = super().forward(x.mean((2, 3)))
        return y * float("nan") if self.how == "nan" else y


def test_failing_peers_are_named_and_turn_nothing_red(monkeypatch, capsys):
    tiny_models(monkeypatch)
    monkeypatch.setattr(model_entries, "_timm", lambda name: Failing("raises"))
    assert quick(*MODELS, "--kinds", "train", "step") == 0
    out = capsys.readouterr().out
    assert "RED" not in out and out.count("failed") == 2
    assert "peer test_convnext: ValueError: no training (test_convnext, train and 1 more)" in out
    monkeypatch.setattr(model_entries, "_timm", lambda name: Failing("nan"))
    assert quick(*MODELS, "--kinds", "eval", "step") == 0
    out = capsys.readouterr().out
    assert "peer test_convnext: logits are not finite" in out and "peer test_convnext: the loss is not finite" in out
    monkeypatch.setattr(model_entries, "_timm", lambda name: sys.exit("no such model"))
    assert quick(*MODELS, "--kinds", "eval") == 0
    assert "peer test_convnext: SystemExit: no such model" in capsys.readouterr().out


def test_an_imprecise_released_model_turns_nothing_red(monkeypatch, capsys):
    tiny_models(monkeypatch)
    entry = model_entries.Entry("released/groupmamba_tiny", "released", lambda: TinyNet(scale=1.5))
    monkeypatch.setattr(models, "convert_released_state_dict", lambda state: state)
    monkeypatch.setattr(model_entries, "entries", lambda *_: [entry])
    assert quick("--op", "model", "--kinds", "eval") == 0
    out = capsys.readouterr().out
    assert "peer released/groupmamba_tiny: imprecise: logits: relative error 5.00e-01" in out and "RED" not in out


def test_compiled_models_are_checked(monkeypatch, capsys):
    """`torch.compile` that is wrong by a per cent: red for this project, named for a peer."""
    tiny_models(monkeypatch)

    def wrong(model, **options):
        assert options == {"dynamic": False}
        return lambda x: tuple(1.01 * y for y in model(x)) if model.training else 1.01 * model(x)

    monkeypatch.setattr(torch, "compile", wrong)
    arguments = ("--op", "model", "--models", "groupmamba_tiny, compiled", "test_convnext", "--kinds", "eval", "step")
    assert quick(*arguments, "--peers", "timm", "compile") == 1
    out = capsys.readouterr().out
    assert "RED: groupmamba_tiny, compiled: compiled, logits: relative error" in out
    assert "RED: groupmamba_tiny, compiled: compiled, gradient: relative error" in out
    assert "peer test_convnext, compiled: compiled, imprecise: logits: relative error" in out
    assert "RED: 2 of this project's rows failed" in out
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    assert quick(*arguments, "--peers", "timm", "compile") == 0


# what is timed ------------------------------------------------------------------------------


def test_a_step_changes_the_weights_and_leaves_no_gradients(device):
    with on_stream(torch.device(device)):
        model = TinyNet().to(device).train()
        before = [p.detach().clone() for p in model.parameters()]
        call = model_calls.Step(model, model, model_calls.images(3, 32, torch.device(device)), torch.float32)
        first = call(0)
        for _ in range(3):
            loss = call(0)
        assert loss < first and call.fault() is None
        assert all(p.grad is None for p in model.parameters())
        assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        with torch.no_grad():
            model.head.bias[3] = float("nan")
        assert "not finite" in call.fault()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_in_graphs_on_a_gpu(monkeypatch, dtype):
    tiny_models(monkeypatch)
    device = torch.device("cuda")
    with on_stream(device):
        runner = models.ModelRunner(Timer(device, quick=True), 64, lambda text: None)
        for entry in model_entries.chosen(
            ["groupmamba_tiny", "test_convnext"], model_entries.entries(["timm"], *[None] * 2), ["timm"]
        ):
            rows = list(runner.rows(entry, 8, dtype, models.KINDS))
            assert [row["pass"] for row in rows] == list(models.KINDS)
            for row in rows:
                assert row["error"] is None and row["graph_error"] is None and row["graph_us"] > 0
                assert row["total_memory_bytes"] > row["peak_memory_bytes"] > 0 and row["launches"] > 0


def test_variants_are_models_of_the_comparison():
    found = {entry.label: entry for entry in model_entries.entries([], None, None)}
    for variant in ("fused", "paper"):
        model = found[f"groupmamba_tiny, {variant}"].build()
        assert {block.attn.variant for stage in model.stages for block in stage.blocks} == {variant}
    x = model_calls.images(1, 64, CPU)
    with torch.no_grad():
        assert model.eval()(x).shape == (1, 1000)


def test_states_are_compared_with_one():
    def row(label, graph, eager, kind="forward"):
        figures = {"us": graph or eager, "graph_us": graph, "eager_us": eager}
        return {"label": label, "shape": "s", "batch": 1, "dtype": "d", "pass": kind, "over": None} | figures

    one, more = row(layer_cases.ONE_STATE, 100.0, 200.0), row(layer_cases.MORE_STATES, 250.0, 300.0)
    other = row(layer_cases.MORE_STATES, 250.0, 300.0, "forward+backward")
    layer_cases.compare_states([one, more, other])
    assert more["over"] == {"graph": 2.5, "eager": 1.5} and one["over"] is None and other["over"] is None
    one["graph_us"] = None
    layer_cases.compare_states([one, more])
    assert more["over"] == {"graph": None, "eager": 1.5}


# which models -------------------------------------------------------------------------------


def labels(names, peers):
    found = model_entries.entries(peers, None, None)
    return [entry.label for entry in model_entries.chosen(names, found, peers)]


def test_any_model_of_timm_is_a_peer():
    assert labels(["test_vit", "groupmamba_base"], ["timm"]) == ["groupmamba_base", "test_vit"]
    assert labels(["test_vit"], ["timm", "compile"]) == ["test_vit", "test_vit, compiled"]
    assert labels(["test_vit, compiled", "hgnetv2_b4, compiled"], ["timm", "compile"]) == [
        "hgnetv2_b4, compiled",
        "test_vit, compiled",
    ]
    assert labels(["groupmamba_tiny, fused, compiled"], ["compile"]) == ["groupmamba_tiny, fused, compiled"]
    assert labels(["groupmamba_tiny"], []) == ["groupmamba_tiny"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["resnet"], ("invalid choice: 'resnet'", "any model of timm")),
        (["resnet50"], ("'resnet50' needs --peers timm",)),
        (["groupmamba_tiny, compiled"], ("needs --peers compile",)),
        (["groupmamba_tiny, quick"], ("invalid choice: 'groupmamba_tiny, quick'",)),
    ],
)
def test_models_that_cannot_be_had_are_named(arguments, parts, capsys):
    with pytest.raises(SystemExit) as end:
        quick("--op", "model", "--peers", "none", "--models", *arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and "argument --models: " in line and all(part in line for part in parts)


def test_every_peer_of_the_comparison_has_a_published_accuracy():
    import timm

    for name in (*model_entries.OURS, *model_entries.TIMM, *model_entries.VMAMBA):
        assert accuracy.figures(name), name
    for name in accuracy.TOP1:
        assert accuracy.figures(name + ", compiled") == accuracy.figures(name)
        for figure in accuracy.figures(name):
            assert 75 < figure.percent < 90 and figure.weights and figure.source
            if figure.source == accuracy.TIMM:
                assert timm.models.is_model_pretrained(f"{name}.{figure.weights}")
    assert accuracy.figures("released/groupmamba_base") == accuracy.figures("groupmamba_base")
    assert accuracy.cell("convnext_tiny, compiled") == "82.1; 84.2†" and accuracy.cell("groupmamba_tiny, no CAM") == ""
    (line,) = accuracy.sources(["hgnetv2_b4", "hgnetv2_b4", "test_vit"])
    assert line == "hgnetv2_b4: 83.7 with ssld_stage2_ft_in1k† (timm, results-imagenet.csv, commit aa4b5850)"
    assert accuracy.sources(["fastvit_sa36"])[0].endswith(", at 256 x 256)")


# the README's table -------------------------------------------------------------------------


def run_of(rows, **versions):
    return {
        "device": {"type": "cuda", "name": "GPU"},
        "versions": {"torch": "2.11", "groupmamba": "0.1", "sources": "abc"} | versions,
        "date": "2026-11-30T00:00:00",
        "copy": {"bytes": 1 << 29, "gb_s": 4000.0},
        "gemm_tflops": {},
        "rows": rows,
    }


def model_row(label, kind, graph, eager, series="timm", **more):
    row = {"op": "model", "label": label, "series": series, "pass": kind, "shape": "3x224x224", "dtype": "bfloat16"}
    row |= {"batch": 1 if kind == "latency" else 128, "storage": "channels_last", "check": None, "error": None}
    row |= {"us": graph, "graph_us": graph, "eager_us": eager, "graph_error": None, "peers": {}, "launches": 3}
    return row | {"peak_memory_bytes": None, "total_memory_bytes": None, "parameters": 28_600_000} | more


@pytest.fixture
def results(tmp_path):
    """Two runs of one tree: this project's tiny model, and a peer as it is and compiled."""
    ours = [
        model_row("groupmamba_tiny", "eval", 8e3, 9e3, "ours", parameters=23_400_000),
        model_row("groupmamba_tiny", "step", 32e3, 40e3, "ours", parameters=23_400_000),
        model_row("groupmamba_tiny", "latency", 1.2e3, 8e3, "ours", parameters=23_400_000),
        model_row("groupmamba_tiny, no CAM", "eval", 7e3, 8e3, "ours"),
    ]
    theirs = [
        model_row("convnext_tiny", "eval", 16e3, 17e3),
        model_row("convnext_tiny", "latency", 1.1e3, 5e3),
        model_row("convnext_tiny, compiled", "eval", 8e3, 8.5e3),
        model_row("convnext_tiny, compiled", "step", None, None, us=None, error="ValueError: no"),
    ]
    path = tmp_path / "results.json"
    report.write_json(path, [run_of(ours), run_of(theirs)])
    return path


def test_readme_and_documentation_from_one_file(results, tmp_path):
    readme, docs = tmp_path / "README.md", tmp_path / "docs" / "benchmarks.md"
    readme.write_text(f"above\n{markdown.BEGIN}\nold\n{markdown.END}\nbelow\n")
    assert table.main([str(results), "--readme", str(readme), "--docs", str(docs)]) == 0
    text = readme.read_text()
    assert text.startswith("above\n") and text.endswith("\nbelow\n") and "old" not in text
    assert "| **groupmamba_tiny** | 83.3 | 23.4 M | 16,000 | 4,000 | 3,200 | 8.00 / 1.20 |" in text
    assert "| convnext_tiny | 82.1; 84.2† | 28.6 M | 16,000<sup>c</sup> | failed | failed | 5.00 / 1.10 |" in text
    assert "no CAM" not in text and "peer convnext_tiny, compiled: ValueError: no" in text
    assert len(text.splitlines()) < 25
    pages = docs.read_text()
    assert pages.startswith("# Benchmarks\n") and "| groupmamba_tiny, no CAM |" in pages
    assert (
        "convnext_tiny: 82.066 with fb_in1k, 84.192 with in12k_ft_in1k† (timm, results-imagenet.csv, commit aa4b5850)"
        in pages
    )
    assert table.main([str(results), "--docs", str(docs)]) == 0 and docs.read_text() == pages
    parts = [tmp_path / "ours.json", tmp_path / "theirs.json"]
    for path, run in zip(parts, report.read_json(results), strict=True):
        report.write_json(path, [run])
    again = tmp_path / "again.json"
    assert table.main([*map(str, parts), "--json", str(again)]) == 0 and again.read_text() == results.read_text()


@pytest.mark.parametrize("versions", [{"sources": "def"}, {"sources": None}, {"torch": "2.14"}])
def test_tables_are_of_one_tree(results, versions, tmp_path, capsys):
    runs = report.read_json(results)
    report.write_json(results, [*runs, run_of([model_row("convnext_tiny", "eval", 1.0, 2.0)], **versions)])
    readme, docs = tmp_path / "README.md", tmp_path / "docs.md"
    readme.write_text(before := f"{markdown.BEGIN}\nold\n{markdown.END}\n")
    assert table.main([str(results), "--readme", str(readme), "--docs", str(docs)]) == 1
    assert "must hold runs that say one tree, device and torch" in capsys.readouterr().err
    assert readme.read_text() == before and not docs.exists()
    assert table.main([str(results)]) == 0  # to be read, with a head that names both
    report.write_json(results, [run_of([model_row("groupmamba_tiny", "eval", 1.0, 2.0, "ours")], sources=None)])
    assert table.main([str(results), "--docs", str(docs)]) == 1 and "trees: ['None']" in capsys.readouterr().err


def test_tables_of_files_without_what_they_need(results, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    assert table.main([str(results), "--readme", str(readme)]) == 1
    assert markdown.BEGIN in capsys.readouterr().err
    report.write_json(results, [run_of([model_row("convnext_tiny", "eval", 1.0, 2.0)])])
    readme.write_text(f"{markdown.BEGIN}\n{markdown.END}\n")
    assert table.main([str(results), "--readme", str(readme)]) == 1
    assert "holds no row of groupmamba_tiny" in capsys.readouterr().err


def test_the_tree_is_named_by_its_sources(monkeypatch, tmp_path):
    name = report.sources()
    assert len(name) == 12 and name == report.sources()
    package = tmp_path / "groupmamba"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(report.groupmamba, "__file__", str(package / "__init__.py"))
    other = report.sources()
    (package / "layer.py").write_text("x = 1")
    assert len({name, other, report.sources()}) == 3
    assert str(ROOT) not in name
