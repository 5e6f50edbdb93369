"""What users really have: files of other programs, odd runs, odd data, only the wheel."""

import collections
import dataclasses
import hashlib
import http.server
import io
import json
import pickle
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from densecl import doctor
from densecl.encoder import Encoder
from densecl.evaluate.__main__ import main as run_evaluate
from densecl.evaluate.features import load_network
from densecl.evaluate.stereo import open_stereo_pair, stereo_probe
from densecl.hooks import check_output
from densecl.runtime.io import UsageError, run_command
from densecl.trainer import train
from densecl.transfer.initialization import resolve_weights
from densecl.weights import backbone_state_dict, find_state_dict, formats, hub
from densecl.weights.__main__ import main
from densecl.weights.initial import load_initial_
from tiny import TINY

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def resnet():
    """A ResNet-18 of torchvision, truncated after layer1 to be small, and its state dict."""
    torch.manual_seed(0)
    net = torchvision.models.resnet18()
    net.layer2, net.layer3, net.layer4 = nn.Sequential(), nn.Sequential(), nn.Sequential()
    net.fc = nn.Linear(64, 2)
    return net, net.state_dict()


def prefixed(prefix, state):
    return {f"{prefix}{key}": value for key, value in state.items()}


def sequence(net):
    return nn.Sequential(*list(net.children())).state_dict()


def other(state):
    """The same names with other numbers: a teacher that must not be taken for the student."""
    return {key: value + 1 for key, value in state.items()}


HEAD = {"weight": torch.ones(4, 512), "bias": torch.ones(4)}
LAYOUTS = {
    "compiled": lambda n, s: prefixed("_orig_mod.", s),
    "compiled DDP": lambda n, s: {"model": prefixed("_orig_mod.module.", s)},
    "DDP inside": lambda n, s: prefixed("encoder.module.", s) | prefixed("head.", HEAD),
    "model.": lambda n, s: prefixed("model.", s),
    "four in a row": lambda n, s: {"state_dict": prefixed("module.model.net.backbone.", s)},
    "base_encoder (MoCo v3)": lambda n, s: {
        "state_dict": prefixed("module.base_encoder.", s)
        | prefixed("module.momentum_encoder.", other(s))
        | prefixed("module.predictor.0.", HEAD)
    },
    "model_state_dict": lambda n, s: {"model_state_dict": s, "epoch": 3, "loss": 0.1},
    "net": lambda n, s: {"net": prefixed("module.", s), "acc": 93.0, "epoch": 1},
    "VISSL": lambda n, s: {
        "phase_idx": 1,
        "classy_state_dict": {
            "base_model": {
                "model": {
                    "trunk": prefixed("_feature_blocks.", s),
                    "heads": prefixed("0.clf.0.", HEAD),
                }
            }
        },
    },
    "DINO": lambda n, s: {
        "student": prefixed("module.backbone.", s) | prefixed("module.head.mlp.0.", HEAD),
        "teacher": prefixed("backbone.", other(s)) | prefixed("head.mlp.0.", HEAD),
        "dino_loss": {"center": torch.ones(1, 4)},
        "epoch": 7,
    },
    "only a teacher": lambda n, s: {"teacher": prefixed("backbone.", s), "epoch": 7},
    "EMA of timm": lambda n, s: {"state_dict": s, "state_dict_ema": other(s), "arch": "resnet18"},
    "Lightning": lambda n, s: {
        "pytorch-lightning_version": "2.4",
        "state_dict": prefixed("model.", s) | prefixed("criterion.", HEAD),
        "hyper_parameters": {"lr": 0.1},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
    },
    "solo-learn": lambda n, s: {
        "state_dict": prefixed("backbone.", s)
        | prefixed("momentum_backbone.", other(s))
        | prefixed("projector.0.", HEAD)
        | prefixed("classifier.", HEAD)
        | {"queue": torch.ones(2, 4)}
    },
    "lightly (nn.Sequential)": lambda n, s: {
        "state_dict": prefixed("backbone.", sequence(n))
        | prefixed("projection_head.layers.0.", HEAD)
        | prefixed("backbone_momentum.", other(sequence(n)))
    },
    "nn.Sequential": lambda n, s: sequence(n),
    "nn.Sequential with a head": lambda n, s: prefixed("0.", sequence(n)) | prefixed("1.", HEAD),
    "MMSelfSup": lambda n, s: {
        "meta": {"epoch": 1},
        "state_dict": prefixed("backbone.", s)
        | prefixed("neck.fc0.", HEAD)
        | prefixed("target_net.0.", other(s)),
    },
    "torchvision's detector": lambda n, s: (
        prefixed("backbone.body.", s)
        | prefixed("backbone.fpn.inner_blocks.0.", HEAD)
        | prefixed("roi_heads.box_head.fc6.", HEAD)
    ),
    "SwAV": lambda n, s: prefixed("module.", s) | prefixed("module.prototypes.", HEAD),
    "averaged": lambda n, s: prefixed("module.", s) | {"n_averaged": torch.tensor(3)},
}


