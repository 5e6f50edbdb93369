"""How time and memory of the losses grow: with the queue's length, the side of the grid, the batch. All logits at once against chunks.

    python benchmarks/scale.py                       # on one thread, about a minute
    python benchmarks/scale.py --device cuda --rounds 9

"global" has one query a picture, "dense" one a position: batch x grid x grid. Times are of forward and backward together,
medians of interleaved runs. Memory is the peak above the inputs, on CUDA as counted there, on the CPU as the tensors that
one forward and backward hold (counted by PyTorch's own profiler of allocations). A case whose logits alone would take more than --most-mb is left
blank on the readable path. Prints a table for each of the three and one line of JSON.
"""
import argparse
import json
import os
import statistics

os.environ.update(KINETO_LOG_LEVEL="99", TORCH_CPP_LOG_LEVEL="ERROR")    # the profiler talks much

import torch
import torch.nn.functional as F
from loss import once

from densecl.loss import info_nce


def inputs(queries, keys, a):
    """q with gradient, k_pos, keys."""
    torch.manual_seed(0)
    q, k_pos = (F.normalize(torch.randn(queries, a.dim, device=a.device), dim=1) for _ in range(2))
    return q.requires_grad_(), k_pos, F.normalize(torch.randn(a.dim, keys, device=a.device), dim=0)


def extra(path, x):
    """Bytes at the peak above the inputs."""
    if x[0].is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        once(path, *x)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen: once(path, *x)
    held = most = 0
    for e in seen.profiler.kineto_results.events():
        if e.name() != "[memory]": continue
        held += e.nbytes()
        most = max(most, held)
    return most


def case(kind, batch, grid, keys, a):
    """A row: seconds and extra MB of both paths; blanks where the readable one would be too large."""
    queries, row = batch*(grid*grid if kind == "dense" else 1), dict(kind=kind, batch=batch, grid=grid, keys=keys)
    found, x, times = {"chunked": lambda *v: info_nce(*v, chunk=a.chunk)}, inputs(queries, keys, a), {}
    if 4*queries*keys <= 1e6*a.most_mb: found["reference"] = info_nce
    for i in range(a.rounds + 1):                                # the first round warms up
        for name, path in found.items(): times.setdefault(name, []).append(once(path, *x)[0])
    for name in ("reference", "chunked"):
        row[f"{name}_s"] = round(statistics.median(times[name][1:]), 6) if name in found else None
        row[f"{name}_mb"] = round(extra(found[name], x)/1e6, 2) if name in found else None
    return row


def cases(a):
    """Title -> (kind, batch, grid, keys) for each row."""
    both = [("global", a.batch_size), ("dense", a.batch_size)]
    lengths = [2**n for n in range(10, 19, 1 if a.all else 2)]
    return {"queue length": [(k, n, a.grid, keys) for k, n in both for keys in lengths],
            "side of the grid": [("dense", a.batch_size, s, a.queue_len) for s in (1, 2, 4, 7, 14, 28)],
            "batch": [(k, n, a.grid, a.queue_len) for k, _ in both for n in (4, 16, 64)]}


def main():
    """Measure and print."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--batch-size", type=int, default=16, help="pictures, where something else grows")
    p.add_argument("--grid", type=int, default=4, help="side of the grid, where something else grows")
    p.add_argument("--queue-len", type=int, default=16384, help="K, where something else grows")
    p.add_argument("--dim", type=int, default=128, help="of a vector")
    p.add_argument("--chunk", type=int, default=8192, help="keys a chunk")
    p.add_argument("--rounds", type=int, default=3, help="runs of each case")
    p.add_argument("--all", action="store_true", help="every power of two from 10 to 18, not every second one")
    p.add_argument("--most-mb", type=float, default=1100, help="of logits on the readable path; beyond it is left out")
    p.add_argument("--threads", type=int, default=1, help="of the CPU")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    print(f"{a.device}, {a.threads} thread(s), dim {a.dim}, chunks of {a.chunk}, torch {torch.__version__}")
    once(info_nce, *inputs(8, 8, a))
    results, blank = [], lambda v, form: "" if v is None else format(v, form)
    for title, rows in cases(a).items():
        print(f"\n{title}\n{'loss':8}{'batch':>6}{'grid':>6}{'keys':>8}{'ms, reference':>15}{'chunked':>10}{'MB, reference':>15}{'chunked':>10}")
        for r in (case(*c, a) for c in rows):
            results.append(dict(varied=title, **r))
            ms = [v and 1e3*v for v in (r["reference_s"], r["chunked_s"])]
            print(f"{r['kind']:8}{r['batch']:6}{r['grid']:6}{r['keys']:8}{blank(ms[0], '.2f'):>15}{ms[1]:10.2f}"
                  f"{blank(r['reference_mb'], '.1f'):>15}{r['chunked_mb']:10.1f}", flush=True)
    print(json.dumps(dict(benchmark="scale", device=a.device, threads=a.threads, torch=torch.__version__, results=results)))


if __name__ == "__main__": main()
