"""Two processes train together: the same values as one process, equal queues, and ShuffleBN."""

import copy
import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing import spawn

import tiny
from densecl import trainer
from densecl.accumulate import accumulate_gradients
from densecl.config import Config
from densecl.data.dataset import BatchSampler
from densecl.encoder import Encoder
from densecl.model import DenseCL
from densecl.queue import Queue
from densecl.runtime import distributed
from densecl.runtime.distributed import BatchShuffle, all_gather, all_reduce_mean
from densecl.trainer import wrap_model

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT.parent / "shared" / "data" / "imagenet-samples" / "train"
B = 3  # images per rank
TINY = shlex.split(
    "demo --backbone resnet18-layer2 --image-size 32 --batch-size 4 --queue-len 12 --lr 0.0075 "
    "--dim 8 --hidden 16 --workers 0 --threads 1 --amp off --log-every 1 --probe ''"
)


def run_rank(rank, folder):
    """What each process does: join the group, run every job, leave the results in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    jobs = {
        "no_bn": lambda: learn(build(None), images(6), rank),
        "eval_bn": lambda: learn(build(False), images(6), rank),
        "accumulated": lambda: learn(build(False), images(6), rank, accumulate=B),
        "keys": lambda: keys_as_rank(rank),
        "shuffle": lambda: shuffle_as_rank(rank),
        "memory_format": lambda: shuffle_channels_last_as_rank(rank),
        "twenty": lambda: twenty_steps_as_rank(rank),
        "queues": lambda: enqueue_as_rank(rank),
        "amp": lambda: choose_amp_as_rank(rank),
        "resumed": lambda: resume_with_accumulation_as_rank(folder),
    }
    torch.save({name: job() for name, job in jobs.items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Name of a job -> its results on rank 0 and rank 1. One pair of processes runs all jobs."""
    folder = tmp_path_factory.mktemp("ranks")
    spawn(run_rank, (str(folder),), nprocs=2)
    results = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    return {name: [result[name] for result in results] for name in results[0]}


def train(*options):
    """`densecl.train` in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [*command, "-m", "densecl.train", *map(str, options)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def rows(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def images(steps=1, views=2):
    """Noise: steps x views x (2 B) x 3 x 8 x 8."""
    return torch.randn(steps, views, 2 * B, 3, 8, 8, generator=torch.Generator().manual_seed(7))


def choose_amp_as_rank(rank):
    """What --amp auto is where both ranks, only the first, or neither has bf16."""
    chosen = []
    for machines in ((True, True), (True, False), (False, False)):
        with patch.object(distributed, "has_bf16", return_value=machines[rank]):
            chosen.append(distributed.choose_amp("auto", torch.device("cpu")))
    return chosen


def part(x, rank):
    """The images of a rank."""
    return x[rank * B : (rank + 1) * B]


def build(bn, seed=0, queue_len=20):
    """A small DenseCL. `bn`: None for no batch norm, or whether it is in train mode."""
    torch.manual_seed(seed)
    layers = [
        nn.Conv2d(3, 12, 3, stride=2, padding=1, bias=bn is None),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, padding=1),
    ]
    if bn is not None:
        layers.insert(1, nn.BatchNorm2d(12))
        nn.init.normal_(layers[1].running_mean, std=0.2)
        nn.init.uniform_(layers[1].running_var, 0.5, 2.0)
    encoder = Encoder(nn.Sequential(*layers), 16, hidden=24, dim=8)
    return DenseCL(encoder, queue_len=queue_len, momentum=0.9).train(bn is not False)


def learn(model, batches, rank=None, accumulate=1):
    """SGD steps: losses, matches, gradients and queues of each.

    `rank`: train on its part of each batch, with the model wrapped as the trainer does it.
    `accumulate`: number of the trainer's micro-batches.
    """
    forward = model if rank is None else wrap_model(model, Config())
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=1e-4)
    steps = []
    for im_q, im_k in batches:
        if rank is not None:
            im_q, im_k = part(im_q, rank), part(im_k, rank)
        optimizer.zero_grad()
        if accumulate > 1:
            out = accumulate_gradients(
                state_of(model, accumulate), forward, {"im_q": im_q, "im_k": im_k}
            )
        else:
            out = forward(im_q, im_k)
            out["loss"].backward()
        optimizer.step()
        losses = torch.stack([out["loss"].detach(), out["loss_global"], out["loss_dense"]])
        named = model.named_parameters()
        steps.append(
            {
                "losses": all_reduce_mean(losses),
                "match": all_gather(out["match"]),
                "queue": model.queue.keys.clone(),
                "queue2": model.queue2.keys.clone(),
                "ptr": model.queue.ptr.clone(),
                "grads": {name: p.grad.clone() for name, p in named if p.requires_grad},
            }
        )
    last = {name: value.clone() for name, value in model.state_dict().items()}
    return {"steps": steps, "last": last}


def test_ranks_choose_the_same_arithmetic(two):
    assert two["amp"] == [["bf16", "off", "off"]] * 2


def state_of(model, accumulate):
    """The part of a run's state that `accumulate_gradients` needs."""
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    config = Config(accumulate=accumulate)
    return SimpleNamespace(config=config, device=torch.device("cpu"), model=model, scaler=scaler)


