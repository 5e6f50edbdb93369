"""Pre-train with several methods and seeds, evaluate the frozen features, store one row per run.

    python benchmarks/reproduce.py methods --seeds 0 1 2 --images images.lmdb --voc VOCdevkit
    python benchmarks/reproduce.py read-out --voc VOCdevkit RUN_FOLDER  # position by stage
    python benchmarks/reproduce.py long --steps 10600 --probe-at 5 10 25 50 100 --seeds 0 1 2 \\
        --images images.lmdb --voc VOCdevkit

A finished run appends one row to benchmarks/results.jsonl: its settings, commit, command, results
and loss curves. A run that has its row is not repeated, and an interrupted run continues from its
checkpoint; so a study can be stopped and started at any time, and several of these commands can
work on it at once, one core each. nbs/guides/results.ipynb shows the rows.

A row holds the scores of single images as well, for the paired bootstrap of
nbs/evaluate/07b_bootstrap.ipynb: `scores`, an npz file in base64.

With --probe-at the training pauses at these percentages of its steps for an evaluation; the row
then has a `curve`: the results at each of them. The pauses change nothing in the training. With
--until 50 as well, a run ends after half of its steps.

The rows in the repository are of 1700 images (1000 of ImageNet, one per class; 600 of VOC 2012; 100
of COCO train2017; in this order, sorted by name in each part), converted by `python -m densecl.data
lmdb images.txt images.lmdb --short-side 192`, and of a VOC subset of 800 images for the probes (600
to fit, 200 to score).
"""

import argparse
import base64
import io
import json
import shlex
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import read_out
import torch
from evaluation import evaluate, image_scores, rounded

from densecl.config import Config
from densecl.data.dataset import open_source
from densecl.evaluate.features import load_network, untrained_like
from densecl.runtime.checkpoint import link_or_copy, load_checkpoint
from densecl.runtime.io import UsageError, atomic_write, lock_folder, run_command

