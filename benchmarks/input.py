"""Images per second and core: the reference pipeline, the fast one, and decoding alone.

    python benchmarks/input.py --data-root data/imagenet/train --images 1000
    python benchmarks/input.py --data-root data/coco/train2017 --images 200 --rounds 5

Measured for the given source and, with the same images, for each other kind of source; then the
time of each operation; then what equality with the reference costs, by comparison with a loose
pipeline that should not be used for training.

All times are processor time of one process with one thread, so waiting for other programs on a
busy machine does not count. Each pipeline makes ten images in turn, several times, before the next
ten follow, so that other programs slow down all pipelines alike; the median of the rounds counts.
On such a machine the ratios are more reliable than the rates. The fast pipeline returns bytes,
which the trainer normalizes on the device. The reference returns floats, and "normalize" is that
step. After the first round the files are in the page cache. Prints tables and one line of JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image

from densecl import augment
from densecl.data import fast_augment
from densecl.data.dataset import open_source
from densecl.data.decode import CorruptImageError
from densecl.runtime.io import UsageError


class Subset:
    """Some images of a source, as a source; corrupt images are not replaced."""

    def __init__(self, source, indices):
        self.source, self.indices = source, indices

    def __len__(self):
        return len(self.indices)

    def __getattr__(self, name):
        return getattr(self.source, name)

    def name(self, index):
        return self.source.name(self.indices[index])

    def read(self, index):
        return self.source.read(self.indices[index])

    def fetch(self, index):
        return self.source.fetch(self.indices[index])

    def load(self, index):
        return self.source.load(self.indices[index])

    def load_or_replace(self, index, rng):
        return self.load(index), index, []


class FastDecode(fast_augment.FastDecodeSource):
    """The fast decoder; corrupt images are not replaced."""

    def load_or_replace(self, index, rng):
        return self.load(index), index, []


def intact_indices(source, images):
    """Indices of at most `images` evenly spaced images that can be decoded."""
    indices = []
    for index in np.linspace(0, len(source) - 1, min(images, len(source))).astype(int):
        try:
            source.load(int(index))
        except CorruptImageError:
            continue
        indices.append(int(index))
    return indices


TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
FROM_YIQ = np.linalg.inv(TO_YIQ)


def rotate_hue(shift):
    """The 3 x 3 matrix that rotates the hue in YIQ."""
    cos, sin = np.cos(2 * np.pi * shift), np.sin(2 * np.pi * shift)
    return FROM_YIQ @ [[1, 0, 0], [0, cos, sin], [0, -sin, cos]] @ TO_YIQ


def loose_render(pixels, view, size):
    """Resize without antialiasing, and all color operations as one matrix: fast, but different."""
    x, y, w, h = view.box
    crop = pixels[y : y + h, x : x + w]
    out = cv2.resize(crop, (size, size), interpolation=cv2.INTER_LINEAR)
    colors = np.eye(4)
    for name, factor in view.jitter:
        step = np.eye(4)
        if name == "brightness":
            step[:3, :3] *= factor
        if name == "contrast":
            mean_color = (colors @ [*cv2.mean(out)[:3], 1.0])[:3]
            step[:3, :3] = factor * fast_augment.IDENTITY
            step[:3, 3] = (1 - factor) * (fast_augment.LUMA_WEIGHTS @ mean_color)
        if name == "saturation":
            gray = (1 - factor) * fast_augment.LUMA_WEIGHTS
            step[:3, :3] = factor * fast_augment.IDENTITY + gray
        if name == "hue":
            step[:3, :3] = rotate_hue(factor)
        colors = step @ colors
    if view.gray:
        colors[:3] = fast_augment.LUMA_WEIGHTS @ colors[:3]
    if view.jitter or view.gray:
        out = cv2.transform(out, colors[:3])
    if view.sigma:
        out = cv2.GaussianBlur(out, (0, 0), view.sigma)
    return cv2.flip(out, 1) if view.flip else out


def with_loose_render(make, index):
    """`make(index)` with `loose_render` in the place of the fast renderer."""
    render_view, fast_augment.render_view = fast_augment.render_view, loose_render
    try:
        return make(index)
    finally:
        fast_augment.render_view = render_view


def pipelines(source, size):
    """Name -> function that makes the two views of an image, given its index."""
    config = augment.AugmentConfig(size=size)
    reference = augment.TwoViews(source, config)
    fast = fast_augment.FastViews(source, config)
    fast.source = FastDecode(source)

    def make_fast(index):
        return fast.at(0, index, index)

    return {
        "reference": lambda index: reference.at(0, index, index),
        "fast": make_fast,
        "decode": fast.source.load,
        "loose": lambda index: with_loose_render(make_fast, index),
    }


def differences(source, indices, size):
    """Pipeline -> mean absolute difference of its views from the reference's, in levels of 255."""
    make = pipelines(source, size)
    errors = {"fast": [], "loose": []}
    for index in indices:
        reference = make["reference"](index)
        for name, values in errors.items():
            views = make[name](index)
            for key in ("im_q", "im_k"):
                expected = augment.denormalize(reference[key]).astype(int)
                values.append(abs(expected - views[key].permute(1, 2, 0).numpy()).mean())
    return {name: float(np.mean(values)) for name, values in errors.items()}


