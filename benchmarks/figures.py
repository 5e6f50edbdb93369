"""Draw the matches of one pair of views by several runs, during training and at its end.

    python -m densecl.train demo --keep-checkpoints 10 --out runs/demo-densecl
    python -m densecl.train demo --method mocov2 --keep-checkpoints 10 --out runs/demo-mocov2
    python benchmarks/figures.py runs/demo-densecl runs/demo-mocov2

The views are those of densecl.evaluate.before_after: two crops of the photograph that no preset
trains on. Two figures are written to nbs/images and shown in nbs/guides/gallery.ipynb:
matches_during_training.jpg has one column per run and one row per step, maps_by_method.jpg one row
of similarity maps per run. The numbers in them are written to benchmarks/figures.jsonl.
"""

import argparse
import json
from pathlib import Path

from evaluation import rounded

from densecl.augment import denormalize
from densecl.correspondence import (
    cell_centers,
    cell_distance_squared,
    ground_truth_match,
    similarity,
)
from densecl.evaluate.before_after import (
    QUERY_COLORS,
    mutual_matches,
    wide_size,
    wide_views,
)
from densecl.evaluate.correspondence import match_scores, moved_positions
from densecl.evaluate.features import (
    encode_images,
    evenly_spaced,
    format_table,
    load_network,
    untrained_like,
)
from densecl.run_files import read_run_config
from densecl.runtime.io import UsageError, atomic_write, run_command
from densecl.visualize import plotting

METHODS = {"densecl": "DenseCL", "mocov2": "MoCo-v2"}
JPEG = {"quality": 70}
LINES = 45  # matches drawn per panel


def run_title(config):
    """Name of a run in the figures.

    Args:
        config: of the run
    """
    warm = config.method == "densecl" and config.geometry_warmup
    return METHODS[config.method] + (" with geometry warm-up" if warm else "")


def load_at(folder, config, step):
    """The query encoder of a run after a number of steps; raises `UsageError` without a checkpoint.

    Args:
        folder: of the run
        config: of the run
        step: number of steps done; 0: before the training
    """
    if not step:
        return untrained_like(config)
    path = Path(folder) / f"step-{step:08d}.pt"
    if not path.exists():
        raise UsageError(f"{path}: no such checkpoint; train with --keep-checkpoints 10")
    return load_network(path)[1]


