"""Files from strangers: whatever door a malicious pickle is brought to, no code of it runs, and one clear line comes out.

To add a door, write a function `door(file)` that puts the file where the door looks, and gives (a command's main, its arguments). Name it in DOORS.
"""
import ast
import io
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch

from densecl import checkpoint, data, doctor, lmdbfile, show, source, train, weights
from densecl.files import run_main

MODULES = sorted(p for p in (Path(__file__).parents[1]/"densecl").glob("*.py") if not p.stem.startswith("_"))
TINY = ("demo --data-root pictures --backbone resnet18-layer2 --image-size 32 --batch-size 4 --queue-len 12 --lr 0.0075 --dim 8 --hidden 16 "
        "--workers 0 --threads 1 --amp off --max-steps 1 --out run").split() + ["--probe", ""]


class Trojan:
    """Whoever unpickles it makes a folder `trap`: harmless, and seen."""
    def __reduce__(self): return os.makedirs, ("trap", 0o777, True)


def as_zip(x, **how):
    buffer = io.BytesIO()
    torch.save(x, buffer, **how)
    return buffer.getvalue()


def as_array(x):
    buffer = io.BytesIO()
    np.savez(buffer, text=np.array([x], dtype=object), ends=np.array([0, 1]))
    return buffer.getvalue()


PARTS = dict(step=1, config={}, model={}, optimizer={}, state_dict={})
TROJANS = {
    "a plain pickle": lambda: pickle.dumps(Trojan()),
    "an old pickle": lambda: pickle.dumps(Trojan(), protocol=0),
    "a torch file": lambda: as_zip(PARTS | dict(extra=Trojan())),
    "a torch file of the old kind": lambda: as_zip(PARTS | dict(extra=Trojan()), _use_new_zipfile_serialization=False),
    "a torch file, hidden in the weights": lambda: as_zip(PARTS | dict(model={"encoder_q.w": Trojan()}, state_dict={"conv1.weight": Trojan()})),
    "numpy arrays": lambda: as_array(Trojan()),
}


def put(file, *names):
    for name in names:
        Path(name).parent.mkdir(exist_ok=True)
        shutil.copy(file, name)


def last_pt(file):
    put(file, "run/last.pt")
    return train.main, TINY


def last_and_numbered(file):
    put(file, "run/last.pt", "run/step-00000003.pt", "run/step-00000006.pt")
    return train.main, TINY


def only_numbered(file):
    put(file, "run/step-00000003.pt")
    return train.main, TINY


def resume(file): return train.main, [*TINY, "--resume", str(file)]


def show_weights(file): return show.main, ["--weights", str(file), "--images", "pictures/picture-00.png", "pictures/picture-01.png"]


def load_encoder(file): return (lambda argv: weights.load_encoder(*argv)), [file]


def load_checkpoint(file): return (lambda argv: checkpoint.load(*argv)), [file]


def lmdb_file(file):
    put(file, "set.lmdb")
    return train.main, [*TINY, "--data-root", "set.lmdb"]


def lmdb_verify(file):
    put(file, "set.lmdb")
    return data.main, ["verify", "set.lmdb"]


def database(records):
    """An LMDB in one file."""
    with lmdb.open("set.lmdb", subdir=False, map_size=2**24) as env, env.begin(write=True) as t:
        for k, v in records.items(): t.put(k, v)


def lmdb_of_pickles(file):
    """As other programs wrote them: each value a pickle."""
    database({b"__len__": file.read_bytes(), b"0": file.read_bytes(), b"__keys__": file.read_bytes()})
    return train.main, [*TINY, "--data-root", "set.lmdb"]


def lmdb_with_our_mark(file):
    """One that says it is ours and finished, with a pickle where its description should be."""
    database({lmdbfile.ABOUT: file.read_bytes(), lmdbfile.key(0): file.read_bytes()})
    raw = Path("set.lmdb").read_bytes()
    Path("set.lmdb").write_bytes(raw + lmdbfile.mark(len(raw), lmdbfile.checksum("set.lmdb", len(raw))))
    return train.main, [*TINY, "--data-root", "set.lmdb"]


def shard(file):
    Path("shards").mkdir(exist_ok=True)
    with tarfile.open("shards/set-000000.tar", "w") as tar: tar.add(file, "0.pickle")
    return train.main, [*TINY, "--data-root", "shards"]