def measure_rates(pipelines, indices, rounds, block=10):
    """Pipeline -> images per second; of the rounds over each block of images the median."""
    total = dict.fromkeys(pipelines, 0.0)
    for first in range(0, len(indices), block):
        times = {name: [] for name in pipelines}
        for _ in range(rounds):
            for name, make in pipelines.items():
                start = time.process_time()
                for index in indices[first : first + block]:
                    make(index)
                times[name].append(time.process_time() - start)
        for name, values in times.items():
            total[name] += statistics.median(values)
    return {name: len(indices) / seconds for name, seconds in total.items()}


def write_list(source, folder, indices):
    root = Path(source.root).resolve()
    (folder / "list.txt").write_text("".join(f"{root / source.name(i)}\n" for i in indices))
    return folder / "list.txt"


def write_coco(source, folder, indices):
    (folder / "annotations").mkdir()
    (folder / "images").symlink_to(Path(source.root).resolve())
    path = folder / "annotations" / "some_images.json"
    path.write_text(json.dumps({"images": [{"file_name": source.name(i)} for i in indices]}))
    return path


def write_lmdb(source, folder, indices):
    path = folder / "some.lmdb"
    call = [sys.executable, "-m", "densecl.data", "lmdb", str(folder / "list.txt"), str(path)]
    subprocess.run(call, check=True, capture_output=True)
    return path


def write_shard(source, folder, indices):
    path = folder / "some-000000.tar"
    with tarfile.open(path, "w") as tar:
        for number, index in enumerate(indices):
            entry = tarfile.TarInfo(f"{number:06d}.jpg")
            file = folder / f"{number}.bytes"
            file.write_bytes(source.read(index))
            entry.size = file.stat().st_size
            with open(file, "rb") as f:
                tar.addfile(entry, f)
            file.unlink()
    return path


WRITERS = {"list": write_list, "coco": write_coco, "lmdb": write_lmdb, "shards": write_shard}


def other_sources(source, folder, indices):
    """Kind -> source of the same images; prints which kinds cannot be made or opened here."""
    sources = {}
    for kind, write in WRITERS.items():
        try:
            opened = open_source(str(write(source, folder, indices)))
            opened.load(0)
        except (UsageError, OSError, AttributeError, subprocess.CalledProcessError) as e:
            print(f"{kind}: left out, {str(e).splitlines()[0]}")
        else:
            sources[kind] = opened
    return sources


class Stopwatch:
    """Times functions by label, each without the watched functions that it calls."""

    def __init__(self):
        self.times, self.inner = {}, [0.0]

    def watch(self, label, function):
        def timed(*args, **kwargs):
            self.inner.append(0.0)
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                seconds = time.process_time() - start
                self.times.setdefault(label, []).append(seconds - self.inner.pop())
                self.inner[-1] += seconds

        return timed

    @contextmanager
    def watching(self, targets):
        """Watch functions for a while; targets are (label, object or dict, name)."""
        originals = [(owner, name, get(owner, name)) for _, owner, name in targets]
        try:
            for label, owner, name in targets:
                put(owner, name, self.watch(label, get(owner, name)))
            yield self
        finally:
            for owner, name, function in reversed(originals):
                put(owner, name, function)


def get(owner, name):
    return owner[name] if isinstance(owner, dict) else getattr(owner, name)


def put(owner, name, function):
    if isinstance(owner, dict):
        owner[name] = function
    else:
        setattr(owner, name, function)


COLOR_STEPS = ("brightness", "contrast", "saturation", "hue")


