"""Two processes that train together: the same numbers as one, the same queues everywhere, ShuffleBN as it is written."""
import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as td
from torch import nn
from torch.multiprocessing import spawn

from densecl.config import Config
from densecl.data import Batches
from densecl.dist import Shuffle, gather, mean
from densecl.encoder import Encoder
from densecl.loss import Queue
from densecl.model import DenseCL
from densecl.trainer import parallel

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT.parent/"shared"/"data"/"imagenet-samples"/"train"
B = 3                                    # pictures a rank
TINY = ("demo --backbone resnet18-layer2 --image-size 32 --batch-size 4 --queue-len 12 --lr 0.0075 --dim 8 --hidden 16 "
        "--workers 0 --threads 1 --amp off --log-every 1").split() + ["--probe", ""]


def one_rank(rank, folder):
    """What each spawned process does: join the group, do every work below, leave the results in the folder."""
    torch.set_num_threads(1)
    td.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    works = dict(no_bn=lambda: learn_as_rank(rank, None), eval_bn=lambda: learn_as_rank(rank, False), keys=lambda: keys_as_rank(rank),
                 shuffle=lambda: shuffle_as_rank(rank), layout=lambda: layout_as_rank(rank), twenty=lambda: twenty_steps_as_rank(rank), queues=lambda: push_as_rank(rank))
    torch.save({name: work() for name, work in works.items()}, f"{folder}/{rank}.pt")
    td.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Name of a work -> what it gave on rank 0 and rank 1. All in one pair of processes: starting them takes longest."""
    folder = tmp_path_factory.mktemp("ranks")
    spawn(one_rank, (str(folder),), nprocs=2)
    ranks = [torch.load(folder/f"{rank}.pt") for rank in range(2)]
    return {name: [r[name] for r in ranks] for name in ranks[0]}


def torchrun(*argv):
    """`densecl.train` in two processes."""
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "densecl.train", *argv],
                          env=env, capture_output=True, text=True, timeout=900)


def rows(out): return [json.loads(line) for line in (Path(out)/"metrics.jsonl").read_text().splitlines()]


def pictures(steps=1, views=2):
    """Noise: steps x views x (2 B) x 3 x 8 x 8."""
    return torch.randn(steps, views, 2*B, 3, 8, 8, generator=torch.Generator().manual_seed(7))


def share(x, rank): return x[rank*B:(rank + 1)*B]


def build(bn, seed=0, queue_len=20):
    """A small DenseCL. `bn`: None, or whether BN is in train mode."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 12, 3, stride=2, padding=1, bias=bn is None), nn.ReLU(), nn.Conv2d(12, 16, 3, padding=1)]
    if bn is not None: layers.insert(1, nn.BatchNorm2d(12))
    if bn is not None: nn.init.normal_(layers[1].running_mean, std=.2), nn.init.uniform_(layers[1].running_var, .5, 2.)
    model = DenseCL(Encoder(nn.Sequential(*layers), 16, hidden=24, dim=8), queue_len=queue_len, momentum=.9)
    return model.train(bn is not False)


def learn(model, batches, rank=None):
    """Some SGD steps: losses, matches, gradients and queues of each. `rank`: train on its share, wrapped as the trainer does it."""
    forward = model if rank is None else parallel(model, Config(), torch.device("cpu"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], .1, momentum=.9, weight_decay=1e-4)
    record = []
    for im_q, im_k in batches:
        out = forward(im_q, im_k) if rank is None else forward(share(im_q, rank), share(im_k, rank))
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        losses = mean(torch.stack([out["loss"].detach(), out["loss_global"], out["loss_dense"]]))
        grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.requires_grad}
        record.append(dict(losses=losses, match=gather(out["match"]), queue=model.queue.keys.clone(), queue2=model.queue2.keys.clone(),
                           ptr=model.queue.ptr.clone(), grads=grads))
    return dict(steps=record, last={k: v.clone() for k, v in model.state_dict().items()})


def learn_as_rank(rank, bn): return learn(build(bn), pictures(6), rank)


@pytest.mark.parametrize("bn, work", [(None, "no_bn"), (False, "eval_bn")], ids=["without BN", "BN in eval mode"])
def test_two_ranks_and_one_process_agree(bn, work, two):
    one = learn(build(bn), pictures(6))
    assert one["steps"][0]["losses"][0] != one["steps"][-1]["losses"][0]
    for ours in two[work]:
        for a, b in zip(one["steps"], ours["steps"], strict=True):
            torch.testing.assert_close(b["losses"], a["losses"], rtol=1e-5, atol=1e-6)
            assert torch.equal(b["match"], a["match"])
            assert torch.equal(b["ptr"], a["ptr"])
            for k in ("queue", "queue2"): torch.testing.assert_close(b[k], a[k], rtol=1e-5, atol=1e-6)
            for k in a["grads"]: assert (b["grads"][k] - a["grads"][k]).abs().max() <= 1e-6 + 1e-5*a["grads"][k].abs().max(), k
        for k in one["last"]: torch.testing.assert_close(ours["last"][k], one["last"][k], rtol=1e-5, atol=2e-6, msg=k)


