"""The index of a set: how long it takes to open, and what it costs in memory, for made-up names like ImageNet's.

    python benchmarks/index.py                          # 1,000, 100,000, 1,281,167 and 10,000,000 names, 8 workers
    python benchmarks/index.py --names 1000 50000 --workers 2

For each size: packing a list of strings (what a first scan does), writing and reading it back from the cache, and the memory
that a process and its forked workers hold after each worker has read the names (of 10 million, every seventh, which touches
all of the memory). Shared pages are counted once (PSS, Linux only). `list` is the same with a Python list of strings, for the
sizes that fit. Each size runs in a process of its own.

    python benchmarks/index.py --shards data/shards     # instead: reading tar shards by number, and as the webdataset library streams them

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

from densecl.shards import Shards, shard_paths
from densecl.source import Files, Texts, cache_file, keep, recall


def memory():
    """(private, proportional) bytes of this process: what is its own, and with its share of what others use too."""
    try: lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError: return 0, 0
    kb = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
    return 1024*(kb["Private_Clean"] + kb["Private_Dirty"]), 1024*kb["Pss"]


def made_up(n):
    """Names like ImageNet's."""
    return (f"n{i//1281:08d}/n{i//1281:08d}_{i:07d}.JPEG" for i in range(n))


def timed(f):
    start = time.perf_counter()
    got = f()
    return got, time.perf_counter() - start


def workers_memory(read, numbers, workers):
    """Bytes that the workers hold together, over their parent's before, after each has read the names."""
    before, total, pipes = memory()[1], 0, []
    for _ in range(workers):
        ready, done, go_in, go_out = *os.pipe(), *os.pipe()
        if not os.fork():
            for i in numbers: read(i)
            os.write(done, b"1")
            os.read(go_in, 1)                          # all stay alive until the last one has been measured
            os.write(done, b"%20d" % memory()[1])
            os.read(go_in, 1)
            os._exit(0)
        pipes.append((ready, go_out))
        os.read(ready, 1)                              # one after the other: a measurement of memory, not of speed
    for ready, go in pipes:
        os.write(go, b"1")
        total += int(os.read(ready, 20))
    total += memory()[1]
    for _, go in pipes:
        os.write(go, b"1")
        os.wait()
    return total - before


def child(kind, n, workers):
    """One size, in this process: a dict. The cache folder is the environment's."""
    file, row = cache_file("folder1", f"{n} made-up names"), {}
    if kind == "write":
        listed = list(made_up(n))
        packed, row["pack_s"] = timed(lambda: Texts.pack(listed))
        _, row["write_s"] = timed(lambda: keep(file, text=packed.text, ends=packed.ends))
        return row | dict(file_mb=file.stat().st_size/1e6)
    before = memory()[0]
    if kind == "list": read = list(made_up(n)).__getitem__
    else:
        kept, row["open_s"] = timed(lambda: recall(file, lambda a: True))
        read = Files("", Texts(kept["text"], kept["ends"])).name
    row["parent_mb"] = (memory()[0] - before)/1e6
    return row | dict(workers_mb=workers_memory(read, range(0, n, max(1, n//1_281_167)), workers)/1e6)


def measure(kind, n, workers):
    """The same in a fresh process."""
    got = subprocess.run([sys.executable, __file__, "--child", kind, str(n), str(workers)], capture_output=True, text=True)
    if got.returncode: raise SystemExit(got.stderr)
    return json.loads(got.stdout.splitlines()[-1])


def by_webdataset(root):
    import webdataset
    return sum(len(raw) for sample in webdataset.WebDataset(list(map(str, shard_paths(root))), shardshuffle=False) for k, raw in sample.items() if k in ("jpg", "jpeg", "png"))


def by_number(opened, order): return sum(len(opened.read(i)) for i in order)


def shards(root, rounds=7):
    """Pictures a second, undecoded, from tar shards: medians of interleaved rounds; and the seconds until each can begin."""
    first, opened = timed(lambda: Shards(root))[1], Shards(root)
    n, order, paths = len(opened), np.random.default_rng(0).permutation(len(opened)), {}
    ways = {"webdataset, streamed": lambda: by_webdataset(root), "by number, in order": lambda: by_number(opened, range(n)), "by number, at random": lambda: by_number(opened, order)}
    for _ in range(rounds):
        for name, way in ways.items(): paths.setdefault(name, []).append(timed(way)[1])
    row = dict(benchmark="shards", pictures=n, **{k: round(n/statistics.median(v)) for k, v in paths.items()}, index_s=first, index_again_s=timed(lambda: Shards(root))[1])
    for module in ("webdataset", "densecl.shards"): row[f"import {module} s"] = timed(lambda: subprocess.run([sys.executable, "-c", f"import {module}"], check=True))[1]
    for k, v in row.items(): print(f"{k:24}{v:12.3f}" if isinstance(v, float) else f"{k:24}{v:>12}")
    print(json.dumps(row))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--names", type=int, nargs="+", default=[1_000, 100_000, 1_281_167, 10_000_000])
    p.add_argument("--workers", type=int, default=8, help="forked processes that each read all names once")
    p.add_argument("--list-up-to", type=int, default=1_281_167, help="also a Python list of strings, for sizes up to this")
    p.add_argument("--shards", help="a folder of tar shards: measure reading them instead")
    p.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.child: return print(json.dumps(child(a.child[0], int(a.child[1]), int(a.child[2]))))
    print(f"{'names':>12}{'pack s':>9}{'write s':>9}{'open s':>9}{'memory MB':>11}{f'+ {a.workers} workers MB':>16}   as a list: {'MB':>6}{f'+ {a.workers} workers MB':>16}")
    if a.shards: return shards(a.shards)
    rows, place = [], tempfile.TemporaryDirectory()
    os.environ["XDG_CACHE_HOME"] = place.name
    for n in a.names:
        row = measure("write", n, a.workers) | measure("index", n, a.workers)
        other = measure("list", n, a.workers) if n <= a.list_up_to else {}
        row |= dict(kind="index", list_mb=other.get("parent_mb"), list_workers_mb=other.get("workers_mb"))
        rows.append(row)
        line = f"{n:12,}{row['pack_s']:9.3f}{row['write_s']:9.3f}{row['open_s']:9.3f}{row['parent_mb']:11.1f}{row['workers_mb']:16.1f}"
        print(line + (f"{row['list_mb']:20.1f}{row['list_workers_mb']:16.1f}" if other else f"{'-':>20}{'-':>16}"), flush=True)
    print(json.dumps(dict(benchmark="index", workers=a.workers, rows=rows)))


if __name__ == "__main__": main()
