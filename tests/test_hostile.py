"""Malicious files: none of their code runs, wherever they are read, and one clear line is printed.

To test another place where files are read, write a function that puts the file there and returns
(a command's main, its arguments). Add it to ENTRY_POINTS.
"""

import ast
import io
import os
import pickle
import shlex
import shutil
import tarfile
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch

from densecl import doctor, show, weights
from densecl.data import __main__ as data_command
from densecl.data import lmdb as densecl_lmdb
from densecl.data import sources
from densecl.runtime import checkpoint
from densecl.runtime.io import run_command
from densecl.train import main as train_main

PACKAGE = Path(__file__).parents[1] / "densecl"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "_modidx.py")
TINY = shlex.split(
    "demo --data-root images --backbone resnet18-layer2 --image-size 32 --batch-size 4 "
    "--queue-len 12 --lr 0.0075 --dim 8 --hidden 16 --workers 0 --threads 1 --amp off "
    "--max-steps 1 --out run --probe ''"
)


class Malicious:
    """An object whose unpickling creates a folder `trap`: harmless, and easy to detect."""

    def __reduce__(self):
        return os.makedirs, ("trap", 0o777, True)


def as_torch_file(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def as_arrays(content):
    buffer = io.BytesIO()
    np.savez(buffer, text=np.array([content], dtype=object), ends=np.array([0, 1]))
    return buffer.getvalue()


CHECKPOINT = {"step": 1, "config": {}, "model": {}, "optimizer": {}, "state_dict": {}}


def as_weights():
    hidden = {"model": {"encoder_q.w": Malicious()}, "state_dict": {"conv1.weight": Malicious()}}
    return as_torch_file(CHECKPOINT | hidden)


def as_old_torch_file():
    content = CHECKPOINT | {"extra": Malicious()}
    return as_torch_file(content, _use_new_zipfile_serialization=False)


FILES = {
    "a plain pickle": lambda: pickle.dumps(Malicious()),
    "an old pickle": lambda: pickle.dumps(Malicious(), protocol=0),
    "a torch file": lambda: as_torch_file(CHECKPOINT | {"extra": Malicious()}),
    "a torch file of the old kind": as_old_torch_file,
    "a torch file, hidden in the weights": as_weights,
    "numpy arrays": lambda: as_arrays(Malicious()),
}


def copy(file, *names):
    for name in names:
        Path(name).parent.mkdir(exist_ok=True)
        shutil.copy(file, name)


def last_pt(file):
    copy(file, "run/last.pt")
    return train_main, TINY


def last_and_numbered(file):
    copy(file, "run/last.pt", "run/step-00000003.pt", "run/step-00000006.pt")
    return train_main, TINY


def only_numbered(file):
    copy(file, "run/step-00000003.pt")
    return train_main, TINY


def resume(file):
    return train_main, [*TINY, "--resume", str(file)]


def show_weights(file):
    images = ["images/image-00.png", "images/image-01.png"]
    return show.main, ["--weights", str(file), "--images", *images]


def load_encoder(file):
    return (lambda argv: weights.load_encoder(*argv)), [file]


def load_checkpoint(file):
    return (lambda argv: checkpoint.load_checkpoint(*argv)), [file]


def lmdb_file(file):
    copy(file, "set.lmdb")
    return train_main, [*TINY, "--data-root", "set.lmdb"]


def lmdb_verify(file):
    copy(file, "set.lmdb")
    return data_command.main, ["verify", "set.lmdb"]


def write_database(records):
    """Write an LMDB as a single file."""
    environment = lmdb.open("set.lmdb", subdir=False, map_size=2**24)
    with environment.begin(write=True) as transaction:
        for key, value in records.items():
            transaction.put(key, value)
    environment.close()


def lmdb_of_pickles(file):
    """As other programs write them: each value is a pickle."""
    write_database(dict.fromkeys((b"__len__", b"0", b"__keys__"), file.read_bytes()))
    return train_main, [*TINY, "--data-root", "set.lmdb"]


def lmdb_with_end_mark(file):
    """A database that is marked as finished, with a pickle in the place of its metadata."""
    keys = (densecl_lmdb.META_KEY, densecl_lmdb.record_key(0))
    write_database(dict.fromkeys(keys, file.read_bytes()))
    raw = Path("set.lmdb").read_bytes()
    crc32 = densecl_lmdb.file_crc32("set.lmdb", len(raw))
    Path("set.lmdb").write_bytes(raw + densecl_lmdb.end_mark(len(raw), crc32))
    return train_main, [*TINY, "--data-root", "set.lmdb"]


def shard(file):
    Path("shards").mkdir(exist_ok=True)
    with tarfile.open("shards/set-000000.tar", "w") as tar:
        tar.add(file, "0.pickle")
    return train_main, [*TINY, "--data-root", "shards"]


def images(file):
    copy(file, *(f"bad/{i}.jpg" for i in range(12)))
    return train_main, [*TINY, "--data-root", "bad"]


def list_file(file):
    copy(file, "list.txt")
    return train_main, [*TINY, "--data-root", "list.txt"]


def coco_json(file):
    copy(file, "set.json")
    return train_main, [*TINY, "--data-root", "set.json"]


def metrics(file):
    copy(file, "run/metrics.jsonl")
    return doctor.main, ["run"]


def config_json(file):
    copy(file, "run/config.json")
    Path("run/metrics.jsonl").write_text('{"step": 1, "loss_global": 1.0}\n')
    return doctor.main, ["run"]


ENTRY_POINTS = [
    last_pt,
    last_and_numbered,
    only_numbered,
    resume,
    show_weights,
    load_encoder,
    load_checkpoint,
    lmdb_file,
    lmdb_verify,
    lmdb_of_pickles,
    lmdb_with_end_mark,
    shard,
    images,
    list_file,
    coco_json,
    metrics,
    config_json,
]


@pytest.fixture
def folder(tmp_path, monkeypatch, make_images):
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "images")
    return tmp_path


