"""Pictures a second and core: the readable pipeline, the fast one, and decoding alone; for a folder and, of the same pictures, each
other kind of source; where the time goes; and what equality costs, by comparison with a loose pipeline that nobody should use.

    python benchmarks/input.py --data-root data/imagenet/train --images 1000
    python benchmarks/input.py --data-root data/coco/train2017 --images 200 --rounds 5

One process, one thread, and the processor's time in it, so that waiting for others on a busy machine doesn't count. Ten pictures are made by
each pipeline in turn, again and again, before the next ten come, so that what else a busy machine does (to the caches, to the clock) slows
all of them alike; the median of the rounds counts. On such a machine ratios can be trusted more than rates. The fast pipeline gives bytes,
which the trainer normalises on the device; the readable one gives floats: "normalise" is that step. Files are in the page cache after
the first round. Prints tables and one line of JSON.
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

from densecl import augment, fast
from densecl.data import open_source
from densecl.files import UsageError


class Chosen:
    """Some pictures of a source, as a source."""

    def __init__(self, source, chosen): self.source, self.chosen = source, chosen
    def __len__(self): return len(self.chosen)
    def __getattr__(self, name): return getattr(self.source, name)
    def name(self, i): return self.source.name(self.chosen[i])
    def read(self, i): return self.source.read(self.chosen[i])
    def fetch(self, i): return self.source.fetch(self.chosen[i])
    def load(self, i): return self.source.load(self.chosen[i])
    def load_any(self, i, rng): return self.load(i), i, []


class Strict(fast.Pixels):
    """The fast decoder, without replacement."""

    def load_any(self, i, rng): return self.load(i), i, []


def readable(source, images):
    """The numbers of `images` of its pictures, evenly chosen, that can be decoded."""
    some = np.linspace(0, len(source) - 1, min(images, len(source))).astype(int)
    good = []
    for i in some:
        try: source.load(int(i))
        except Exception: continue
        good.append(int(i))
    return good


def loose_render(pixels, view, size):
    """Without antialiasing, and all colours as one matrix, hue included (turned in YIQ): fast, and other pictures."""
    x, y, w, h = view.box
    out, all_at_once = cv2.resize(pixels[y:y+h, x:x+w], (size, size), interpolation=cv2.INTER_LINEAR), np.eye(4)
    for name, f in view.jitter:
        m = np.eye(4)
        if name == "brightness": m[:3, :3] *= f
        if name == "contrast": m[:3, :3], m[:3, 3] = f*fast.EYE, (1 - f)*(fast.LUMA @ (all_at_once @ [*cv2.mean(out)[:3], 1.])[:3])
        if name == "saturation": m[:3, :3] = f*fast.EYE + (1 - f)*fast.LUMA
        if name == "hue": m[:3, :3] = FROM_YIQ @ [[1, 0, 0], [0, np.cos(2*np.pi*f), np.sin(2*np.pi*f)], [0, -np.sin(2*np.pi*f), np.cos(2*np.pi*f)]] @ TO_YIQ
        all_at_once = m @ all_at_once
    if view.gray: all_at_once[:3] = fast.LUMA @ all_at_once[:3]
    if view.jitter or view.gray: out = cv2.transform(out, all_at_once[:3])
    if view.sigma: out = cv2.GaussianBlur(out, (0, 0), view.sigma)
    return cv2.flip(out, 1) if view.flip else out


TO_YIQ = np.array([[.299, .587, .114], [.596, -.274, -.322], [.211, -.523, .312]])
FROM_YIQ = np.linalg.inv(TO_YIQ)


def loosely(make, i):
    """What `make(i)` gives with the loose rendering in the place of the fast one."""
    kept, fast.render = fast.render, loose_render
    try: return make(i)
    finally: fast.render = kept


def differences(source, numbers, size):
    """Pipeline -> mean absolute difference of its views from the reference's, in levels of 255."""
    made, sums = pipelines(source, size), dict(fast=[], loose=[])
    for i in numbers:
        right = made["reference"](i)
        for name in sums:
            got = made[name](i)
            sums[name] += [np.abs(augment.denormalise(right[k]).astype(int) - got[k].permute(1, 2, 0).numpy()).mean() for k in ("im_q", "im_k")]
    return {name: float(np.mean(d)) for name, d in sums.items()}


