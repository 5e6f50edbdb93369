"""Runs that are killed, preempted, hung, or out of disk: what is left, and that the run which goes on is the same run."""
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from densecl.files import run_main
from densecl.train import main

ROOT = Path(__file__).parents[1]
TINY = ("demo --data-root pictures --backbone resnet18-layer2 --image-size 32 --batch-size 6 --queue-len 24 --lr 0.0075 --lambda-warmup 0 --dim 8 --hidden 16 "
        "--threads 1 --amp off --log-every 2 --save-every 3 --deterministic --epochs 100000 --timeout 60").split() + ["--probe", ""]
CLOCK = {"images_per_s", "data_wait", "memory"}          # what differs between two runs of the same thing
# the last one: processes that torchrun starts again must not meet in the store of the dead ones (06_dist)
ENV = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TRAIN = ["-m", "densecl.train"]


@pytest.fixture
def place(tmp_path, monkeypatch, make_pictures):
    """The current folder; `pictures` holds twelve."""
    monkeypatch.chdir(tmp_path)
    make_pictures(tmp_path/"pictures")
    return tmp_path


class Run:
    """A command as a process group of its own, its words in a file; all of it is killed on leaving."""
    number = 0

    def __init__(self, *argv, options=TINY, workers=0, before=(sys.executable,), program=TRAIN):
        Run.number += 1
        self.log = Path(f"log-{Run.number:03d}.txt")
        self.start, self.seen = time.monotonic(), set()
        with open(self.log, "w") as f:
            self.process = subprocess.Popen([*before, *program, *options, "--workers", str(workers), *argv], env=ENV, stdout=f, stderr=f, start_new_session=True)

    def __enter__(self): return self

    def __exit__(self, *error):
        for pid in {*self.seen, *descendants(self.process.pid), self.process.pid}:     # seen: a torchrun that was killed leaves its ranks behind
            try: os.kill(pid, signal.SIGKILL)
            except ProcessLookupError: pass
        self.process.wait()

    @property
    def text(self): return self.log.read_text(errors="replace")

    def until(self, what, seconds=200):
        """Wait until `what()` is true; the run must be alive as long as it is not."""
        end = time.monotonic() + seconds
        while not what():
            assert self.process.poll() is None, self.text
            assert time.monotonic() < end, f"waited too long\n{self.text[-3000:]}"
            time.sleep(.01)
        self.seen |= {*descendants(self.process.pid)}
        return self

    def ends(self, seconds=200):
        try: return self.process.wait(seconds)
        except subprocess.TimeoutExpired: raise AssertionError(f"does not end\n{self.text}") from None

    def resumed(self): return [int(s) for s in re.findall(r"resumed at step (\d+)", self.text)]

    def lines(self): return [line for line in self.text.splitlines() if line.startswith("densecl: ")]


def start_with(changes):
    """Write start.py: the command line with something in it changed."""
    Path("start.py").write_text("import os, resource, signal, sys, time\nfrom densecl import checkpoint\nfrom densecl.files import run_main\nfrom densecl.train import main\n" + changes + "run_main(main)\n")


def torchrun(*words, ranks=2): return TORCHRUN + [*(words or ["--standalone"]), f"--nproc_per_node={ranks}"]


def descendants(pid):
    """The processes below a process, the nearest first."""
    got = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True).stdout.split()[2:]
    parent = {int(a): int(b) for a, b in zip(got[::2], got[1::2])}
    children = [p for p, up in parent.items() if up == pid]
    return children + [d for c in children for d in descendants(c)]


def ranks(pid): return [p for p in descendants(pid) if b"densecl.train" in Path(f"/proc/{p}/cmdline").read_bytes() and b"distributed.run" not in Path(f"/proc/{p}/cmdline").read_bytes()]


def rows(out): return [json.loads(line) for line in (Path(out)/"metrics.jsonl").read_text().splitlines()]


