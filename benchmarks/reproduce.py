"""The paper's claim at a scale that one machine carries: pre-train with several methods and seeds, ask the frozen features, keep each run's row.

    python benchmarks/reproduce.py methods --seeds 0 1 2 --pictures pictures.lmdb --voc VOCdevkit

A finished run appends one row to benchmarks/results.jsonl: settings, commit, command, figures, and how they came about. What has its row
is not run again, and a run that was interrupted goes on from its checkpoint; so a study can be stopped and started at will, and several
of these commands may work at it side by side, one core each. 33_results draws what rows there are.

The rows that come with the repository are of 1700 pictures (1000 of ImageNet, one a class; 600 of VOC 2012, 100 of COCO train2017), made into one file by
`python -m densecl.data lmdb pictures.txt pictures.lmdb --short-side 192`, and of a VOC subset of 800 (600 to fit the probes on, 200 to score).
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
from densecl.evaluate.correspondence import match_scores
from densecl.evaluate.features import encode_images, load_network, untrained_like
from densecl.evaluate.probes import PROBES, probe_options, run_probe
from densecl.runtime.io import UsageError, lock_folder, run_command

# the demo's network and pictures of 96 pixels, trained as the paper does it otherwise: no warm-up of lambda, fast views, one thread
BASE = "--backbone resnet18-layer3 --image-size 96 --batch-size 32 --hidden 512 --queue-len 1024 --momentum 0.99 --lr 0.06 --lambda-warmup 0 --augment fast --workers 0 --threads 1"

METHODS = {  # name -> what differs from DenseCL as published
    "untrained": None,
    "MoCo-v2": "--method mocov2",
    "DenseCL": "",
    "true": "--match geometry",  # the upper line: pairs by the views' geometry
    "random": "--match random",
    "dense": "--match dense",
    "agreed": "--match verified",
    "centred": "--match centered",  # less what a cell says of every picture
    "mutual": "--match mutual",
    "handover": "--geometry-warmup {40%}",  # true pairs for 40 % of the steps, then the paper's
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
    "ahead": ["handover", "agreed", "mutual", "centred"],
    "ablations": ["lambda 0.1", "lambda 0.3", "lambda 0.7", "lambda 0.9", "grid 1", "grid 3"],
}


def commit():
    """The commit that the code stands at, with a + when files of the package differ from it."""
    git = lambda *words: subprocess.run(
        ["git", *words], cwd=Path(__file__).parent.parent, capture_output=True, text=True
    ).stdout.strip()
    return git("rev-parse", "--short", "HEAD") + "+" * bool(
        git("status", "--porcelain", "--", "densecl")
    )


def settings(method, seed, args):
    """The options of a run, without paths: they and the commit make it again."""
    own = METHODS[method].replace("{40%}", str(round(0.4 * args.steps)))
    return f"{BASE} {own} --epochs {args.epochs} --seed {seed}".replace("  ", " ")


def place(encoder, batch):
    "What of the matches is the place that padding tells (32_choices): a cell's average over one half of the views, asked of the other half."
    f_q, f_k = (encode_images(encoder, batch[v])[0] for v in ("im_q", "im_k"))  # V x C x h x w
    half, (h, w) = len(f_q) // 2, f_q.shape[2:]
    mean, q, k, cells = f_q[:half].mean(0), f_q[half:], f_k[half:], torch.arange(h * w)
    truth = ground_truth_match(batch["affine_q"], batch["affine_k"], h, w)[half:]
    near = torch.cdist(q.flatten(2).mT, mean.flatten(1).T[None]).argmin(
        2
    )  # the average that a vector is nearest to
    share = lambda yes: float(yes.float().mean())
    return {
        "known": share(near == cells),
        "stays": share(best_match(q, k) == cells),
        "should": float((truth == cells).sum() / (truth >= 0).sum()),
        "whole": match_scores(best_match(q, k), truth, w),
        "without": match_scores(best_match(q - mean, k - mean), truth, w),
    }


def figures(encoder, args):
    """What the frozen features know: backbone (and dense head, for matches), and what guesses reach."""
    encoder.grid = None  # all are asked on the native grid
    batch = PROBES["match"].read(
        o := probe_options("match", data_root=args.voc, image_size=96, limit=512)
    )
    match = PROBES["match"].ask(encoder, batch, o)
    encoder.dense_head = None  # the rest is asked of the backbone alone
    out = {
        "match": match,
        "place": place(encoder, batch),
        "stereo": run_probe(encoder, "stereo", "", 96),
        "keypoints": run_probe(encoder, "keypoints", args.voc, 96),
    }
    o = probe_options("segment", data_root=args.voc, trials=1)
    return out | {
        "segment": PROBES["segment"].ask(encoder, PROBES["segment"].read(o), o),
        "rank": run_probe(encoder, "rank", args.voc, 96),
    }


def curve(folder):
    """How the run came there: (rows of the losses and of how alike positions are, probes of the matches by backbone features)."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keep = (
        "step",
        "loss_global",
        "loss_dense",
        "match_acc",
        "alike",
        "alike_backbone",
        "neg",
        "images_per_s",
    )
    short = lambda r: {k: round(r[k], 4) if isinstance(r[k], float) else r[k] for k in keep}
    return [short(r) for r in rows if "loss" in r], [
        dict(step=r["step"], **r["backbone"]) for r in rows if r.get("probe") == "match"
    ]


