"""`densecl detect` with a feature pyramid on models of timm: weights, resume, refusals."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import test_detect as resnets
import torch
from test_backbones import OPTIONS as TRAIN
from test_detect import arguments, last, results, voc  # noqa: F401  voc is a fixture
from torch import nn

from densecl.detect import __main__ as command
from densecl.detect.__main__ import DetectConfig, main
from densecl.detect.rcnn import ProposalCounts, mask_rcnn_fpn
from densecl.encoder import build_backbone, build_stages
from densecl.runtime import distributed
from densecl.runtime.io import UsageError
from densecl.segment.__main__ import main as segment
from densecl.train import main as train
from densecl.transfer import trials
from densecl.transfer.initialization import convert_sync_bn, resolve_weights
from densecl.weights import extract_backbone

pytest.importorskip("timm")
LAYER_NORM, BATCH_NORM = "timm:convnext_atto", "timm:mobilenetv3_small_050"
TINY = [*resnets.TINY[2:], "--detector", "fpn", "--eval-images", "2", "--precise-bn-iters", "1"]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")


def body(out):
    """The trained backbone under timm's names."""
    prefix = "backbone.body.net."
    tensors = last(out)["model"].items()
    return {k.removeprefix(prefix): v for k, v in tensors if k.startswith(prefix)}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def refusal(function, *args, **options):
    with pytest.raises(UsageError) as caught:
        function(*args, **options)
    assert caught.value.status == 2 and "\n" not in str(caught.value)
    return str(caught.value)


def run_file(name, path="run.pt"):
    """A file like that of a run; the tensors of its backbone under timm's names."""
    backbone = build_backbone(name)[0].state_dict()
    tensors = {f"encoder_q.backbone.{key}": value for key, value in backbone.items()}
    tensors["encoder_q.global_head.0.weight"] = torch.zeros(2, 2)
    torch.save({"model": tensors, "config": {"backbone": name}}, path)
    return {key.removeprefix("net."): value for key, value in backbone.items()}


def test_the_weights_are_those_of_a_run(voc, make_images):  # noqa: F811
    make_images(Path("images"), 8)
    train([*TRAIN, "--backbone", LAYER_NORM, "--probe", "", "--out", "run", "--max-steps", "1"])
    for file in ("extracted.pth", "extracted.safetensors"):
        extract_backbone("run/last.pt", file, "timm")
    expected = torch.load("extracted.pth", weights_only=True)
    main([*arguments(voc, "run/last.pt", out="frozen", max_steps=1), *TINY, "--freeze"])
    assert same(body("frozen"), expected)
    summary = results("frozen")
    assert summary["config"]["backbone"] == summary["weights"]["backbone"] == LAYER_NORM
    for file in ("extracted.pth", "extracted.safetensors"):
        found = resolve_weights(file, LAYER_NORM, needs_resnet="")
        assert same(found.state_dict, expected) and len(found.sha256) == 64


def test_an_interrupted_run_continues_bit_for_bit(voc, monkeypatch, capfd):  # noqa: F811
    before = run_file(LAYER_NORM)
    argv = [*arguments(voc, "run.pt", max_steps=2, save_every=1), *TINY]
    main([*argv, "--out", "straight"])
    save = trials.Trial.save

    def interrupted(self, step, *args):
        save(self, step, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trials.Trial, "save", interrupted)
        main([*argv, "--out", "broken"])
    assert last("broken")["step"] == 1
    main([*argv, "--out", "broken"])
    assert "resumed at step 1" in capfd.readouterr().err
    assert same(last("straight")["model"], last("broken")["model"])
    assert results("straight")["runs"] == results("broken")["runs"]
    assert 0 <= results("straight")["ap_mean"] <= 1
    after = body("straight")
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert before.keys() == after.keys() and len(moved) > len(before) / 2


@pytest.mark.parametrize("shape", [(203, 333), (75, 121), (33, 500)])
def test_anchors_and_maps_of_odd_sizes(shape):
    maps = [(4, (32,)), (8, (64,)), (16, (128,)), (32, (256,)), (64, (512,))]

    def build(_, num_classes):
        return mask_rcnn_fpn(build_stages(LAYER_NORM), num_classes)

    resnets.test_anchors_have_the_strides_of_the_protocol(build, maps, shape)


