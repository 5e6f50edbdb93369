"""Pre-train with several methods and seeds, evaluate the frozen features, store one row per run.

    python benchmarks/reproduce.py methods --seeds 0 1 2 --images images.lmdb --voc VOCdevkit

A finished run appends one row to benchmarks/results.jsonl: its settings, commit, command, results
and loss curves. A run that has its row is not repeated, and an interrupted run continues from its
checkpoint; so a study can be stopped and started at any time, and several of these commands can
work on it at once, one core each. nbs/guides/results.ipynb shows the rows.

The rows in the repository are of 1700 images (1000 of ImageNet, one per class; 600 of VOC 2012; 100
of COCO train2017), converted by `python -m densecl.data lmdb images.txt images.lmdb --short-side
192`, and of a VOC subset of 800 images for the probes (600 to fit, 200 to score).
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

from densecl.config import Config
from densecl.correspondence import best_match, ground_truth_match
from densecl.data.dataset import open_source
from densecl.evaluate.correspondence import match_scores
from densecl.evaluate.features import encode_images, load_network, untrained_like
from densecl.evaluate.probes import PROBES, probe_options, run_probe
from densecl.runtime.io import UsageError, lock_folder, run_command

ROOT = Path(__file__).parent.parent
# the demo's network on images of 96 pixels, otherwise with the paper's training: no warm-up of
# lambda; fast augmentation, one thread
BASE = (
    "--backbone resnet18-layer3 --image-size 96 --batch-size 32 --hidden 512 --queue-len 1024 "
    "--momentum 0.99 --lr 0.06 --lambda-warmup 0 --augment fast --workers 0 --threads 1"
)
# name, as stored in the rows -> options that differ from DenseCL as published; {40%} of the steps
METHODS = {
    "untrained": None,
    "MoCo-v2": "--method mocov2",
    "DenseCL": "",
    "true": "--match geometry",  # the upper bound: correspondences by the views' geometry
    "random": "--match random",
    "dense": "--match dense",
    "agreed": "--match verified",
    "centred": "--match centered",
    "mutual": "--match mutual",
    "sinkhorn": "--match sinkhorn",
    "handover": "--geometry-warmup {40%}",
    "warm-up": "--lambda-warmup {40%}",
    "own": "--negatives intra-image",
    "position": "--negatives position",
    "K 4096": "--queue-len 4096",
    "T 0.1": "--temperature 0.1",
    "reflect": "--padding reflect",
    "MoCo-v2 reflect": "--method mocov2 --padding reflect",
    "handover own": "--geometry-warmup {40%} --negatives intra-image",
    "reflect true": "--padding reflect --match geometry",
    "reflect warm-up": "--padding reflect --lambda-warmup {40%}",
    "K 256": "--queue-len 256",
    "lambda 0.1": "--loss-lambda 0.1",
    "lambda 0.3": "--loss-lambda 0.3",
    "lambda 0.7": "--loss-lambda 0.7",
    "lambda 0.9": "--loss-lambda 0.9",
    "grid 1": "--grid 1",
    "grid 3": "--grid 3",
}
GROUPS = {
    "methods": ["untrained", "MoCo-v2", "DenseCL", "true"],
    "tuning": ["warm-up", "K 4096", "T 0.1"],
    "suspects": ["random", "own", "position", "reflect", "dense"],
    "ahead": ["handover", "agreed", "mutual", "centred", "sinkhorn"],
    "ablations": ["lambda 0.1", "lambda 0.3", "lambda 0.7", "lambda 0.9", "grid 1", "grid 3"],
}
# options in rows from before they were renamed -> today's options
RENAMED_OPTIONS = {
    "--match true": "--match geometry",
    "--match agreed": "--match verified",
    "--match centred": "--match centered",
    "--negatives own": "--negatives intra-image",
    "--match-warmup ": "--geometry-warmup ",
}
# fields of metrics.jsonl that are stored in a row
CURVES = shlex.split("step loss_global loss_dense match_acc alike alike_backbone neg images_per_s")


def git(*words):
    """What a git command prints."""
    command = ["git", *words]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return result.stdout.strip()


def commit():
    """The current commit, with a + when files of the package differ from it."""
    changed = git("status", "--porcelain", "--", "densecl")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def run_name(method, seed, args):
    """Name of a run's folder."""
    again = "-again" if args.again else ""
    return f"{method.replace(' ', '-')}-{args.epochs}-{seed}{again}"


def settings(method, seed, args):
    """The options of a run without paths; with the commit they determine the run."""
    if METHODS[method] is None:
        return ""
    options = METHODS[method].replace("{40%}", str(round(0.4 * args.steps)))
    return f"{BASE} {options} --epochs {args.epochs} --seed {seed}".replace("  ", " ")


def position_leakage(encoder, batch):
    """How much of the matches is position information leaked by zero padding.

    A cell's mean feature over one half of the views is compared with the features of the other
    half, as in nbs/guides/ablations.ipynb.

    Args:
        encoder: the network
        batch: pairs of views
    """
    f_q, f_k = (encode_images(encoder, batch[view])[0] for view in ("im_q", "im_k"))
    h, w = f_q.shape[2:]
    half, cells = len(f_q) // 2, torch.arange(h * w)
    mean, q, k = f_q[:half].mean(0), f_q[half:], f_k[half:]
    truth = ground_truth_match(batch["affine_q"], batch["affine_k"], h, w)[half:]
    # the cell whose mean is nearest to each feature
    nearest = torch.cdist(q.flatten(2).mT, mean.flatten(1).T[None]).argmin(2)
    return {
        "known": float((nearest == cells).float().mean()),
        "stays": float((best_match(q, k) == cells).float().mean()),
        "should": float((truth == cells).sum() / (truth >= 0).sum()),
        "whole": match_scores(best_match(q, k), truth, w),
        "without": match_scores(best_match(q - mean, k - mean), truth, w),
    }


