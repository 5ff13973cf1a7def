# SPDX-License-Identifier: Apache-2.0
"""The ablation of examples/: its data, its runs in little, going on, several processes, and the report."""

import dataclasses
import gzip
import json
import os
import statistics
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("timm", reason="needs the extra 'train'")
pytest.importorskip("safetensors", reason="needs the extra 'train'")
pytest.importorskip("scipy", reason="needs the extra 'ablation'")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from ablation import fashion, report, results, run, trainer  # noqa: E402
from ablation.arms import ARMS, COMPARISONS, QUICK, Settings, arm_runs, large_runs, teacher_run  # noqa: E402
from groupmamba import GroupedMamba2d  # noqa: E402
from groupmamba_ext._command import CommandError  # noqa: E402
from pages import write_runs  # noqa: E402

CPU = torch.device("cpu")
TRAIN, TEST = 40, 20
LITTLE = dataclasses.replace(QUICK, batch=8)


def write_idx(file, values):
    content = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Four files as Zalando's, of noise that is brighter in one place for each class."""
    folder = tmp_path_factory.mktemp("fashion")
    rng = np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("t10k", TEST)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = rng.integers(0, 100, (count, 28, 28)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 * label : 2 * label + 6] += 100
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{split}-labels-idx1-ubyte", labels)
    return folder


@pytest.fixture(scope="module")
def data(pictures):
    return trainer.Data(*(fashion.read(pictures, split, CPU) for split in ("train", "t10k")))


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_data(data):
    assert data.train.images.shape == (TRAIN, 28, 28) and data.train.images.dtype == torch.uint8
    assert data.test.labels.tolist() == [i % 10 for i in range(TEST)]
    image = data.train.images[3].float()
    assert image[6:12].mean() > image[12:].mean() + 90  # of class 3, its bright rows


def test_data_that_is_wrong(tmp_path, pictures):
    with pytest.raises(CommandError, match="is no folder"):
        fashion.find(tmp_path / "nowhere")
    with pytest.raises(CommandError, match="holds no train-images-idx3-ubyte.gz"):
        fashion.read(tmp_path, "train", CPU)
    for name in os.listdir(pictures):
        (tmp_path / name).write_bytes((pictures / name).read_bytes())
    broken = tmp_path / "train-images-idx3-ubyte.gz"
    for content in (b"no gzip", gzip.compress(b"PNG!"), gzip.compress(struct.pack(">HBBI", 0, 8, 1, 5))):
        broken.write_bytes(content)
        with pytest.raises(CommandError, match=r"train-images-idx3-ubyte\.gz is no idx file"):
            fashion.read(tmp_path, "train", CPU)
    broken.write_bytes((pictures / broken.name).read_bytes())
    labels = tmp_path / "train-labels-idx1-ubyte"
    write_idx(labels, np.full(TRAIN, 10, np.uint8))
    with pytest.raises(CommandError, match="labels from 0 to 9"):
        fashion.read(tmp_path, "train", CPU)
    write_idx(labels, np.zeros(3, np.uint8))
    with pytest.raises(CommandError, match=r"labels of shape \(3,\)"):
        fashion.read(tmp_path, "train", CPU)


def test_batches_are_moved_and_mirrored_images(data):
    batches = fashion.Batches(data.train, 8, 28, seed=1)
    seen = []
    mirrored = 0
    for images, labels in batches.epoch(2):
        assert images.shape == (8, 3, 28, 28) and images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])
        pixels = ((images[:, 0] * fashion.STD + fashion.MEAN) * 255).round().to(torch.uint8)
        for image, label in zip(pixels, labels, strict=True):
            found = _source(image, data.train)
            assert found is not None and data.train.labels[found[0]] == label
            seen.append(found[0])
            mirrored += found[1]
    assert sorted(seen) == list(range(TRAIN)) and 5 < mirrored < 35


def _source(image, split):
    """The index of the image that this one is, and whether it is mirrored."""
    for index, original in enumerate(split.images):
        for flipped, source in enumerate((original, original.flip(1))):
            padded = torch.nn.functional.pad(source, (2, 2, 2, 2))
            if any(torch.equal(image, padded[i : i + 28, j : j + 28]) for i in range(5) for j in range(5)):
                return index, flipped
    return None


def test_batches_follow_from_the_seed_and_the_epoch(data):
    def first(seed, epoch):
        return next(fashion.Batches(data.train, 8, 32, seed).epoch(epoch))[0]

    assert torch.equal(first(0, 0), first(0, 0))
    assert not torch.equal(first(0, 0), first(1, 0)) and not torch.equal(first(0, 0), first(0, 1))