ROOT = Path(__file__).parent.parent
# the demo's network on images of 96 pixels, otherwise with the paper's training: no warm-up of
# lambda, and positives by the features from the first step; fast augmentation, one thread
BASE = (
    "--backbone resnet18-layer3 --image-size 96 --batch-size 32 --hidden 512 --queue-len 1024 "
    "--momentum 0.99 --lr 0.06 --lambda-warmup 0 --geometry-warmup 0 --augment fast --workers 0 "
    "--threads 1"
)
# name, as stored in the rows -> options that differ from DenseCL as published; {40%} of the steps
METHODS = {
    "untrained": None,
    "MoCo-v2": "--method mocov2",
    "DenseCL": "",
    "geometry": "--match geometry",  # the upper bound: correspondences by the views' geometry
    "random": "--match random",
    "dense": "--match dense",
    "verified": "--match verified",
    "centered": "--match centered",
    "mutual": "--match mutual",
    "sinkhorn": "--match sinkhorn",
    "geometry warm-up": "--geometry-warmup {40%}",
    "geometry warm-up 480": "--geometry-warmup 480",  # of 10600 steps: 5 %
    "lambda warm-up": "--lambda-warmup {40%}",
    "intra-image": "--negatives intra-image",
    "position": "--negatives position",
    "K 4096": "--queue-len 4096",
    "T 0.1": "--temperature 0.1",
    "reflect": "--padding reflect",
    "MoCo-v2, reflect": "--method mocov2 --padding reflect",
    "geometry warm-up, intra-image": "--geometry-warmup {40%} --negatives intra-image",
    "reflect, geometry": "--padding reflect --match geometry",
    "reflect, lambda warm-up": "--padding reflect --lambda-warmup {40%}",
    "K 256": "--queue-len 256",
    "lambda 0.1": "--loss-lambda 0.1",
    "lambda 0.3": "--loss-lambda 0.3",
    "lambda 0.7": "--loss-lambda 0.7",
    "lambda 0.9": "--loss-lambda 0.9",
    "grid 1": "--grid 1",
    "grid 3": "--grid 3",
    "random offset": "--random-offset 2",
    "mirrored margin": "--backbone benchmarks.backbones:mirrored_margin",
}
GROUPS = {
    "methods": ["untrained", "MoCo-v2", "DenseCL", "geometry"],
    "tuning": ["lambda warm-up", "K 4096", "T 0.1"],
    "suspects": ["random", "intra-image", "position", "reflect", "dense"],
    "borders": ["MoCo-v2, reflect", "reflect, geometry", "random offset", "mirrored margin"],
    "ahead": ["geometry warm-up", "verified", "mutual", "centered", "sinkhorn"],
    "ablations": ["lambda 0.1", "lambda 0.3", "lambda 0.7", "lambda 0.9", "grid 1", "grid 3"],
    "long": ["MoCo-v2", "DenseCL", "geometry warm-up"],  # for --steps 10600
}
# methods in rows from before they were renamed -> today's names
RENAMED_METHODS = {
    "true": "geometry",
    "handover": "geometry warm-up",
    "centred": "centered",
    "own": "intra-image",
    "warm-up": "lambda warm-up",
    "MoCo-v2 reflect": "MoCo-v2, reflect",
    "reflect true": "reflect, geometry",
}
# options in rows from before they were renamed -> today's options
RENAMED_OPTIONS = {
    # the demo had no geometry warm-up then
    "--lambda-warmup 0 --augment": "--lambda-warmup 0 --geometry-warmup 0 --augment",
    "--match true": "--match geometry",
    "--match agreed": "--match verified",
    "--match centred": "--match centered",
    "--negatives own": "--negatives intra-image",
    "--match-warmup ": "--geometry-warmup ",
    # the first rows were of a backbone that did the same
    "--backbone benchmarks.backbones:random_offset": "--random-offset 2",
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
    length = f"{args.steps}-steps" if args.probe_at else args.epochs
    again = "-again" if args.again else ""
    return f"{method.replace(',', '').replace(' ', '-')}-{length}-{seed}{again}"


def settings(method, seed, args):
    """The options of a run without paths; with the commit they determine the run."""
    if METHODS[method] is None:
        return ""
    options = METHODS[method].replace("{40%}", str(round(0.4 * args.steps)))
    text = f"{BASE} {options} --epochs {args.epochs} --seed {seed}".replace("  ", " ")
    whole = args.steps == args.per_epoch * args.epochs
    return text if whole else f"{text} --max-steps {args.steps}"


def probe_steps(args):
    """Steps after which a run is evaluated, in ascending order; the last one ends the run."""
    percents = {percent for percent in args.probe_at if percent < args.until} | {args.until}
    return sorted(round(args.steps * percent / 100) for percent in percents)


def read_curves(folder):
    """Rows of the losses, and results of the match probe by backbone features, over the steps."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [rounded({key: row[key] for key in CURVES}) for row in rows if "loss" in row]
    matches = [row for row in rows if row.get("probe") == "match"]
    return losses, [{"step": row["step"]} | row["backbone"] for row in matches]


def training_seconds(losses):
    """Seconds of the training steps alone, of all parts of an interrupted run together."""
    steps = [0, *(row["step"] for row in losses)]
    parts = zip(pairwise(steps), losses)
    return round(sum(32 * (end - start) / row["images_per_s"] for (start, end), row in parts))


def run_training(words, log):
    """Run a training in a process of its own; when this one ends, it saves a checkpoint and ends.

    Args:
        words: the arguments of python
        log: path to append its messages to
    """
    with open(log, "a") as f, subprocess.Popen([sys.executable, *words], stderr=f) as process:
        try:
            status = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if status:
        last = Path(log).read_text(errors="replace").splitlines()[-1:]
        raise UsageError(
            f"the training ended with status {status}; {log} ends with: {''.join(last)}"
        )


def train_to(step, method, seed, args):
    """Train a run up to a step, or continue it.

    Args:
        step: number of steps done at the end
        method: name in `METHODS`
        seed: of the run
        args: options of the command
    """
    folder, every = Path(args.out) / run_name(method, seed, args), max(1, args.steps // 20)
    options = f"{settings(method, seed, args)} --data-root {args.images} --out {folder}"
    options += f" --log-every {every} --keep-checkpoints 2"
    if args.probe_at:
        options += f' --save-every {every} --probe "" --max-steps {step}'
    else:
        every = max(1, args.steps // 5)
        options += f" --save-every {every} --probe match --probe-root {args.voc}"
        options += f" --probe-every {every}"
    print(f"{method}, seed {seed}: python -m densecl.train demo {options}", flush=True)
    run_training(["-m", "densecl.train", "demo", *shlex.split(options)], f"{folder}.log")


def load_encoder(path):
    """The query encoder of a checkpoint; its backbone may be a function of benchmarks.backbones."""
    content = load_checkpoint(path)
    if not content["config"]["backbone"].startswith("benchmarks."):
        return load_network(path)[1]
    encoder = untrained_like(Config(**content["config"]))
    tensors = [(k.removeprefix("encoder_q."), v) for k, v in content["model"].items()]
    encoder.load_state_dict({k: v for k, v in tensors if not k.startswith(("encoder_k.", "queue"))})
    return encoder


def load_at(step, method, seed, args):
    """The query encoder of a run after a number of steps, which are trained if need be.

    Args:
        step: number of steps done; 0: before the training
        method: name in `METHODS`
        seed: of the run
        args: options of the command
    """
    folder = Path(args.out) / run_name(method, seed, args)
    if not step:
        folder.mkdir(parents=True, exist_ok=True)
        return untrained_like(Config(backbone="resnet18-layer3", hidden=512, seed=seed))
    checkpoint = folder / f"probe-{step:08d}.pt"
    if not checkpoint.exists():
        train_to(step, method, seed, args)
        if load_checkpoint(folder / "last.pt")["step"] != step:
            raise UsageError(f"{folder}: it is beyond step {step} already; give another --out")
        link_or_copy(folder / "last.pt", checkpoint.name)
    return load_encoder(checkpoint)


def evaluate_at(step, method, seed, args):
    """Results of a run after a number of steps, from its folder if they are there.

    Args: as for `load_at`
    """
    stored = Path(args.out) / run_name(method, seed, args) / f"results-{step:08d}.json"
    if stored.exists():
        return json.loads(stored.read_text())
    figures = rounded(evaluate(load_at(step, method, seed, args), args.voc))
    with atomic_write(stored, "w") as f:
        f.write(json.dumps(figures))
    print(f"{method}, seed {seed}, step {step}: {summary(figures)}", flush=True)
    return figures


def pack(arrays):
    """Arrays by name as an npz file in base64."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return base64.b64encode(buffer.getvalue()).decode()


def summary(figures):
    """The most important results in one line, in percent."""
    match, known = figures["match"]["backbone"], figures["place"]["known"]
    keypoints, miou = figures["keypoints"]["backbone"]["PCK@0.2"], figures["segment"]["backbone"]
    values = {name: match[name] for name in ("exact", "near", "moved")}
    values |= {"keypoints": keypoints, "segmentation": miou["linear"], "cell known": known}
    return ", ".join(f"{name} {100 * value:.1f}" for name, value in values.items())


def train(method, seed, args):
    """Train a run, or continue it, and evaluate it.

    Args:
        method: name in `METHODS`
        seed: of the run
        args: options of the command

    Returns:
        the fields of its row
    """
    folder = Path(args.out) / run_name(method, seed, args)
    steps = probe_steps(args) if args.probe_at else [args.steps]
    curve = [{"step": step, "figures": evaluate_at(step, method, seed, args)} for step in steps]
    losses, matches = read_curves(folder)
    if args.probe_at:
        losses = [loss for loss in losses if loss["step"] <= steps[-1]]
        matches = [{"step": c["step"]} | c["figures"]["match"]["backbone"] for c in curve]
    options = settings(method, seed, args)
    row = {
        "settings": options,
        "command": f"python -m densecl.train demo {options} --data-root IMAGES",
        "steps": args.steps,
        "losses": losses,
        "probes": matches,
        "seconds": training_seconds(losses),
    }
    return row | ({"curve": curve} if args.probe_at else {}) | {"figures": curve[-1]["figures"]}


def run_method(method, seed, args):
    """Train a method with a seed, evaluate it, and append its row.

    Args:
        method: name in `METHODS`
        seed: of the run
        args: options of the command
    """
    row = {"method": method, "seed": seed, "epochs": args.epochs}
    row |= {"commit": commit(), "torch": torch.__version__}
    if args.again:
        row["again"] = True
    if METHODS[method] is None:
        row |= {"settings": "", "command": "untrained_like, this seed", "epochs": 0}
        row["figures"] = evaluate_at(0, method, seed, args)
    else:
        row |= train(method, seed, args)
    last = (probe_steps(args) if args.probe_at else [args.steps])[-1]
    last = last if METHODS[method] is not None else 0
    row["scores"] = pack(image_scores(load_at(last, method, seed, args), args.voc))
    with open(args.results, "a") as f:
        f.write(json.dumps(row) + "\n")


def has_row(method, seed, args):
    """Whether the results contain this run, of any commit, evaluated at the wanted steps."""
    path, trained = Path(args.results), METHODS[method] is not None
    wanted = set(probe_steps(args)) if args.probe_at and trained else set()
    for line in path.read_text().splitlines() if path.exists() else []:
        row = json.loads(line)
        stored, name = row["settings"], RENAMED_METHODS.get(row["method"], row["method"])
        for old, new in RENAMED_OPTIONS.items():
            stored = stored.replace(old, new)
        same = (name, row["seed"], row.get("again", False)) == (method, seed, args.again)
        same = same and stored == settings(method, seed, args)
        if same and wanted <= {point["step"] for point in row.get("curve", [])}:
            return True
    return False


TIME = """\
How long it takes: 1060 steps of 32 images about 9 minutes on a core of its own, 10600 steps about
90. Measured in bf16 on a core with avx512_bf16: 53 steps of DenseCL, 1696 images, in 28 seconds of
CPU time, the start included (60 images per second; MoCo-v2 65). On a core that ten programs shared
it was 12 images per second. An evaluation takes about two minutes of CPU time, so --probe-at 5 10
25 50 100 adds ten minutes to a run. A run folder has 40 MB for each point of its curve.
"""


def build_parser():
    """The options of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=TIME,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    groups, names = ", ".join(GROUPS), "; ".join(METHODS)
    add = parser.add_argument
    text = f"groups of methods: {groups}; or methods, in quotes: {names}"
    add("study", nargs="+", metavar="STUDY", help=text)
    add("--images", required=True, help="images to pre-train on, as for --data-root")
    voc = "VOC tree for the probes; its val images should not be among --images"
    add("--voc", required=True, help=voc)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--epochs", type=int, default=20, help="length of a run; default: 20")
    add("--steps", type=int, default=0, help="length of a run in steps instead; default: --epochs")
    probe_at = "evaluate at these percentages of the steps, too, such as 5 10 25 50 100"
    add("--probe-at", type=float, nargs="+", default=[], metavar="PERCENT", help=probe_at)
    until = "end the runs after this percentage of their steps, in the middle of their schedule"
    add("--until", type=float, default=100, metavar="PERCENT", help=until)
    add("--again", action="store_true", help="repeat runs that have a row, in a second row")
    add("--out", default="runs/reproduce", help="where the run folders are")
    add("--results", default=str(Path(__file__).with_name("results.jsonl")))
    return parser


def check_options(args):
    """The methods; epochs, steps and per_epoch are set in `args`. Raises `UsageError`."""
    methods = [method for name in args.study for method in GROUPS.get(name, [name])]
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise UsageError(f"no study {unknown[0]!r}; there are {'; '.join([*GROUPS, *METHODS])}")
    args.per_epoch = len(open_source(args.images)) // 32
    if not args.per_epoch:
        raise UsageError(f"--images {args.images}: fewer than 32 images, a batch")
    if args.until != 100 and not args.probe_at:
        raise UsageError("--until needs --probe-at, such as --probe-at 5 10 25 50")
    if min(args.epochs, args.steps + 1) < 1:
        raise UsageError("--epochs and --steps must be above 0")
    if args.steps:
        args.epochs = -(-args.steps // args.per_epoch)
    args.steps = args.steps or args.per_epoch * args.epochs
    wrong = [p for p in [*args.probe_at, args.until] if not 0 <= p <= 100]
    if wrong:
        raise UsageError(
            f"--probe-at, --until {wrong[0]:g}: must be between 0 and 100, percent of the steps"
        )
    return methods


def main(argv):
    if argv[:1] == ["read-out"]:
        read_out.main(argv[1:])
        return
    args = build_parser().parse_args(argv)
    torch.set_num_threads(1)
    methods = check_options(args)
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
    # so that the training under way saves a checkpoint before it ends, see `run_training`
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    run_command(main)