def body(state):
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def is_body(found, state):
    expected = body(state)
    return found.keys() == expected.keys() and all(
        torch.equal(found[k], expected[k]) for k in found
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_backbone_is_found_in_the_layouts_of_other_programs(layout, resnet, tmp_path, capsys):
    net, state = resnet
    torch.save(LAYOUTS[layout](net, state), tmp_path / "weights.pth")
    found, name = backbone_state_dict(tmp_path / "weights.pth")
    assert name == "resnet18-layer1" and is_body(found, state)
    lines = capsys.readouterr().err.splitlines()
    usual = layout == "EMA of timm"  # torchvision's names under state_dict
    assert len(lines) == (0 if usual else 1)  # where it was read from
    assert usual or "weights.pth: the backbone is read from" in lines[0]


def test_the_line_names_what_was_stripped_and_comes_once(resnet, tmp_path, capsys):
    net, state = resnet
    torch.save(LAYOUTS["VISSL"](net, state), tmp_path / "a.pth")
    for _ in range(2):
        backbone_state_dict(tmp_path / "a.pth")
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "classy_state_dict.base_model.model.trunk" in error
    assert "_feature_blocks." in error


@pytest.mark.parametrize("layout", ["DINO", "EMA of timm", "base_encoder (MoCo v3)", "solo-learn"])
def test_the_key_encoder_is_the_moving_average_of_any_program(layout, resnet, tmp_path):
    net, state = resnet
    torch.save(LAYOUTS[layout](net, state), tmp_path / "weights.pth")
    found, _ = backbone_state_dict(tmp_path / "weights.pth", key_encoder=True)
    assert is_body(found, other(state))


def test_safetensors_npz_and_pickles_of_python_2_are_read(resnet, tmp_path):
    _, state = resnet
    formats.write_state_dict(prefixed("model.", state), tmp_path / "a.safetensors", "safetensors")
    arrays = {key: value.numpy() for key, value in state.items()}
    np.savez(tmp_path / "a.npz", **prefixed("module.", arrays))
    (tmp_path / "ordered.pkl").write_bytes(pickle.dumps(collections.OrderedDict(arrays)))
    assert is_body(backbone_state_dict(tmp_path / "a.safetensors")[0], state)
    assert is_body(backbone_state_dict(tmp_path / "a.npz")[0], state)
    assert is_body(backbone_state_dict(tmp_path / "ordered.pkl")[0], state)
    # {'a': array([1, 255], dtype=uint8)}, as Python 2 writes it, protocols 2 and 0
    new = (
        b"\x80\x02}q\x01U\x01aq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\n"
        b"q\x04K\x00\x85U\x01b\x87Rq\x05(K\x01K\x02\x85cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x02\x01\xfftbs."
    )
    (tmp_path / "two.pkl").write_bytes(new)
    (tmp_path / "zero.pkl").write_bytes(b"(dp0\nS'lr'\np1\nF0.5\ns.")
    assert formats.read_checkpoint(tmp_path / "two.pkl")["a"].tolist() == [1, 255]
    assert formats.read_checkpoint(tmp_path / "zero.pkl") == {"lr": 0.5}


def test_harmless_objects_beside_the_tensors_are_read(resnet, tmp_path):
    import argparse

    _, state = resnet
    content = {"state_dict": state, "args": argparse.Namespace(lr=0.1), "best": np.float64(3.5)}
    torch.save(content, tmp_path / "a.pth")
    assert is_body(backbone_state_dict(tmp_path / "a.pth")[0], state)


def archive(*names):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name in names:
            file.writestr(name, "x")
    return content.getvalue()


def scripted():
    content = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), content)
    return content.getvalue()


