"""What the demo's training does, over several seeds: matches on the held-out photograph, untrained, MoCo-v2's loss alone, DenseCL.

    python benchmarks/demo.py --seeds 0 1 2 --lambdas 0 0.5

Prints a table and, as its last line, one JSON object. A run of the table goes on where it was when it is interrupted; finished ones are read
from their folder below --out. Equal steps for each lambda; `seconds` says what they took.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean

from densecl.config import presets
from densecl.trainer import train


def probes(folder):
    """The first and the last probe of a run."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [r for r in rows if r.get("probe") == "match"]
    return rows[0], rows[-1]


def one(seed, loss_lambda, args):
    """A run's figures: seed, lambda, seconds, first and last probe."""
    folder = Path(args.out) / f"lambda-{loss_lambda:g}-seed-{seed}"
    done = folder / "result.json"
    if done.exists():
        return json.loads(done.read_text())
    config = replace(
        presets["demo"],
        seed=seed,
        loss_lambda=loss_lambda,
        out=str(folder),
        threads=args.threads,
        workers=args.workers,
    )
    start = time.perf_counter()
    train(config)
    first, last = probes(folder)
    result = {
        "seed": seed,
        "loss_lambda": loss_lambda,
        "seconds": round(time.perf_counter() - start),
        "first": first,
        "last": last,
    }
    done.write_text(json.dumps(result))
    return result


def row(name, results, when, what):
    """A line of the table: means over the seeds, and the spread of `moved`."""
    values = {k: [r[when][what][k] for r in results] for k in ("exact", "near", "moved")}
    return (
        f"{name:34} "
        + "  ".join(f"{mean(v):.3f}" for v in values.values())
        + f"   {min(values['moved']):.3f} .. {max(values['moved']):.3f}",
        {k: round(mean(v), 4) for k, v in values.items()},
    )


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--lambdas", type=float, nargs="+", default=[0.0, 0.5])
    p.add_argument("--out", default="runs/demo-seeds")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--workers", type=int, default=0)
    args = p.parse_args()
    results = [one(s, lam, args) for s in args.seeds for lam in args.lambdas]
    print(
        f"{'held-out matches, mean of ' + str(len(args.seeds)) + ' seeds':34} exact   near  moved "
        "  moved: least .. greatest"
    )
    table = [
        ("chance", "first", "chance", results),
        ("the same cell", "first", "same_cell", results),
        (
            "untrained, backbone",
            "first",
            "backbone",
            [r for r in results if r["loss_lambda"] == args.lambdas[0]],
        ),
    ]
    for lam in args.lambdas:
        runs = [r for r in results if r["loss_lambda"] == lam]
        table += [
            (f"lambda {lam:g}, backbone", "last", "backbone", runs),
            (f"lambda {lam:g}, dense head", "last", "dense", runs),
        ]
    out = {}
    for name, when, what, runs in table:
        text, out[name] = row(name, runs, when, what)
        print(text)
    print(
        json.dumps(
            dict(
                seeds=args.seeds,
                seconds={
                    f"{lam:g}": [r["seconds"] for r in results if r["loss_lambda"] == lam]
                    for lam in args.lambdas
                },
                **out,
            )
        )
    )


if __name__ == "__main__":
    main()