def quick(folder, pictures, *options):
    """The exit status of the command."""
    common = ["--output", folder, "--data", pictures, "--quick", "--device", "cpu", "--batch", "8", "--epochs", "1"]
    return run.main([str(argument) for argument in (*common, *options)])


def test_runs_and_skips_what_is_finished(tmp_path, pictures, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    # Two processes share the runs; the distilled ones wait for the teacher.
    assert quick(tmp_path, pictures, "--only", "arms", "--arms", "distilled", "affinity", "--workers", "2") == 0
    names = {"teacher", "affinity-0", "affinity-1", "distilled-0", "distilled-1"}
    assert {path.stem for path in tmp_path.glob("*.json")} == names
    assert "5 of 5 runs are finished in" in capsys.readouterr().err
    first = results.read_all([tmp_path])
    for name in names:
        epochs = 3 if name == "teacher" else 1
        assert first[name]["steps"] == epochs * (TRAIN // 8) and len(first[name]["history"]) == epochs
        assert 0 <= first[name]["accuracy"] <= 100 and first[name]["not_finite_at"] is None
    assert first["affinity-0"]["processes_on_device"] == 2
    losses = {name: first[name]["history"][0]["loss"] for name in names}
    assert len(set(losses.values())) == 5

    assert quick(tmp_path, pictures, "--only", "arms", "--arms", "affinity", "grouped", "--seeds", "2") == 0
    second = results.read_all([tmp_path])
    assert {name: second[name] for name in first} == first and "grouped-1" in second
    assert quick(tmp_path, pictures, "--only", "arms", "--arms", "affinity", "--lr", "0.5") == 1
    assert "with lr 0.001 and not 0.5: choose another --output" in capsys.readouterr().err


def test_runs_of_an_earlier_file_are_finished(tmp_path, pictures, capsys):
    """But for the teacher, whose weights are not in it, and what learnt from it."""
    first, second, packed = tmp_path / "first", tmp_path / "second", tmp_path / "all.json"
    argv = ["--data", str(pictures), "--quick", "--device", "cpu", "--workers", "1", "--only", "arms"]
    arms = ["--arms", "grouped", "distilled"]
    assert run.main(["--output", str(first), *argv, *arms, "--batch", "8"]) == 0
    assert report.main([str(first), "--json", str(packed)]) == 0
    teacher = json.loads((first / "teacher.json").read_text())
    assert teacher["steps"] == 3 * json.loads((first / "grouped-0.json").read_text())["steps"]
    capsys.readouterr()
    assert run.main(["--output", str(second), *argv, *arms, "--batch", "8", "--earlier", str(packed)]) == 0
    said = capsys.readouterr().err
    assert "teacher:" in said and "distilled-0:" in said and "grouped-0:" not in said
    assert (second / "grouped-0.json").read_text() == (first / "grouped-0.json").read_text()
    assert run.main(["--output", str(second), *argv, "--batch", "4", "--earlier", str(packed)]) != 0
    assert "batch" in capsys.readouterr().err


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path, data):
    settings = dataclasses.replace(LITTLE, epochs=3)
    run_ = next(arm_runs(settings, ("affinity",)))

    def training(name):
        return trainer.Training(run_, settings, data, None, tmp_path / name)

    told = []
    whole = training("whole.pt").fit(float("inf"), told.append)
    assert [progress.step for progress in told] == [5, 10, 15]
    for _ in range(2):
        assert training("stopped.pt").fit(0, told.append) is None and (tmp_path / "stopped.pt").is_file()
    going_on = training("stopped.pt")
    assert going_on.done == 10
    result = going_on.fit(float("inf"), told.append)
    for key in ("loss", "accuracy", "step"):
        assert [row[key] for row in result["history"]] == [row[key] for row in whole["history"]]
    other = dataclasses.replace(settings, lr=0.1)
    assert trainer.Training(run_, other, data, None, tmp_path / "stopped.pt").done == 0


def test_a_loss_that_is_not_finite_is_the_end(tmp_path, data):
    run_ = next(large_runs(LITTLE, 1e-3))
    training = trainer.Training(dataclasses.replace(run_, steps=30), LITTLE, data, None, tmp_path / "x.pt")
    with torch.no_grad():
        training.model.head.weight.fill_(float("nan"))
    result = training.fit(float("inf"), lambda progress: None)
    assert result["not_finite_at"] == 0 and result["history"][-1]["step"] == 3 and results.failed(result)
    json.loads(json.dumps(result, allow_nan=False))


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_is_a_model(name):
    """Of GroupMamba-T itself, without its values."""
    run_ = next(arm_runs(Settings(), (name,)))
    with torch.device("meta"):
        model = trainer.make_model(run_, Settings())
    assert sum(parameter.numel() for parameter in model.parameters()) > 20e6 and model.head.out_features == 10
    layer = next(module for module in model.modules() if isinstance(module, GroupedMamba2d))
    given = {"variant": "released", "scan": "grouped", **ARMS[name].options}
    assert (layer.variant, layer.scan) == (given["variant"], given["scan"])
    assert (layer.affinity is not None) == given.get("affinity", True)
    if name.startswith("groups"):
        assert layer.directions == given["directions"] and len(layer.directions) == int(name[-1])


def test_comparisons_name_arms():
    for comparison in COMPARISONS:
        assert set(comparison.rows) <= set(ARMS) and comparison.reference in (None, *comparison.rows)
    assert {name for comparison in COMPARISONS for name in comparison.rows} == set(ARMS)


def test_only_one_process_has_a_run(tmp_path):
    folder, again = results.Folder(tmp_path, LITTLE), results.Folder(tmp_path, LITTLE)
    run_ = teacher_run(LITTLE)
    with folder.claim(run_) as mine:
        assert mine
        with again.claim(run_) as theirs:
            assert not theirs
    with again.claim(run_) as theirs:
        assert theirs


def made_up(settings, accuracy=lambda run: 93.0):
    """Results of all runs, as if they had been trained."""
    runs = [
        teacher_run(settings),
        *arm_runs(settings),
        *(r for rate in settings.rates for r in large_runs(settings, rate)),
    ]
    made = {}
    for one in runs:
        value = accuracy(one)
        made[one.name] = {
            "run": one.name,
            "kind": one.kind,
            "arm": one.arm.name,
            "seed": one.seed,
            "accuracy": value,
            "not_finite_at": None,
            "parameters": 23_400_000,
            "images_per_s": 1234.0,
            "graph": True,
            "no_graph": None,
            "processes_on_device": 1,
            "seconds": 1.0,
            "history": [{"step": i, "loss": 1.0, "accuracy": value - 2 + i} for i in range(3)],
            "settings": settings.as_json(),
            "device": "a GPU",
            "versions": {"torch": "2.14.1"},
            "date": "2026-01-02T03:04:05+00:00",
        }
    return made


def test_rates_rise_until_all_seeds_fail(tmp_path):
    settings = dataclasses.replace(Settings(), rates=(1e-3, 1e-2, 1e-1))
    args = run.parse(["--output", str(tmp_path), "--only", "large"])
    folder = results.Folder(tmp_path, settings)

    def planned():
        return {one.lr for one in run.plan(folder, args) if one.kind == "large"}

    def finish(rate, accuracies):
        plain = [one for one in large_runs(settings, rate) if not one.needs_teacher]
        values = dict(zip((one.name for one in plain), accuracies, strict=True))
        made = made_up(settings, lambda one: values.get(one.name, 0))
        for one in plain:
            folder.write(one, made[one.name])

    assert run.plan(folder, args)[0].kind == "teacher" and planned() == {1e-3}
    finish(1e-3, (90, 10, 10))
    assert planned() == {1e-3, 1e-2}
    finish(1e-2, (49.9, 10, 10))
    assert planned() == {1e-3, 1e-2}
    folder.error(teacher_run(settings)).write_text("what happened")
    assert not any(one.needs_teacher or one.kind == "teacher" for one in run.plan(folder, args))


def test_the_interval_is_students_for_pairs():
    def runs(*values):
        return {seed: {"accuracy": value} for seed, value in enumerate(values)}

    mean, low, high = report.difference(runs(93.0, 93.5, 94.1), runs(92.8, 93.1, 93.2))
    deviation = statistics.stdev((0.2, 0.4, 0.9))
    assert mean == pytest.approx(0.5)
    assert high - mean == pytest.approx(4.302653 * deviation / 3**0.5, rel=1e-6)
    assert mean - low == pytest.approx(high - mean)
    assert report.difference(runs(93.0), runs(92.0)) is None
    assert report.difference(runs(93.0, 94.0), runs(92.0, 93.0)) == (1.0, 1.0, 1.0)


def test_report(tmp_path, capsys):
    settings = Settings()
    levels = {"four-d": 93.0, "grouped": 92.5, "affinity": 93.5, "distilled": 94.0, "fused": 91.0}

    def accuracy(one):
        if one.kind == "large":
            return 90.0 if one.lr < 1e-2 or one.needs_teacher else 10.0
        return levels.get(one.arm.name, 93.0) + one.seed / 10

    made = made_up(settings, accuracy)
    made["affinity-2"]["accuracy"] += 0.3
    made["large-distilled-0.01-1"]["not_finite_at"] = 17
    made = {name: one for name, one in made.items() if "0.03" not in name and name != "groups8-2"}
    write_runs(made.values(), tmp_path / "runs.json")
    page, curves = tmp_path / "page.md", tmp_path / "images" / "curves.png"
    page.write_text(f"Before.\n{report.BEGIN}\nold\n{report.END}\nAfter.\n")
    files = ["--page", str(page), "--curves", str(curves), "--json", str(tmp_path / "again.json")]
    assert report.main([str(tmp_path / "runs.json"), *files]) == 0
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "runs.json").read_bytes()
    text = page.read_text()
    assert text.startswith("Before.\n") and text.endswith("After.\n") and "old" not in text
    assert "| grouped scanning | 92.60 ± 0.10 | -0.50 (-0.50 to -0.50) | 23.40 M | 1,234 | 82.20 |" in text
    assert "| grouped + CAM | 93.70 ± 0.26 | +1.10 (+0.67 to +1.53) | 23.40 M | 1,234 | 82.50 |" in text
    assert "grouped scanning, 4-D scanning, grouped + CAM, grouped + CAM + hard distillation; as in the paper" in text
    assert "Intervals that leave out zero: 2 of 3." in text  # the last is +0.40 (-0.03 to +0.83)
    assert "| 0.01 | 3 of 3 | 10.0, 10.0, 10.0 | 1 of 3 | 90.0, not finite at step 17, 90.0 |" in text
    assert "| 0.003 | 0 of 3 |" in text and "| 0.03 | not run |" in text
    assert "Below 92%: fused." in text and "Missing, of all runs: groups8-2." in text
    assert "](images/curves.png)" in text and "([all runs](again.json))" in text and curves.stat().st_size > 10_000
    # The order turned round, and a speed that was not the arm's alone.
    for name, one in made.items():
        one["processes_on_device"] = 2
        if name.startswith("four-d"):
            one["accuracy"] = 99.0
    text = report.block(report.Found(made))
    assert "; the paper's is grouped scanning, 4-D scanning," in text and "| shared |" in text and "1,234" not in text