FILES = {
    "TorchScript": (scripted, "TorchScript"),
    "zip": (lambda: archive("a.pth", "b.txt"), "a zip archive without weights"),
    "gzip": (lambda: b"\x1f\x8b\x08\x00" + bytes(99), "compressed archive; unpack"),
    "tar": (lambda: b"a".ljust(257, b"\0") + b"ustar\x0000", "tar archive; unpack"),
    "keras": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5"),
    "npy": (lambda: b"\x93NUMPY\x01\x00", "without a name"),
    "json": (lambda: b'{"error": "not found"}', "JSON text"),
    "json that looks like safetensors": (lambda: b'[1, 22, {"error": "not found"}]', "JSON text"),
    "web page with a mark": (lambda: b"\xef\xbb\xbf<html>404</html>", "a web page"),
    "zeros": (lambda: bytes(4096), "only zero bytes"),
    "pickled tensors": (lambda: pickle.dumps({"a": torch.ones(1)}), "plain pickle of torch"),
}


@pytest.mark.parametrize("what", FILES)
def test_other_files_are_called_by_their_name_and_not_damaged(what, tmp_path, capsys):
    make, word = FILES[what]
    (tmp_path / "weights.pth").write_bytes(make())
    with pytest.raises(SystemExit) as end:
        run_command(main, ["extract", str(tmp_path / "weights.pth"), str(tmp_path / "out.pth")])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert word in error and "damaged" not in error and error.isascii()


@pytest.mark.parametrize(
    "content, words",
    [
        ({"state_dict": {}, "epoch": 3}, ("state_dict (dict of 0)", "epoch (int)")),
        ({"optimizer": {"lr": 0.1}, "hyper": {}}, ("optimizer (dict of 1)", "hyper (dict of 0)")),
        ([torch.ones(1)], ("a list",)),
        (torch.ones(2), ("a Tensor",)),
    ],
)
def test_without_named_tensors_the_message_lists_what_was_seen(content, words):
    with pytest.raises(UsageError, match="no named tensors") as e:
        find_state_dict(content, "a.pth")
    assert all(word in str(e.value) for word in words)


def test_an_unknown_prefix_and_an_unknown_part_name_the_way_out(resnet, tmp_path):
    _, state = resnet
    torch.save(prefixed("vision.", state), tmp_path / "a.pth")
    with pytest.raises(UsageError, match="extract --prefix vision writes a file"):
        backbone_state_dict(tmp_path / "a.pth")
    assert is_body(backbone_state_dict(tmp_path / "a.pth", prefix="vision")[0], state)
    with pytest.raises(UsageError, match="no key begins with --prefix visio"):
        backbone_state_dict(tmp_path / "a.pth", prefix="visio")
    torch.save(prefixed("model.", state) | prefixed("odd.", state), tmp_path / "b.pth")
    with pytest.raises(
        UsageError, match=r"another network beside .*--prefix model takes .*unmatched"
    ):
        backbone_state_dict(tmp_path / "b.pth")
    small = prefixed("backbone.", state) | {"backbone.conv1.weight": torch.ones(64, 3, 3, 3)}
    torch.save(small, tmp_path / "c.pth")
    with pytest.raises(UsageError, match="3 x 3, CIFAR"):
        backbone_state_dict(tmp_path / "c.pth")


def test_evaluate_reads_a_checkpoint_of_another_program_that_has_a_config(resnet, tmp_path):
    _, state = resnet
    torch.save({"config": {"lr": 0.1}, "model": prefixed("net.", state)}, tmp_path / "a.pth")
    config, encoder = load_network(tmp_path / "a.pth")
    assert config.backbone == "resnet18-layer1" and is_body(encoder.backbone.state_dict(), state)


# ---- the doctor


def write_run(folder, rows, **fields):
    config = dataclasses.asdict(dataclasses.replace(TINY, **fields))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(folder)]


def falling(steps=40, **fields):
    """Rows of a healthy run of `steps` steps."""
    losses = {"loss_global": 2.4, "loss_dense": 2.4, "match_acc": 0.4, "neg": 0.1}
    return [
        {"step": n, **{k: v - 0.02 * n * (k[0] == "l") for k, v in losses.items()}} | fields
        for n in range(1, steps + 1)
    ]


def probe(step, exact, moved):
    baselines = {"same_cell": {"exact": 0.378, "moved": 0.0}, "chance": {"exact": 0.03, "moved": 0}}
    part = {"exact": exact, "near": 0.6, "wide": 0.8, "moved": moved}
    return {"step": step, "probe": "match", "backbone": part, "dense": part} | baselines