def watched_functions(source, fast):
    """The functions to watch in a pipeline: (operation, object or dict, name)."""
    both = [("read", source.source, "read"), ("sample", augment, "sample_view")]
    if fast:
        return [
            *both,
            ("decode", fast_augment, "decode_jpeg"),
            ("decode", fast_augment, "decode_image"),
            ("crop, resize", fast_augment, "crop_resize"),
            ("blur", fast_augment, "gaussian_blur"),
            ("flip", cv2, "flip"),
            ("gray", fast_augment, "to_grayscale"),
            *((step, fast_augment.COLOR_OPS, step) for step in COLOR_STEPS),
        ]
    return [
        *both,
        ("decode", source, "load"),
        ("crop, resize", Image.Image, "crop"),
        ("crop, resize", Image.Image, "resize"),
        ("blur", Image.Image, "filter"),
        ("flip", Image.Image, "transpose"),
        ("gray", TF, "to_grayscale"),
        ("normalize", augment, "normalize"),
        *((step, TF, f"adjust_{step}") for step in COLOR_STEPS),
    ]


def time_operations(source, indices, size, rounds):
    """Pipeline -> operation -> mean milliseconds per image, of the median round."""
    make = pipelines(source, size)
    results = {name: [] for name in ("reference", "fast")}
    for _ in range(rounds):
        for name, rows in results.items():
            stopwatch = Stopwatch()
            with stopwatch.watching(watched_functions(source, name == "fast")):
                timed = stopwatch.watch("other", make[name])
                for index in indices:
                    timed(index)
            times = stopwatch.times.items()
            rows.append({label: 1e3 * sum(values) / len(indices) for label, values in times})
    return {
        name: {label: statistics.median(row.get(label, 0.0) for row in rows) for label in rows[0]}
        for name, rows in results.items()
    }


def print_table(title, head, rows):
    print(f"\n{title}\n{'':16}" + "".join(f"{text:>12}" for text in head))
    for name, values in rows.items():
        print(f"{name:16}" + "".join(f"{value:>12}" for value in values))


def print_rates(found, images, args):
    rows = {}
    for kind, rates in found.items():
        reference, fast, decode = (rates[name] for name in ("reference", "fast", "decode"))
        rows[kind] = [f"{reference:.0f}", f"{fast:.0f}", f"{decode:.0f}"]
        rows[kind] += [f"{fast / reference:.2f}", f"{fast / decode:.2f}"]
    title = f"images per second on one core, two views of {args.size} px each; {images} images, "
    head = ("reference", "fast", "decode", "fast/ref.", "fast/decode")
    print_table(title + f"median of {args.rounds} rounds", head, rows)


def print_operations(operations):
    reference, fast = operations["reference"], operations["fast"]
    labels = sorted(set(reference) | set(fast), key=lambda label: -reference.get(label, 0.0))
    rows = {x: [f"{reference.get(x, 0.0):.2f}", f"{fast.get(x, 0.0):.2f}"] for x in labels}
    rows["sum"] = [f"{sum(reference.values()):.2f}", f"{sum(fast.values()):.2f}"]
    print_table("milliseconds per image (both views)", ("reference", "fast"), rows)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    text = "what densecl.train takes: a folder, a list, a COCO json, an LMDB, shards"
    parser.add_argument("--data-root", required=True, help=text)
    parser.add_argument("--images", type=int, default=200, help="number of images, evenly spaced")
    parser.add_argument("--size", type=int, default=224, help="side of a view in pixels")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds over each image")
    args = parser.parse_args()
    try:
        source = open_source(args.data_root)
    except UsageError as e:
        parser.error(str(e))
    indices = intact_indices(source, args.images)
    if not indices:
        parser.error(f"--data-root {args.data_root}: none of its images can be decoded")
    return args, source, indices


def main():
    args, source, indices = parse_arguments()
    torch.set_num_threads(1)
    subset, numbers = Subset(source, indices), range(len(indices))
    with tempfile.TemporaryDirectory() as folder:
        sources = {"as given": subset}
        if hasattr(source, "root"):
            sources |= other_sources(source, Path(folder), indices)
        found = {}
        for kind, opened in sources.items():
            found[kind] = measure_rates(pipelines(opened, args.size), numbers, args.rounds)
        del sources, opened
    print_rates(found, len(indices), args)

    given, errors = found["as given"], differences(subset, numbers, args.size)
    rows = {name: [f"{given[name]:.0f}", f"{errors[name]:.2f}"] for name in ("fast", "loose")}
    print_table("what equality costs", ("images/s", "levels off"), rows)

    operations = time_operations(subset, numbers, args.size, args.rounds)
    print_operations(operations)
    summary = {
        "levels_off": errors,
        "ratio": given["fast"] / given["reference"],
        "of_decode": given["fast"] / given["decode"],
        "images": len(indices),
        "size": args.size,
        "sources": found,
        "split_ms": operations,
    }
    print(json.dumps(given | summary))


if __name__ == "__main__":
    main()