def query_positions(truth, columns):
    """Positions whose maps are drawn: evenly spaced among those that moved, one per color.

    Args:
        truth: hw int64, the ground truth
        columns: w of the grid
    """
    moved = moved_positions(truth[None], columns)[0].nonzero()[:, 0]
    count = len(QUERY_COLORS)
    return moved[[(2 * i + 1) * len(moved) // (2 * count) for i in range(count)]]


class PairOfViews:
    """Two views of the held-out photograph, and what an encoder finds in them.

    Args:
        image_size: side of a view in the training, in pixels
    """

    def __init__(self, image_size):
        self.views = wide_views(wide_size(image_size))
        self.images = [denormalize(self.views[key][0]) for key in ("im_q", "im_k")]

    def encode(self, encoder):
        """The cosines of all cells of both views, hw x hw, the ground truth, hw, and the side w."""
        f_q, f_k = (encode_images(encoder, self.views[key])[0] for key in ("im_q", "im_k"))
        h, w = f_q.shape[2:]
        truth = ground_truth_match(self.views["affine_q"], self.views["affine_k"], h, w)[0]
        return similarity(f_q, f_k)[0], truth, w

    def scores(self, encoder):
        """Numbers of mutual matches of moved positions and of correct ones, and the accuracy.

        Of the positions of `draw_maps`: the errors of their matches in cells, and the numbers of
        cells whose cosine is within 0.05 of the best one.
        """
        sim, truth, w = self.encode(encoder)
        correct = mutual_matches(sim, truth, w)[2]
        scores = match_scores(sim.argmax(1)[None], truth[None], w)
        scores |= {"mutual": len(correct), "correct": int(correct.sum())}
        queries = query_positions(truth, w)
        cosines = sim[queries]
        squared = cell_distance_squared(cosines.argmax(1), truth[queries], w)
        near_best = (cosines > cosines.max(1, keepdim=True)[0] - 0.05).sum(1)
        errors = [round(error, 1) for error in squared.sqrt().tolist()]
        return scores | {"errors": errors, "near_best": near_best.tolist()}

    def draw_matches(self, ax, encoder, name):
        """Draw evenly spaced mutual matches, with their numbers in the title."""
        sim, truth, w = self.encode(encoder)
        found, match, correct = mutual_matches(sim, truth, w)
        ax.set_title(f"{name}: {int(correct.sum())} of {len(correct)} correct", fontsize=10)
        shown = evenly_spaced(len(found), LINES)
        centers = cell_centers(len(truth) // w, w)
        points = centers[found[shown]], centers[match[shown]]
        plotting.draw_matches(ax, *self.images, *points, correct[shown])

    def draw_maps(self, row, encoder, name):
        """Draw view A with four positions and the similarity map of each; the last map."""
        sim, truth, w = self.encode(encoder)
        centers = cell_centers(len(truth) // w, w)
        row[0].imshow(self.images[0])
        row[0].set_title(name, fontsize=10)
        for ax, query, color in zip(row[1:], query_positions(truth, w), QUERY_COLORS):
            x, y = plotting.to_pixel_coordinates(centers[query], self.images[0])[0]
            row[0].plot(x, y, "o", mfc=color, mec="white", ms=8, mew=1.5)
            cosines = sim[query].view(-1, w).numpy()
            overlay = plotting.draw_similarity(ax, self.images[1], cosines, centers[truth[query]])
            for spine in ax.spines.values():
                spine.set(color=color, lw=3)
            ax.set(xticks=[], yticks=[], frame_on=True)
            ax.set_axis_on()
        return overlay


def training_figure(pair, runs, steps):
    """Matches by each run at each step: one column per run, one row per step.

    Args:
        pair: the views
        runs: (folder, config) of each run
        steps: numbers of steps done
    """
    fig, axes = plotting.panels(len(steps) * len(runs), len(runs), 1.95, aspect=2.05)
    for i, step in enumerate(steps):
        for ax, (folder, config) in zip(axes[i * len(runs) :], runs):
            title = f"step {step}" if i else f"{run_title(config)}\nstep {step}"
            pair.draw_matches(ax, load_at(folder, config, step), title)
    return fig


def maps_figure(pair, networks):
    """Similarity maps of four positions, one row per network.

    Args:
        pair: the views
        networks: name -> encoder
    """
    columns = len(QUERY_COLORS) + 1
    fig, axes = plotting.panels(columns * len(networks), columns, 1.95)
    for i, (name, encoder) in enumerate(networks.items()):
        overlay = pair.draw_maps(axes[i * columns : (i + 1) * columns], encoder, name)
    plotting.add_map_bar(axes, overlay)
    return fig


def main(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN_FOLDER", help="one per method")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 200, 400, 1200])
    here = Path(__file__).parent
    parser.add_argument("--out", default=str(here.parent / "nbs/images"), help="of the figures")
    parser.add_argument("--results", default=str(here / "figures.jsonl"), help="of the numbers")
    args = parser.parse_args(argv)
    runs = [(folder, read_run_config(Path(folder) / "config.json")) for folder in args.runs]
    pair, rows = PairOfViews(runs[0][1].image_size), []
    networks = {"untrained": load_at(*runs[0], 0)}
    for folder, config in runs:
        for step in args.steps:
            encoder = load_at(folder, config, step)
            rows.append({"run": run_title(config), "seed": config.seed, "step": step})
            rows[-1] |= rounded(pair.scores(encoder))
        networks[run_title(config).replace(" with", "\nwith")] = encoder
    for name, figure in (
        ("matches_during_training", training_figure(pair, runs, args.steps)),
        ("maps_by_method", maps_figure(pair, networks)),
    ):
        figure.savefig(Path(args.out) / f"{name}.jpg", pil_kwargs=JPEG)
    with atomic_write(args.results, "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    columns = ("mutual", "correct", "near", "moved")
    table = {f"{r['run']}, step {r['step']}": {name: r[name] for name in columns} for r in rows}
    print(format_table(table))


if __name__ == "__main__":
    run_command(main)
