"""Properties of crops and of the ground-truth match, over many generated images (hypothesis)."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from densecl.augment import AugmentConfig, render_view, sample_view
from densecl.correspondence import ground_truth_match, image_to_view, view_to_image

side, seed = st.integers(1, 3000), st.integers(0, 2**32 - 1)
GEOMETRY_ONLY = AugmentConfig(size=64, p_jitter=0, p_gray=0, p_blur=0)  # crops and flips


def random_affine(rng, width, height):
    view = sample_view(rng, width, height, GEOMETRY_ONLY)
    return torch.from_numpy(view.affine())[None]


@settings(deadline=None, max_examples=300)
@given(side, side, seed)
def test_a_box_lies_inside_its_image(width, height, seed):
    x, y, w, h = sample_view(np.random.default_rng(seed), width, height, AugmentConfig()).box
    assert 0 <= x and 0 <= y and w >= 1 and h >= 1 and x + w <= width and y + h <= height


def gradient_image(width, height):
    """An image whose red channel encodes x and whose green channel encodes y, in 0 .. 255."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return Image.fromarray(np.stack([255 * x, 255 * y, 0 * x], -1).round().astype(np.uint8))


def values_at(image, points):
    """Red and green of the pixels at points of the unit square, M x 2."""
    size, values = image.size[0], np.asarray(image, float)
    column, row = np.clip((points * size).astype(int), 0, size - 1).T
    return values[row, column, :2]


@settings(deadline=None, max_examples=100)
@given(st.integers(48, 255), st.integers(48, 255), seed)
def test_a_point_maps_to_the_same_content_within_a_pixel(width, height, seed):
    rng, image = np.random.default_rng(seed), gradient_image(width, height)
    views = [sample_view(rng, width, height, GEOMETRY_ONLY) for _ in range(2)]
    image_q, image_k = (render_view(image, view, 64) for view in views)
    affine_q, affine_k = (torch.from_numpy(view.affine())[None] for view in views)
    points_q = torch.from_numpy(rng.random((200, 2))).float()
    points_k = image_to_view(view_to_image(points_q, affine_q), affine_k)[0]
    inside = [((p > 0.02) & (p < 0.98)).all(1) for p in (points_q, points_k)]
    visible = inside[0] & inside[1]
    values_q = values_at(image_q, points_q[visible].numpy())
    values_k = values_at(image_k, points_k[visible].numpy())
    # difference in value across one pixel of the views, in x and y
    pixel = sum(255 / 64 * np.array(view.box[2:]) / (width, height) for view in views) / 2
    # 2.5: rounding in the image and in each view, and the next step of the gradient
    assert (np.abs(values_q - values_k) <= pixel + 2.5).all()


@settings(deadline=None, max_examples=100)
@given(st.integers(8, 500), st.integers(8, 500), st.integers(1, 14), seed)
def test_ground_truth_is_inside_the_grid_and_a_view_matches_itself(width, height, grid, seed):
    rng = np.random.default_rng(seed)
    affine_q, affine_k = random_affine(rng, width, height), random_affine(rng, width, height)
    truth = ground_truth_match(affine_q, affine_k, grid, grid)[0]
    assert truth.min() >= -1 and truth.max() < grid * grid
    same_view = ground_truth_match(affine_q, affine_q, grid, grid)[0]
    assert torch.equal(same_view, torch.arange(grid * grid))
