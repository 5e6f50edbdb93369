"""Import and export of weights: other libraries, the command, torch.hub, untrusted files."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from densecl.config import BACKBONES
from densecl.encoder import Encoder, build_backbone
from densecl.model import DenseCL, MoCo
from densecl.runtime.io import UsageError, run_command
from densecl.weights import (
    backbone_state_dict,
    extract_backbone,
    formats,
    hub,
    load_backbone,
    load_encoder,
    state_dict_keys,
)
from densecl.weights.__main__ import main
from densecl.weights.state_dict_keys import load_official, official_state_dict

ROOT = Path(__file__).parents[1]
RECORDED = json.loads((ROOT / "tests/golden/checkpoint_keys.json").read_text())
SUFFIX = {name: suffixes[0] for name, suffixes in formats.EXPORT_FORMATS.items()}


def randomize(net, seed=0):
    """Change every tensor, counters and running statistics included: a wrong name shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in net.state_dict().values():
            if not value.is_floating_point():
                value.fill_(int(torch.randint(1, 1000, (), generator=generator)))
            elif value.dim() > 1:
                value.add_(torch.randn(value.shape, generator=generator) * value.std() / 4)
            else:
                value.add_(torch.rand(value.shape, generator=generator) / 4)
    return net


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a
    )


def constant_state_dict(shapes):
    """A state dict with these shapes, one repeated number per tensor, whose file is small."""
    state = {}
    for i, (key, shape) in enumerate(shapes.items()):
        dtype = torch.int64 if key.endswith(("tracked", "ptr")) else torch.float32
        state[key] = torch.tensor(i % 97 + 1, dtype=dtype).expand(shape)
    return state


def shapes_of(name):
    """The shapes of a network of torchvision by key, without memory for its tensors."""
    with torch.device("meta"):
        state = getattr(torchvision.models, name)().state_dict()
    return {key: tuple(value.shape) for key, value in state.items()}


def save_run(name, folder, method=DenseCL, complete=True):
    """Write a run's last.pt and return its model; `complete=False`: query encoder only."""
    torch.manual_seed(0)
    encoder = Encoder(*build_backbone(name), hidden=16, dim=8, dense=method is DenseCL)
    model = randomize(method(encoder, queue_len=32))
    config = {
        "backbone": name,
        "hidden": 16,
        "dim": 8,
        "grid": 0,
        "method": "densecl" if method is DenseCL else "mocov2",
    }
    state = {
        key: value
        for key, value in model.state_dict().items()
        if complete or key.startswith("encoder_q.")
    }
    torch.save({"step": 1, "config": config, "model": state, "optimizer": {}}, folder / "last.pt")
    return model


@pytest.fixture(scope="module")
def resnet50_run(tmp_path_factory):
    """A run with a ResNet-50: (its folder, its model)."""
    folder = tmp_path_factory.mktemp("run")
    return folder, save_run("resnet50", folder)


def load_without_classifier(net, state):
    """Replace the classifier by the identity and load the state dict strictly."""
    net.fc = nn.Identity()
    net.load_state_dict(state)
    return net.eval()


def features(net, x):
    """Backbone features of torchvision's network, before the pooling."""
    with torch.no_grad():
        return nn.Sequential(*list(net.children())[:-2])(x)


# ---- formats


@pytest.mark.parametrize("export_format", formats.EXPORT_FORMATS)
def test_a_run_is_exported_to_every_format_and_read_back(export_format, resnet50_run, tmp_path):
    folder, model = resnet50_run
    out = tmp_path / f"out{SUFFIX[export_format]}"
    extract_backbone(folder / "last.pt", out, export_format)
    state, name = backbone_state_dict(out)
    assert name == "resnet50" and same(state, model.encoder_q.backbone.state_dict())
    again = tmp_path / f"again{SUFFIX[export_format]}"
    back = tmp_path / "back.pth"
    extract_backbone(out, back)
    extract_backbone(back, again, export_format)
    if export_format == "detectron2":
        assert again.read_bytes() == out.read_bytes()
    assert same(backbone_state_dict(again)[0], state)