@pytest.mark.parametrize("name", [LAYER_NORM, BATCH_NORM, "timm:hrnet_w18_small"])
def test_every_trained_parameter_has_a_gradient(name):
    """Several processes wait for the gradient of each of them."""
    counts = ProposalCounts(50, 20, 50, 10)
    model = mask_rcnn_fpn(build_stages(name), 3, roi_batch_size=8, counts=counts)
    box = torch.tensor([[8.0, 8, 40, 50]])
    mask = torch.ones(1, 64, 64, dtype=torch.uint8)
    target = {"boxes": box, "labels": torch.tensor([2]), "masks": mask}
    sum(model.train()([torch.rand(3, 64, 64)] * 2, [target] * 2).values()).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_sync_bn_keeps_the_activations_inside_of_timms_layers(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    stages = build_stages(BATCH_NORM).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before, keys = stages(images), list(stages.state_dict())
        stages = convert_sync_bn(stages, torch.device("cuda"))
        assert all(torch.equal(stages(images)[key], before[key]) for key in before)
    norms = [m for m in stages.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(m, nn.SyncBatchNorm) for m in norms)
    assert list(stages.state_dict()) == keys


def test_precise_bn_is_skipped_where_no_bn_is_trained(monkeypatch, capfd):
    def no_batch(*args):
        raise AssertionError("a batch was loaded")

    monkeypatch.setattr(command, "trial_loader", no_batch)
    trial = trials.Trial(DetectConfig(out="out"), 0)
    for model in (build_stages(LAYER_NORM), build_stages(BATCH_NORM).eval()):
        command._measure_bn(trial, model, None, torch.device("cpu"))
        assert "precise BN is skipped" in capfd.readouterr().err
    with pytest.raises(AssertionError, match="a batch was loaded"):
        command._measure_bn(trial, build_stages(BATCH_NORM), None, torch.device("cpu"))


def test_timms_own_weights_are_read_from_the_cache(monkeypatch):
    import huggingface_hub
    import timm

    tensors = timm.create_model(LAYER_NORM[5:]).state_dict()
    torch.save(tensors, "cached.bin")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args: "cached.bin")
    found = resolve_weights("timm-pretrained", LAYER_NORM, needs_resnet="")
    kept = {key: value for key, value in tensors.items() if not key.startswith("head.fc.")}
    assert same(found.state_dict, kept) and len(found.sha256) == 64


def test_what_does_not_fit_ends_in_one_line(voc):  # noqa: F811
    tensors = run_file(LAYER_NORM)
    torch.save(tensors, "timm.pth")
    torch.save(tensors | {"stages.9.weight": torch.zeros(1)}, "more.pth")
    torch.save({key: value for key, value in tensors.items() if key != "stem.0.bias"}, "less.pth")
    torch.save(tensors | {"stem.0.bias": torch.zeros(7)}, "shape.pth")
    vit, strides = "timm:vit_tiny_patch16_224", "strides 16, 16, 16, 16, not 4, 8, 16, 32"
    cases = [
        (f"random --backbone {vit} --detector fpn", strides),
        (f"random --backbone {vit}", strides),
        ("random --backbone timm:efficientvit_m0", "computes no four maps of an image"),
        (f"random --backbone {LAYER_NORM} --detector c4", "divides a ResNet after layer3"),
        (f"random --backbone {LAYER_NORM} --preset voc", "give --detector fpn"),
        ("run.pt --detector c4", "timm:convnext_atto is none; give --detector fpn"),
        ("random --backbone timm:convnext_atom", "did you mean convnext_atto"),
        ("random --backbone mine:small", "or timm:NAME, such as timm:convnext_tiny"),
        ("run.pt --backbone resnet18", "is a timm:convnext_atto, not a resnet18"),
        (f"run.pt --backbone {BATCH_NORM}", "give --backbone timm:convnext_atto"),
        (f"run.pt --baselines random {voc}/none.pth", "none.pth"),
        ("timm.pth", "for a model of timm give --backbone timm:NAME, too"),
        (f"more.pth --backbone {LAYER_NORM}", "unmatched: 1 (stages.9.weight)"),
        (f"less.pth --backbone {LAYER_NORM}", "missing: 1 (stem.0.bias)"),
        (f"shape.pth --backbone {LAYER_NORM}", "of another shape: 1 (stem.0.bias [7] for [40])"),
        (f"supervised --backbone {LAYER_NORM}", "try timm-pretrained"),
        ("timm-pretrained", "goes with --backbone timm:NAME"),
    ]
    for line, text in cases:
        argv = ["--data-root", str(voc), "--batch-size", "2", "--weights", *shlex.split(line)]
        found = refusal(main, [*argv, "--out", "out"])
        assert text in found, found
    argv = [*arguments(voc, "random", backbone=vit, batch_size=2), "--out", "out"]
    start = [sys.executable, "-m", "densecl.detect"]
    got = subprocess.run([*start, *argv], capture_output=True, text=True, check=False)
    assert (got.returncode, got.stdout, got.stderr.count("\n")) == (2, "", 1), got.stderr
    assert not Path("out").exists()


def test_segment_needs_a_resnet_and_says_why(voc):  # noqa: F811
    run_file(LAYER_NORM)
    why = "the FCN dilates the last two stages of a ResNet"
    options = ["--data-root", str(voc), "--out", "out", "--weights"]
    assert f"{why}; choose from resnet18" in refusal(
        segment, [*options, "random", "--backbone", LAYER_NORM]
    )
    found = refusal(segment, [*options, "run.pt"])
    assert found == f"run.pt: of a run with --backbone {LAYER_NORM}, and {why}"
    assert why in refusal(segment, [*options, "timm-pretrained"])
    assert not Path("out").exists()