def evaluate(encoder, voc):
    """All probes of a row: of the backbone, of the dense head for matches, and of baselines.

    Args:
        encoder: the network; changed in place
        voc: a VOC tree
    """
    encoder.grid = None  # every network is evaluated on its native grid
    options = probe_options("match", data_root=voc, image_size=96, limit=512)
    batch = PROBES["match"].open(options)
    match = PROBES["match"].run(encoder, batch, options)
    encoder.dense_head = None  # the other probes are of the backbone only
    results = {
        "match": match,
        "place": position_leakage(encoder, batch),
        "stereo": run_probe(encoder, "stereo", "", 96),
        "keypoints": run_probe(encoder, "keypoints", voc, 96),
    }
    options = probe_options("segment", data_root=voc, trials=1)
    segment = PROBES["segment"]
    results["segment"] = segment.run(encoder, segment.open(options), options)
    results["rank"] = run_probe(encoder, "rank", voc, 96)
    return results


def read_curves(folder):
    """Rows of the losses, and results of the match probe by backbone features, over the steps."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [rounded({key: row[key] for key in CURVES}) for row in rows if "loss" in row]
    matches = [row for row in rows if row.get("probe") == "match"]
    return losses, [{"step": row["step"]} | row["backbone"] for row in matches]


def rounded(value):
    """A number, or the numbers in nested dicts, with four decimals."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def train(method, seed, args):
    """Train a run in a process of its own, or continue it.

    Args:
        method: name in `METHODS`
        seed: of the run
        args: options of the command

    Returns:
        its query encoder, and the fields of its row
    """
    start, folder = time.perf_counter(), Path(args.out) / run_name(method, seed, args)
    options, every = settings(method, seed, args), args.steps // 5
    command = f"-m densecl.train demo {options} --data-root {args.images} --out {folder}"
    probes = (
        f"--probe match --probe-root {args.voc} --probe-every {every} "
        f"--log-every {args.steps // 20} --save-every {every} --keep-checkpoints 2"
    )
    print(f"{method}, seed {seed}: python {command} {probes}", flush=True)
    with open(f"{folder}.log", "a") as log:
        words = [sys.executable, *shlex.split(f"{command} {probes}")]
        subprocess.run(words, check=True, stderr=log)
    _, encoder = load_network(str(folder / "last.pt"))
    losses, matches = read_curves(folder)
    return encoder, {
        "settings": options,
        "command": f"python -m densecl.train demo {options} --data-root IMAGES",
        "losses": losses,
        "probes": matches,
        "seconds": round(time.perf_counter() - start),
    }


def run_method(method, seed, args):
    """Train a method with a seed, evaluate it, and append its row.

    Args:
        method: name in `METHODS`
        seed: of the run
        args: options of the command
    """
    row = {"method": method, "seed": seed, "epochs": args.epochs}
    row |= {"commit": commit(), "torch": torch.__version__}
    if METHODS[method] is None:
        config = Config(backbone="resnet18-layer3", hidden=512, seed=seed)
        encoder = untrained_like(config)
        row |= {"settings": "", "command": "untrained_like, this seed", "epochs": 0}
    else:
        encoder, fields = train(method, seed, args)
        row |= fields
    if args.again:
        row["again"] = True
    row["figures"] = results = rounded(evaluate(encoder, args.voc))
    with open(args.results, "a") as f:
        f.write(json.dumps(row) + "\n")
    shown = {name: results[name]["backbone"] for name in ("match", "segment", "keypoints")}
    print(f"{method}, seed {seed}: {shown}", flush=True)


def has_row(method, seed, args):
    """Whether the results contain this run, of any commit."""
    path = Path(args.results)
    wanted = settings(method, seed, args)
    for line in path.read_text().splitlines() if path.exists() else []:
        row = json.loads(line)
        stored = row["settings"]
        for old, new in RENAMED_OPTIONS.items():
            stored = stored.replace(old, new)
        same = (row["method"], row["seed"], row.get("again", False)) == (method, seed, args.again)
        if same and stored == wanted:
            return True
    return False


def build_parser():
    """The options of the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ", ".join([*GROUPS, *METHODS])
    add = parser.add_argument
    add("study", nargs="+", metavar="STUDY", help=f"methods or groups of them: {names}")
    add("--images", required=True, help="images to pre-train on, as for --data-root")
    voc = "VOC tree for the probes; its val images should not be among --images"
    add("--voc", required=True, help=voc)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--epochs", type=int, default=20)
    add("--again", action="store_true", help="repeat runs that have a row, in a second row")
    add("--out", default="runs/reproduce", help="where the run folders are")
    add("--results", default=str(Path(__file__).with_name("results.jsonl")))
    return parser


def main(argv):
    args = build_parser().parse_args(argv)
    torch.set_num_threads(1)
    methods = [method for name in args.study for method in GROUPS.get(name, [name])]
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise UsageError(f"no study {unknown[0]!r}; there are {', '.join([*GROUPS, *METHODS])}")
    args.steps = len(open_source(args.images)) // 32 * args.epochs
    for seed in args.seeds:
        for method in methods:
            lock = Path(args.out) / "turns" / run_name(method, seed, args)
            lock.mkdir(parents=True, exist_ok=True)
            try:
                with lock_folder(lock):
                    if not has_row(method, seed, args):
                        run_method(method, seed, args)
            except UsageError as e:
                if "another run" not in str(e):
                    raise
                print(f"{method}, seed {seed}: another process works on it", flush=True)


if __name__ == "__main__":
    run_command(main)