def test_the_key_encoder_is_exported_on_request(resnet50_run, tmp_path):
    folder, model = resnet50_run
    extract_backbone(folder / "last.pt", tmp_path / "key.pth", key_encoder=True)
    assert same(backbone_state_dict(tmp_path / "key.pth")[0], model.encoder_k.backbone.state_dict())
    assert not torch.equal(
        model.encoder_k.backbone.conv1.weight, model.encoder_q.backbone.conv1.weight
    )


@pytest.mark.parametrize("name", ["resnet50", "resnet101"])
def test_torchvision_loads_the_exported_file_strictly_with_equal_features(name, tmp_path):
    model = save_run(name, tmp_path, complete=False)
    extract_backbone(tmp_path / "last.pt", tmp_path / "out.pth")
    x = torch.randn(2, 3, 96, 64)
    encoder = model.encoder_q.eval()
    state = torch.load(tmp_path / "out.pth", weights_only=True)
    missing, unexpected = getattr(torchvision.models, name)().load_state_dict(state, strict=False)
    assert (sorted(missing), unexpected) == (["fc.bias", "fc.weight"], [])
    with torch.no_grad():
        ours = encoder(x).features
    net = load_backbone(tmp_path / "out.pth").eval()
    assert isinstance(net.fc, nn.Linear) and torch.equal(features(net, x), ours)
    assert torch.equal(
        features(load_without_classifier(getattr(torchvision.models, name)(), state), x), ours
    )


def test_the_detectron2_file_equals_that_of_the_authors_converter(resnet50_run, tmp_path):
    folder, model = resnet50_run
    extract_backbone(folder / "last.pt", tmp_path / "out.pkl")
    # as detectron2 reads it
    content = pickle.loads((tmp_path / "out.pkl").read_bytes(), encoding="latin1")
    recorded = RECORDED["densecl_r50_detectron2"]
    assert content.keys() == recorded["top_level"].keys() and content["matching_heuristics"] is True
    assert {k: list(v.shape) for k, v in content["model"].items()} == recorded["tensors"]
    assert torch.equal(
        torch.from_numpy(content["model"]["res2.0.shortcut.norm.running_var"]),
        model.encoder_q.backbone.layer1[0].downsample[1].running_var,
    )


def test_the_openmmlab_file_has_the_structure_of_the_released_files(resnet50_run, tmp_path):
    extract_backbone(resnet50_run[0] / "last.pt", tmp_path / "out.pth", "openmmlab")
    content = torch.load(tmp_path / "out.pth", weights_only=True)
    recorded = RECORDED["densecl_r50_extracted"]
    assert content.keys() == recorded["top_level"].keys()
    assert {k: list(v.shape) for k, v in content["state_dict"].items()} == recorded["tensors"]


@pytest.mark.parametrize(
    "recorded, name",
    [
        ("densecl_r50_extracted", "resnet50"),
        ("densecl_r101_extracted", "resnet101"),
        ("densecl_r50_detectron2", "resnet50"),
    ],
)
def test_the_recorded_files_of_the_authors_are_read(recorded, name, tmp_path):
    state = constant_state_dict(RECORDED[recorded]["tensors"])
    if "detectron2" in recorded:
        arrays = {k: v.numpy() for k, v in state.items()}
        content = {"model": arrays, "__author__": "OpenSelfSup", "matching_heuristics": True}
        (tmp_path / "file").write_bytes(pickle.dumps(content))
        state = {state_dict_keys.from_detectron2_key(k): v for k, v in state.items()}
    else:
        torch.save({"state_dict": state, "author": "DenseCL"}, tmp_path / "file")
    found, backbone = backbone_state_dict(tmp_path / "file")
    assert backbone == name and same(found, state)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_timm_loads_the_exported_file_strictly_with_equal_features(suffix, resnet50_run, tmp_path):
    timm = pytest.importorskip("timm")
    folder, model = resnet50_run
    out = tmp_path / f"out{suffix}"
    lines = extract_backbone(folder / "last.pt", out, "timm")
    net = eval(lines[1], {"timm": timm}).eval()  # the line that the command prints
    x = torch.randn(2, 3, 64, 64)
    encoder = model.encoder_q.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            net.forward_features(x), encoder(x).features, atol=1e-5, rtol=1e-5
        )