@pytest.mark.parametrize(
    "bn, job",
    [(None, "no_bn"), (False, "eval_bn"), (False, "accumulated")],
    ids=["without BN", "BN in eval mode", "three micro-batches"],
)
def test_two_ranks_and_one_process_agree(bn, job, two):
    one = learn(build(bn), images(6))
    assert one["steps"][0]["losses"][0] != one["steps"][-1]["losses"][0]
    for result in two[job]:
        for a, b in zip(one["steps"], result["steps"], strict=True):
            torch.testing.assert_close(b["losses"], a["losses"], rtol=1e-5, atol=1e-6)
            assert torch.equal(b["match"], a["match"])
            assert torch.equal(b["ptr"], a["ptr"])
            for name in ("queue", "queue2"):
                torch.testing.assert_close(b[name], a[name], rtol=1e-5, atol=1e-6)
            for name, expected in a["grads"].items():
                tolerance = 1e-6 + 1e-5 * expected.abs().max()
                assert (b["grads"][name] - expected).abs().max() <= tolerance, name
        for name, expected in one["last"].items():
            torch.testing.assert_close(
                result["last"][name], expected, rtol=1e-5, atol=2e-6, msg=name
            )


def keys_as_rank(rank):
    """One forward with BN in train mode: the keys, the images that the key encoder saw, queues."""
    model, seen = build(bn=True), []
    model.encoder_k.backbone.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].clone())
    )
    im_q, im_k = (part(x, rank) for x in images()[0])
    # only rank 0's seed counts; its permutation separates [0, 1, 3] from [2, 4, 5]
    torch.manual_seed(rank + 101)
    out = model(im_q, im_k)
    return {
        "k": out["k"],
        "seen": torch.cat(seen),
        "queue": model.queue.keys,
        "queue2": model.queue2.keys,
    }


def test_shuffle_bn_shuffles_the_images_and_sorts_the_keys_back(two):
    im_k = images()[0, 1]
    torch.manual_seed(101)
    perm = torch.randperm(2 * B)
    encoders = [copy.deepcopy(build(bn=True).encoder_k) for _ in range(2)]
    # BN takes its statistics over these images
    outputs = [encoders[rank](part(im_k[perm], rank)) for rank in range(2)]
    k, dense_pooled = torch.empty(2 * B, 8), torch.empty(2 * B, 8)
    k[perm] = torch.cat([out.embedding for out in outputs]).detach()
    dense_pooled[perm] = torch.cat([out.dense_pooled for out in outputs]).detach()
    unshuffled = torch.cat([encoders[rank](part(im_k, rank)).embedding for rank in range(2)])
    assert not torch.allclose(k, unshuffled.detach(), atol=1e-3)  # the shuffle changes the keys
    for rank, result in enumerate(two["keys"]):
        assert torch.equal(result["seen"], part(im_k[perm], rank))
        torch.testing.assert_close(result["k"], part(k, rank))
        torch.testing.assert_close(result["queue"][:, : 2 * B], k.T)
        torch.testing.assert_close(result["queue2"][:, : 2 * B], dense_pooled.T)


def shuffle_as_rank(rank):
    torch.manual_seed(rank)
    own, shuffle = torch.arange(B) + 100 * rank, BatchShuffle(B, "cpu")
    shuffled = shuffle.shuffle(own)
    return {
        "perm": shuffle.perm,
        "own": own,
        "shuffled": shuffled,
        "unshuffled": shuffle.unshuffle(shuffled),
    }


