"""Matches on the held-out photograph after the demo's training, over several seeds and lambdas.

    python benchmarks/demo.py --seeds 0 1 2 --lambdas 0 0.5

Compares the untrained network, MoCo-v2's loss alone (lambda 0) and DenseCL (lambda 0.5) after the
same number of steps. Prints a table and, as its last line, one JSON object. An interrupted run is
continued; the results of finished runs are read from their folders below --out.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean

from densecl.config import presets
from densecl.trainer import train


def first_and_last_probe(folder):
    """The first and the last row of a run's match probe."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row.get("probe") == "match"]
    return rows[0], rows[-1]


def run(seed, loss_lambda, args):
    """The results of a run: seed, loss_lambda, seconds, first and last probe.

    Args:
        seed: of the run
        loss_lambda: weight of the dense loss
        args: options of the command
    """
    folder = Path(args.out) / f"lambda-{loss_lambda:g}-seed-{seed}"
    path = folder / "result.json"
    if path.exists():
        return json.loads(path.read_text())
    config = replace(presets["demo"], seed=seed, loss_lambda=loss_lambda, out=str(folder))
    config = replace(config, threads=args.threads, workers=args.workers)
    start = time.perf_counter()
    train(config)
    seconds = round(time.perf_counter() - start)
    first, last = first_and_last_probe(folder)
    result = {"seed": seed, "loss_lambda": loss_lambda, "seconds": seconds}
    result |= {"first": first, "last": last}
    path.write_text(json.dumps(result))
    return result


def table_row(name, results, when, part):
    """A line of the table, and its means by column.

    Args:
        name: of the row
        results: of the runs, one per seed
        when: "first" or "last" probe
        part: backbone, dense, same_cell or chance
    """
    values = {key: [r[when][part][key] for r in results] for key in ("exact", "near", "moved")}
    means = "  ".join(f"{mean(v):.3f}" for v in values.values())
    least, greatest = min(values["moved"]), max(values["moved"])
    line = f"{name:34} {means}   {least:.3f} .. {greatest:.3f}"
    return line, {key: round(mean(v), 4) for key, v in values.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lambdas", type=float, nargs="+", default=[0.0, 0.5])
    parser.add_argument("--out", default="runs/demo-seeds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()
    results = [run(seed, lam, args) for seed in args.seeds for lam in args.lambdas]
    by_lambda = {lam: [r for r in results if r["loss_lambda"] == lam] for lam in args.lambdas}
    rows = [
        ("chance", results, "first", "chance"),
        ("the same cell", results, "first", "same_cell"),
        ("untrained, backbone", by_lambda[args.lambdas[0]], "first", "backbone"),
    ]
    for lam, runs in by_lambda.items():
        rows.append((f"lambda {lam:g}, backbone", runs, "last", "backbone"))
        rows.append((f"lambda {lam:g}, dense head", runs, "last", "dense"))
    title = f"held-out matches, mean of {len(args.seeds)} seeds"
    print(f"{title:34} exact   near  moved   moved: least .. greatest")
    seconds = {f"{lam:g}": [r["seconds"] for r in runs] for lam, runs in by_lambda.items()}
    summary = {"seeds": args.seeds, "seconds": seconds}
    for row in rows:
        line, summary[row[0]] = table_row(*row)
        print(line)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