def pictures(file):
    put(file, *(f"bad/{i}.jpg" for i in range(12)))
    return train.main, [*TINY, "--data-root", "bad"]


def list_file(file):
    put(file, "list.txt")
    return train.main, [*TINY, "--data-root", "list.txt"]


def coco_json(file):
    put(file, "set.json")
    return train.main, [*TINY, "--data-root", "set.json"]


def metrics(file):
    put(file, "run/metrics.jsonl")
    return doctor.main, ["run"]


def config_json(file):
    put(file, "run/config.json")
    Path("run/metrics.jsonl").write_text('{"step": 1, "loss_global": 1.0}\n')
    return doctor.main, ["run"]


DOORS = [last_pt, last_and_numbered, only_numbered, resume, show_weights, load_encoder, load_checkpoint, lmdb_file, lmdb_verify, lmdb_of_pickles,
         lmdb_with_our_mark, shard, pictures, list_file, coco_json, metrics, config_json]


@pytest.fixture
def place(tmp_path, monkeypatch, make_pictures):
    monkeypatch.chdir(tmp_path)
    make_pictures(tmp_path/"pictures")
    return tmp_path


@pytest.mark.parametrize("door", DOORS, ids=lambda d: d.__name__)
@pytest.mark.parametrize("trojan", TROJANS)
def test_no_code_of_a_stranger_runs(door, trojan, place, capsys):
    file = Path("gift.pt")
    file.write_bytes(TROJANS[trojan]())
    main, argv = door(file)
    with pytest.raises(SystemExit) as end: run_main(main, argv)
    said = capsys.readouterr()
    assert end.value.code in (1, 2)
    assert not Path("trap").exists()
    assert sum(line.startswith("densecl: ") for line in said.err.splitlines()) == 1 and "Traceback" not in said.err, said.err
    assert len(said.err.splitlines()[-1]) < 1000 and said.err.splitlines()[-1].isprintable(), said.err


@pytest.mark.parametrize("trojan", TROJANS)
def test_the_trojans_are_real(trojan, place):
    """Read carelessly, each of them runs its code: else the tests above would show nothing."""
    file = Path("gift.pt")
    file.write_bytes(TROJANS[trojan]())
    if "torch" in trojan: torch.load(file, weights_only=False)
    elif "numpy" in trojan: np.load(file, allow_pickle=True)["text"]
    else: pickle.loads(file.read_bytes())
    assert Path("trap").exists()


@pytest.mark.parametrize("trojan", TROJANS)
def test_the_cache_of_names_runs_nothing_and_is_made_anew(trojan, place):
    Path("cache.npz").write_bytes(TROJANS[trojan]())
    assert source.recall(Path("cache.npz"), lambda kept: kept["ends"][-1] == len(kept["text"])) is None
    assert not Path("trap").exists()


def calls(tree):
    """(dotted name, keyword arguments with constant values) of every call in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: getattr(k.value, "value", None) for k in node.keywords}


FORBIDDEN = ("pickle.load", "pickle.loads", "pickle.Unpickler", "eval", "exec", "yaml.load", "yaml.unsafe_load", "joblib.load", "marshal.loads", "marshal.load", "shelve.open", "pd.read_pickle")


def opens_the_door(text):
    """What in a module's text could run code of a file."""
    found = []
    for name, how in calls(ast.parse(text)):
        if name in FORBIDDEN: found.append(name)
        if name.endswith("torch.load") and how.get("weights_only") is not True: found.append(name)
        if name in ("np.load", "numpy.load") and how.get("allow_pickle"): found.append(name)
    return found


def test_an_open_door_would_be_seen():
    for text in ("pickle.load(f)", "torch.load(p)", "torch.load(p, weights_only=False)", "np.load(p, allow_pickle=True)", "x = eval(s)"): assert opens_the_door(text), text
    for text in ("torch.load(p, weights_only=True)", "np.load(p)", "pickle.dumps(x)", "json.loads(s)", "model.eval()"): assert not opens_the_door(text), text


@pytest.mark.parametrize("module", MODULES, ids=lambda p: p.stem)
def test_no_module_has_a_door_that_stands_open(module): assert opens_the_door(module.read_text()) == []