def last_step(out):
    """The step of the newest whole row, 0 when there is none."""
    try: lines = (Path(out)/"metrics.jsonl").read_text().split("\n")[:-1]
    except OSError: return 0
    return json.loads(lines[-1])["step"] if lines else 0


def state(out): return torch.load(Path(out)/"last.pt", weights_only=True)


def leaves(x, name=""):
    """Every number and tensor in nested containers, with its path."""
    if isinstance(x, dict): return [leaf for k, v in x.items() for leaf in leaves(v, f"{name}/{k}")]
    if isinstance(x, (list, tuple)): return [leaf for k, v in enumerate(x) for leaf in leaves(v, f"{name}/{k}")]
    return [(name, x)]


def assert_same_run(a, b):
    """Two run folders end with the same bits, and their rows are the same, none lost and none doubled."""
    left, right = ([(k, v) for k, v in leaves(state(out)) if not k.startswith("/config")] for out in (a, b))
    assert [k for k, _ in left] == [k for k, _ in right] and sum("queue" in k for k, _ in left) == 4
    for (k, x), (_, y) in zip(left, right): assert torch.equal(x, y) if torch.is_tensor(x) else x == y, k
    assert [r["step"] for r in rows(a)] == [r["step"] for r in rows(b)]
    for x, y in zip(rows(a), rows(b)): assert {k: v for k, v in x.items() if k not in CLOCK} == {k: v for k, v in y.items() if k not in CLOCK}


def here(*argv):
    """The same command inside this process, which is quicker where nothing is killed: exit status, what it said."""
    status, said = 0, io.StringIO()
    with redirect_stderr(said), redirect_stdout(io.StringIO()):
        try: run_main(main, [*TINY, "--workers", "0", *argv])
        except SystemExit as e: status = e.code
        finally: torch.use_deterministic_algorithms(False)
    return status, said.getvalue()


def undisturbed(out, steps, *argv, before=None):
    """A run from its beginning to a step."""
    argv = ["--out", out, "--max-steps", str(steps), *argv]
    if not before:
        status, said = here(*argv)
        assert status == 0 and "resumed" not in said, said
        return out
    with Run(*argv, before=before) as run: assert run.ends() == 0, run.text
    return out


def goes_on(out, step, steps, *argv):
    """The same command once more, to a step: it must resume where it should. What it says."""
    status, said = here("--out", out, "--max-steps", str(steps), *argv)
    assert status == 0 and re.findall(r"resumed at step (\d+)", said) == [str(step)], said
    return said


def moment(dice, run, out):
    """Wait for a random moment: mostly some rows later and then a few milliseconds, sometimes a time that falls into the start."""
    if dice.random() < .2: return time.sleep(dice.uniform(.1, 3))
    goal = last_step(out) + 2*dice.randint(1, 5)
    run.until(lambda: last_step(out) >= goal)
    time.sleep(dice.uniform(0, .15))


def checkpoint_step(out): return state(out)["step"] if (Path(out)/"last.pt").exists() else 0


def survives(kills, seed, workers=0):
    """Start, SIGKILL at a random moment, start again, ...; then to the end, and the same without a kill."""
    dice, had = random.Random(seed), [0]
    for _ in range(kills):
        with Run("--out", "killed", workers=workers) as run: moment(dice, run, "killed")
        had.append(checkpoint_step("killed"))
        if had[-1] > had[-2] > 0 or run.resumed(): assert run.resumed() == [had[-2]], run.text       # never from zero
        assert last_step("killed") >= had[-2] - 1 and had[-1] >= had[-2]                              # a row every 2 steps; nothing saved is lost
    assert had[-1] > 0 and len(set(had)) > kills//3, had                                              # and on from there
    steps = had[-1] + 7
    goes_on("killed", had[-1], steps)
    assert_same_run("killed", undisturbed("whole", steps))
    assert not list(Path("killed").glob(".*.tmp"))


