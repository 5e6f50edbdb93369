"""Train the demo with several settings and seeds: matches on the photograph that was held out.

    python benchmarks/demo.py --seeds 0 1 2                     # all settings
    python benchmarks/demo.py "MoCo-v2 (lambda 0)" --seeds 0    # one of them

A finished run appends one row to benchmarks/demo.jsonl: its options, commit, seconds, and the
match probe before and after training. A run that has its row is not repeated, and an interrupted
run continues from its checkpoint. The last lines are the table: means over the seeds, and the
least and the greatest value.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

from reproduce import commit, rounded

from densecl.runtime.io import UsageError, run_command

# name -> options that differ from the preset, which trains for 1200 steps
PUBLISHED = "--lambda-warmup 0 --geometry-warmup 0"
WARM = "--lambda-warmup 0 --geometry-warmup 480"  # of the cheap choices
SETTINGS = {
    "MoCo-v2 (lambda 0)": "--loss-lambda 0 --geometry-warmup 0",
    "DenseCL, as published": PUBLISHED,
    "DenseCL, lambda warm-up": "--lambda-warmup 400 --geometry-warmup 0",
    "DenseCL, geometry warm-up 25 %": "--lambda-warmup 0 --geometry-warmup 300",
    "DenseCL, geometry warm-up 40 %": WARM,
    "DenseCL, geometry warm-up 60 %": "--lambda-warmup 0 --geometry-warmup 720",
    "DenseCL, positives by geometry": f"{PUBLISHED} --match geometry",
    "40 %, queue 1024": f"{WARM} --queue-len 1024",
    "40 %, temperature 0.1": f"{WARM} --temperature 0.1",
    "40 %, crops of 40 to 100 %": f"{WARM} --crop-scale 0.4 1.0",
    "40 %, learning rate 0.12": f"{WARM} --lr 0.12",
}
COLUMNS = {"exact": "exact", "near": "within one cell", "moved": "moved points"}


def probe_rows(folder):
    """The first and the last row of a run's match probe."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row.get("probe") == "match"]
    return rows[0], rows[-1]


def run(name, seed, args):
    """Train with a setting and a seed, or continue; its row.

    Args:
        name: of the setting
        seed: of the run
        args: options of the command
    """
    folder = Path(args.out) / f"{name.replace(',', '').replace(' ', '-')}-{seed}"
    options = f"{SETTINGS[name]} {args.options} --seed {seed}".replace("  ", " ")
    command = f"-m densecl.train demo {options} --out {folder}"
    print(f"{name}, seed {seed}: python {command}", flush=True)
    start = time.perf_counter()
    speed = ["--threads", str(args.threads), "--workers", str(args.workers)]
    subprocess.run([sys.executable, *shlex.split(command), *speed], check=True)
    first, last = probe_rows(folder)
    row = {"setting": name, "seed": seed, "options": options, "commit": commit()}
    row |= {"seconds": round(time.perf_counter() - start)}
    row |= {"amp": json.loads((folder / "config.json").read_text())["amp"]}
    return row | {"untrained": rounded(first), "trained": rounded(last)}


def stored_rows(path):
    """The rows of earlier runs."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(rows):
    """Lines of the table: mean over the seeds, least and greatest value, per setting.

    Args:
        rows: of the runs
    """
    title = "backbone features, held-out photograph"
    yield f"{title:40}" + "".join(f"{text:>28}" for text in COLUMNS.values())
    groups = {"untrained": [row["untrained"] for row in rows]}
    for row in rows:
        groups.setdefault(row["setting"], []).append(row["trained"])
    for name, probes in groups.items():
        line = f"{name} ({len(probes)} runs)"
        cells = [[probe["backbone"][key] for probe in probes] for key in COLUMNS]
        yield f"{line:40}" + "".join(
            f"{f'{mean(v):.3f} ({min(v):.3f} to {max(v):.3f})':>28}" for v in cells
        )


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = "; ".join(SETTINGS)
    parser.add_argument("settings", nargs="*", metavar="SETTING", help=f"all, or some of: {names}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--options", default="", help="more options of densecl train, in quotes")
    parser.add_argument("--out", default="runs/demo-settings", help="where the run folders are")
    parser.add_argument("--results", default=str(Path(__file__).with_name("demo.jsonl")))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args(argv)
    unknown = [name for name in args.settings if name not in SETTINGS]
    if unknown:
        raise UsageError(f"no setting {unknown[0]!r}; there are {names}")
    results, wanted = Path(args.results), args.settings or list(SETTINGS)
    for seed in args.seeds:
        for name in wanted:
            rows = stored_rows(results)
            if any((row["setting"], row["seed"]) == (name, seed) for row in rows):
                continue
            row = run(name, seed, args)
            with results.open("a") as f:
                f.write(json.dumps(row) + "\n")
    rows = stored_rows(results)
    print(*table([r for r in rows if r["setting"] in wanted and r["seed"] in args.seeds]), sep="\n")


if __name__ == "__main__":
    run_command(main)
