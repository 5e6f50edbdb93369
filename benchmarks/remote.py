"""Images per second from tar shards behind a web server, against the same shards on the disk.

    python benchmarks/remote.py [--workers 2] [--images 600] [--rounds 3]

A server in another process answers each request after 0, 5 or 50 ms. The variants take turns, and
the median over the rounds is printed with its ratio to the disk.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


def write_shards(folder: Path, images: int) -> None:
    """Four shards of photographs of 500 x 375 pixels."""
    from densecl.data.dataset import TRAIN_PHOTOS, load_photo

    photos = [load_photo(name) for name in TRAIN_PHOTOS]
    rng = np.random.default_rng(0)
    for shard in range(4):
        with tarfile.open(folder / f"set-{shard}.tar", "w") as tar:
            for i in range(shard, images, 4):
                photo = Image.fromarray(photos[i % 4]).resize((500, 375))
                path = folder / "image.jpg"
                Image.fromarray(np.roll(np.asarray(photo), int(rng.integers(500)), 1)).save(path)
                tar.add(path, f"{i:06d}.jpg")
    (folder / "image.jpg").unlink()


def run_server(folder: Path, latency: float, queue: multiprocessing.Queue) -> None:
    """Serve a folder until the process is ended."""
    from test_remote import serve

    with serve(folder, latency=latency) as server:
        queue.put(server.url)
        time.sleep(10**6)


def images_per_second(root: str, workers: int, images: int) -> float:
    """Images per second of one epoch of the loader, without its start."""
    from densecl.config import Config
    from densecl.data.loader import build_loader, build_views

    config = Config(
        data_root=root, batch_size=32, image_size=224, workers=workers, augment="fast", seed=1
    )
    batches = iter(build_loader(config, build_views(config), 0, images // 32))
    for _ in range(2 * max(workers, 1)):
        next(batches)
    start, seen = time.perf_counter(), 0
    for batch in batches:
        seen += len(batch["im_q"])
    return seen / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    from densecl.data.remote import index_remote_shards

    with tempfile.TemporaryDirectory() as name:
        folder, servers = Path(name) / "set", []
        folder.mkdir()
        os.environ["XDG_CACHE_HOME"] = name
        write_shards(folder, args.images)
        roots = {"disk": str(folder)}
        for latency in (0, 5, 50):
            queue = multiprocessing.Queue()
            server = multiprocessing.Process(
                target=run_server, args=(folder, latency / 1000, queue), daemon=True
            )
            server.start()
            servers.append(server)
            roots[f"{latency} ms"] = queue.get() + "/set-{0..3}.tar"
            index_remote_shards(roots[f"{latency} ms"])
        rates = {variant: [] for variant in roots}
        for _ in range(args.rounds):
            for variant, root in roots.items():
                rates[variant].append(images_per_second(root, args.workers, args.images))
        print({k: [round(x) for x in v] for k, v in rates.items()})
        disk = statistics.median(rates["disk"])
        for variant, values in rates.items():
            rate = statistics.median(values)
            print(f"{variant:6} {rate:7.1f} images/s  {rate / disk:5.2f} of the disk", flush=True)
        for server in servers:
            server.terminate()


if __name__ == "__main__":
    main()
