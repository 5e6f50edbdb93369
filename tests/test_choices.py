"""The switches for the paper's choices, from the command line to the run folder; and the script that runs a row of the table."""
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from densecl.checkpoint import same_run
from densecl.config import Config, presets
from densecl.features import network
from densecl.files import UsageError
from densecl.trainer import build_model
from densecl.variants import Variant

ROOT = Path(__file__).parents[1]


def train(folder, *options):
    command = [sys.executable, "-m", "densecl.train", "demo", "--max-steps", "2", "--batch-size", "8", "--workers", "0", "--threads", "1",
               "--log-every", "1", "--probe", "", "--out", str(folder), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("options", ["--match true --negatives own", "--match agreed --negatives position --padding reflect", "--match mutual --match-warmup 1", "--match centred"], ids=str)
def test_a_run_with_other_choices_trains_and_its_weights_load(tmp_path, options):
    got = train(tmp_path/"run", *options.split())
    assert got.returncode == 0, got.stderr
    rows = [json.loads(l) for l in (tmp_path/"run/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2] and all(r["loss_dense"] > 0 and r["match_acc"] <= 1 for r in rows)
    recipe, encoder = network(str(tmp_path/"run/last.pt"))
    padding = "reflect" if "reflect" in options else "zeros"
    assert recipe["padding"] == padding == encoder.backbone.conv1.padding_mode
    if options.startswith("--match true"): assert all(r["match_acc"] == 1 for r in rows)       # in bf16, too, where the demo uses it


@pytest.mark.parametrize("options, words", [("--match nearest", "choose from backbone"), ("--method mocov2 --match true", "no dense loss"),
                                            ("--negatives all", "choose from pooled"), ("--bn sync --device cpu", "SyncBN needs CUDA")], ids=str)
def test_a_wrong_choice_ends_in_one_line_and_writes_nothing(tmp_path, options, words):
    got = train(tmp_path/"run", *options.split())
    assert got.returncode == 2 and words in got.stderr and "Traceback" not in got.stderr
    assert not (tmp_path/"run").exists()


def test_the_defaults_are_the_papers_model():
    assert type(build_model(presets["demo"])).__name__ == "DenseCL"
    assert not isinstance(build_model(presets["demo"]), Variant)


def test_a_checkpoint_from_before_the_switches_goes_on():
    saved = asdict(presets["demo"])
    for name in ("match", "match_warmup", "negatives", "padding", "bn"): del saved[name]
    same_run(saved, presets["demo"])
    with pytest.raises(UsageError, match="match backbone \\(now true\\)"): same_run(saved, Config(**asdict(presets["demo"]) | dict(match="true")))


@pytest.mark.parametrize("row", range(1, 8))
def test_a_row_of_the_table_is_three_or_four_commands_that_exist(row):
    got = subprocess.run(["bash", "benchmarks/full.sh", str(row)], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"DRY": "1"})
    assert got.returncode == 0, got.stderr
    commands = [line.split(" -m ")[1].split() for line in got.stdout.splitlines()]
    assert [c[0] for c in commands] == (["densecl.train", "densecl.weights"] if row > 1 else []) + ["densecl.detect", "densecl.segment"]
    if row > 1: assert commands[0][1] in presets
    for module, *words in commands:
        said = subprocess.run([sys.executable, "-m", module, *(["extract"] if "extract" in words else []), "--help"], cwd=ROOT, capture_output=True, text=True).stdout
        assert all(w in said for w in words if w.startswith("--")), (module, words)


def test_a_row_that_is_none_ends_with_one_line():
    got = subprocess.run(["bash", "benchmarks/full.sh", "8"], cwd=ROOT, capture_output=True, text=True)
    assert got.returncode == 2 and "1 to 7" in got.stderr and got.stdout == ""


def test_a_backbone_with_another_padding_is_not_given_away(tmp_path):
    assert train(tmp_path/"run", "--padding", "reflect", "--max-steps", "1").returncode == 0
    command = [sys.executable, "-m", "densecl.weights", "extract", str(tmp_path/"run/last.pt"), str(tmp_path/"out.pth")]
    got = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert got.returncode == 2 and "--padding reflect" in got.stderr and "Traceback" not in got.stderr
    assert not (tmp_path/"out.pth").exists()