def pipelines(source, size):
    """Name -> function of a picture's number."""
    recipe = augment.Recipe(size=size)
    slow, quick, pixels = augment.TwoViews(source, recipe), fast.FastViews(source, recipe), Strict(source)
    quick.source = pixels
    make = lambda i: quick.at(0, i, i)
    return dict(reference=lambda i: slow.at(0, i, i), fast=make, decode=pixels.load, loose=lambda i: loosely(make, i))


def rates(named, numbers, rounds, block=10):
    """Name -> pictures a second: every pipeline makes a block of pictures, then the next block; of the rounds over a block the median."""
    total = dict.fromkeys(named, 0.)
    for at in range(0, len(numbers), block):
        times = {name: [] for name in named}
        for _ in range(rounds):
            for name, make in named.items():
                start = time.process_time()
                for i in numbers[at:at + block]: make(i)
                times[name].append(time.process_time() - start)
        for name, t in times.items(): total[name] += statistics.median(t)
    return {name: len(numbers)/t for name, t in total.items()}


def write_list(source, folder, numbers):
    (folder/"list.txt").write_text("".join(f"{Path(source.root).resolve()/source.name(i)}\n" for i in numbers))
    return folder/"list.txt"


def write_coco(source, folder, numbers):
    (folder/"annotations").mkdir()
    (folder/"pictures").symlink_to(Path(source.root).resolve())
    at = folder/"annotations"/"some_pictures.json"
    at.write_text(json.dumps(dict(images=[dict(file_name=source.name(i)) for i in numbers])))
    return at


def write_lmdb(source, folder, numbers):
    at = folder/"some.lmdb"
    subprocess.run([sys.executable, "-m", "densecl.data", "lmdb", str(folder/"list.txt"), str(at)], check=True, capture_output=True)
    return at


def write_tar(source, folder, numbers):
    at = folder/"some-000000.tar"
    with tarfile.open(at, "w") as tar:
        for n, i in enumerate(numbers):
            entry = tarfile.TarInfo(f"{n:06d}.jpg")
            raw = (folder/f"{n}.bytes")
            raw.write_bytes(source.read(i))
            entry.size = raw.stat().st_size
            with open(raw, "rb") as f: tar.addfile(entry, f)
            raw.unlink()
    return at


def other_kinds(source, folder, numbers):
    """Kind -> source of the same pictures; what cannot be made or opened here is left out, with a word why."""
    made = {}
    for kind, write in dict(list=write_list, coco=write_coco, lmdb=write_lmdb, shards=write_tar).items():
        try:
            made[kind] = open_source(str(write(source, folder, numbers)))
            made[kind].load(0)
        except (UsageError, OSError, AttributeError, subprocess.CalledProcessError) as e:
            made.pop(kind, None)
            print(f"{kind}: left out, {str(e).splitlines()[0]}")
    return made


class Stopwatch:
    """Times functions by name, each without the watched ones that it calls."""

    def __init__(self): self.times, self.inner = {}, [0.]

    def watch(self, label, function):
        def timed(*args, **kwargs):
            self.inner.append(0.)
            start = time.process_time()
            try: return function(*args, **kwargs)
            finally:
                took = time.process_time() - start
                self.times.setdefault(label, []).append(took - self.inner.pop())
                self.inner[-1] += took
        return timed

    @contextmanager
    def watching(self, places):
        """places: (label, object or dict, name)."""
        get, put = (lambda o, n: o[n] if isinstance(o, dict) else getattr(o, n)), (lambda o, n, f: o.__setitem__(n, f) if isinstance(o, dict) else setattr(o, n, f))
        kept = [(o, n, get(o, n)) for _, o, n in places]
        try:
            for label, o, n in places: put(o, n, self.watch(label, get(o, n)))
            yield self
        finally:
            for o, n, f in reversed(kept): put(o, n, f)


STEPS = ("brightness", "contrast", "saturation", "hue")