def keys_as_rank(rank):
    """One forward with BN in train mode: the keys, which pictures the key encoder saw, and the queues after it."""
    model, seen = build(bn=True), []
    model.encoder_k.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    im_q, im_k = (share(x, rank) for x in pictures()[0])
    torch.manual_seed(rank + 101)                              # rank 0's permutation counts; it parts [0, 1, 3] from [2, 4, 5]
    out = model(im_q, im_k)
    return dict(k=out["k"], seen=torch.cat(seen), queue=model.queue.keys, queue2=model.queue2.keys)


def test_shuffle_bn_deals_the_pictures_and_brings_the_keys_back(two):
    im_k = pictures()[0, 1]
    torch.manual_seed(101)
    perm = torch.randperm(2*B)
    encoders = [copy.deepcopy(build(bn=True).encoder_k) for _ in range(2)]
    dealt = [encoders[r](share(im_k[perm], r)) for r in range(2)]      # BN takes its statistics over these pictures
    k, s = torch.empty(2*B, 8), torch.empty(2*B, 8)
    k[perm], s[perm] = torch.cat([d.q for d in dealt]).detach(), torch.cat([d.s for d in dealt]).detach()
    unshuffled = torch.cat([encoders[r](share(im_k, r)).q for r in range(2)]).detach()
    assert not torch.allclose(k, unshuffled, atol=1e-3)                # so the shuffle is seen in the keys
    for r, ours in enumerate(two["keys"]):
        assert torch.equal(ours["seen"], share(im_k[perm], r))
        torch.testing.assert_close(ours["k"], share(k, r))
        torch.testing.assert_close(ours["queue"][:, :2*B], k.T)
        torch.testing.assert_close(ours["queue2"][:, :2*B], s.T)


def shuffle_as_rank(rank):
    torch.manual_seed(rank)
    own, shuffle = torch.arange(B) + 100*rank, Shuffle(B, "cpu")
    dealt = shuffle.deal(own)
    return dict(perm=shuffle.perm, own=own, dealt=dealt, back=shuffle.back(dealt))


def test_rank_0_draws_the_permutation_and_back_undoes_deal(two):
    torch.manual_seed(0)
    perm = torch.randperm(2*B)
    everyone = torch.cat([t["own"] for t in two["shuffle"]])
    for r, t in enumerate(two["shuffle"]):
        assert torch.equal(t["perm"], perm)
        assert torch.equal(t["dealt"], share(everyone[perm], r))
        assert torch.equal(t["back"], t["own"])


def twenty_steps_as_rank(rank):
    model = build(bn=True, seed=rank)                          # other queues and other parameters on each rank, on purpose
    before = model.queue.keys.clone()
    return learn(model, pictures(20), rank) | dict(before=before)


def test_two_ranks_hold_the_same_bits_after_twenty_steps(two):
    a, b = two["twenty"]
    assert not torch.equal(a["before"], b["before"])
    same = [k for k in a["last"] if "running_" not in k]       # BN's statistics are each rank's own
    assert {"queue.keys", "queue2.keys", "queue.ptr"} < set(same)
    for k in same: assert torch.equal(a["last"][k], b["last"][k]), k
    for x, y in zip(a["steps"], b["steps"], strict=True): assert torch.equal(x["queue2"], y["queue2"])
    bn = [k for k in a["last"] if "encoder_q" in k and "running_mean" in k]
    assert bn and not torch.equal(a["last"][bn[0]], b["last"][bn[0]])


LENGTHS = (1, B, 2*B - 1, 2*B, 2*B + 1, 4*B, 16)


def push_as_rank(rank):
    queues = {length: Queue(2, length) for length in LENGTHS}
    for step in range(5):
        for queue in queues.values(): queue.push(share(numbered(step), rank))
    return {length: (queue.keys, queue.ptr) for length, queue in queues.items()}


def numbered(step): return torch.arange(step*2*B, (step + 1)*2*B).float()[:, None].expand(-1, 2).contiguous()


def check_queue(keys, ptr, length):
    """Slot i holds the newest key whose number is i modulo the length."""
    pushed = torch.arange(5*2*B)
    for i in range(length): assert keys[:, i].tolist() == [pushed[pushed % length == i].max()]*2, f"slot {i} of {length}"
    assert ptr.item() == 5*2*B % length


def test_queues_of_any_length_wrap_round_with_two_ranks(two):
    for got in two["queues"]:
        for length in LENGTHS: check_queue(*got[length], length)


