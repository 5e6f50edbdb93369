"""A whole training step: plain PyTorch against this package's fast paths, and DenseCL against MoCo-v2. Where the time goes, and the peak memory.

    python benchmarks/step.py                        # ResNet-18, 128 px, 16 pictures, K = 16384
    python benchmarks/step.py --device cuda --backbone resnet50 --image-size 224 --batch-size 32 --queue-len 65536
    python benchmarks/step.py --compile              # and torch.compile of the encoders, which takes a minute or more

reference    float32, N x C x H x W in memory, all logits at once, a moving average parameter by parameter, SGD parameter by parameter
fp32, bf16   channels_last, the loss in chunks, everything else as the trainer does it
mocov2 ...   the same without the dense head and the dense loss

Every path takes one step, then every path once more, each time another one first, so that a busy machine slows all of them
alike. Seconds are medians; a ratio is the median over the rounds of the ratio within a round. Pictures are random numbers: loading
is not measured. The parts are measured in rounds of their own, since on CUDA each of them has to wait for the device.
Memory: on CUDA the peak that one path allocates, on the CPU that of a fresh process, libraries included (blank where there is no
such count). Prints two tables and one line of JSON.
"""
import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time

import torch
from loss import high_water

import densecl.model
from densecl.encoder import Encoder, build_backbone
from densecl.loss import Queue
from densecl.model import DenseCL, MoCo

PARTS = ("query forward", "EMA", "key forward", "match", "losses", "queue", "backward", "optimizer", "other")


def slow_ema_(slow, fast, m):
    """The moving average as it is usually written."""
    with torch.no_grad():
        for s, f in zip(slow.parameters(), fast.parameters()): s.data = s.data*m + f.data*(1 - m)


def wait(device):
    """Until the device has done what it was told."""
    if device.type == "cuda": torch.cuda.synchronize()


@contextlib.contextmanager
def instead(owner, name, value):
    """Inside, owner.name is another one."""
    old = getattr(owner, name)
    setattr(owner, name, value)
    try: yield
    finally: setattr(owner, name, old)


class Path:
    """A model with its optimizer and the way in which it takes a step."""
    def __init__(self, name, a):
        self.plain, self.amp, self.device = name == "reference", "bf16" in name, torch.device(a.device)
        dense = "mocov2" not in name
        torch.manual_seed(0)
        encoder = Encoder(*build_backbone(a.backbone), a.hidden, a.dim, dense=dense)
        model = (DenseCL if dense else MoCo)(encoder, a.queue_len, chunk=None if self.plain else a.chunk)
        layout = torch.contiguous_format if self.plain else torch.channels_last
        self.model = model.to(self.device, memory_format=layout)
        if "compiled" in name:
            model.encoder_q.compile()
            model.encoder_k.compile()
        learn = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(learn, 1e-3, momentum=.9, weight_decay=1e-4, **(dict(foreach=False) if self.plain else dict(fused=True)))
        shape = (a.batch_size, 3, a.image_size, a.image_size)
        self.views = [torch.randn(shape, device=self.device).to(memory_format=layout) for _ in range(2)]

    def forward(self):
        """The model's forward, as the trainer calls it."""
        slow = instead(densecl.model, "ema_", slow_ema_) if self.plain else contextlib.nullcontext()
        with slow, torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp): return self.model(*self.views)["loss"]

    def step(self):
        """Seconds of a whole step."""
        wait(self.device)
        start = time.perf_counter()
        loss = self.forward()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        wait(self.device)
        return time.perf_counter() - start

    def parts(self):
        """Part -> seconds, for one step; "other" is what is left of the forward."""
        found, model = dict.fromkeys(PARTS, 0.), densecl.model

        def timed(part, function):
            def run(*args, **kwargs):
                wait(self.device)
                start = time.perf_counter()
                out = function(*args, **kwargs)
                wait(self.device)
                found[part] += time.perf_counter() - start
                return out
            return run

        with contextlib.ExitStack() as stack:
            change = lambda owner, name, part: stack.enter_context(instead(owner, name, timed(part, getattr(owner, name))))
            change(self.model.encoder_q, "forward", "query forward")
            change(self.model.encoder_k, "forward", "key forward")
            change(Queue, "push", "queue")
            for name, part in (("best_match", "match"), ("take", "match"), ("info_nce", "losses")): change(model, name, part)
            if self.plain: stack.enter_context(instead(sys.modules[__name__], "slow_ema_", timed("EMA", slow_ema_)))
            else: change(model, "ema_", "EMA")
            whole = timed("other", self.forward)
            loss = whole()
        found["other"] -= sum(v for k, v in found.items() if k != "other")
        timed("backward", lambda: (self.optimizer.zero_grad(set_to_none=True), loss.backward()))()
        timed("optimizer", self.optimizer.step)()
        return found


