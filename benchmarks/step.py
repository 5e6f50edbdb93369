"""Time and memory of a training step: plain PyTorch, this package, DenseCL and MoCo-v2.

    python benchmarks/step.py                        # ResNet-18, 128 px, 16 images, K = 16384
    python benchmarks/step.py --compile              # and torch.compile, which takes a minute
    python benchmarks/step.py --device cuda --backbone resnet50 --image-size 224 --batch-size 32 \
        --queue-len 65536

reference    float32, contiguous memory format, the reference loss with all logits, a moving average
             and SGD in a loop over the parameters
contiguous   float32, contiguous memory format, everything else as the trainer does it
fp32, bf16   the same with channels_last, as in the presets
mocov2 ...   the same without the dense head and the dense loss

Every variant takes one step, then every variant once more, each time in another order, so that
other load slows all of them alike. Seconds are medians; a ratio is the median over the rounds of
the ratio within a round. Images are random numbers: loading is not measured. The parts are measured
in rounds of their own, since on CUDA each of them has to wait for the device. cuDNN chooses its
fastest algorithms, as in a run.
Memory: on CUDA the peak that one variant allocates, on the CPU that of a fresh process with its
libraries (blank on systems that do not report it). Prints two tables and one line of JSON.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from unittest.mock import patch

import torch
from loss import peak_process_memory

import densecl.model
from densecl.encoder import Encoder, build_backbone
from densecl.model import DenseCL, MoCo
from densecl.queue import Queue
from densecl.runtime.distributed import init_distributed
from densecl.runtime.io import UsageError

PARTS = (
    *("query forward", "EMA", "key forward", "match", "losses", "queue"),
    *("backward", "optimizer", "other"),
)
MODEL_FUNCTIONS = {"positive_vectors": "match", "info_nce": "losses"}


def momentum_update_in_loop(slow, fast, m):
    """The moving average as it is usually written."""
    with torch.no_grad():
        for slow_parameter, fast_parameter in zip(slow.parameters(), fast.parameters()):
            slow_parameter.data = slow_parameter.data * m + fast_parameter.data * (1 - m)


def synchronize(device):
    """Wait until a CUDA device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize()


class Variant:
    """A model with its optimizer and its way of taking a step.

    Args:
        name: one of `variant_names`
        options: of the command line
    """

    def __init__(self, name, options):
        self.reference = name == "reference"
        self.amp = "bf16" in name
        self.device = torch.device(options.device)
        contiguous = name in ("reference", "contiguous")
        self.memory_format = torch.contiguous_format if contiguous else torch.channels_last
        self.model = self.build_model(dense="mocov2" not in name, options=options)
        if "compiled" in name:
            self.model.encoder_q.compile()
            self.model.encoder_k.compile()
        implementation = {"foreach": False} if self.reference else {"fused": True}
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(
            parameters, 1e-3, momentum=0.9, weight_decay=1e-4, **implementation
        )
        shape = (2, options.batch_size, 3, options.image_size, options.image_size)
        views = torch.randn(shape, device=self.device)
        self.views = [view.to(memory_format=self.memory_format) for view in views]

    def build_model(self, dense, options):
        """DenseCL or MoCo-v2 on the device."""
        torch.manual_seed(0)
        backbone, channels = build_backbone(options.backbone)
        encoder = Encoder(backbone, channels, options.hidden, options.dim, dense=dense)
        model_class = DenseCL if dense else MoCo
        chunk = None if self.reference else options.chunk or "auto"
        model = model_class(encoder, options.queue_len, chunk=chunk)
        return model.to(self.device, memory_format=self.memory_format)

    def forward(self):
        """The model's forward pass, as the trainer calls it."""
        with contextlib.ExitStack() as stack:
            if self.reference:
                name = "momentum_update_"
                stack.enter_context(patch.object(densecl.model, name, momentum_update_in_loop))
            stack.enter_context(torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp))
            return self.model(*self.views)["loss"]

    def backward(self, loss):
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()

    def step(self):
        """Seconds of a complete step."""
        synchronize(self.device)
        start = time.perf_counter()
        self.backward(self.forward())
        self.optimizer.step()
        synchronize(self.device)
        return time.perf_counter() - start

    def parts(self):
        """Part -> seconds, for one step; "other" is the rest of the forward pass."""
        seconds = dict.fromkeys(PARTS, 0.0)

        def timed(part, function):
            def run(*args, **kwargs):
                synchronize(self.device)
                start = time.perf_counter()
                out = function(*args, **kwargs)
                synchronize(self.device)
                seconds[part] += time.perf_counter() - start
                return out

            return run

        with contextlib.ExitStack() as stack:
            for owner, name, part in self.timed_functions():
                function = timed(part, getattr(owner, name))
                stack.enter_context(patch.object(owner, name, function))
            loss = timed("other", self.forward)()
        seconds["other"] -= sum(value for part, value in seconds.items() if part != "other")
        timed("backward", self.backward)(loss)
        timed("optimizer", self.optimizer.step)()
        return seconds

    def timed_functions(self):
        """(owner, attribute, part) of each function whose calls are timed."""
        yield self.model.encoder_q, "forward", "query forward"
        yield self.model.encoder_k, "forward", "key forward"
        yield Queue, "enqueue", "queue"
        if isinstance(self.model, DenseCL):
            yield self.model, "assign_positives", "match"
        for name, part in MODEL_FUNCTIONS.items():
            yield densecl.model, name, part
        if self.reference:
            yield sys.modules[__name__], "momentum_update_in_loop", "EMA"
        else:
            yield densecl.model, "momentum_update_", "EMA"