def test_a_file_of_timm_is_read(tmp_path):
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    for name in ("resnet18", "resnet50"):
        net = randomize(timm.create_model(name))
        save_file(net.state_dict(), tmp_path / "timm.safetensors")
        state, backbone = backbone_state_dict(tmp_path / "timm.safetensors")
        assert backbone == name and same(
            state, {k: v for k, v in net.state_dict().items() if not k.startswith("fc.")}
        )


# ---- files of other programs


def authors_checkpoint(record):
    """A training checkpoint with one storage for the backbone and its alias, like the authors'."""
    state = constant_state_dict(record["tensors"])
    return {
        k: state.get(k.replace("backbone.", "encoder_q.0."), v) if k.startswith("backbone.") else v
        for k, v in state.items()
    }


@pytest.mark.parametrize(
    "recorded, method", [("densecl_r50_checkpoint", DenseCL), ("moco_r50_checkpoint", MoCo)]
)
def test_training_checkpoints_of_the_authors_are_imported_and_exported(recorded, method, tmp_path):
    state = authors_checkpoint(RECORDED[recorded])
    torch.save(
        {"meta": {"epoch": 1}, "state_dict": state, "optimizer": {}}, tmp_path / "official.pth"
    )
    model = method(Encoder(*build_backbone("resnet50"), dense=method is DenseCL))
    load_official(model, torch.load(tmp_path / "official.pth", weights_only=True)["state_dict"])
    assert same(official_state_dict(model), state)
    assert same(load_encoder(tmp_path / "official.pth").state_dict(), model.encoder_q.state_dict())
    found, name = backbone_state_dict(tmp_path / "official.pth")
    assert name == "resnet50" and same(found, model.encoder_q.backbone.state_dict())
    assert same(
        backbone_state_dict(tmp_path / "official.pth", key_encoder=True)[0],
        model.encoder_k.backbone.state_dict(),
    )


def test_a_run_is_exported_to_the_authors_names_and_read_back(tmp_path):
    model = save_run("resnet18", tmp_path)
    torch.save({"state_dict": official_state_dict(model)}, tmp_path / "official.pth")
    other = DenseCL(Encoder(*build_backbone("resnet18"), hidden=16, dim=8), queue_len=32)
    load_official(other, torch.load(tmp_path / "official.pth", weights_only=True)["state_dict"])
    assert same(other.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    "heads",
    [("fc.weight", "fc.bias"), ("fc.0.weight", "fc.0.bias", "fc.2.weight", "fc.2.bias")],
    ids=["v1", "v2"],
)
def test_the_official_files_of_moco_are_read(heads, tmp_path):
    q, k = (randomize(torchvision.models.resnet18(), seed).state_dict() for seed in (1, 2))
    for net in (q, k):
        for old in ("fc.weight", "fc.bias"):
            del net[old]
        net.update({h: torch.ones(2) for h in heads})
    state = {f"module.encoder_q.{n}": v for n, v in q.items()} | {
        f"module.encoder_k.{n}": v for n, v in k.items()
    }
    state |= {"module.queue": torch.ones(2, 4), "module.queue_ptr": torch.zeros(1)}
    torch.save(
        {"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": {}},
        tmp_path / "moco.pth.tar",
    )
    for key, net in ((False, q), (True, k)):
        found, name = backbone_state_dict(tmp_path / "moco.pth.tar", key_encoder=key)
        assert name == "resnet18" and same(
            found, {n: v for n, v in net.items() if not n.startswith("fc.")}
        )


def test_the_backbone_of_an_openmmlab_network_is_read_and_an_unknown_part_is_an_error(tmp_path):
    net = {f"backbone.{k}": v for k, v in build_backbone("resnet18")[0].state_dict().items()}
    torch.save(
        {"meta": {}, "state_dict": net | {"decode_head.conv_seg.weight": torch.ones(2)}},
        tmp_path / "segmenter.pth",
    )
    assert backbone_state_dict(tmp_path / "segmenter.pth")[1] == "resnet18"
    torch.save({"state_dict": net | {"another.conv1.weight": torch.ones(2)}}, tmp_path / "odd.pth")
    with pytest.raises(UsageError, match=r"unmatched: 1 \(another.conv1.weight\)"):
        backbone_state_dict(tmp_path / "odd.pth")


