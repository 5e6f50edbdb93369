"""Options and images that several test files share."""

import signal

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)
# a background job of a shell ignores Ctrl-C, and its children inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption(
        "--long", action="store_true", help="also run the tests marked `long` (minutes)"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes minutes; runs only with --long")
    config.addinivalue_line("markers", "cuda: needs a CUDA device; skipped where there is none")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--long"):
        return
    for item in items:
        if "long" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with --long"))


@pytest.fixture(autouse=True)
def no_setting_remains():
    """A test that leaves deterministic algorithms on changes speed and memory of later ones."""
    yield
    left = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    assert not left, "deterministic algorithms are still on"


@pytest.fixture
def make_images():
    """A function that fills a folder with small images, each of its own coarse color noise."""

    def make(folder, n=12):
        folder.mkdir(parents=True)
        for i in range(n):
            coarse = np.random.default_rng(i).integers(0, 256, (6, 8, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize((64, 48), Image.BICUBIC)
            image.save(folder / f"image-{i:02d}.png")
        return folder

    return make