def places(source, fast_way):
    """What to watch in either pipeline, by the names of the operations."""
    both = [("read", source.source, "read")]
    if fast_way:
        return both + [("decode", fast, "jpeg"), ("decode", fast, "decode"), ("draw", fast, "draw"), ("crop, resize", fast, "cut"), ("blur", fast, "blur"),
                       ("flip", cv2, "flip"), ("grey", fast, "grey"), *((s, fast.STEPS, s) for s in STEPS)]
    return both + [("decode", source, "load"), ("draw", augment, "draw"), ("crop, resize", Image.Image, "crop"), ("crop, resize", Image.Image, "resize"),
                   ("blur", Image.Image, "filter"), ("flip", Image.Image, "transpose"), ("grey", TF, "to_grayscale"), ("normalise", augment, "normalise"),
                   *((s, TF, f"adjust_{s}") for s in STEPS)]


def split(source, numbers, size, rounds):
    """Pipeline -> operation -> mean milliseconds a picture, of the median round."""
    named, out = pipelines(source, size), {}
    sums = {name: [] for name in ("reference", "fast")}
    for _ in range(rounds):
        for name in sums:
            watch = Stopwatch()
            with watch.watching(places(source, name == "fast")):
                at = watch.watch("rest", named[name])
                for i in numbers: at(i)
            sums[name].append({label: 1e3*sum(t)/len(numbers) for label, t in watch.times.items()})
    for name, rounds_of in sums.items():
        out[name] = {label: statistics.median(r.get(label, 0.) for r in rounds_of) for label in rounds_of[0]}
    return out


def table(title, head, rows):
    print(f"\n{title}\n{'':16}" + "".join(f"{h:>12}" for h in head))
    for name, values in rows.items(): print(f"{name:16}" + "".join(f"{v:>12}" for v in values))


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--data-root", required=True, help="what densecl.train takes: a folder, a list, a COCO json, an LMDB, shards")
    p.add_argument("--images", type=int, default=200, help="how many of its pictures, evenly chosen")
    p.add_argument("--size", type=int, default=224, help="side of a view in pixels")
    p.add_argument("--rounds", type=int, default=3, help="over each picture")
    a = p.parse_args()
    torch.set_num_threads(1)
    try: source = open_source(a.data_root)
    except UsageError as e: p.error(str(e))
    numbers = readable(source, a.images)
    if not numbers: p.error(f"--data-root {a.data_root}: none of its pictures can be decoded")
    chosen = Chosen(source, numbers)
    with tempfile.TemporaryDirectory() as folder:
        kinds = {"as given": chosen} | (other_kinds(source, Path(folder), numbers) if hasattr(source, "root") else {})
        found = {kind: rates(pipelines(s, a.size), range(len(numbers)), a.rounds) for kind, s in kinds.items()}
        del kinds
    table(f"pictures a second on one core, two {a.size} px views each; {len(numbers)} pictures, median of {a.rounds} rounds",
          ("reference", "fast", "decode", "fast/ref.", "fast/decode"),
          {k: [f"{r['reference']:.0f}", f"{r['fast']:.0f}", f"{r['decode']:.0f}", f"{r['fast']/r['reference']:.2f}", f"{r['fast']/r['decode']:.2f}"] for k, r in found.items()})
    first, away = found["as given"], differences(chosen, range(len(numbers)), a.size)
    table("what equality costs", ("pictures/s", "levels off"), {"fast": [f"{first['fast']:.0f}", f"{away['fast']:.2f}"], "loose": [f"{first['loose']:.0f}", f"{away['loose']:.2f}"]})
    parts = split(chosen, range(len(numbers)), a.size, a.rounds)
    labels = sorted(set(parts["reference"]) | set(parts["fast"]), key=lambda x: -parts["reference"].get(x, 0.))
    table("milliseconds a picture (both views)", ("reference", "fast"),
          {x: [f"{parts[p].get(x, 0.):.2f}" for p in parts] for x in labels} | {"sum": [f"{sum(parts[p].values()):.2f}" for p in parts]})
    print(json.dumps(dict(first, levels_off=away, ratio=first["fast"]/first["reference"], of_decode=first["fast"]/first["decode"], images=len(numbers), size=a.size,
                          sources=found, split_ms=parts)))


if __name__ == "__main__": main()
