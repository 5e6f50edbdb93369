"""Options and made-up pictures that several test files share."""
import signal

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell's background job has Ctrl-C switched off, and its children inherit that


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also run the tests marked `long` (minutes)")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes minutes; runs only with --long")
    config.addinivalue_line("markers", "cuda: needs a CUDA device; skipped where there is none")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--long"): return
    for item in items:
        if "long" in item.keywords: item.add_marker(pytest.mark.skip(reason="takes minutes; run with --long"))


@pytest.fixture
def make_pictures():
    """A function that fills a folder with small pictures, each coarse coloured noise of its own."""
    def make(folder, n=12):
        folder.mkdir(parents=True)
        for i in range(n):
            coarse = np.random.default_rng(i).integers(0, 256, (6, 8, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((64, 48), Image.BICUBIC).save(folder/f"picture-{i:02d}.png")
        return folder
    return make