def test_a_run_killed_at_random_moments_ends_like_one_left_alone(place): survives(3, seed=1, workers=1)


@pytest.mark.long
def test_a_run_killed_twelve_times_ends_like_one_left_alone(place): survives(12, seed=2, workers=2)


def ranks_survive(kills, seed, n=2):
    """One torchrun; a random rank is killed at a random moment, and torchrun starts all of them again."""
    dice = random.Random(seed)
    with Run("--out", "killed", before=torchrun("--standalone", f"--max-restarts={kills + 3}", ranks=n)) as run:
        for lives in range(1, kills + 1):
            moment(dice, run, "killed") if lives > 1 else run.until(lambda: last_step("killed") >= 6)
            run.until(lambda: len(ranks(run.process.pid)) >= n)
            os.kill(dice.choice(ranks(run.process.pid)[:n]), signal.SIGKILL)
            old = len(run.resumed())
            run.until(lambda: len(run.resumed()) > old)
        run.until(lambda: last_step("killed") >= run.resumed()[-1] + 4)
        assert len(run.resumed()) == kills and min(run.resumed()) >= 3 and run.resumed() == sorted(run.resumed()), run.text
    steps = state("killed")["step"] + 7
    with Run("--out", "killed", "--max-steps", str(steps), before=torchrun(ranks=n)) as run: assert run.ends() == 0, run.text
    assert_same_run("killed", undisturbed("whole", steps, before=torchrun(ranks=n)))


def test_a_killed_rank_leads_to_a_restart_that_resumes(place): ranks_survive(1, seed=3)


@pytest.mark.long
def test_ranks_killed_ten_times_end_like_those_left_alone(place): ranks_survive(10, seed=4)


@pytest.mark.long
def test_three_ranks_sum_in_the_same_order_after_a_restart(place): ranks_survive(2, seed=5, n=3)


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)], ids=["two, then one", "one, then two"])
def test_another_number_of_ranks_goes_on_from_the_same_checkpoint(before, after, place):
    undisturbed("out", 4, before=torchrun(ranks=before) if before > 1 else None)
    if after == 1: goes_on("out", 4, 8)
    else:
        with Run("--out", "out", "--max-steps", "8", before=torchrun(ranks=after)) as run: assert run.ends() == 0, run.text
        assert run.resumed() == [4]
    assert [r["step"] for r in rows("out")] == [2, 4, 6, 8]