def test_rank_0_draws_the_permutation_and_unshuffle_inverts_shuffle(two):
    torch.manual_seed(0)
    perm = torch.randperm(2 * B)
    batch = torch.cat([result["own"] for result in two["shuffle"]])
    for rank, result in enumerate(two["shuffle"]):
        assert torch.equal(result["perm"], perm)
        assert torch.equal(result["shuffled"], part(batch[perm], rank))
        assert torch.equal(result["unshuffled"], result["own"])


def shuffle_channels_last_as_rank(rank):
    x = numbered_images(rank).to(memory_format=torch.channels_last)
    shuffle = BatchShuffle(B, x.device)
    return shuffle.shuffle(x), shuffle.unshuffle(shuffle.shuffle(x)), shuffle.perm


def numbered_images(rank):
    return torch.arange(B * 3 * 2 * 2.0).view(B, 3, 2, 2) + 1000 * rank


def test_the_memory_format_does_not_change_what_is_shuffled(two):
    batch = torch.cat([numbered_images(rank) for rank in range(2)])
    for rank, (shuffled, unshuffled, perm) in enumerate(two["memory_format"]):
        assert torch.equal(shuffled, batch[part(perm, rank)])
        assert torch.equal(unshuffled, part(batch, rank))
        assert unshuffled.is_contiguous(memory_format=torch.channels_last)


def twenty_steps_as_rank(rank):
    model = build(bn=True, seed=rank)  # other queues and other parameters on each rank, on purpose
    before = model.queue.keys.clone()
    return learn(model, images(20), rank) | {"before": before}


def test_two_ranks_hold_the_same_bits_after_twenty_steps(two):
    a, b = two["twenty"]
    assert not torch.equal(a["before"], b["before"])
    same = [name for name in a["last"] if "running_" not in name]  # BN's differ between ranks
    assert {"queue.keys", "queue2.keys", "queue.ptr"} < set(same)
    for name in same:
        assert torch.equal(a["last"][name], b["last"][name]), name
    for x, y in zip(a["steps"], b["steps"], strict=True):
        assert torch.equal(x["queue2"], y["queue2"])
    bn = [name for name in a["last"] if "encoder_q" in name and "running_mean" in name]
    assert bn and not torch.equal(a["last"][bn[0]], b["last"][bn[0]])


def resume_with_accumulation_as_rank(folder):
    """State after four steps of two micro-batches, of a run without and with an interruption."""
    config = replace(tiny.TINY, data_root="builtin:photos", batch_size=8, accumulate=2)
    config = replace(config, deterministic=True, max_steps=4, out=f"{folder}/whole")
    whole = trainer.train(config)
    trainer.train(replace(config, max_steps=2, out=f"{folder}/parts"))
    parts = trainer.train(replace(config, out=f"{folder}/parts"))
    return whole.state_dict(), parts.state_dict()


def test_a_resumed_run_with_accumulation_is_the_same_bit_for_bit_on_two_ranks(two):
    for whole, parts in two["resumed"]:
        assert whole["queue.ptr"].item() == 4 * 8 % 12
        # rank 1 continues with the running statistics of rank 0, which no step reads
        for name in (name for name in whole if "running_" not in name):
            assert torch.equal(whole[name], parts[name]), name


LENGTHS = (1, B, 2 * B - 1, 2 * B, 2 * B + 1, 4 * B, 16)


def enqueue_as_rank(rank):
    queues = {length: Queue(2, length) for length in LENGTHS}
    for step in range(5):
        for queue in queues.values():
            queue.enqueue(part(numbered_keys(step), rank))
    return {length: (queue.keys, queue.ptr) for length, queue in queues.items()}


def numbered_keys(step):
    numbers = torch.arange(step * 2 * B, (step + 1) * 2 * B).float()
    return numbers[:, None].expand(-1, 2).contiguous()


def check_queue(keys, ptr, length):
    """Slot i holds the newest key whose number is i modulo the length."""
    enqueued = torch.arange(5 * 2 * B)
    for i in range(length):
        newest = enqueued[enqueued % length == i].max()
        assert keys[:, i].tolist() == [newest] * 2, f"slot {i} of {length}"
    assert ptr.item() == 5 * 2 * B % length


