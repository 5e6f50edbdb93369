"""benchmarks/reproduce.py: evaluations during a training, resume after a kill, scores of images."""

import base64
import io
import json
import shlex
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_probes import make_voc_tree

from densecl.config import Config
from densecl.evaluate.bootstrap import resampled_accuracy, resampled_mean_iou
from densecl.evaluate.features import untrained_like
from densecl.runtime.checkpoint import load_checkpoint
from densecl.runtime.io import UsageError, run_command
from densecl.train import parse_args
from densecl.trainer import train
from tiny import TINY

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import evaluation
import figures
import reproduce

LEFT_OUT = ("seconds", "images_per_s", "commit")  # differ from run to run


@pytest.fixture
def study(tmp_path, monkeypatch, make_images):
    """A command line of a short study, in a folder with 32 images and a VOC tree."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "VIEWS", 24)
    evaluation.open_probe.cache_clear()
    make_voc_tree(tmp_path / "VOC2012")
    make_images(tmp_path / "images", 32)
    return "--steps 4 --probe-at 0 50 --seeds 0 --images images --voc VOC2012 --results rows.jsonl"


def without_times(value):
    """The value without what differs between two runs of the same command."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in LEFT_OUT}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def scores_of(row):
    return np.load(io.BytesIO(base64.b64decode(row["scores"])))


def test_the_published_method_does_not_depend_on_the_demo_preset():
    """The demo starts with positives by geometry; the study's DenseCL must not."""
    args = Namespace(steps=1060, epochs=20, per_epoch=53)
    words = shlex.split(reproduce.settings("DenseCL", 0, args))
    config = parse_args(["demo", *words, "--data-root", "images"]).config
    assert (config.method, config.match, config.negatives) == ("densecl", "backbone", "pooled")
    assert (config.geometry_warmup, config.lambda_warmup, config.loss_lambda) == (0, 0, 0.5)
    assert (config.optimizer, config.schedule, config.crop_scale) == ("sgd", "epoch", (0.2, 1.0))
    warm = shlex.split(reproduce.settings("geometry warm-up", 0, args))
    assert parse_args(["demo", *warm, "--data-root", "images"]).config.geometry_warmup == 424


def test_rows_from_before_a_change_of_options_are_found():
    path = Path(reproduce.__file__).with_name("results.jsonl")
    args = Namespace(
        steps=1060, epochs=20, per_epoch=53, again=False, probe_at=[], until=100, results=path
    )
    methods = ("untrained", "MoCo-v2", "DenseCL", "geometry", "geometry warm-up", "T 0.1")
    for method in (*methods, "random offset"):
        assert reproduce.has_row(method, 0, args), method


def test_a_backbone_of_the_study_is_trained_and_loaded(study, monkeypatch):
    monkeypatch.syspath_prepend(Path(reproduce.__file__).parents[1])
    option = shlex.split(reproduce.METHODS["mirrored margin"])[1]
    train(replace(TINY, backbone=option, data_root="images", out="run", image_size=64, max_steps=1))
    encoder = reproduce.load_encoder("run/last.pt")
    saved = load_checkpoint("run/last.pt")["model"]
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, saved[f"encoder_q.{name}"])
    images = torch.randn(2, 3, 64, 64)
    inside = encoder.backbone(images)[:, :, 1:3, 1:3]
    assert inside.shape == encoder.backbone.body(images)[:, :, 1:3, 1:3].shape
    assert not torch.allclose(inside, encoder.backbone.body(images)[:, :, 1:3, 1:3])