def test_two_agents_meet_train_and_stop_together_on_a_signal_to_one(place):
    """Two torchruns on this machine, as on two. SIGUSR1 to the second, which was told to pass it on; then both again, to the end."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    meet = lambda name: torchrun("--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", f"--rdzv_id={name}",
                                 "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", ranks=1)
    with Run("--out", "out", before=meet("a")) as first, Run("--out", "out", before=meet("a")) as second:
        first.until(lambda: last_step("out") >= 4)
        second.process.send_signal(signal.SIGUSR1)
        first.ends(), second.ends()
    assert "asked to stop" in first.text + second.text and re.search(r"exitcode\s*: 75", first.text), first.text   # what torchrun says of its process
    steps = {int(s) for s in re.findall(r"stopped after step (\d+), saved in out", first.text + second.text)}
    assert len(steps) == 1 and steps == {state("out")["step"]}, first.text + second.text
    goal = steps.pop() + 3
    with Run("--out", "out", "--max-steps", str(goal), before=meet("b")) as first, Run("--out", "out", "--max-steps", str(goal), before=meet("b")) as second:
        assert (first.ends(), second.ends()) == (0, 0), first.text + second.text
    assert (first.resumed() or second.resumed()) == [goal - 3] and state("out")["step"] == goal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_signal_to_the_whole_group_finishes_the_step_saves_and_ends_with_75(number, place):
    with Run("--out", "out", "--save-every", "1000000", "--log-every", "1", workers=2) as run:
        run.until(lambda: last_step("out") >= 3)
        os.killpg(run.process.pid, number)                     # the workers that load pictures get it, too
        assert run.ends() == 75, run.text
    (line,) = run.lines()
    assert number.name in line and "out" in line and "Traceback" not in run.text
    done = state("out")["step"]
    assert f"step {done}" in line and last_step("out") == done
    if number != signal.SIGTERM: return
    goes_on("out", done, done + 2, "--save-every", "1000000", "--log-every", "1")
    assert_same_run("out", undisturbed("whole", done + 2, "--save-every", "1000000", "--log-every", "1"))


def test_a_second_sigint_stops_at_once(place):
    """The run is held in its third step for ever."""
    start_with("from densecl import trainer\nreal = trainer.take_step\n"
               "def take_step(state, *rest):\n    if state.step == 2: print('held', flush=True), time.sleep(10**6)\n    return real(state, *rest)\n"
               "trainer.take_step = take_step\n")
    with Run("--out", "out", "--log-every", "1", program=["start.py"]) as run:
        run.until(lambda: "held" in run.text)
        run.process.send_signal(signal.SIGINT)
        run.until(lambda: "Ctrl-C again" in run.text)
        time.sleep(1)
        assert run.process.poll() is None
        run.process.send_signal(signal.SIGINT)
        assert run.ends(20) == -signal.SIGINT


def test_torchrun_passes_sigusr1_on_only_when_told(place):
    with Run("--out", "out", before=torchrun(ranks=1)) as run:
        run.until(lambda: last_step("out") >= 2)
        run.process.send_signal(signal.SIGUSR1)
        assert run.ends() == -signal.SIGUSR1
    assert "asked" not in run.text and "SIGUSR1: finishing" not in run.text


def test_a_rank_that_hangs_ends_the_run_within_the_timeout(place):
    with Run("--out", "out", "--timeout", "8", before=torchrun("--standalone", "--shutdown-timeout=4")) as run:
        run.until(lambda: last_step("out") >= 4)
        os.kill(ranks(run.process.pid)[1], signal.SIGSTOP)
        assert run.ends(90) == 1
    assert [line for line in run.lines() if "hangs" in line and "--timeout" in line], run.text
    assert state("out")["step"] >= 3


def test_a_folder_in_use_ends_all_ranks_with_one_line(place):
    Path("out").mkdir()
    hold = "import sys; from densecl.files import lock\nwith lock('out'): print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", hold], env=ENV, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with Run("--out", "out", before=torchrun()) as run: assert run.ends() == 1
        holder.stdin.close()
    (line,) = run.lines()
    assert "another run is writing here" in line and "Traceback" not in run.text.split("ChildFailedError")[0].split("Traceback (most recent call last):\n  File")[0]
    statuses = re.findall(r"exitcode\s+: (-?\d+) \(pid", run.text)          # of both ranks; torchrun may have told the slower one to go
    assert len(statuses) == 2 and "2" in statuses and {*statuses} <= {"2", "-15"}, run.text


def test_a_run_folder_that_ranks_see_differently_is_refused(place):
    """Rank 1 has another current folder, as a second machine has another disk."""
    undisturbed("out", 3)
    shutil.copytree("pictures", "elsewhere/pictures")
    start_with("if os.environ['RANK'] == '1': os.chdir('elsewhere')\n")
    with Run("--out", "out", "--max-steps", "6", before=torchrun(), program=["start.py"]) as run: assert run.ends() == 1
    (line,) = run.lines()
    assert "all machines share" in line and "[0, 3]" in line, run.text


def test_the_readme_s_slurm_script_is_a_script(place):
    script = (ROOT/"README.md").read_text().split("```bash\n")[1].split("```")[0]
    assert script.startswith("#!/bin/bash") and "--signals-to-handle" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).returncode == 0


@pytest.fixture
def small_disk(place):
    """A file system of its own with 60 MB, mounted for real; skipped where that is not allowed."""
    Path("disk").mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", "disk"], capture_output=True).returncode: pytest.skip("may not mount a file system here")
    yield Path("disk")
    subprocess.run(["umount", "-l", "disk"], check=True)


def assert_stopped_by_the_disk(run, out):
    (line,) = run.lines()
    done = state(out)["step"]
    assert run.process.returncode == 1 and "Traceback" not in run.text, run.text
    assert "cannot write there" in line and f"the last good checkpoint is that of step {done};" in line and "make room" in line
    assert not list(Path(out).glob(".*.tmp")) and done > 0
    return done


def test_a_disk_that_fills_up_stops_the_run_and_keeps_the_last_checkpoint(small_disk):
    with Run("--out", "disk/out") as run:
        run.until(lambda: Path("disk/out/last.pt").exists())
        with open("disk/ballast", "wb") as f:
            try:
                while True: f.write(bytes(2**16)), f.flush()
            except OSError: pass
        run.ends()
    done = assert_stopped_by_the_disk(run, "disk/out")
    Path("disk/ballast").unlink()
    goes_on("disk/out", done, done + 3)
    assert_same_run("disk/out", undisturbed("whole", done + 3))


def test_a_file_that_may_not_grow_stops_the_run_and_keeps_the_last_checkpoint(place):
    """The same without a file system: after two saves no file may be longer than a metrics file needs."""
    start_with("real, _ = checkpoint.write, signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
               "def write(data, folder, step, keep):\n    if step > 6: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n    real(data, folder, step, keep)\n"
               "checkpoint.write = write\n")
    with Run("--out", "out", program=["start.py"]) as run: run.ends()
    assert assert_stopped_by_the_disk(run, "out") == 6 and "File too large" in run.text


@pytest.mark.parametrize("damage", ["cut off", "a flipped bit", "gone"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_with_a_warning(damage, place):
    undisturbed("out", 8)                                      # saved at 3, 6 and 8
    last = Path("out/last.pt")
    if damage == "gone": last.unlink(), Path("out/step-00000008.pt").unlink()
    if damage == "cut off": os.truncate(last, last.stat().st_size//2)
    if damage == "a flipped bit":
        raw = bytearray(last.read_bytes())
        raw[len(raw)//2] ^= 4
        with open(last, "r+b") as f: f.write(raw)              # in place: the numbered name is the same file
    said = goes_on("out", 6, 10)
    assert sum("warning: out/last.pt" in line for line in said.splitlines()) == 1, said
    if damage == "gone": assert_same_run("out", undisturbed("whole", 10))


def test_when_no_checkpoint_can_be_read_nothing_begins_anew(place):
    undisturbed("out", 4)
    for path in Path("out").glob("*.pt"): path.write_bytes(b"")
    before = (Path("out")/"metrics.jsonl").read_bytes()
    status, said = here("--out", "out", "--max-steps", "6")
    (line,) = [line for line in said.splitlines() if line.startswith("densecl: ")]
    assert status == 2 and "cannot be read" in line and "--resume never" in line
    assert (Path("out")/"metrics.jsonl").read_bytes() == before


def test_a_run_killed_between_its_last_probe_and_its_end_keeps_the_row(place):
    """The probe's row is on the disk before the checkpoint that would make it superfluous."""
    start_with("real = checkpoint.write\ndef write(*args):\n    real(*args)\n    if args[2] == 4: os.kill(os.getpid(), signal.SIGKILL)\ncheckpoint.write = write\n")
    probing = ["--save-every", "2", "--probe", "match", "--probe-every", "2"]
    with Run("--out", "out", "--max-steps", "6", *probing, program=["start.py"]) as run: assert run.ends() == -signal.SIGKILL, run.text
    goes_on("out", 4, 6, *probing)
    assert [(r["step"], "probe" in r) for r in rows("out")] == [(0, True), (2, False), (2, True), (4, False), (4, True), (6, False), (6, True)]