def test_queues_of_any_length_wrap_around_with_two_ranks(two):
    for result in two["queues"]:
        for length in LENGTHS:
            check_queue(*result[length], length)


@pytest.mark.parametrize("length", LENGTHS)
def test_queues_of_any_length_wrap_around_with_one_process(length):
    queue = Queue(2, length)
    for step in range(5):
        queue.enqueue(numbered_keys(step))
    check_queue(queue.keys, queue.ptr, length)


@pytest.mark.parametrize("first, last", [(0, 9), (4, 7)])
def test_the_batches_of_two_ranks_together_are_those_of_one_process(first, last):
    one = list(BatchSampler(14, 4, 3, first, last))
    ranks = [list(BatchSampler(14, 4, 3, first, last, rank, 2)) for rank in range(2)]
    assert len(one) == last - first
    assert [a + b for a, b in zip(*ranks, strict=True)] == one
    if first > 0:
        return
    for epoch in range(3):  # no image twice
        batches = one[3 * epoch : 3 * epoch + 3]
        assert len({index for batch in batches for _, _, index in batch}) == 12


def test_torchrun_trains_to_the_end_and_writes_one_run_folder(tmp_path, make_images):
    folder, out = make_images(tmp_path / "images"), tmp_path / "out"
    options = ("--max-steps", 5, "--workers", 1)
    done = train(*TINY, "--data-root", folder, "--out", out, *options)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out"]
    assert [row["step"] for row in rows(out)] == [1, 2, 3, 4, 5]
    assert all(np.isfinite(row["loss"]) and 0 <= row["match_acc"] <= 1 for row in rows(out))
    assert len(list((out / "events").iterdir())) == 1
    assert [path.name for path in (out / "matches").iterdir()] == ["step-00000005.png"]


def with_a_corrupt_image_on_rank_1(make_images, folder):
    """A dataset whose only corrupt image is read by rank 1 in the first step; its name."""
    make_images(folder)
    batch = next(iter(BatchSampler(12, 4, 0, 0, 1, 1, 2)))
    _, _, index = batch[0]
    corrupt = sorted(folder.iterdir())[index]
    corrupt.write_bytes(b"no image")
    return corrupt.name


def test_a_corrupt_image_of_rank_1_is_counted_and_named(tmp_path, make_images):
    folder, out = tmp_path / "images", tmp_path / "out"
    name = with_a_corrupt_image_on_rank_1(make_images, folder)
    options = ("--max-steps", 2, "--max-corrupt-fraction", 0.6)
    done = train(*TINY, "--data-root", folder, "--out", out, *options)
    assert done.returncode == 0, done.stderr
    named = [line for line in done.stderr.splitlines() if name in line]
    assert [line.startswith("hint: ") for line in named] == [True, False]
    assert rows(out)[-1]["bad"] >= 1


def test_a_corrupt_image_of_rank_1_stops_both_on_request(tmp_path, make_images):
    folder, out = tmp_path / "images", tmp_path / "out"
    name = with_a_corrupt_image_on_rank_1(make_images, folder)
    options = ("--max-steps", 2, "--on-bad-image", "raise")
    done = train(*TINY, "--data-root", folder, "--out", out, *options)
    assert done.returncode != 0
    messages = [line for line in done.stderr.splitlines() if line.startswith("densecl: ")]
    assert sum(name in line for line in messages) == 1, done.stderr


def test_the_error_of_a_wrong_input_is_printed_once_under_torchrun(tmp_path):
    done = train("demo", "--lr", "nan", "--out", tmp_path / "out")
    assert done.returncode != 0
    assert sum(line.startswith("densecl: --lr") for line in done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.long
@pytest.mark.skipif(
    not SAMPLES.exists(), reason="the sample photographs are not beside this checkout"
)
def test_real_photographs_train_on_two_ranks(tmp_path):
    options = shlex.split(
        "--image-size 96 --backbone resnet18 --queue-len 1024 --epochs 2 --max-steps 20 "
        "--log-every 5"
    )
    done = train("demo", "--data-root", SAMPLES, "--out", tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    measured = [row for row in rows(tmp_path / "out") if "loss" in row]
    assert [row["step"] for row in measured] == [5, 10, 15, 20]
    assert all(np.isfinite(row["loss"]) and row["bad"] == 0 for row in measured)