def test_report_of_little(tmp_path, capsys):
    made = made_up(LITTLE)
    few = {name: made[name] for name in ("grouped-0", "affinity-0")}
    write_runs(few.values(), tmp_path / "few.json")
    assert report.main([str(tmp_path / "few.json")]) == 0
    text = capsys.readouterr().out
    assert "| grouped + CAM | 93.00 | not measured |" in text and "| 4-D scanning | not measured |" in text
    assert "four-d-0" in text.splitlines()[-1]
    assert report.main([str(tmp_path)]) == 1 and "can't be read" in capsys.readouterr().err
    few["grouped-0"]["settings"] = dataclasses.replace(LITTLE, epochs=9).as_json()
    write_runs(few.values(), tmp_path / "few.json")
    assert report.main([str(tmp_path / "few.json")]) == 1
    assert capsys.readouterr().err == "report.py: grouped-0 and affinity-0 had different settings\n"
    page = tmp_path / "page.md"
    page.write_text("no markers")
    write_runs(made_up(LITTLE).values(), tmp_path / "all.json")
    assert report.main([str(tmp_path / "all.json"), "--page", str(page)]) == 1
    assert "must hold the lines" in capsys.readouterr().err


def test_wrong_arguments(tmp_path, pictures, capsys):
    for words, argument in (
        (["--rates", "0.1", "0.01"], "--rates"),
        (["--arms", "five-d"], "--arms"),
        (["--minutes", "-1"], "--minutes"),
        (["--seeds", "1"], "--seeds"),
    ):
        with pytest.raises(SystemExit, match="2"):
            quick(tmp_path / "runs", pictures, *words)
        assert f"argument {argument}" in capsys.readouterr().err
    assert quick(tmp_path / "runs", tmp_path / "nothing") == 1
    assert capsys.readouterr().err.strip() == f"run.py: {tmp_path / 'nothing'} is no folder"
    assert quick(tmp_path / "runs", pictures, "--batch", "41") == 1
    assert "--batch 41: there are 40 images" in capsys.readouterr().err