def rounded(x):
    """The same with four digits behind the point."""
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    return round(x, 4) if isinstance(x, float) else x


def one(method, seed, args):
    """Train, ask, append the row."""
    folder, start = (
        Path(args.out) / f"{method.replace(' ', '-')}-{args.epochs}-{seed}{'-again' * args.again}",
        time.perf_counter(),
    )
    row = {
        "method": method,
        "seed": seed,
        "epochs": args.epochs,
        "commit": commit(),
        "torch": torch.__version__,
    }
    if METHODS[method] is None:
        encoder = untrained_like(
            Config(
                backbone="resnet18-layer3",
                hidden=512,
                dim=128,
                grid=0,
                method="densecl",
                seed=seed,
            )
        )
        row |= {"settings": "", "command": "densecl.features.fresh, this seed", "epochs": 0}
    else:
        command = f"-m densecl.train demo {settings(method, seed, args)} --data-root {args.pictures} --out {folder}"
        probes = f"--probe match --probe-root {args.voc} --probe-every {args.steps // 5} --log-every {args.steps // 20} --save-every {args.steps // 5} --keep 2"
        print(f"{method}, seed {seed}: python {command} {probes}", flush=True)
        with open(f"{folder}.log", "a") as log:
            subprocess.run(
                [sys.executable, *shlex.split(f"{command} {probes}")], check=True, stderr=log
            )
        encoder = load_network(str(folder / "last.pt"))[1]
        row |= {
            "settings": settings(method, seed, args),
            "command": f"python -m densecl.train demo {settings(method, seed, args)} --data-root PICTURES",
        }
        row["losses"], row["probes"] = curve(folder)
        row["seconds"] = round(time.perf_counter() - start)
    if args.again:
        row["again"] = True
    row["figures"] = rounded(figures(encoder, args))
    with open(args.results, "a") as f:
        f.write(json.dumps(row) + "\n")
    f = row["figures"]
    print(
        f"{method}, seed {seed}: matches {f['match']['backbone']}, mIoU {f['segment']['backbone']}, keypoints {f['keypoints']['backbone']}",
        flush=True,
    )


# options that rows from before they were renamed contain, and their names of today
RENAMED = {
    "--match true": "--match geometry",
    "--match agreed": "--match verified",
    "--match centred": "--match centered",
    "--negatives own": "--negatives intra-image",
    "--keep ": "--keep-checkpoints ",
    "--match-warmup ": "--geometry-warmup ",
}


def renamed(text):
    """The settings of a row under today's names."""
    for old, new in RENAMED.items():
        text = text.replace(old, new)
    return text


def has_row(method, seed, args):
    """Whether the results file holds this run, whatever the commit."""
    path = Path(args.results)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    wanted = "" if METHODS[method] is None else settings(method, seed, args)
    return any(
        r["method"] == method
        and r["seed"] == seed
        and renamed(r["settings"]) == wanted
        and r.get("again", False) == args.again
        for r in rows
    )


def main(argv):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument(
        "study",
        nargs="+",
        metavar="STUDY",
        help=f"methods or groups of them: {', '.join([*GROUPS, *METHODS])}",
    )
    p.add_argument(
        "--pictures", required=True, help="what to pre-train on: anything that --data-root takes"
    )
    p.add_argument(
        "--voc",
        required=True,
        help="a VOC tree for the probes; its val pictures should not be among --pictures",
    )
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--epochs", type=int, default=20)
    p.add_argument(
        "--again",
        action="store_true",
        help="run what has its row once more, into a second row that says so",
    )
    p.add_argument("--out", default="runs/reproduce", help="where the runs' folders lie")
    p.add_argument("--results", default=str(Path(__file__).with_name("results.jsonl")))
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    wanted = [m for name in args.study for m in GROUPS.get(name, [name])]
    strange = [m for m in wanted if m not in METHODS]
    if strange:
        raise UsageError(f"no study {strange[0]!r}; there are {', '.join([*GROUPS, *METHODS])}")
    from densecl.data.dataset import open_source

    args.steps = len(open_source(args.pictures)) // 32 * args.epochs
    for seed in args.seeds:
        for method in wanted:
            turn = (
                Path(args.out)
                / "turns"
                / f"{method.replace(' ', '-')}-{args.epochs}-{seed}{'-again' * args.again}"
            )
            turn.mkdir(parents=True, exist_ok=True)
            try:
                with lock_folder(turn):
                    if not has_row(method, seed, args):
                        one(method, seed, args)
            except UsageError as e:
                if "another run" not in str(e):
                    raise
                print(f"{method}, seed {seed}: another process is at it", flush=True)


if __name__ == "__main__":
    run_command(main)
