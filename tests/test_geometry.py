"""Properties of crops and of the true match, over many made-up pictures (hypothesis)."""
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from densecl.augment import Recipe, draw, render
from densecl.match import to_picture, to_view, true_match

side, seed = st.integers(1, 3000), st.integers(0, 2**32 - 1)
PLAIN = Recipe(size=64, p_jitter=0, p_gray=0, p_blur=0)   # crops and mirrors only


@settings(deadline=None, max_examples=300)
@given(side, side, seed)
def test_a_box_lies_inside_its_picture(width, height, seed):
    x, y, w, h = draw(np.random.default_rng(seed), width, height, Recipe()).box
    assert 0 <= x and 0 <= y and w >= 1 and h >= 1 and x + w <= width and y + h <= height


def chart(width, height):
    """A picture whose red says x and whose green says y, in 0 .. 255."""
    x, y = np.meshgrid((np.arange(width) + .5)/width, (np.arange(height) + .5)/height)
    return Image.fromarray(np.stack([255*x, 255*y, 0*x], -1).round().astype(np.uint8))


def levels_at(image, points):
    """Red and green of the pixels at points of the unit square, M x 2."""
    size, values = image.size[0], np.asarray(image, float)
    col, row = np.clip((points*size).astype(int), 0, size - 1).T
    return values[row, col, :2]


@settings(deadline=None, max_examples=100)
@given(st.integers(48, 255), st.integers(48, 255), seed)
def test_a_point_lands_on_the_same_content_within_a_pixel(width, height, seed):
    rng, picture = np.random.default_rng(seed), chart(width, height)
    views = [draw(rng, width, height, PLAIN) for _ in range(2)]
    images = [render(picture, v, 64) for v in views]
    affine_q, affine_k = (torch.from_numpy(v.affine())[None] for v in views)
    points = torch.from_numpy(rng.random((200, 2))).float()
    there = to_view(to_picture(points, affine_q), affine_k)[0]
    seen = ((there > .02) & (there < .98)).all(1) & ((points > .02) & (points < .98)).all(1)
    pixel = sum(255/64*np.array(v.box[2:])/(width, height) for v in views)/2   # levels that a pixel of the views is wide, in x and y
    off = np.abs(levels_at(images[0], points[seen].numpy()) - levels_at(images[1], there[seen].numpy()))
    assert (off <= pixel + 2.5).all()                     # 2.5: a rounding in the chart and in each view, and the next step of the chart


@settings(deadline=None, max_examples=100)
@given(st.integers(8, 500), st.integers(8, 500), st.integers(1, 14), seed)
def test_true_matches_stay_in_the_grid_and_a_view_matches_itself(width, height, grid, seed):
    rng = np.random.default_rng(seed)
    affine_q, affine_k = (torch.from_numpy(draw(rng, width, height, PLAIN).affine())[None] for _ in range(2))
    there = true_match(affine_q, affine_k, grid, grid)[0]
    same = true_match(affine_q, affine_q, grid, grid)[0]
    assert there.min() >= -1 and there.max() < grid*grid
    assert torch.equal(same, torch.arange(grid*grid))     # a view matched with itself
