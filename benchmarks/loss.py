"""The loss alone, at the paper's size: the readable InfoNCE, the chunked one, and PyTorch's linear_cross_entropy.

    python benchmarks/loss.py                        # M = 1568 queries, K = 65536 keys, on one thread
    python benchmarks/loss.py --device cuda --chunks 1024 8192 65536

Forward and backward together. Times are medians of interleaved runs: every path once, then every path once more, so that a
busy machine slows all of them alike. Memory is the peak above the inputs, each path in a process of its own.
Prints a table and one line of JSON.
"""
import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from densecl.loss import info_nce


def by_linear_cross_entropy(q, k_pos, keys, temperature):
    """InfoNCE by way of PyTorch's own chunked loss. It knows no positive of a query's own, so it gives the log-sum-exp over
    the negatives (its loss for target 0, plus that target's logit), and we add the positive: softplus(lse - positive)."""
    at = torch.zeros(len(q), dtype=torch.long, device=q.device)
    lse = F.linear_cross_entropy(q/temperature, keys.T, at, reduction="none", options=torch.nn.LinearCrossEntropyOptions())
    return F.softplus(lse + (q @ keys[:, 0] - (q*k_pos).sum(1))/temperature).mean()


def paths(chunks):
    """Name -> function of (q, k_pos, keys, temperature)."""
    found = {"reference": info_nce}
    for c in chunks: found[f"chunk {c}"] = lambda *a, c=c: info_nce(*a, chunk=c)
    if hasattr(torch.nn, "LinearCrossEntropyOptions"): found["linear_cross_entropy"] = by_linear_cross_entropy
    return found


def inputs(a):
    """q with gradient, k_pos, keys."""
    torch.manual_seed(0)
    q, k_pos = (F.normalize(torch.randn(a.queries, a.dim, device=a.device), dim=1) for _ in range(2))
    return q.requires_grad_(), k_pos, F.normalize(torch.randn(a.dim, a.keys, device=a.device), dim=0)


def once(path, q, k_pos, keys):
    """Seconds of one forward and backward, the loss, the gradient."""
    q.grad, wait = None, torch.cuda.synchronize if q.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    loss = path(q, k_pos, keys, .2)
    loss.backward()
    wait()
    return time.perf_counter() - start, loss.item(), q.grad


def high_water(restart=False):
    """The most memory that this process held, in bytes; on Linux, since the last restart."""
    if sys.platform != "linux": return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*(1 if sys.platform == "darwin" else 1024)
    if restart: Path("/proc/self/clear_refs").write_text("5")
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))*1024


def peak(a):
    """Bytes that one run of the path `a.only` needs above its inputs (called in a fresh process)."""
    path, x = paths(a.chunks)[a.only], inputs(a)
    once(path, x[0].detach()[:64].requires_grad_(), x[1][:64], x[2][:, :4096])  # libraries are loaded now
    if a.device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        once(path, *x)
        return torch.cuda.max_memory_allocated() - before
    before = high_water(restart=True)
    once(path, *x)
    return high_water() - before


def main():
    """Measure and print."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--queries", type=int, default=1568, help="M: pictures a rank x positions")
    p.add_argument("--keys", type=int, default=65536, help="K: length of the queue")
    p.add_argument("--dim", type=int, default=128, help="of a vector")
    p.add_argument("--chunks", type=int, nargs="+", default=[512, 1024, 2048, 8192], help="keys a chunk, each measured")
    p.add_argument("--rounds", type=int, default=5, help="runs of each path")
    p.add_argument("--threads", type=int, default=1, help="of the CPU")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--only", help=argparse.SUPPRESS)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    if a.only: return print(peak(a))

    x, found, seconds, results = inputs(a), paths(a.chunks), {}, []
    for i in range(a.rounds + 1):                                # the first round warms up
        for name, path in found.items():
            t, loss, grad = once(path, *x)
            if i == 0 and name == "reference": ref_loss, ref_grad = loss, grad
            if i == 0: off = abs(loss - ref_loss)/ref_loss, ((grad - ref_grad).abs().max()/ref_grad.abs().max()).item()
            if i == 0: seconds[name] = dict(times=[], value_off=off[0], grad_off=off[1])
            else: seconds[name]["times"].append(t)
    base = statistics.median(seconds["reference"]["times"])
    print(f"M {a.queries}, K {a.keys}, dim {a.dim}, {a.device}, {a.threads} thread(s), torch {torch.__version__}")
    print(f"{'path':24}{'seconds':>9}{'of ref.':>9}{'extra MB':>10}{'value off':>11}{'grad off':>10}")
    for name, r in seconds.items():
        mb = int(subprocess.run([sys.executable, *sys.argv, "--only", name], check=True, capture_output=True, text=True).stdout)/1e6
        s = statistics.median(r.pop("times"))
        results.append(dict(path=name, seconds=round(s, 4), ratio=round(s/base, 3), extra_mb=round(mb), **r))
        print(f"{name:24}{s:9.3f}{s/base:9.2f}{mb:10.0f}{r['value_off']:11.1e}{r['grad_off']:10.1e}")
    print(json.dumps(dict(benchmark="loss", queries=a.queries, keys=a.keys, dim=a.dim, device=a.device, threads=a.threads,
                          torch=torch.__version__, results=results)))


if __name__ == "__main__": main()