def test_files_without_batch_norm_counters_are_read_with_counters_of_zero(tmp_path):
    net = torchvision.models.resnet18().state_dict()
    old = {k: v for k, v in net.items() if not k.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    state, name = backbone_state_dict(tmp_path / "old.pth")
    assert name == "resnet18" and len(state) == 120 and state["bn1.num_batches_tracked"] == 0
    torch.save(old | {"bn1.num_batches_tracked": torch.tensor(1)}, tmp_path / "some.pth")
    with pytest.raises(UsageError, match="missing: 19"):
        backbone_state_dict(tmp_path / "some.pth")


# ---- a truncated backbone


def test_a_truncated_backbone_is_loaded_into_a_complete_network_only_on_request(tmp_path, capsys):
    model = save_run("resnet18-layer3", tmp_path)
    main(["extract", str(tmp_path / "last.pt"), str(tmp_path / "out.pth")])
    said = capsys.readouterr().out
    assert "truncated after layer3" in said and "strict=False" in said
    assert "densecl segment and detect load it with --partial" in said
    exported = torch.load(tmp_path / "out.pth", weights_only=True)
    result = torchvision.models.resnet18().load_state_dict(exported, strict=False)
    assert not result.unexpected_keys
    assert {key.split(".")[0] for key in result.missing_keys} == {"layer4", "fc"}
    assert "only later stages and fc may be missing" in said
    assert same(
        torch.load(tmp_path / "out.pth", weights_only=True), model.encoder_q.backbone.state_dict()
    )
    with pytest.raises(UsageError, match="layer4 would be randomly initialized; --partial"):
        load_backbone(tmp_path / "out.pth")
    net = load_backbone(tmp_path / "out.pth", partial=True).eval()
    assert "layer4 of the resnet18 is randomly initialized" in capsys.readouterr().err
    x = torch.randn(1, 3, 64, 64)
    encoder = model.encoder_q.eval()
    with torch.no_grad():
        assert torch.equal(nn.Sequential(*list(net.children())[:7])(x), encoder(x).features)


# ---- untrusted and damaged files


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def good():
    return torchvision.models.resnet18().state_dict()


def half(write):
    def broken(path, marker):
        write(path, marker)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])

    return broken


def wrong_header(path, marker):
    """Write a safetensors file whose header describes more than the file contains."""
    head = json.dumps(
        {"conv1.weight": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}
    ).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + b"\0" * 64)


def numpy_function(path, marker):
    """Write a pickle that calls a function of numpy that does not build arrays."""
    path.write_bytes(
        b"\x80\x03cnumpy.testing._private.utils\nrunstring\nX\x05\x00\x00\x001 + 1}\x86R."
    )


def resnet(name):
    return lambda path, marker: torch.save(constant_state_dict(shapes_of(name)), path)


