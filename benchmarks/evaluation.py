"""Evaluate a frozen network by the probes of the small-scale study (see reproduce.py)."""

from functools import cache

import numpy as np
import torch

from densecl.augment import normalize
from densecl.correspondence import best_match, cell_distance_squared, ground_truth_match
from densecl.evaluate.correspondence import match_scores, moved_positions
from densecl.evaluate.feature_metrics import position_by_stage
from densecl.evaluate.features import encode_images, open_images
from densecl.evaluate.keypoints import common_points, predict_points, within_tolerance
from densecl.evaluate.linear_segmentation import (
    cache_features,
    class_fractions,
    confusion_matrix,
    fit_linear_head,
    flatten_cells,
)
from densecl.evaluate.probes import PROBES, probe_options, run_probe

VIEWS = 512  # pairs of views for matches and positions


def rounded(value):
    """A number, or the numbers in nested dicts, with four decimals."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return round(value, 4) if isinstance(value, float) else value


@cache
def open_probe(name, voc, **given):
    """The data of a probe and its options; the data is opened once per process.

    Args:
        name: of the probe
        voc: a VOC tree
        **given: fields of `ProbeOptions`
    """
    options = probe_options(name, data_root=voc, **given)
    return PROBES[name].open(options), options


def position_leakage(encoder, batch):
    """How much of the matches is position information leaked by zero padding.

    A cell's mean feature over one half of the views is compared with the features of the other
    half, as in nbs/guides/position_leakage.ipynb.

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
    batch, options = open_probe("match", voc, image_size=96, limit=VIEWS)
    match = PROBES["match"].run(encoder, batch, options)
    encoder.dense_head = None  # the other probes are of the backbone only
    results = {
        "match": match,
        "place": position_leakage(encoder, batch),
        "position": position_read_out(encoder, voc),
        "stereo": run_probe(encoder, "stereo", "", 96),
    }
    animals, options = open_probe("keypoints", voc, limit=1000, trials=1)
    results["keypoints"] = PROBES["keypoints"].run(encoder, animals, options)
    masks, options = open_probe("segment", voc, trials=1)
    results["segment"] = PROBES["segment"].run(encoder, masks, options)
    results["rank"] = run_probe(encoder, "rank", voc, 96)
    return results


def position_read_out(encoder, voc):
    """R2 of a linear read-out of a cell's position after each stage, on images not fitted on.

    Args:
        encoder: the network
        voc: a VOC tree; views of one half of its val images are to fit on, the others to score
    """
    views = open_probe("match", voc, image_size=96, limit=VIEWS)[0]["im_q"]
    half = len(views) // 2
    return position_by_stage(encoder, views[:half], views[half:])


def match_counts(encoder, voc):
    """Correct and all positions of each pair of views, with its image, per metric of matching."""
    batch, _ = open_probe("match", voc, image_size=96, limit=VIEWS)
    f_q, f_k = (encode_images(encoder, batch[view])[0] for view in ("im_q", "im_k"))
    h, w = f_q.shape[2:]
    truth = ground_truth_match(batch["affine_q"], batch["affine_k"], h, w)  # V x hw
    distance = cell_distance_squared(best_match(f_q, f_k), truth, w)
    valid, moved = truth >= 0, moved_positions(truth, w)
    counts = {
        "match": ((distance == 0) & valid, valid),
        "near": ((distance <= 1) & valid, valid),
        "moved": ((distance <= 1) & moved, moved),
    }
    views, images = torch.arange(len(truth)), len(open_images(voc))
    return {
        name: (correct.sum(1), total.sum(1), (views * images // len(views))[:, None])
        for name, (correct, total) in counts.items()
    }


def keypoint_counts(encoder, voc):
    """Correct (PCK@0.2) and all keypoints of each pair of animals, and its images."""
    (dataset, pairs), _ = open_probe("keypoints", voc, limit=1000, trials=1)
    features, _ = encode_images(encoder, [normalize(image) for image in dataset.images])
    correct = []
    for a, b in pairs.tolist():
        points, truth = common_points(dataset, a, b)
        predicted = predict_points(features[a], points, features[b])
        correct.append(within_tolerance(predicted, truth)[:, 1])
    totals = torch.tensor([len(c) for c in correct])
    correct = torch.stack([c.sum() for c in correct])
    _, images = dataset.image_ids[pairs].unique(return_inverse=True)  # numbered from 0
    return {"keypoints": (correct, totals, images)}


def segmentation_counts(encoder, voc):
    """Pixels in the intersection and in the union of each class, per image: two N x classes."""
    data, options = open_probe("segment", voc, trials=1)
    train, val = (cache_features(encoder, s, data.size, data.limit) for s in (data.train, data.val))
    x, grids = train.grids["backbone"], val.grids["backbone"]
    (h, w), classes = x.shape[2:], data.train.num_classes
    y = torch.stack([class_fractions(mask, classes, h, w) for mask in train.masks])
    head = fit_linear_head(flatten_cells(x), flatten_cells(y), h * w, options.seed)
    counts = []
    for grid, mask in zip(grids, val.masks):
        confusion = confusion_matrix(head(flatten_cells(grid[None])).T.reshape(-1, h, w), mask)
        correct = confusion.diag()
        counts.append((correct, confusion.sum(0) + confusion.sum(1) - correct))
    intersection, union = (torch.stack(parts) for parts in zip(*counts))
    return intersection, union


def image_scores(encoder, voc):
    """The scores of single images of which the metrics consist, for `densecl.evaluate.bootstrap`.

    Args:
        encoder: the network; changed in place
        voc: a VOC tree

    Returns:
        arrays by name: NAME_correct and NAME_total, M, and NAME_images, M x 1 or M x 2, for match,
        near, moved and keypoints; segmentation_intersection and segmentation_union, N x classes
    """
    encoder.grid = None
    scores = {}
    for name, parts in (match_counts(encoder, voc) | keypoint_counts(encoder, voc)).items():
        scores |= {f"{name}_{key}": x for key, x in zip(("correct", "total", "images"), parts)}
    intersection, union = segmentation_counts(encoder, voc)
    scores |= {"segmentation_intersection": intersection, "segmentation_union": union}
    return {name: compact(x.numpy()) for name, x in scores.items()}


def compact(x):
    """The array with the smallest type that holds its values."""
    return x.astype(np.min_scalar_type(int(x.max())))
