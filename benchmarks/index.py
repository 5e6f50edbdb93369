"""The index of a dataset: time to open and memory, for generated names like ImageNet's.

    python benchmarks/index.py    # 1,000, 100,000, 1,281,167 and 10,000,000 names, 8 workers
    python benchmarks/index.py --names 1000 50000 --workers 2

For each size: packing a list of strings (part of the first scan), writing it to the cache, reading
it from there, and the memory of a process and its forked workers after each worker has read the
names (of 10 million every seventh, which touches all of the memory). Shared pages are counted once
(PSS, Linux only). `list` is the same with a Python list of strings, for the sizes that fit. Each
size runs in a process of its own.

    python benchmarks/index.py --shards data/shards

Instead: reading tar shards with random access, and streaming them with the webdataset library.
Prints a table and one line of JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from densecl.data.shards import ShardSource, shard_paths
from densecl.data.sources import FileSource, PackedStrings, cache_path, load_cache, save_cache


def measure_memory():
    """(private, proportional) bytes of this process; proportional: with its share of the shared."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0, 0
    kb = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
    return 1024 * (kb["Private_Clean"] + kb["Private_Dirty"]), 1024 * kb["Pss"]


def imagenet_names(n):
    """Names like ImageNet's."""
    return (f"n{i // 1281:08d}/n{i // 1281:08d}_{i:07d}.JPEG" for i in range(n))


def timed(function, *args):
    """(result, seconds)."""
    start = time.perf_counter()
    result = function(*args)
    return result, time.perf_counter() - start


def run_worker(read, indices, results, commands):
    """In a forked process: read the names, wait for all workers, report the memory."""
    for index in indices:
        read(index)
    os.write(results, b"1")
    os.read(commands, 1)  # until all workers have read the names
    os.write(results, b"%20d" % measure_memory()[1])
    os.read(commands, 1)  # until all workers have reported
    os._exit(0)


def workers_memory(read, indices, workers):
    """Bytes that the workers add to the memory of this process when each has read the names."""
    before, total, pipes = measure_memory()[1], 0, []
    for _ in range(workers):
        results, results_in = os.pipe()
        commands, command = os.pipe()
        if not os.fork():
            run_worker(read, indices, results_in, commands)
        pipes.append((results, command))
        os.read(results, 1)  # one worker after the other: memory is measured, not speed
    for results, command in pipes:
        os.write(command, b"1")
        total += int(os.read(results, 20))
    total += measure_memory()[1]
    for _, command in pipes:
        os.write(command, b"1")
        os.wait()
    return total - before


def measure_here(kind, n, workers):
    """Measure one size in this process; the cache folder is that of the environment."""
    cache, row = cache_path("folder2", f"{n} generated names"), {}
    if kind == "write":
        names = list(imagenet_names(n))
        packed, row["pack_s"] = timed(PackedStrings.pack, names)
        start = time.perf_counter()
        save_cache(cache, text=packed.text, ends=packed.ends)
        row["write_s"] = time.perf_counter() - start
        return row | {"file_mb": cache.stat().st_size / 1e6}
    before = measure_memory()[0]
    if kind == "list":
        read = list(imagenet_names(n)).__getitem__
    else:
        arrays, row["open_s"] = timed(load_cache, cache, lambda arrays: True)
        read = FileSource("", PackedStrings(arrays["text"], arrays["ends"])).name
    row["parent_mb"] = (measure_memory()[0] - before) / 1e6
    indices = range(0, n, max(1, n // 1_281_167))
    return row | {"workers_mb": workers_memory(read, indices, workers) / 1e6}


def measure(kind, n, workers):
    """Measure one size in a new process."""
    call = [sys.executable, __file__, "--child", kind, str(n), str(workers)]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def stream_with_webdataset(root):
    import webdataset

    total = 0
    for sample in webdataset.WebDataset(list(map(str, shard_paths(root))), shardshuffle=False):
        total += sum(len(raw) for key, raw in sample.items() if key in ("jpg", "jpeg", "png"))
    return total


def read_images(source, indices):
    return sum(len(source.read(index)) for index in indices)


def import_seconds(module):
    call = [sys.executable, "-c", f"import {module}"]
    return timed(lambda: subprocess.run(call, check=True))[1]


def measure_shards(root, rounds=7):
    """Undecoded images per second from tar shards, medians of interleaved rounds; opening times."""
    source, index_s = timed(ShardSource, root)
    n = len(source)
    order = np.random.default_rng(0).permutation(n)
    ways = {
        "webdataset, streamed": lambda: stream_with_webdataset(root),
        "random access, in order": lambda: read_images(source, range(n)),
        "random access, in random order": lambda: read_images(source, order),
    }
    seconds = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append(timed(way)[1])
    row = {"benchmark": "shards", "images": n}
    row |= {name: round(n / statistics.median(values)) for name, values in seconds.items()}
    row |= {"index_s": index_s, "index_again_s": timed(ShardSource, root)[1]}
    for module in ("webdataset", "densecl.data.shards"):
        row[f"import {module} s"] = import_seconds(module)
    for name, value in row.items():
        print(f"{name:32}{value:12.3f}" if isinstance(value, float) else f"{name:32}{value:>12}")
    print(json.dumps(row))


COLUMNS = {
    "pack_s": ("pack s", 9, 3),
    "write_s": ("write s", 9, 3),
    "open_s": ("open s", 9, 3),
    "parent_mb": ("memory MB", 11, 1),
    "workers_mb": ("workers MB", 12, 1),
    "list_mb": ("list: memory MB", 17, 1),
    "list_workers_mb": ("workers MB", 12, 1),
}


def format_row(n, row):
    cells = [f"{n:12,}"]
    for name, (_, width, digits) in COLUMNS.items():
        value = row[name]
        cells.append(f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}")
    return "".join(cells)


def measure_sizes(sizes, workers, list_up_to):
    print(f"{'names':>12}" + "".join(f"{head:>{width}}" for head, width, _ in COLUMNS.values()))
    rows = []
    for n in sizes:
        row = measure("write", n, workers) | measure("index", n, workers)
        as_list = measure("list", n, workers) if n <= list_up_to else {}
        row |= {"kind": "index", "list_mb": as_list.get("parent_mb")}
        row["list_workers_mb"] = as_list.get("workers_mb")
        rows.append(row)
        print(format_row(n, row), flush=True)
    print(json.dumps({"benchmark": "index", "workers": workers, "rows": rows}))


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = [1_000, 100_000, 1_281_167, 10_000_000]
    parser.add_argument("--names", type=int, nargs="+", default=sizes)
    text = "number of forked processes that each read all names once"
    parser.add_argument("--workers", type=int, default=8, help=text)
    text = "measure a Python list of strings, too, for sizes up to this"
    parser.add_argument("--list-up-to", type=int, default=1_281_167, help=text)
    text = "a folder of tar shards: measure reading them instead"
    parser.add_argument("--shards", help=text)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = parse_arguments()
    if args.child:
        kind, n, workers = args.child
        print(json.dumps(measure_here(kind, int(n), int(workers))))
    elif args.shards:
        measure_shards(args.shards)
    else:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["XDG_CACHE_HOME"] = folder
            measure_sizes(args.names, args.workers, args.list_up_to)


if __name__ == "__main__":
    main()