@pytest.mark.long
def test_a_run_that_is_killed_continues_and_has_the_same_row(study, monkeypatch):
    reproduce.main(shlex.split(f"DenseCL {study} --out whole"))

    # the first part of a run ends after one of its two steps, and its evaluation is killed
    whole, killed = reproduce.run_training, []

    def interrupt(words, log):
        at = len(words) - words[::-1].index("--max-steps")  # the last one counts
        killed.append(words[at])
        words = [*words[:at], "1", *words[at + 1 :]] if len(killed) == 1 else words
        whole(words, log)
        if len(killed) == 1:
            raise KeyboardInterrupt

    def stop(encoder, voc):
        raise KeyboardInterrupt

    line = f"DenseCL {study} --out killed".replace("rows.jsonl", "other.jsonl")
    monkeypatch.setattr(reproduce, "run_training", interrupt)
    with pytest.raises(KeyboardInterrupt):
        reproduce.main(shlex.split(line))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reproduce, "evaluate", stop)
        reproduce.main(shlex.split(line))
    reproduce.main(shlex.split(line))
    assert killed[0] == "2"
    first, second = (json.loads(Path(name).read_text()) for name in ("rows.jsonl", "other.jsonl"))
    assert without_times(first) == without_times(second)
    assert [point["step"] for point in first["curve"]] == [0, 2, 4]
    assert first["curve"][-1]["figures"] == first["figures"] != first["curve"][0]["figures"]
    assert first["steps"] == 4 and [row["step"] for row in first["losses"]] == [1, 2, 3, 4]
    stages = list(first["figures"]["position"])
    assert stages == ["stem", "layer1", "layer2", "layer3"]
    # nothing is left to do
    monkeypatch.setattr(reproduce, "run_method", stop)
    reproduce.main(shlex.split(f"DenseCL {study} --out other"))


@pytest.mark.long
def test_a_run_without_probes_has_the_matches_of_its_training(study):
    line = study.replace("--steps 4 --probe-at 0 50", "--epochs 1")
    reproduce.main(shlex.split(f"untrained MoCo-v2 {line} --out runs"))
    untrained, trained = map(json.loads, Path("rows.jsonl").read_text().splitlines())
    assert untrained["settings"] == "" and "losses" not in untrained
    assert "curve" not in trained and trained["steps"] == 1
    assert [row["step"] for row in trained["probes"]] == [0, 1]
    assert trained["figures"]["match"] != untrained["figures"]["match"]
    assert scores_of(trained)["match_images"].shape == (24, 1)


def test_the_scores_of_images_add_up_to_the_metrics(study):
    config = Config(backbone="resnet18-layer3", hidden=64, dim=16, seed=1)
    figures = evaluation.evaluate(untrained_like(config), "VOC2012")
    scores = scores_of(
        {"scores": reproduce.pack(evaluation.image_scores(untrained_like(config), "VOC2012"))}
    )
    expected = {name: figures["match"]["backbone"][name] for name in ("near", "moved")}
    expected["match"] = figures["match"]["backbone"]["exact"]
    expected["keypoints"] = figures["keypoints"]["backbone"]["PCK@0.2"]
    for name, value in expected.items():
        correct, total, images = (scores[f"{name}_{k}"] for k in ("correct", "total", "images"))
        once = np.ones((1, images.max() + 1), int)
        assert resampled_accuracy(once, correct, total, images)[0] == pytest.approx(value), name
    intersection, union = (scores[f"segmentation_{k}"] for k in ("intersection", "union"))
    assert intersection.shape == (10, 21)
    once = np.ones((1, 10), int)
    miou = resampled_mean_iou(once, intersection, union)[0]
    assert miou == pytest.approx(figures["segment"]["backbone"]["linear"])


def options(**given):
    values = {"steps": 1060, "epochs": 20, "per_epoch": 53, "probe_at": [], "again": False}
    values |= {"until": 100}
    return Namespace(**(values | given))


def test_rows_are_recognized_by_settings_and_by_their_curve(tmp_path):
    results = tmp_path / "rows.jsonl"
    args = options(results=str(results))
    assert not reproduce.has_row("geometry", 0, args)
    row = {"method": "true", "seed": 0, "settings": reproduce.settings("geometry", 0, args)}
    results.write_text(
        json.dumps(row | {"settings": row["settings"].replace("--match geometry", "--match true")})
    )
    assert reproduce.has_row("geometry", 0, args)  # a row from before the renaming
    assert not reproduce.has_row("geometry", 1, args)
    assert not reproduce.has_row("DenseCL", 0, args)
    assert not reproduce.has_row("geometry", 0, options(results=str(results), again=True))
    longer = options(results=str(results), steps=10600, epochs=200)
    assert not reproduce.has_row("geometry", 0, longer)
    probed = options(results=str(results), probe_at=[5, 10])
    assert reproduce.probe_steps(probed) == [53, 106, 1060]
    assert not reproduce.has_row("geometry", 0, probed)
    row["curve"] = [{"step": step} for step in (53, 106, 1060)]
    results.write_text(json.dumps(row))
    assert reproduce.has_row("geometry", 0, probed)