BAD = {
    "empty": (lambda p, m: p.write_bytes(b""), "an empty file"),
    "web page": (lambda p, m: p.write_text("<!DOCTYPE html><title>404</title>"), "a web page"),
    "git lfs": (
        lambda p, m: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        "git lfs pull",
    ),
    "text": (lambda p, m: p.write_text("hello"), "not a file of weights"),
    "folder": (lambda p, m: p.mkdir(), "Is a directory"),
    "malicious, torch": (
        lambda p, m: torch.save({"state_dict": Malicious(m)}, p),
        "holds more than tensors (posix.mkdir)",
    ),
    "malicious, old torch": (
        lambda p, m: torch.save({"a": Malicious(m)}, p, _use_new_zipfile_serialization=False),
        "holds more than tensors (posix.mkdir)",
    ),
    "malicious, pickle": (
        lambda p, m: p.write_bytes(pickle.dumps({"model": Malicious(m)})),
        "holds more than tensors (posix.mkdir)",
    ),
    "pickle, other function of numpy": (
        numpy_function,
        "holds more than tensors (numpy.testing._private.utils",
    ),
    "half, torch": (half(lambda p, m: torch.save(good(), p)), "truncated or damaged"),
    "half, old torch": (
        half(lambda p, m: torch.save(good(), p, _use_new_zipfile_serialization=False)),
        "truncated or damaged",
    ),
    "half, pickle": (
        half(
            lambda p, m: (
                formats.write_state_dict(good(), p.with_suffix(".pkl"), "detectron2")
                or p.with_suffix(".pkl").rename(p)
            )
        ),
        "truncated or damaged",
    ),
    "half, safetensors": (
        half(
            lambda p, m: (
                formats.write_state_dict(good(), p.with_suffix(".safetensors"), "safetensors")
                or p.with_suffix(".safetensors").rename(p)
            )
        ),
        "truncated or damaged",
    ),
    "safetensors, wrong header": (wrong_header, "truncated or damaged"),
    "a list": (lambda p, m: torch.save([torch.ones(3)], p), "no named tensors"),
    "resnet152": (resnet("resnet152"), "another depth, blocks (3, 8, 36, 3)"),
    "wide": (resnet("wide_resnet50_2"), "wide or grouped"),
    "resnext": (resnet("resnext50_32x4d"), "wide or grouped"),
    "vgg": (resnet("vgg11"), "not a ResNet-18, -34, -50 or -101"),
    "transformer": (resnet("vit_b_16"), "not a ResNet"),
    "prefix": (
        lambda p, m: torch.save({f"visual.{k}": v for k, v in good().items()}, p),
        "another prefix, visual.",
    ),
    "control letters": (
        lambda p, m: torch.save(good() | {"\x1b[31m\n": torch.ones(1)}, p),
        "unmatched: 1",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_files_end_in_one_clear_line(what, tmp_path, capsys):
    make, why = BAD[what]
    path = tmp_path / "weights.pth"
    marker = tmp_path / "caught"
    out = tmp_path / "out.pth"
    make(path, str(marker))
    with pytest.raises(SystemExit) as end:
        run_command(main, ["extract", str(path), str(out)])
    printed = capsys.readouterr()
    assert end.value.code == 2 and printed.out == "" and not marker.exists() and not out.exists()
    line = printed.err.removesuffix("\n")
    assert line.startswith("densecl: ") and why in line and line.isprintable() and len(line) < 1200
    assert "weights.pth" in line


def test_a_deep_stem_of_timm_is_recognized(tmp_path):
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("resnet50d").state_dict(), tmp_path / "deep.pth")
    with pytest.raises(UsageError, match="a deep stem") as e:
        backbone_state_dict(tmp_path / "deep.pth")
    assert "conv1.0.weight" in str(e.value)


def test_the_names_of_caffe_are_refused_with_the_reason(tmp_path):
    import numpy as np

    arrays = {"conv1_w": np.zeros((64, 3, 7, 7)), "res2_0_branch2a_w": np.zeros((64, 64, 1, 1))}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(arrays))
    with pytest.raises(UsageError, match="BGR"):
        backbone_state_dict(tmp_path / "R-50.pkl")


# ---- the command line


def command(*arguments, cwd):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TORCH_HOME": str(cwd / "home")},
    )


def test_the_command_runs_as_a_program(tmp_path):
    save_run("resnet18-layer1", tmp_path)
    result = command("-m", "densecl.weights", "extract", "last.pt", "out.pkl", cwd=tmp_path)
    assert (
        (result.returncode, result.stderr) == (0, "")
        and result.stdout.startswith("wrote out.pkl: resnet18-layer1")
        and (tmp_path / "out.pkl").exists()
    )
    listing = command("-m", "densecl.weights", "released", cwd=tmp_path)
    assert (
        listing.returncode == 0
        and all(name in listing.stdout for name in hub.released)
        and "61.3" in listing.stdout
    )


