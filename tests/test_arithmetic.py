"""--amp auto: which arithmetic it chooses, what a run says about it, and the authors' float32."""

import contextlib
import json
import shlex
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from pretend import pretended_cuda

from densecl import trainer
from densecl.config import Config, presets
from densecl.runtime import distributed
from densecl.runtime.distributed import choose_amp, has_bf16
from densecl.train import main
from tiny import TINY

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def tiny(make_images, tmp_path, monkeypatch):
    """A config for twelve images with the presets' arithmetic; `out` is a new folder."""
    make_images(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    config = replace(TINY, data_root="images", device="cpu", out="out", augment="reference")
    return replace(config, amp="auto", channels_last=True)


@contextlib.contextmanager
def machine(bf16):
    """A context in which every device computes in bf16, or none does."""
    with patch.object(distributed, "has_bf16", lambda device: bf16):
        yield


def last_config(folder="out"):
    return json.loads(Path(folder, "config.json").read_text())


def test_presets_choose_and_a_config_without_options_is_the_authors():
    assert (Config().amp, Config().channels_last) == ("off", False)
    for name, config in presets.items():
        assert (config.amp, config.channels_last) == ("auto", True), name


@pytest.mark.parametrize(
    "flags, expected",
    [("avx2 avx512_bf16", True), ("amx_bf16 amx_tile", True), ("avx2 avx512f", False)],
)
def test_a_cpu_is_asked_for_its_instructions(monkeypatch, flags, expected):
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: f"flags\t: fpu {flags}\n")
    assert has_bf16(CPU) == expected
    assert choose_amp("auto", CPU) == ("bf16" if expected else "off")


def test_a_system_that_does_not_report_its_cpu_computes_in_float32(monkeypatch):
    def missing(self, encoding):
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", missing)
    assert choose_amp("auto", CPU) == "off"


@pytest.mark.parametrize("major, expected", [(7, "off"), (8, "bf16"), (9, "bf16")])
def test_a_gpu_that_only_emulates_bf16_computes_in_float32(monkeypatch, major, expected):
    """A V100 has compute capability 7; torch counts its emulation as support unless told not to."""

    def is_bf16_supported(including_emulation=True):
        return including_emulation or major >= 8

    with pretended_cuda():
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
        assert choose_amp("auto", CUDA) == expected
        assert choose_amp("fp16", CUDA) == "fp16"


def test_a_run_on_a_gpu_chooses_bf16_and_the_fastest_algorithms(tiny, monkeypatch, capsys):
    benchmarks = []
    with pretended_cuda():
        config = replace(tiny, device="cuda", max_steps=1)
        trainer.train(config, log=lambda row: benchmarks.append(torch.backends.cudnn.benchmark))
        assert benchmarks == [True] and not torch.backends.cudnn.benchmark
        assert last_config()["amp"] == "bf16"
        assert "arithmetic: bf16 mixed precision, channels_last (" in capsys.readouterr().err
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
        with distributed.restored_settings():
            trainer.setup_device(replace(tiny, device="cuda", deterministic=True))
            assert not torch.backends.cudnn.benchmark


def test_one_line_names_the_arithmetic_and_the_way_to_the_authors(tiny, capsys):
    trainer.train(replace(tiny, max_steps=1))
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("arithmetic")]
    (line,) = lines
    name = "bf16 mixed precision" if has_bf16(CPU) else "float32"
    assert line.startswith(f"arithmetic: {name}, channels_last (")
    assert "--amp off --no-channels-last for the authors' float32" in line


def test_a_run_goes_on_in_another_arithmetic_with_a_line(tiny, capsys):
    """One that began before presets chose theirs, then on two machines that choose otherwise."""

    def train(step, bf16, **change):
        with machine(bf16):
            model = trainer.train(replace(tiny, max_steps=step, **change))
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
        return capsys.readouterr().err

    assert "arithmetic" not in train(1, bf16=True, amp="off", channels_last=False)
    changed = "changed since step 1: amp off (now bf16), channels_last False (now True)"
    assert changed in train(2, bf16=True)
    assert last_config()["amp"] == "bf16"
    assert "changed since step 2: amp bf16 (now off)\n" in train(3, bf16=False)
    assert "changed since" not in train(4, bf16=False)
    assert last_config()["amp"] == "off"


@pytest.mark.parametrize("authors", [False, True])
def test_the_options_give_the_authors_float32(tiny, monkeypatch, capsys, authors):
    """What reaches the encoders: memory format, and whether mixed precision is on."""
    seen, build_model = [], trainer.build_model

    def watch(module, args):
        if not args[0].is_meta:  # a forward pass that only estimates sizes
            seen.append((args[0].is_contiguous(), torch.is_autocast_enabled("cpu")))

    def watched(config):
        model = build_model(config)
        for encoder in (model.encoder_q, model.encoder_k):
            encoder.register_forward_pre_hook(watch)
        return model

    monkeypatch.setattr(trainer, "build_model", watched)
    options = shlex.split(
        "demo --data-root images --backbone resnet18-layer2 --image-size 32 --batch-size 4 "
        "--queue-len 12 --lr 0.0075 --dim 8 --hidden 16 --workers 0 --threads 1 --probe '' "
        "--max-steps 1 --out out"
    )
    more = ["--amp", "off", "--no-channels-last"] if authors else []
    with machine(bf16=True):
        main([*options, *more])
    assert seen == [(authors, not authors)] * 2
    assert ("arithmetic" in capsys.readouterr().err) == (not authors)


def test_a_dry_run_says_which_arithmetic_it_measured(tiny, capsys):
    options = shlex.split(
        "demo --data-root images --backbone resnet18-layer2 --image-size 32 --batch-size 4 "
        "--queue-len 12 --lr 0.0075 --dim 8 --hidden 16 --workers 0 --threads 1 --dry-run"
    )
    with machine(bf16=True):
        main(options)
    printed = capsys.readouterr().out
    assert "auto, bf16 where the hardware has it, else float32" in printed
    assert "4 random images on cpu in bf16" in printed
