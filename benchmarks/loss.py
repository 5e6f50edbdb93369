"""Time and memory of the loss alone: reference, chunked, and PyTorch's linear_cross_entropy.

    python benchmarks/loss.py                        # M = 1568 queries, K = 65536 keys, one thread
    python benchmarks/loss.py --device cuda --chunks 1024 8192 65536

Forward and backward together, at the size of one process of the paper's runs. Times are medians of
interleaved rounds: every implementation once, then every one once more, so that other load slows
all of them alike. Memory is the peak above the inputs, each implementation in a process of its own.
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


def info_nce_by_linear_cross_entropy(q, k_pos, keys, temperature):
    """InfoNCE with PyTorch's chunked loss, which has no positives that differ per query.

    It computes the log-sum-exp over the negatives (its loss for target 0 plus the logit of that
    target), and the positive is added afterwards: softplus(log-sum-exp - positive).
    """
    target = torch.zeros(len(q), dtype=torch.long, device=q.device)
    options = torch.nn.LinearCrossEntropyOptions()
    loss = F.linear_cross_entropy(
        q / temperature, keys.T, target, reduction="none", options=options
    )
    return F.softplus(loss + (q @ keys[:, 0] - (q * k_pos).sum(1)) / temperature).mean()


def implementations(chunks):
    """Name -> function of (q, k_pos, keys, temperature)."""
    found = {"reference": info_nce}
    for chunk in chunks:
        found[f"chunk {chunk}"] = lambda *args, chunk=chunk: info_nce(*args, chunk=chunk)
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found["linear_cross_entropy"] = info_nce_by_linear_cross_entropy
    return found


def make_inputs(queries, keys, options):
    """q with gradient, k_pos, keys."""
    torch.manual_seed(0)
    q = F.normalize(torch.randn(queries, options.dim, device=options.device), dim=1)
    k_pos = F.normalize(torch.randn(queries, options.dim, device=options.device), dim=1)
    queue = F.normalize(torch.randn(options.dim, keys, device=options.device), dim=0)
    return q.requires_grad_(), k_pos, queue


def synchronize(tensor):
    """Wait until a CUDA device has finished."""
    if tensor.is_cuda:
        torch.cuda.synchronize()


def time_once(loss_function, q, k_pos, keys):
    """Seconds of one forward and backward, the loss, the gradient."""
    q.grad = None
    synchronize(q)
    start = time.perf_counter()
    loss = loss_function(q, k_pos, keys, 0.2)
    loss.backward()
    synchronize(q)
    return time.perf_counter() - start, loss.item(), q.grad


def peak_process_memory(restart=False):
    """Peak memory of this process in bytes; on Linux, since the last restart."""
    if sys.platform != "linux":
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if restart:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line for line in lines if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024


def extra_memory(options):
    """Peak bytes above the inputs of the implementation `options.only`, in a fresh process."""
    loss_function = implementations(options.chunks)[options.only]
    q, k_pos, keys = make_inputs(options.queries, options.keys, options)
    # a small run first, which loads the libraries
    time_once(loss_function, q.detach()[:64].requires_grad_(), k_pos[:64], keys[:, :4096])
    if options.device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        time_once(loss_function, q, k_pos, keys)
        return torch.cuda.max_memory_allocated() - before
    before = peak_process_memory(restart=True)
    time_once(loss_function, q, k_pos, keys)
    return peak_process_memory() - before


def extra_memory_in_subprocess(name):
    command = [sys.executable, *sys.argv, "--only", name]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(result.stdout) / 1e6


def measure(options):
    """Name -> seconds of each round and the errors relative to the reference."""
    inputs, found = make_inputs(options.queries, options.keys, options), {}
    functions = implementations(options.chunks)
    for i in range(options.rounds + 1):  # the first round warms up
        for name, loss_function in functions.items():
            seconds, loss, gradient = time_once(loss_function, *inputs)
            if i > 0:
                found[name]["times"].append(seconds)
                continue
            if name == "reference":
                reference_loss, reference = loss, gradient
            error = (gradient - reference).abs().max() / reference.abs().max()
            found[name] = {
                "times": [],
                "value_off": abs(loss - reference_loss) / reference_loss,
                "grad_off": error.item(),
            }
    return found


def report(options, found):
    """Print the table; a dict for each implementation."""
    reference, results = statistics.median(found["reference"]["times"]), []
    print(
        f"M {options.queries}, K {options.keys}, dim {options.dim}, {options.device}, "
        f"{options.threads} thread(s), torch {torch.__version__}"
    )
    print(
        f"{'implementation':24}{'seconds':>9}{'of ref.':>9}{'extra MB':>10}"
        f"{'value error':>13}{'grad error':>12}"
    )
    for name, row in found.items():
        megabytes = extra_memory_in_subprocess(name)
        seconds = statistics.median(row.pop("times"))
        ratio = seconds / reference
        print(
            f"{name:24}{seconds:9.3f}{ratio:9.2f}{megabytes:10.0f}"
            f"{row['value_off']:13.1e}{row['grad_off']:12.1e}"
        )
        numbers = {"seconds": round(seconds, 4), "ratio": round(ratio, 3)}
        results.append({"path": name, **numbers, "extra_mb": round(megabytes), **row})
    return results


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=1568, help="M: images x positions")
    parser.add_argument("--keys", type=int, default=65536, help="K: length of the queue")
    parser.add_argument("--dim", type=int, default=128, help="dimension of the embeddings")
    parser.add_argument(
        "--chunks",
        type=int,
        nargs="+",
        default=[512, 1024, 2048, 8192],
        help="keys per chunk, each measured",
    )
    parser.add_argument("--rounds", type=int, default=5, help="runs of each implementation")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    """Measure and print."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    if options.only:
        print(extra_memory(options))
        return
    results = report(options, measure(options))
    names = ("queries", "keys", "dim", "device", "threads")
    settings = {name: getattr(options, name) for name in names}
    version = {"torch": torch.__version__}
    print(json.dumps({"benchmark": "loss", **settings, **version, "results": results}))


if __name__ == "__main__":
    main()