def test_the_doctor_sees_that_only_the_same_cell_is_answered(tmp_path, capsys):
    rows = [probe(0, 0.21, 0.18), *falling(), probe(40, 0.378, 0.0)]
    doctor.main(write_run(tmp_path, rows))
    text = capsys.readouterr().out
    assert (
        "verdict: not normal" in text
        and "--geometry-warmup" in text
        and "--padding reflect" in text
    )
    doctor.main(write_run(tmp_path, [rows[0], *falling(), probe(40, 0.45, 0.31)]))
    assert (
        "the same cell 0.378" in (text := capsys.readouterr().out)
        and "--padding reflect" not in text
    )
    doctor.main(write_run(tmp_path, [rows[0], *falling(), probe(40, 0.21, 0.18)]))
    assert "no better than before the training" in capsys.readouterr().out


@pytest.mark.parametrize("skip", [{"grad": float("inf")}, {"grad": None, "skipped": 1}])
def test_one_step_that_fp16_skipped_is_normal_and_many_are_not(skip, tmp_path, capsys):
    rows = falling(grad=0.5)
    doctor.main(write_run(tmp_path, [rows[0] | skip, *rows[1:]], amp="fp16"))
    text = capsys.readouterr().out
    assert "fp16 skipped 1 step" in text and "not normal" not in text
    doctor.main(write_run(tmp_path, [row | skip for row in rows], amp="fp16"))
    assert "verdict: not normal" in capsys.readouterr().out
    doctor.main(write_run(tmp_path, [*rows[:-1], rows[-1] | {"grad": float("inf")}], amp="off"))
    assert "grad is not finite from step 40" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_is_drawn_and_reported(tmp_path, capsys):
    rows = falling()
    rows[20] |= {"loss_dense": float("inf"), "loss_global": float("nan")}
    doctor.main(write_run(tmp_path, rows))
    assert "loss_dense is not finite from step 21 on" in capsys.readouterr().out
    assert (tmp_path / "doctor.png").stat().st_size > 5000


# ---- probes


def test_match_on_a_grid_without_moved_points_is_strict_json_and_says_so(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))  # no supervised weights
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), "uint8"))
    photo.save(tmp_path / "a.png")
    main(["extract", str(weights_file(tmp_path)), str(tmp_path / "b.pth")])
    capsys.readouterr()
    both = ["--weights", str(tmp_path / "b.pth"), "--data-root", str(tmp_path), "--limit", "4"]
    run_evaluate(["match", "--image-size", "8", *both])
    printed = capsys.readouterr()
    *table, line = printed.out.splitlines()
    rows = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))["rows"]
    assert list(rows) == ["untrained backbone", "b backbone", "same_cell", "chance"]
    assert len(table) == 5 and all(row["moved"] is None for row in rows.values())
    assert printed.err.count("no point moves by more than a cell") == 1


def weights_file(folder):
    net = nn.Sequential(*list(torchvision.models.resnet18().children())[:6])
    torch.save(net.state_dict(), folder / "a.pth")
    return folder / "a.pth"


@pytest.mark.parametrize("size, coarse", [(128, True), (320, False)])
def test_stereo_says_when_the_same_place_is_correct(size, coarse, capsys):
    pair = open_stereo_pair()
    encoder = load_network("random", "resnet18")[1]
    rows = stereo_probe(encoder, pair, size)
    note = capsys.readouterr().err
    assert (rows["same_place"]["plain"] > 0.8) == coarse == ("give a larger --image-size" in note)


# ---- downloads


@pytest.fixture
def server(tmp_path):
    """A local HTTP server: (its URL, its folder, the list of the requests)."""
    (tmp_path / "site").mkdir()
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path / "site"))

        def log_message(self, *arguments):
            requests.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{site.server_address[1]}", tmp_path / "site", requests
        site.shutdown()


def test_a_download_is_checked_where_the_hash_is_known(server, tmp_path):
    url, site, _ = server
    content = b"weights" * 1000
    digest = hashlib.sha256(content).hexdigest()
    for name in ("a.pth", f"b-{digest[:8]}.pth", "c-00000000.pth"):
        (site / name).write_bytes(content)
    cache = tmp_path / "cache"
    assert hub.fetch(f"{url}/a.pth", cache / "a.pth", digest).read_bytes() == content
    assert hub.fetch(f"{url}/b-{digest[:8]}.pth", cache / f"b-{digest[:8]}.pth").is_file()
    assert len(list(cache.iterdir())) == 2
    with pytest.raises(UsageError, match="not with 00000000: truncated or another file"):
        hub.fetch(f"{url}/c-00000000.pth", cache / "c-00000000.pth")
    with pytest.raises(UsageError, match="cannot be fetched .*not found"):
        hub.fetch(f"{url}/d.pth", cache / "d.pth")
    (cache / "e.pth.sha256").write_text(f"{'1' * 64}  e.pth")
    with pytest.raises(UsageError, match="not with 1111"):
        hub.fetch(f"{url}/a.pth", cache / "e.pth")
    (cache / "a.pth").write_bytes(content[:-1])  # a copy that was interrupted
    with pytest.raises(UsageError, match="delete it and get it again"):
        hub.fetch(f"{url}/a.pth", cache / "a.pth", digest)
    kept = {path.name for path in cache.iterdir()}  # nothing wrong, no temporary file
    assert kept == {"a.pth", f"b-{digest[:8]}.pth", "e.pth.sha256"}


