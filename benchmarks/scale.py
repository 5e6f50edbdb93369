"""How time and memory of the losses grow with the queue, the grid and the batch.

    python benchmarks/scale.py                       # one thread, about a minute
    python benchmarks/scale.py --device cuda --rounds 9

Compares the reference loss, which holds all logits, with the chunked one. "global" has one query
per image, "dense" one per position: batch x grid x grid. Times are of forward and backward
together, medians of interleaved runs. Memory is the peak above the inputs; on the CPU it is counted
by PyTorch's profiler of allocations. A case whose logits alone would take more than --most-mb is
left blank for the reference. Prints three tables and one line of JSON.
"""

import argparse
import json
import os
import statistics

os.environ.update(KINETO_LOG_LEVEL="99", TORCH_CPP_LOG_LEVEL="ERROR")  # silence the profiler

import torch
from loss import make_inputs, time_once

from densecl.loss import info_nce

GRID_SIDES = (1, 2, 4, 7, 14, 28)
BATCH_SIZES = (4, 16, 64)


def chunk_of(options):
    """--chunk as `info_nce` takes it: a number or "auto"."""
    return int(options.chunk) if options.chunk.isdigit() else options.chunk


def extra_memory(loss_function, inputs):
    """Bytes at the peak above the inputs."""
    if inputs[0].is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        time_once(loss_function, *inputs)
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        time_once(loss_function, *inputs)
    allocated = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return peak


def measure(kind, batch, grid, keys, options):
    """A row: seconds and extra MB of both losses; None where the reference is too large."""
    row = {"kind": kind, "batch": batch, "grid": grid, "keys": keys}
    queries = batch * (grid * grid if kind == "dense" else 1)
    inputs = make_inputs(queries, keys, options)
    functions = {"chunked": lambda *args: info_nce(*args, chunk=chunk_of(options))}
    if 4 * queries * keys <= 1e6 * options.most_mb:
        functions["reference"] = info_nce
    times = {name: [] for name in functions}
    for _ in range(options.rounds + 1):  # the first round warms up
        for name, loss_function in functions.items():
            times[name].append(time_once(loss_function, *inputs)[0])
    for name in ("reference", "chunked"):
        row[f"{name}_s"] = row[f"{name}_mb"] = None
        if name in functions:
            row[f"{name}_s"] = round(statistics.median(times[name][1:]), 6)
            row[f"{name}_mb"] = round(extra_memory(functions[name], inputs) / 1e6, 2)
    return row


def cases(options):
    """Title -> (kind, batch, grid, keys) for each row."""
    kinds = ("global", "dense")
    batch, grid, keys = options.batch_size, options.grid, options.queue_len
    lengths = [2**n for n in range(10, 19, 1 if options.all else 2)]
    return {
        "queue length": [(kind, batch, grid, length) for kind in kinds for length in lengths],
        "side of the grid": [("dense", batch, side, keys) for side in GRID_SIDES],
        "batch": [(kind, size, grid, keys) for kind in kinds for size in BATCH_SIZES],
    }


def format_row(row):
    """A line of the table."""

    def number(value, width, digits, scale=1):
        text = "" if value is None else f"{value * scale:.{digits}f}"
        return f"{text:>{width}}"

    return (
        f"{row['kind']:8}{row['batch']:6}{row['grid']:6}{row['keys']:8}"
        + number(row["reference_s"], 15, 2, 1e3)
        + number(row["chunked_s"], 10, 2, 1e3)
        + number(row["reference_mb"], 15, 1)
        + number(row["chunked_mb"], 10, 1)
    )


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=16, help="images, where fixed")
    parser.add_argument("--grid", type=int, default=4, help="side of the grid, where fixed")
    parser.add_argument("--queue-len", type=int, default=16384, help="K, where fixed")
    parser.add_argument("--dim", type=int, default=128, help="dimension of the embeddings")
    parser.add_argument(
        "--chunk", default="auto", help="keys per chunk; auto: 1024 on the CPU, 8192 on CUDA"
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each case")
    parser.add_argument(
        "--all", action="store_true", help="every power of two from 10 to 18, not every second one"
    )
    parser.add_argument(
        "--most-mb", type=float, default=1100, help="largest size of the reference's logits in MB"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    return parser.parse_args()


def main():
    """Measure and print."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    print(
        f"{options.device}, {options.threads} thread(s), dim {options.dim}, "
        f"chunk {options.chunk}, torch {torch.__version__}"
    )
    time_once(info_nce, *make_inputs(8, 8, options))
    results = []
    for title, rows in cases(options).items():
        print(f"\n{title}\n{'loss':8}{'batch':>6}{'grid':>6}{'keys':>8}", end="")
        print(f"{'ms, reference':>15}{'chunked':>10}{'MB, reference':>15}{'chunked':>10}")
        for case in rows:
            row = measure(*case, options)
            results.append({"varied": title, **row})
            print(format_row(row), flush=True)
    settings = {"device": options.device, "threads": options.threads, "torch": torch.__version__}
    print(json.dumps({"benchmark": "scale", **settings, "results": results}))


if __name__ == "__main__":
    main()