@pytest.mark.parametrize("entry_point", ENTRY_POINTS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("kind", FILES)
def test_no_code_of_a_file_runs(entry_point, kind, folder, capsys):
    file = Path("malicious.pt")
    file.write_bytes(FILES[kind]())
    main, argv = entry_point(file)
    with pytest.raises(SystemExit) as end:
        run_command(main, argv)
    err = capsys.readouterr().err
    assert end.value.code in (1, 2)
    assert not Path("trap").exists()
    assert sum(line.startswith("densecl: ") for line in err.splitlines()) == 1, err
    assert "Traceback" not in err, err
    last = err.splitlines()[-1]
    assert len(last) < 1000 and last.isprintable(), err


@pytest.mark.parametrize("kind", FILES)
def test_the_malicious_files_work(kind, folder):
    """Read without precautions, each of them runs its code; else the tests above prove nothing."""
    file = Path("malicious.pt")
    file.write_bytes(FILES[kind]())
    if "torch" in kind:
        torch.load(file, weights_only=False)
    elif "numpy" in kind:
        assert np.load(file, allow_pickle=True)["text"] is not None
    else:
        pickle.loads(file.read_bytes())
    assert Path("trap").exists()


@pytest.mark.parametrize("kind", FILES)
def test_a_malicious_cache_of_names_is_ignored(kind, folder):
    cache = Path("cache.npz")
    cache.write_bytes(FILES[kind]())
    arrays = sources.load_cache(cache, lambda arrays: arrays["ends"][-1] == len(arrays["text"]))
    assert arrays is None
    assert not Path("trap").exists()


FORBIDDEN = (
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "eval",
    "exec",
    "yaml.load",
    "yaml.unsafe_load",
    "joblib.load",
    "marshal.loads",
    "marshal.load",
    "shelve.open",
    "pd.read_pickle",
)


def unsafe_calls(text):
    """Calls in a module's text that could run code from a file."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        if name in FORBIDDEN:
            found.append(name)
        if name.endswith("torch.load") and options.get("weights_only") is not True:
            found.append(name)
        if name in ("np.load", "numpy.load") and options.get("allow_pickle"):
            found.append(name)
    return found


def test_unsafe_calls_are_found():
    for text in (
        "pickle.load(f)",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "np.load(p, allow_pickle=True)",
        "x = eval(s)",
    ):
        assert unsafe_calls(text), text
    for text in (
        "torch.load(p, weights_only=True)",
        "np.load(p)",
        "pickle.dumps(x)",
        "json.loads(s)",
        "model.eval()",
    ):
        assert not unsafe_calls(text), text


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_calls_an_unsafe_function(module):
    assert unsafe_calls(module.read_text()) == []