def test_processes_that_begin_together_download_once(server, tmp_path):
    url, site, requests = server
    (site / "a.pth").write_bytes(bytes(10**6))
    program = """import sys
from pathlib import Path
from densecl.weights.hub import fetch
print(fetch(sys.argv[1], Path(sys.argv[2])).stat().st_size)"""
    command = [sys.executable, "-c", program, f"{url}/a.pth", str(tmp_path / "cache" / "a.pth")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
    assert [int(process.communicate()[0]) for process in processes] == [10**6] * 3
    assert requests == ["/a.pth"]


def test_torch_hub_needs_torch_and_torchvision_only(resnet, tmp_path):
    net = torchvision.models.resnet50()
    torch.save(net.state_dict(), tmp_path / "a.pth")
    program = """import sys
for name in ("simple_parsing", "tqdm", "matplotlib", "lmdb", "cv2", "skimage", "simplejpeg",
             "tensorboard", "safetensors"):
    sys.modules[name] = None  # an import of it is an error
import hubconf
assert hubconf.dependencies == ["torch", "torchvision"]
print(type(hubconf.densecl_resnet50(sys.argv[1])).__name__)"""
    command = [sys.executable, "-c", program, str(tmp_path / "a.pth")]
    got = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert got.stdout == "ResNet\n", got.stderr


# ---- data sets and models of one's own


class Items(Dataset):
    """A dataset whose items are all the same."""

    def __init__(self, item):
        self.item = item

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self.item


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(3, 32, 32), torch.zeros(3, 32, 32)


VIEW = torch.zeros(3, 32, 32)
VIEWS = {
    "a dict without an image": (Items({"name": "a.jpg", "label": 3}), "dict is not an image"),
    "one view, normalized": (Items(VIEW - 1), "from -1 to -1; expected floats from 0 to 1"),
    "paths": (Items(("a.jpg", 0)), "tuple is not an image"),
    "other shapes": (Items((VIEW, VIEW[:, :9])), r"\[3, 32, 32\] and \[3, 9, 32\]"),
    "iterable": (Stream(), "a Stream has no len"),
    "a generator": ((pair for pair in [(VIEW, VIEW)]), "a generator has no len"),
}


@pytest.mark.parametrize("what", VIEWS)
def test_views_that_are_no_pairs_end_in_one_line_and_write_nothing(what, tmp_path):
    views, words = VIEWS[what]
    with pytest.raises(UsageError, match=words) as e:
        train(dataclasses.replace(TINY, out=str(tmp_path / "run")), views)
    assert "\n" not in str(e.value) and not (tmp_path / "run").exists()


def test_a_model_that_returns_too_little_and_a_backbone_of_another_shape_are_named():
    with pytest.raises(UsageError, match="returned a dict with loss_global; .* with loss, a 0-dim"):
        check_output({"loss_global": torch.ones(())})
    pooled = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for backbone in (pooled, nn.Conv2d(3, 9, 3), nn.Sequential()):
        with pytest.raises(ValueError, match="expects N x 8 x h x w"):
            Encoder(backbone, 8, hidden=4, dim=4)(torch.zeros(2, 3, 16, 16))


def test_a_word_for_weights_does_not_shadow_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for word in ("random", "supervised", "timm-pretrained"):
        Path(word).write_bytes(b"weights")
    calls = [
        (load_network, "random"),
        (resolve_weights, "random"),
        (resolve_weights, "supervised"),
        (load_initial_, nn.Conv2d(3, 8, 1), "resnet18", "supervised"),
        (load_initial_, nn.Conv2d(3, 8, 1), "timm:convnext_atto", "timm-pretrained"),
    ]
    for function, *args in calls:
        with pytest.raises(UsageError, match=rf"two meanings; give \./{args[-1]}"):
            function(*args)