def variant_names(options):
    """The variants to measure, the reference first."""
    types = ["fp32", "bf16"] if options.bf16 else ["fp32"]
    compiled = [f"{name} compiled" for name in types if options.compile]
    return ["reference", "contiguous", *types, *compiled, *(f"mocov2 {name}" for name in types)]


def peak_memory(options):
    """MB at the peak of two steps of the variant `options.only`, in a fresh process."""
    variant = Variant(options.only, options)
    for _ in range(2):
        variant.step()
    if options.device != "cpu":
        return torch.cuda.max_memory_allocated() / 1e6
    return peak_process_memory() / 1e6 if sys.platform in ("linux", "darwin") else None


def peak_memory_in_subprocess(name):
    command = [sys.executable, *sys.argv, "--only", name]
    result = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        raise SystemExit(f"step.py: no peak memory of {name}, see above; --no-memory skips it")
    return json.loads(result.stdout.splitlines()[-1])


def measure_rounds(variants, rounds, measure):
    """Name -> list of `measure(variant)` over the rounds; each round starts with another one."""
    found = {name: [] for name in variants}
    names = list(variants)
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(measure(variants[name]))
    return found


def median_ratio(times, name, other):
    """Median over the rounds of the ratio of two variants' times."""
    return statistics.median(a / b for a, b in zip(times[name], times[other]))


def measure(options, variants):
    """A dict for each variant."""
    for variant in variants.values():
        for _ in range(2):  # warm up; compile
            variant.step()
    times = measure_rounds(variants, options.rounds, Variant.step)
    parts = measure_rounds(variants, options.rounds_of_parts, Variant.parts)
    results = []
    for name in variants:
        mocov2 = f"mocov2 {name}"
        megabytes = None if options.no_memory else peak_memory_in_subprocess(name)
        medians = {}
        if parts[name]:
            medians = {part: statistics.median(row[part] for row in parts[name]) for part in PARTS}
        results.append(
            {
                "path": name,
                "seconds": statistics.median(times[name]),
                "of_reference": median_ratio(times, name, "reference"),
                "of_mocov2": median_ratio(times, name, mocov2) if mocov2 in times else None,
                "peak_mb": megabytes and round(megabytes),
                "parts": medians,
            }
        )
    return results


def format_tables(options, results):
    """The two tables as text."""

    def optional(value, form):
        return "" if value is None else format(value, form)

    title = (
        f"{options.backbone}, {options.image_size} px, {options.batch_size} images, "
        f"K {options.queue_len}, {options.device}, {torch.get_num_threads()} thread(s), "
        f"{options.rounds} rounds, torch {torch.__version__}"
    )
    lines = [
        title,
        f"{'variant':16}{'seconds':>9}{'of ref.':>9}{'of mocov2':>11}{'peak MB':>9}",
    ]
    for row in results:
        of_mocov2, megabytes = optional(row["of_mocov2"], ".3f"), optional(row["peak_mb"], "d")
        lines.append(
            f"{row['path']:16}{row['seconds']:9.4f}{row['of_reference']:9.3f}"
            f"{of_mocov2:>11}{megabytes:>9}"
        )
    lines += ["", f"{'milliseconds':16}" + "".join(f"{row['path']:>16}" for row in results)]
    for part in PARTS if results[0]["parts"] else ():
        numbers = "".join(f"{1e3 * row['parts'][part]:16.2f}" for row in results)
        lines.append(f"{part:16}{numbers}")
    return "\n".join(lines)


def rounded(row):
    """A variant's dict with five digits per number."""
    row = {
        key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()
    }
    row["parts"] = {part: round(value, 5) for part, value in row["parts"].items()}
    return row


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--backbone", default="resnet18", help="as in densecl.train")
    add("--image-size", type=int, default=128, help="side of an image in pixels")
    add("--batch-size", type=int, default=16, help="images of this process")
    add("--queue-len", type=int, default=16384, help="K")
    add("--hidden", type=int, default=2048, help="width of the heads' hidden layer")
    add("--dim", type=int, default=128, help="dimension of the embeddings")
    add(
        "--chunk",
        type=int,
        default=0,
        help="keys per chunk of the chunked loss; 0: 1024 on the CPU, 8192 on CUDA",
    )
    add("--rounds", type=int, default=9, help="steps of each variant")
    add("--rounds-of-parts", type=int, default=3, help="steps whose parts are timed")
    add("--threads", type=int, default=0, help="CPU threads; 0: torch decides")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--bf16", action=switch, default=True, help="measure bf16; slow on a CPU without it")
    add("--compile", action="store_true", help="measure torch.compile of the encoders")
    add("--no-memory", action="store_true", help="skip the peak memory, one process per variant")
    add("--only", help=argparse.SUPPRESS)
    return parser.parse_args()


def set_up_device(device):
    """What a run does before its first step."""
    try:
        init_distributed(device)
    except UsageError as e:
        raise SystemExit(f"step.py: {e}") from None
    torch.backends.cudnn.benchmark = device == "cuda"


def main():
    """Measure and print."""
    options = parse_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    set_up_device(options.device)
    if options.only:
        print(json.dumps(peak_memory(options)))
        return
    variants = {name: Variant(name, options) for name in variant_names(options)}
    results = measure(options, variants)
    print(format_tables(options, results))
    names = ("backbone", "image_size", "batch_size", "queue_len", "device", "rounds")
    settings = {name: getattr(options, name) for name in names}
    settings |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    results = [rounded(row) for row in results]
    print(json.dumps({"benchmark": "step", **settings, "results": results}))


if __name__ == "__main__":
    main()