@pytest.mark.parametrize("length", LENGTHS)
def test_queues_of_any_length_wrap_round_with_one_process(length):
    queue = Queue(2, length)
    for step in range(5): queue.push(numbered(step))
    check_queue(queue.keys, queue.ptr, length)


@pytest.mark.parametrize("first, last", [(0, 9), (4, 7)])
def test_the_batches_of_two_ranks_together_are_those_of_one_process(first, last):
    one = list(Batches(14, 4, 3, first, last))
    ranks = [list(Batches(14, 4, 3, first, last, rank, 2)) for rank in range(2)]
    assert len(one) == last - first
    assert [a + b for a, b in zip(*ranks, strict=True)] == one
    if first == 0:
        for epoch in range(3): assert len({i for batch in one[3*epoch:3*epoch + 3] for _, _, i in batch}) == 12   # none twice


def test_torchrun_trains_to_the_end_and_writes_one_run_folder(tmp_path, make_pictures):
    got = torchrun(*TINY, "--data-root", str(make_pictures(tmp_path/"pictures")), "--out", str(tmp_path/"out"), "--max-steps", "5", "--workers", "1")
    assert got.returncode == 0, got.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "pictures"]
    assert [r["step"] for r in rows(tmp_path/"out")] == [1, 2, 3, 4, 5]
    assert all(np.isfinite(r["loss"]) and 0 <= r["match_acc"] <= 1 for r in rows(tmp_path/"out"))
    assert len(list((tmp_path/"out"/"events").iterdir())) == 1
    assert [p.name for p in (tmp_path/"out"/"matches").iterdir()] == ["step-00000005.png"]


def with_one_rotten_on_rank_1(make_pictures, folder):
    """A set whose only rotten picture falls to rank 1 in the first step; its name."""
    make_pictures(folder)
    index = list(Batches(12, 4, 0, 0, 1, rank=1, world=2))[0][0][2]
    rotten = sorted(folder.iterdir())[index]
    rotten.write_bytes(b"no picture")
    return rotten.name


def test_a_rotten_picture_of_rank_1_is_counted_and_named(tmp_path, make_pictures):
    name = with_one_rotten_on_rank_1(make_pictures, tmp_path/"pictures")
    got = torchrun(*TINY, "--data-root", str(tmp_path/"pictures"), "--out", str(tmp_path/"out"), "--max-steps", "2", "--bad-share", "0.6")
    assert got.returncode == 0, got.stderr
    assert got.stderr.count(name) == 1
    assert rows(tmp_path/"out")[-1]["bad"] >= 1


def test_a_rotten_picture_of_rank_1_stops_both_on_request(tmp_path, make_pictures):
    name = with_one_rotten_on_rank_1(make_pictures, tmp_path/"pictures")
    got = torchrun(*TINY, "--data-root", str(tmp_path/"pictures"), "--out", str(tmp_path/"out"), "--max-steps", "2", "--on-bad-image", "raise")
    assert got.returncode != 0
    assert sum(line.startswith("densecl: ") and name in line for line in got.stderr.splitlines()) == 1, got.stderr


def test_wrong_input_under_torchrun_is_said_once(tmp_path):
    got = torchrun("demo", "--lr", "nan", "--out", str(tmp_path/"out"))
    assert got.returncode != 0
    assert sum(line.startswith("densecl: --lr") for line in got.stderr.splitlines()) == 1
    assert not (tmp_path/"out").exists()


@pytest.mark.long
@pytest.mark.skipif(not SAMPLES.exists(), reason="the sample photographs are not beside this checkout")
def test_real_photographs_train_on_two_ranks(tmp_path):
    got = torchrun("demo", "--data-root", str(SAMPLES), "--image-size", "96", "--backbone", "resnet18", "--queue-len", "1024", "--epochs", "2",
                   "--max-steps", "20", "--log-every", "5", "--out", str(tmp_path/"out"))
    assert got.returncode == 0, got.stderr
    measured = [r for r in rows(tmp_path/"out") if "loss" in r]
    assert [r["step"] for r in measured] == [5, 10, 15, 20]
    assert all(np.isfinite(r["loss"]) and r["bad"] == 0 for r in measured)


def layout_as_rank(rank):
    """Pictures in channels_last, dealt out and taken back: both, and the permutation."""
    x = (torch.arange(B*3*2*2.).view(B, 3, 2, 2) + 1000*rank).to(memory_format=torch.channels_last)
    s = Shuffle(B, x.device)
    return s.deal(x), s.back(s.deal(x)), s.perm


def test_the_order_in_memory_changes_nothing_that_is_dealt(two):
    whole = torch.cat([torch.arange(B*3*2*2.).view(B, 3, 2, 2) + 1000*rank for rank in range(2)])
    for rank, (dealt, back, perm) in enumerate(two["layout"]):
        assert torch.equal(dealt, whole[share(perm, rank)])
        assert torch.equal(back, share(whole, rank)) and back.is_contiguous(memory_format=torch.channels_last)
