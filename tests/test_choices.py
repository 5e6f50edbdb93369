"""The options for the paper's ablations, from the command line to the run folder, and full.sh."""

import functools
import json
import os
import shlex
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from densecl.config import presets, validate_config
from densecl.correspondence import best_match, ground_truth_match
from densecl.data.dataset import TileSource
from densecl.encoder import Encoder, build_backbone
from densecl.evaluate.correspondence import probe_views
from densecl.evaluate.features import load_network
from densecl.model import DenseCL
from densecl.resume import check_resumable
from densecl.runtime.checkpoint import load_checkpoint
from densecl.runtime.io import UsageError
from densecl.train import parse_args
from densecl.trainer import build_model
from densecl.variants import DenseCLVariant, match_geometry

ROOT = Path(__file__).parents[1]


def run(command, **environment):
    environment = os.environ | environment
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False
    )


def train(folder, *options):
    command = shlex.split(
        "-m densecl.train demo --max-steps 2 --batch-size 8 --workers 0 --threads 1 "
        "--log-every 1 --probe '' --out"
    )
    return run([sys.executable, *command, str(folder), *options], OMP_NUM_THREADS="1")


@pytest.mark.parametrize(
    "options",
    [
        "--match geometry --negatives intra-image",
        "--match verified --negatives position --padding reflect",
        pytest.param("--match mutual --geometry-warmup 1", marks=pytest.mark.long),
        pytest.param("--match centered", marks=pytest.mark.long),
        "--match sinkhorn",
        "--random-offset 2",
    ],
    ids=str,
)
def test_a_run_with_other_choices_trains_and_its_weights_load(tmp_path, options):
    result = train(tmp_path / "run", *options.split())
    assert result.returncode == 0, result.stderr
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["loss_dense"] > 0 and row["match_acc"] <= 1 for row in rows)
    config, encoder = load_network(str(tmp_path / "run/last.pt"))
    padding = "reflect" if "reflect" in options else "zeros"
    assert config.padding == padding == encoder.backbone.conv1.padding_mode
    if options.startswith("--match geometry"):
        assert all(row["match_acc"] < 1 for row in rows)  # of the features, not of the positives


def test_a_run_with_a_random_offset_resumes_bit_for_bit(tmp_path):
    options = ("--random-offset", "2", "--epochs", "2")
    for folder, steps in (("whole", "3"), ("resumed", "1"), ("resumed", "3")):
        result = train(tmp_path / folder, *options, "--max-steps", steps)
        assert result.returncode == 0, result.stderr
    assert "resumed at step 1" in result.stderr
    models = [load_checkpoint(tmp_path / f"{name}/last.pt") for name in ("whole", "resumed")]
    assert models[0]["step"] == models[1]["step"] == 3
    for name, tensor in models[0]["model"].items():
        assert torch.equal(tensor, models[1]["model"][name]), name


def test_positives_by_geometry_are_exact_in_bf16_and_the_matches_of_the_features_are_reported():
    torch.manual_seed(0)
    encoder = Encoder(*build_backbone("resnet18-layer2"), hidden=16, dim=8)
    model = DenseCL(encoder, queue_len=16, positives=match_geometry)
    pairs = probe_views(TileSource(("coffee",)), size=64, views=4)
    got = {}
    model.dense_loss = lambda q, k, positives: (
        got.update(q=q, k=k, positives=positives) or q.dense.sum()
    )
    with torch.autocast("cpu", torch.bfloat16):
        out = model(*(pairs[name] for name in ("im_q", "im_k", "affine_q", "affine_k")))
    truth = ground_truth_match(pairs["affine_q"], pairs["affine_k"], 8, 8)
    assert torch.equal(got["positives"], truth)
    assert torch.equal(out["match"], best_match(got["q"].features, got["k"].features))
    assert not torch.equal(out["match"], truth)


@pytest.mark.parametrize(
    "options, words",
    [
        ("--match nearest", "choose from backbone"),
        ("--method mocov2 --match geometry", "no dense loss"),
        ("--negatives all", "choose from pooled"),
        ("--match sinkhorn --negatives intra-image", "none is left for --negatives intra-image"),
        ("--random-offset -1", "must not be below 0"),
        ("--backbone timm:resnet10t --random-offset 1", "for ResNets only"),
        ("--bn sync --device cpu", "SyncBN needs CUDA"),
    ],
    ids=str,
)
def test_a_wrong_choice_ends_with_one_line_and_writes_nothing(tmp_path, options, words):
    result = train(tmp_path / "run", *options.split())
    assert result.returncode == 2 and words in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_the_defaults_are_the_papers_model():
    assert type(build_model(presets["demo"])).__name__ == "DenseCL"
    assert not isinstance(build_model(presets["demo"]), DenseCLVariant)


def test_a_checkpoint_without_the_options_can_be_resumed():
    config = replace(presets["demo"], geometry_warmup=0)
    saved = asdict(config)
    for name in ("match", "geometry_warmup", "negatives", "padding", "random_offset", "bn"):
        del saved[name]
    check_resumable(saved, config)
    with pytest.raises(UsageError, match="match backbone \\(now geometry\\)"):
        check_resumable(saved, replace(config, match="geometry"))


def test_moco_drops_the_presets_options_of_the_dense_loss_and_refuses_the_users():
    assert parse_args(["demo"]).config.geometry_warmup > 0
    config = parse_args(["demo", "--method", "mocov2"]).config
    assert config.geometry_warmup == 0
    validate_config(config)
    given = parse_args(["demo", "--method", "mocov2", "--geometry-warmup", "100"]).config
    with pytest.raises(UsageError, match="--geometry-warmup 100: MoCo-v2 has no dense loss"):
        validate_config(given)


@functools.cache
def help_text(module, *words):
    return run([sys.executable, "-m", module, *words, "--help"]).stdout


@pytest.mark.parametrize("row", range(1, 8))
def test_a_row_of_the_table_consists_of_commands_that_exist(row):
    result = run(["bash", "benchmarks/full.sh", str(row)], DRY="1")
    assert result.returncode == 0, result.stderr
    commands = [line.split(" -m ")[1].split() for line in result.stdout.splitlines()]
    pretraining = ["densecl.train", "densecl.weights"] if row > 1 else []
    assert [command[0] for command in commands] == [
        *pretraining,
        "densecl.detect",
        "densecl.segment",
    ]
    if row > 1:
        assert commands[0][1] in presets
    for module, *words in commands:
        subcommand = ["extract"] if "extract" in words else []
        text = help_text(module, *subcommand)
        options = [word for word in words if word.startswith("--")]
        assert all(option in text for option in options), (module, words)


def test_an_unknown_row_ends_with_one_line():
    result = run(["bash", "benchmarks/full.sh", "8"])
    assert result.returncode == 2 and "1 to 7" in result.stderr and result.stdout == ""


def test_a_backbone_with_another_padding_is_not_extracted(tmp_path):
    trained = train(tmp_path / "run", "--padding", "reflect", "--max-steps", "1")
    assert trained.returncode == 0
    checkpoint, out = str(tmp_path / "run/last.pt"), tmp_path / "out.pth"
    command = [sys.executable, "-m", "densecl.weights", "extract", checkpoint, str(out)]
    result = run(command)
    assert result.returncode == 2 and "--padding reflect" in result.stderr
    assert "Traceback" not in result.stderr
    assert not out.exists()
