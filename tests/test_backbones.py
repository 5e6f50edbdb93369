"""Backbones of timm and of one's own: training, exact resume, extraction, probes, figures."""

import json
import shlex
from pathlib import Path

import pytest
import torch

from densecl.encoder import build_backbone
from densecl.evaluate import __main__ as evaluate
from densecl.runtime.io import UsageError
from densecl.show import main as show
from densecl.train import main as train
from densecl.transfer.initialization import resolve_weights
from densecl.weights import extract_backbone

OPTIONS = shlex.split(
    "demo --data-root images --image-size 64 --batch-size 4 --queue-len 12 --lambda-warmup 0 "
    "--dim 8 --hidden 16 --workers 0 --threads 1 --amp off --epochs 9 --log-every 1 "
    "--save-every 1 --lr 0.00375 --deterministic"
)


@pytest.fixture
def place(tmp_path, monkeypatch, make_images):
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "images", 8)
    return tmp_path


def tensors(out):
    saved = torch.load(f"{out}/last.pt", weights_only=True)
    return saved["model"]


def message(function, *args):
    with pytest.raises(UsageError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["convnext_atto", "vit_tiny_patch16_224"])
def test_a_model_of_timm_is_trained_resumed_extracted_probed_and_drawn(name, place, capsys):
    timm = pytest.importorskip("timm")
    options = [*OPTIONS, "--backbone", f"timm:{name}", "--probe", ""]
    train([*options, "--out", "whole", "--max-steps", "3"])
    train([*options, "--out", "parts", "--max-steps", "2"])
    train([*options, "--out", "parts", "--max-steps", "3"])
    whole, parts = tensors("whole"), tensors("parts")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    rows = [json.loads(line) for line in Path("whole/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all(0 <= row["match_acc"] <= 1 for row in rows)
    start = build_backbone(f"timm:{name}")[0].state_dict()
    moved = [k for k in start if not torch.equal(start[k], whole[f"encoder_q.backbone.{k}"])]
    assert len(moved) > len(start) / 2

    extract_backbone("whole/last.pt", "backbone.pth", "timm")
    model = timm.create_model(name, num_classes=0)
    model.load_state_dict(torch.load("backbone.pth", weights_only=True))
    assert "needs timm or safetensors" in message(
        extract_backbone, "whole/last.pt", "backbone.pkl", "detectron2"
    )
    assert f"of a run with --backbone timm:{name}" in message(resolve_weights, "whole/last.pt")
    probe = shlex.split("match --data-root images --image-size 64 --limit 8 --weights")
    evaluate.main([*probe, "whole/last.pt"])
    evaluate.main([*probe, "backbone.pth", "--backbone", f"timm:{name}"])
    tables = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    run, file = (json.loads(line)["rows"] for line in tables)
    assert run["whole backbone"] == file["backbone backbone"] != file["untrained backbone"]
    assert "give --backbone timm:NAME, too" in message(evaluate.main, [*probe, "backbone.pth"])
    other = [*probe, "backbone.pth", "--backbone", "timm:resnet10t"]
    assert "does not fit timm:resnet10t" in message(evaluate.main, other)
    pair = ["--images", "images/image-00.png", "images/image-01.png", "--out"]
    show(["--weights", "whole/last.pt", *pair, "matches.png"])
    show(["--weights", "backbone.pth", "--backbone", f"timm:{name}", *pair, "same.png"])
    show(["--weights", "random", "--backbone", f"timm:{name}", *pair, "random.png"])
    drawn = [Path(f"{file}.png").read_bytes() for file in ("matches", "same", "random")]
    assert drawn[0] == drawn[1] != drawn[2]
    assert "give --backbone timm:NAME, too" in message(
        show, ["--weights", "backbone.pth", *pair, "none.png"]
    )
    train([*options, "--out", "again", "--max-steps", "1", "--init", "whole/last.pt"])


def test_a_backbone_of_ones_own(place, monkeypatch):
    Path("mine.py").write_text(
        """from torch import nn

def small():
    return nn.Sequential(nn.Conv2d(3, 24, 8, 8), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1))
"""
    )
    options = [*OPTIONS, "--backbone", "mine:small", "--out", "run", "--probe", "match"]
    train([*options, "--max-steps", "2"])
    train([*options, "--max-steps", "3"])
    assert "encoder_q.backbone.0.weight" in tensors("run")
    text = message(show, ["--weights", "run/last.pt", "--images", *["images/image-00.png"] * 2])
    assert "no code that a file names is run" in text
    assert "no code that a file names is run" in message(resolve_weights, "run/last.pt")
    text = message(evaluate.main, shlex.split("match --weights run/last.pt --data-root images"))
    assert "no code that a file names is run" in text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("--backbone timm:convnext_atom", "did you mean convnext_atto"),
        ("--backbone nothing:here", "cannot be imported"),
        ("--backbone a:b:c", "choose from resnet18"),
        ("--backbone timm:convnext_atto --padding reflect", "for ResNets only"),
        ("--init nowhere.pth", "neither a file nor a released checkpoint"),
        ("--init timm-pretrained", "goes with --backbone timm:NAME"),
        ("--backbone timm:convnext_atto --init supervised", "try timm-pretrained"),
    ],
)
def test_wrong_choices_end_with_one_line_and_write_nothing(options, text, place):
    assert text in message(train, [*OPTIONS, "--out", "run", *shlex.split(options)])
    assert not Path("run").exists()


def test_initial_weights_are_those_of_both_encoders(place):
    train([*OPTIONS, "--backbone", "resnet18", "--out", "first", "--max-steps", "1", "--probe", ""])
    extract_backbone("first/last.pt", "backbone.pth")
    options = ["--backbone", "resnet18-layer3", "--init", "backbone.pth", "--lr", "1e-30"]
    train([*OPTIONS, *options, "--out", "second", "--max-steps", "1", "--probe", ""])
    file, run = torch.load("backbone.pth", weights_only=True), tensors("second")
    for encoder in ("encoder_q", "encoder_k"):
        weight = run[f"{encoder}.backbone.layer3.1.conv2.weight"]
        torch.testing.assert_close(weight, file["layer3.1.conv2.weight"], rtol=0, atol=1e-6)