def names(a):
    """The paths to be measured, the reference first."""
    amps = ["fp32"] + ["bf16"]*a.bf16
    found = ["reference"] + amps + [f"{x} compiled" for x in amps if a.compile]
    return found + [f"mocov2 {x}" for x in amps]


def peak(a):
    """MB at the peak of two steps of the path `a.only` (called in a fresh process), None where nobody counts."""
    path = Path(a.only, a)
    for _ in range(2): path.step()
    if a.device != "cpu": return torch.cuda.max_memory_allocated()/1e6
    return high_water()/1e6 if sys.platform in ("linux", "darwin") else None


def rounds(paths, count, what):
    """What `what` gives for each path: name -> list over the rounds. Another path begins each round."""
    found, order = {n: [] for n in paths}, list(paths)
    for i in range(count):
        for n in order[i % len(order):] + order[:i % len(order)]: found[n].append(what(paths[n]))
    return found


def ratio(times, a, b):
    """Median over the rounds of a's time in b's."""
    return statistics.median(x/y for x, y in zip(times[a], times[b]))


def results(a, paths):
    """A dict for each path."""
    for p in paths.values(): p.step(), p.step()                              # warm up; compile
    times, split, found = rounds(paths, a.rounds, Path.step), rounds(paths, a.rounds_of_parts, Path.parts), []
    for n in paths:
        twin = n if "mocov2" in n else f"mocov2 {n}"
        mb = None if a.no_memory else json.loads(subprocess.run([sys.executable, *sys.argv, "--only", n], check=True, capture_output=True, text=True).stdout)
        found.append(dict(path=n, seconds=statistics.median(times[n]), of_reference=ratio(times, n, "reference"),
                          of_mocov2=ratio(times, n, twin) if twin in times else None, peak_mb=mb and round(mb),
                          parts={k: statistics.median(s[k] for s in split[n]) for k in PARTS} if split[n] else {}))
    return found


def table(a, found):
    """The two tables as text."""
    blank = lambda v, form: format(v, form) if v is not None else ""
    lines = [f"{a.backbone}, {a.image_size} px, {a.batch_size} pictures, K {a.queue_len}, {a.device}, {torch.get_num_threads()} thread(s), "
             f"{a.rounds} rounds, torch {torch.__version__}", f"{'path':16}{'seconds':>9}{'of ref.':>9}{'of mocov2':>11}{'peak MB':>9}"]
    lines += [f"{r['path']:16}{r['seconds']:9.4f}{r['of_reference']:9.3f}{blank(r['of_mocov2'], '.3f'):>11}{blank(r['peak_mb'], 'd'):>9}" for r in found]
    lines += ["", f"{'milliseconds of':16}" + "".join(f"{r['path']:>16}" for r in found)]
    lines += [f"{k:16}" + "".join(f"{1e3*r['parts'][k]:16.2f}" for r in found) for k in PARTS if found[0]["parts"]]
    return "\n".join(lines)


def main():
    """Measure and print."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--backbone", default="resnet18", help="as in densecl.train")
    p.add_argument("--image-size", type=int, default=128, help="side of a picture in pixels")
    p.add_argument("--batch-size", type=int, default=16, help="pictures of this one process")
    p.add_argument("--queue-len", type=int, default=16384, help="K")
    p.add_argument("--hidden", type=int, default=2048, help="width of the heads' hidden layer")
    p.add_argument("--dim", type=int, default=128, help="of a vector")
    p.add_argument("--chunk", type=int, default=0, help="keys a chunk of the loss, on the fast paths; 0: as the trainer, 1024 on the CPU, 8192 on CUDA")
    p.add_argument("--rounds", type=int, default=9, help="steps of each path")
    p.add_argument("--rounds-of-parts", type=int, default=3, help="steps of each path that are taken apart")
    p.add_argument("--threads", type=int, default=0, help="of the CPU; 0: torch decides")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="measure bf16, too; on a CPU without bf16 it is slow")
    p.add_argument("--compile", action="store_true", help="measure torch.compile of the encoders, too")
    p.add_argument("--no-memory", action="store_true", help="leave out the peak memory, which takes a process a path")
    p.add_argument("--only", help=argparse.SUPPRESS)
    a = p.parse_args()
    a.chunk = a.chunk or (8192 if a.device == "cuda" else 1024)
    if a.threads: torch.set_num_threads(a.threads)
    if a.only: return print(json.dumps(peak(a)))
    found = results(a, {n: Path(n, a) for n in names(a)})
    print(table(a, found))
    rounded = [{k: round(v, 5) if isinstance(v, float) else v for k, v in r.items()} | dict(parts={k: round(v, 5) for k, v in r["parts"].items()}) for r in found]
    setting = {k: getattr(a, k) for k in ["backbone", "image_size", "batch_size", "queue_len", "device", "rounds"]}
    print(json.dumps(dict(benchmark="step", **setting, threads=torch.get_num_threads(), torch=torch.__version__, results=rounded)))


if __name__ == "__main__": main()