def test_the_length_of_a_run_is_given_in_epochs_or_in_steps():
    assert reproduce.settings("DenseCL", 3, options()).endswith("--epochs 20 --seed 3")
    part = options(steps=60, epochs=2)  # two epochs have 106 steps
    assert reproduce.settings("DenseCL", 3, part).endswith("--seed 3 --max-steps 60")
    assert "--geometry-warmup 4240" in reproduce.settings(
        "geometry warm-up", 0, options(steps=10600)
    )


def test_a_run_can_end_in_the_middle_of_its_schedule():
    part = options(steps=10600, epochs=200, probe_at=[5, 50, 100], until=50)
    assert reproduce.probe_steps(part) == [530, 5300]
    assert reproduce.probe_steps(options(steps=10600, probe_at=[5, 50])) == [530, 5300, 10600]
    whole = reproduce.settings("DenseCL", 0, options(steps=10600, epochs=200))
    assert reproduce.settings("DenseCL", 0, part) == whole  # the same learning rates


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("DenseCl {study}", ["DenseCl", "MoCo-v2"]),
        ("DenseCL {study} --probe-at 5 120", ["--until 120", "0 and 100"]),
        ("DenseCL --images images --voc VOC2012 --until 50", ["--until needs --probe-at"]),
        ("DenseCL {study} --steps -3", ["--steps", "above 0"]),
        ("DenseCL {study} --images VOC2012/JPEGImages", ["VOC2012/JPEGImages", "32 images"]),
        ("read-out --voc VOC2012 empty", ["empty", "last.pt"]),
    ],
)
def test_wrong_options_are_refused_in_one_line(study, capsys, line, words):
    Path("empty").mkdir()
    line = line.format(study=study)
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as error:
        run_command(reproduce.main, shlex.split(line))
    message = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and len(message) == 1, message
    assert all(word in message[0] for word in words)
    assert sorted(Path().rglob("*")) == before


def test_the_read_out_of_a_folder_is_of_each_checkpoint(tmp_path):
    for name in ("last.pt", "probe-00000053.pt", "probe-00000530.pt"):
        (tmp_path / name).touch()
    names = list(reproduce.read_out.checkpoints(tmp_path))
    assert names == [f"{tmp_path.name}, probe-{step:08d}" for step in (53, 530)]
    assert list(reproduce.read_out.checkpoints(tmp_path / "last.pt")) == [tmp_path.name]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="give a run folder"):
        reproduce.read_out.checkpoints(tmp_path / "empty")


def test_the_figures_of_two_runs_are_of_their_checkpoints(tmp_path, monkeypatch, make_images):
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "images", 8)
    config = replace(TINY, data_root="images", max_steps=2, save_every=1, keep_checkpoints=3)
    train(replace(config, out="dense", geometry_warmup=1))
    train(replace(config, out="moco", method="mocov2"))
    line = "dense moco --steps 0 2 --out . --results rows.jsonl"
    figures.main(shlex.split(line))
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    names = ["DenseCL with geometry warm-up", "MoCo-v2"]
    assert [(row.pop("run"), row.pop("step")) for row in rows] == [
        (name, step) for name in names for step in (0, 2)
    ]
    # both runs start with the same backbone, and differ after two steps
    assert rows[0] == rows[2] and len({json.dumps(row) for row in rows}) == 3
    pair = figures.PairOfViews(TINY.image_size)
    assert rows[3]["exact"] == round(pair.scores(figures.load_at("moco", TINY, 2))["exact"], 4)
    for name in ("matches_during_training", "maps_by_method"):
        assert Path(f"{name}.jpg").stat().st_size > 10_000
    with pytest.raises(UsageError, match="--keep-checkpoints"):
        figures.main(shlex.split(line.replace("0 2", "0 3")))
