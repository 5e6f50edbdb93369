"""Where the position code is: R2 of a linear read-out of a cell's position after each stage.

    python benchmarks/reproduce.py read-out --voc VOCdevkit [RUN_FOLDER | WEIGHTS ...]

Untrained networks with three kinds of padding, and the given networks: weight files, or run
folders, of which each checkpoint is read that --probe-at has left. The figure of
nbs/guides/position_leakage.ipynb is from benchmarks/position.jsonl, one row per network.
"""

import argparse
import json
from pathlib import Path

import torch
from evaluation import position_read_out, rounded

from densecl.config import Config
from densecl.evaluate.features import display_name, format_table, load_network, untrained_like
from densecl.runtime.io import UsageError, atomic_write

PADDINGS = ("zeros", "reflect", "replicate")


def checkpoints(path):
    """The networks of a path by name: a file is one, a run folder has one per checkpoint.

    Args:
        path: of a weight file or a run folder
    """
    path = Path(path)
    if not path.is_dir():
        return {display_name(path): path}
    files = sorted(path.glob("probe-*.pt")) or sorted(path.glob("last.pt"))
    if not files:
        raise UsageError(f"{path}: neither last.pt nor probe-*.pt; give a run folder or a file")
    return {f"{path.name}, {file.stem}": file for file in files}


def networks(args):
    """Pairs of the name and seed of a network, and the network."""
    files = {name: file for path in args.paths for name, file in checkpoints(path).items()}
    for padding in PADDINGS:
        for seed in args.seeds:
            config = Config(backbone=args.backbone, hidden=512, padding=padding, seed=seed)
            yield {"network": f"untrained, {padding}", "seed": seed}, untrained_like(config)
    for name, file in files.items():
        config, encoder = load_network(file)
        yield {"network": name, "seed": config.seed}, encoder


def main(argv):
    parser = argparse.ArgumentParser(
        prog="reproduce.py read-out",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="*", metavar="PATH", help="run folders or weight files")
    parser.add_argument("--voc", required=True, help="VOC tree, of which the val images are used")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="untrained networks"
    )
    parser.add_argument("--backbone", default="resnet18-layer3", help="of the untrained networks")
    parser.add_argument("--results", help="a file for the rows, such as benchmarks/position.jsonl")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    for row, encoder in networks(args):
        rows.append(row | {"r2": rounded(position_read_out(encoder, args.voc))})
        print(json.dumps(rows[-1]), flush=True)
    print(format_table({f"{row['network']}, seed {row['seed']}": row["r2"] for row in rows}))
    if args.results:
        with atomic_write(args.results, "w") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