def test_invalid_arguments_are_refused_before_torch_is_imported(tmp_path):
    (tmp_path / "a.pth").write_text("x")
    for arguments in (
        ["extract", "a.pth", "b.zip"],
        ["extract", "a.pth", "no/b.pth"],
        ["extract", "a.pth", "a.pth"],
        ["extract", "a.pth", "b.pkl", "--format", "timm"],
        ["extract", "nowhere.pth", "b.pth"],
        ["extract", "a.pth", "b.pth", "--format", "caffe"],
        ["extract", "a.pth"],
        [],
    ):
        program = """import sys
from densecl.runtime.io import run_command
from densecl.weights.__main__ import main
try: run_command(main, sys.argv[1:])
finally: assert 'torch' not in sys.modules"""
        result = command("-c", program, *arguments, cwd=tmp_path)
        assert (
            result.returncode == 2
            and result.stdout == ""
            and result.stderr.count("\n") == 1
            and result.stderr.startswith("densecl: ")
        ), result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pth"]


# ---- released files and torch.hub


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A local folder in place of the authors' site, and an empty cache."""
    monkeypatch.setattr(torch.hub, "_hub_dir", None, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    (tmp_path / "site").mkdir()
    for name, checkpoint in hub.released.items():
        monkeypatch.setitem(
            hub.released, name, checkpoint._replace(source=(tmp_path / "site").as_uri())
        )
    return tmp_path / "site"


def publish(source, name):
    checkpoint = hub.released[name]
    state = constant_state_dict(
        {k: v for k, v in shapes_of(checkpoint.backbone).items() if not k.startswith("fc.")}
    )
    torch.save({"state_dict": state, "author": "DenseCL"}, source / checkpoint.file)
    return state


def test_a_released_file_is_loaded_by_name_and_later_from_the_cache(source, tmp_path, capsys):
    state = publish(source, "densecl-coco-800ep")
    assert same(backbone_state_dict("coco-800ep")[0], state)
    (source / "densecl_r50_coco_800ep.pth").unlink()
    assert torch.equal(load_backbone("densecl-r50-coco-800ep").conv1.weight, state["conv1.weight"])
    main(["extract", "densecl-coco-800ep", str(tmp_path / "out.pkl")])
    assert same(backbone_state_dict(tmp_path / "out.pkl")[0], state)
    with pytest.raises(
        UsageError, match="densecl-coco-1600ep: not in torch.hub's cache.*put it at"
    ):
        load_backbone("coco-1600ep")
    capsys.readouterr()
    main(["released"])
    listing = capsys.readouterr().out.splitlines()
    assert ["in the cache" in line for line in listing] == [False, True, False, False, False]


def test_an_incomplete_file_in_the_cache_is_reported_as_damaged(source):
    path = hub.cached_path("densecl-coco-800ep")
    publish(source, "densecl-coco-800ep")
    hub.download("densecl-coco-800ep")
    path.write_bytes(path.read_bytes()[: 10**4])
    with pytest.raises(UsageError, match=f"{path}: truncated or damaged"):
        load_backbone("coco-800ep")


def test_torch_hub_loads_from_the_repository(source):
    state = publish(source, "densecl-coco-800ep")

    def load(entry, **options):
        return torch.hub.load(str(ROOT), entry, source="local", **options)

    result = load("densecl_resnet50", weights="coco-800ep")
    assert isinstance(result, torchvision.models.ResNet) and same(
        {k: v for k, v in result.state_dict().items() if k in state}, state
    )
    assert len(load("densecl_resnet101", weights=None).layer3) == 23
    with pytest.raises(Exception, match="of a resnet50, not of a resnet101"):
        load("densecl_resnet101", weights="coco-800ep")
    with pytest.raises(Exception, match="neither a file nor a released checkpoint"):
        load("densecl_resnet50", weights="coco")


def test_hubconf_imports_no_large_package():
    result = command(
        "-c",
        "import hubconf, sys; assert not {'torch', 'torchvision', 'densecl'} & set(sys.modules)",
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr


def test_the_released_names_are_presets_and_the_backbones_are_known():
    from densecl.config import presets

    assert set(hub.released) <= set(presets)
    assert state_dict_keys.BLOCK_COUNTS.keys() == set(BACKBONES)
