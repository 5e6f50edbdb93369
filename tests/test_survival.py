"""Runs that are killed, preempted, hanging, or out of disk: what is left, and exact resume."""

import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from densecl.runtime.io import run_command
from densecl.runtime.metrics_log import MetricsLog
from densecl.train import main

ROOT = Path(__file__).parents[1]
TINY = shlex.split(
    "demo --data-root images --backbone resnet18-layer2 --image-size 32 --batch-size 6 "
    "--queue-len 24 --lr 0.0075 --lambda-warmup 0 --dim 8 --hidden 16 --threads 1 --amp off "
    "--log-every 2 --save-every 3 --deterministic --epochs 100000 --timeout 60 --probe ''"
)
CLOCK = {
    "images_per_s",
    "data_wait",
    "loader_cpu",
    "memory",
}  # fields that differ between two equal runs
ENV = os.environ | {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    # restarted processes must not look their peers up in the store of the ended ones
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TRAIN = ["-m", "densecl.train"]


@pytest.fixture
def place(tmp_path, monkeypatch, make_images):
    """The current folder; `images` contains twelve."""
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "images")
    return tmp_path


class Run:
    """A command as a process group, its output in a file; all of it is killed on leaving."""

    number = 0

    def __init__(self, *argv, options=TINY, workers=0, before=(sys.executable,), program=TRAIN):
        Run.number += 1
        self.log = Path(f"log-{Run.number:03d}.txt")
        self.seen = set()  # processes: those of a torchrun that was killed have no parent any more
        with open(self.log, "w") as f:
            self.process = subprocess.Popen(
                [*before, *program, *options, "--workers", str(workers), *argv],
                env=ENV,
                stdout=f,
                stderr=f,
                start_new_session=True,
            )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for pid in {*self.seen, *descendants(self.process.pid), self.process.pid}:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait()

    @property
    def text(self):
        return self.log.read_text(errors="replace")

    def wait_until(self, condition, seconds=200):
        """Wait until `condition()` is true; the run must be alive as long as it is not."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.text
            assert time.monotonic() < end, f"waited too long\n{self.text[-3000:]}"
            time.sleep(0.01)
        self.seen.update(descendants(self.process.pid))
        return self

    def exit_status(self, seconds=200):
        """Wait for the end of the run."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"does not end\n{self.text}") from None

    def resumed_steps(self):
        return resumed_steps(self.text)

    def messages(self):
        return messages(self.text)


def resumed_steps(text):
    return [int(step) for step in re.findall(r"resumed at step (\d+)", text)]


def messages(text):
    return [line for line in text.splitlines() if line.startswith("densecl: ")]


def write_start_script(changes):
    """Write start.py: the train command with something in it changed."""
    Path("start.py").write_text(
        f"""import os, resource, signal, sys, time
from densecl.runtime import checkpoint
from densecl.runtime.io import run_command
from densecl.train import main
{changes}
run_command(main)
"""
    )


def torchrun(*words, ranks=2):
    return TORCHRUN + [*(words or ["--standalone"]), f"--nproc_per_node={ranks}"]


def descendants(pid):
    """The processes below a process, the nearest first."""
    table = subprocess.run(
        ["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True
    ).stdout
    pairs = [map(int, line.split()) for line in table.splitlines()]
    children = [child for child, parent in pairs if parent == pid]
    return children + [d for child in children for d in descendants(child)]


def rank_processes(pid):
    """The training processes below a torchrun."""
    found = []
    for child in descendants(pid):
        command = Path(f"/proc/{child}/cmdline").read_bytes()
        if b"densecl.train" in command and b"distributed.run" not in command:
            found.append(child)
    return found


def rows(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def last_step(out):
    """The step of the newest complete row, 0 when there is none."""
    try:
        lines = (Path(out) / "metrics.jsonl").read_text().split("\n")[:-1]
    except OSError:
        return 0
    return json.loads(lines[-1])["step"] if lines else 0


def state(out):
    return torch.load(Path(out) / "last.pt", weights_only=True)


def checkpoint_step(out):
    return state(out)["step"] if (Path(out) / "last.pt").exists() else 0


def leaves(value, name=""):
    """Every number and tensor in nested containers, with its path."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return [(name, value)]
    return [leaf for key, child in items for leaf in leaves(child, f"{name}/{key}")]


def assert_same_run(a, b):
    """Two run folders have the same bits in last.pt, and the same rows, each exactly once."""
    left, right = (
        [(name, value) for name, value in leaves(state(out)) if not name.startswith("/config")]
        for out in (a, b)
    )
    assert [name for name, _ in left] == [name for name, _ in right]
    assert sum("queue" in name for name, _ in left) == 4
    for (name, x), (_, y) in zip(left, right):
        assert torch.equal(x, y) if torch.is_tensor(x) else x == y, name
    assert [row["step"] for row in rows(a)] == [row["step"] for row in rows(b)]
    for x, y in zip(rows(a), rows(b)):
        assert {k: v for k, v in x.items() if k not in CLOCK} == {
            k: v for k, v in y.items() if k not in CLOCK
        }


def run_here(*argv):
    """The command inside this process, which is quicker: exit status and output on stderr."""
    status, stderr = 0, io.StringIO()
    with redirect_stderr(stderr), redirect_stdout(io.StringIO()):
        try:
            run_command(main, [*TINY, "--workers", "0", *argv])
        except SystemExit as e:
            status = e.code
    return status, stderr.getvalue()


def undisturbed(out, steps, *argv, before=None):
    """A run from its beginning to a step."""
    argv = ["--out", out, "--max-steps", str(steps), *argv]
    if before:
        with Run(*argv, before=before) as run:
            assert run.exit_status() == 0, run.text
    else:
        status, text = run_here(*argv)
        assert status == 0 and "resumed" not in text, text
    return out


def resume(out, step, steps, *argv):
    """The same command again, up to `steps`: it must resume at `step`. Returns its output."""
    status, text = run_here("--out", out, "--max-steps", str(steps), *argv)
    assert status == 0 and resumed_steps(text) == [step], text
    return text


def wait_for_random_moment(rng, run, out):
    """Mostly some rows and a few milliseconds later, sometimes while the program starts."""
    if rng.random() < 0.2:
        time.sleep(rng.uniform(0.1, 3))
        return
    goal = last_step(out) + 2 * rng.randint(1, 5)
    run.wait_until(lambda: last_step(out) >= goal)
    time.sleep(rng.uniform(0, 0.15))


def check_kills(kills, seed, workers=0):
    """SIGKILL at a random moment, start again, ...; then to the end, and the same without kills."""
    rng, saved = random.Random(seed), [0]
    for _ in range(kills):
        with Run("--out", "killed", workers=workers) as run:
            wait_for_random_moment(rng, run, "killed")
        saved.append(checkpoint_step("killed"))
        if saved[-1] > saved[-2] > 0 or run.resumed_steps():
            assert run.resumed_steps() == [saved[-2]], run.text  # never from zero
        # a row every 2 steps; nothing that was saved is lost
        assert last_step("killed") >= saved[-2] - 1 and saved[-1] >= saved[-2]
    assert saved[-1] > 0 and len(set(saved)) > kills // 3, saved
    steps = saved[-1] + 7
    resume("killed", saved[-1], steps)
    assert_same_run("killed", undisturbed("whole", steps))
    assert not list(Path("killed").glob(".*.tmp"))


def test_a_run_killed_at_random_moments_ends_like_an_undisturbed_one(place):
    check_kills(3, seed=1, workers=1)


@pytest.mark.long
def test_a_run_killed_twelve_times_ends_like_an_undisturbed_one(place):
    check_kills(12, seed=2, workers=2)


def check_rank_kills(kills, seed, n=2):
    """One torchrun; a random rank is killed at a random moment, and torchrun restarts all ranks."""
    rng = random.Random(seed)
    before = torchrun("--standalone", f"--max-restarts={kills + 3}", ranks=n)
    with Run("--out", "killed", before=before) as run:
        for number in range(1, kills + 1):
            if number > 1:
                wait_for_random_moment(rng, run, "killed")
            else:
                run.wait_until(lambda: last_step("killed") >= 6)
            run.wait_until(lambda: len(rank_processes(run.process.pid)) >= n)
            os.kill(rng.choice(rank_processes(run.process.pid)[:n]), signal.SIGKILL)
            restarts = len(run.resumed_steps())
            run.wait_until(lambda restarts=restarts: len(run.resumed_steps()) > restarts)
        run.wait_until(lambda: last_step("killed") >= run.resumed_steps()[-1] + 4)
        steps = run.resumed_steps()
        assert len(steps) == kills and min(steps) >= 3 and steps == sorted(steps), run.text
    goal = state("killed")["step"] + 7
    with Run("--out", "killed", "--max-steps", str(goal), before=torchrun(ranks=n)) as run:
        assert run.exit_status() == 0, run.text
    assert_same_run("killed", undisturbed("whole", goal, before=torchrun(ranks=n)))


def test_a_killed_rank_leads_to_a_restart_that_resumes(place):
    check_rank_kills(1, seed=3)


@pytest.mark.long
def test_ranks_killed_ten_times_end_like_undisturbed_ones(place):
    check_rank_kills(10, seed=4)


@pytest.mark.long
def test_three_ranks_sum_in_the_same_order_after_a_restart(place):
    check_rank_kills(2, seed=5, n=3)


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)], ids=["two, then one", "one, then two"])
def test_another_number_of_ranks_continues_from_the_same_checkpoint(before, after, place):
    undisturbed("out", 4, before=torchrun(ranks=before) if before > 1 else None)
    if after == 1:
        resume("out", 4, 8)
    else:
        with Run("--out", "out", "--max-steps", "8", before=torchrun(ranks=after)) as run:
            assert run.exit_status() == 0, run.text
        assert run.resumed_steps() == [4]
    assert [row["step"] for row in rows("out")] == [2, 4, 6, 8]


def is_listening(port):
    """Whether a process of this machine accepts connections at a port."""
    with socket.socket() as s:
        return s.connect_ex(("localhost", port)) == 0


def test_two_agents_meet_train_and_stop_together_on_a_signal_to_one(place):
    """Two torchruns on this machine. SIGUSR1 to the second; then both again, to the end."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]

    def agent(name):
        return torchrun(
            "--nnodes=2",
            "--rdzv_backend=c10d",
            f"--rdzv_endpoint=localhost:{port}",
            f"--rdzv_id={name}",
            "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
            ranks=1,
        )

    with Run("--out", "out", before=agent("a")) as first:
        # the agent that listens first serves the store, which the other one needs to its end
        first.wait_until(lambda: is_listening(port))
        with Run("--out", "out", before=agent("a")) as second:
            first.wait_until(lambda: last_step("out") >= 4)
            second.process.send_signal(signal.SIGUSR1)
            first.exit_status()
            second.exit_status()
    text = first.text + second.text
    assert "another process received a signal" in text
    assert re.search(r"exitcode\s*: 75", first.text), first.text  # torchrun's report
    steps = {int(step) for step in re.findall(r"stopped after step (\d+), saved in out", text)}
    assert len(steps) == 1 and steps == {state("out")["step"]}, text
    goal = steps.pop() + 3
    argv = ("--out", "out", "--max-steps", str(goal))
    with Run(*argv, before=agent("b")) as first, Run(*argv, before=agent("b")) as second:
        statuses = first.exit_status(), second.exit_status()
        assert statuses == (0, 0), first.text + second.text
    assert (first.resumed_steps() or second.resumed_steps()) == [goal - 3]
    assert state("out")["step"] == goal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_signal_to_the_whole_group_finishes_the_step_saves_and_ends_with_75(number, place):
    options = ("--save-every", "1000000", "--log-every", "1")
    with Run("--out", "out", *options, workers=2) as run:
        run.wait_until(lambda: last_step("out") >= 3)
        os.killpg(run.process.pid, number)  # the loader's workers receive it, too
        assert run.exit_status() == 75, run.text
    (line,) = run.messages()
    assert number.name in line and "out" in line and "Traceback" not in run.text
    step = state("out")["step"]
    assert f"step {step}" in line and last_step("out") == step
    if number != signal.SIGTERM:
        return
    resume("out", step, step + 2, *options)
    assert_same_run("out", undisturbed("whole", step + 2, *options))


def test_a_second_sigint_stops_at_once(place):
    """The run is blocked in its third step."""
    write_start_script(
        """from densecl import trainer
real = trainer.train_step
def train_step(state, *rest):
    if state.step == 2: print("blocked", flush=True), time.sleep(10**6)
    return real(state, *rest)
trainer.train_step = train_step
"""
    )
    with Run("--out", "out", "--log-every", "1", program=["start.py"]) as run:
        run.wait_until(lambda: "blocked" in run.text)
        run.process.send_signal(signal.SIGINT)
        run.wait_until(lambda: "second Ctrl-C" in run.text)
        time.sleep(1)
        assert run.process.poll() is None
        run.process.send_signal(signal.SIGINT)
        assert run.exit_status(20) == -signal.SIGINT


def test_torchrun_passes_sigusr1_on_only_when_told(place):
    with Run("--out", "out", before=torchrun(ranks=1)) as run:
        run.wait_until(lambda: last_step("out") >= 2)
        run.process.send_signal(signal.SIGUSR1)
        assert run.exit_status() == -signal.SIGUSR1
    assert "asked" not in run.text and "SIGUSR1: finishing" not in run.text


def test_a_rank_that_hangs_ends_the_run_within_the_timeout(place):
    before = torchrun("--standalone", "--shutdown-timeout=4")
    with Run("--out", "out", "--timeout", "8", before=before) as run:
        run.wait_until(lambda: last_step("out") >= 4)
        hanging = rank_processes(run.process.pid)[1]
        os.kill(hanging, signal.SIGSTOP)
        run.wait_until(lambda: any("hangs" in line for line in run.messages()))
        os.kill(hanging, signal.SIGKILL)  # torchrun would wait for it, for half a minute
        assert run.exit_status(90) == 1
    assert any("hangs" in line and "--timeout" in line for line in run.messages()), run.text
    assert state("out")["step"] >= 3


def test_a_folder_in_use_ends_all_ranks_with_one_line(place):
    Path("out").mkdir()
    hold = """import sys; from densecl.runtime.io import lock_folder
with lock_folder('out'): print('locked', flush=True); sys.stdin.read()"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", hold], env=ENV, **pipes) as holder:
        assert holder.stdout.readline() == "locked\n"
        with Run("--out", "out", before=torchrun()) as run:
            assert run.exit_status() == 1
        holder.stdin.close()
    (line,) = run.messages()
    assert "another run is writing here" in line
    of_torchrun = "Traceback (most recent call last):\n  File"
    assert "Traceback" not in run.text.split("ChildFailedError")[0].split(of_torchrun)[0]
    # of both ranks; torchrun may have ended the slower one
    statuses = re.findall(r"exitcode\s+: (-?\d+) \(pid", run.text)
    assert len(statuses) == 2 and "2" in statuses and {*statuses} <= {"2", "-15"}, run.text


def test_a_run_folder_that_ranks_see_differently_is_refused(place):
    """Rank 1 has another current folder, as a second machine has another disk."""
    undisturbed("out", 3)
    shutil.copytree("images", "elsewhere/images")
    write_start_script("if os.environ['RANK'] == '1': os.chdir('elsewhere')\n")
    with Run("--out", "out", "--max-steps", "6", before=torchrun(), program=["start.py"]) as run:
        assert run.exit_status() == 1
    (line,) = run.messages()
    assert "all machines share" in line and "step 3 on rank 0, 0 on rank 1" in line, run.text


def guide_script(name):
    """A script that the guide on clusters writes."""
    cells = json.loads((ROOT / "nbs/guides/cluster.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    (script,) = [s.split("\n", 1)[1] for s in sources if s.startswith(f"%%writefile {name}")]
    return script


def run_guide_script(name, dry_run, torchrun):
    """Status and calls of a script with programs that stand in for SLURM and torchrun."""
    fakes = {
        "densecl": f"case $* in *--dry-run) {dry_run} ;; *) exit 9 ;; esac",
        "torchrun": f"case $* in *--dry-run*) exit 9 ;; esac; {torchrun}",
        "srun": 'exec "$@"',
        "scontrol": "exit 0",
        "sleep": "exit 0",
    }
    Path("bin").mkdir()
    for program, line in fakes.items():
        text = f"#!/bin/bash\necho {program} $1 >> calls.txt\n{line}\n"
        Path("bin", program).write_text(text)
        Path("bin", program).chmod(0o755)
    environment = os.environ | {"PATH": f"{Path('bin').resolve()}:{os.environ['PATH']}"}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    done = subprocess.run(
        ["bash"],
        input=guide_script(name),
        text=True,
        capture_output=True,
        env=environment,
        check=False,
        timeout=60,
    )
    return done.returncode, Path("calls.txt").read_text().splitlines()


SAVED = "mkdir -p runs/coco; touch -d '+1 hour' runs/coco/last.pt"


@pytest.mark.parametrize("name", ["train.sh", "restart.sh"])
def test_the_guide_s_scripts_end_at_an_error_in_the_command(name, place):
    status, calls = run_guide_script(name, "exit 2", "exit 0")
    assert status == 2 and not any(call.startswith("torchrun") for call in calls), calls


@pytest.mark.parametrize(
    ("torchrun", "status", "queued"),
    [("exit 0", 0, False), (f"{SAVED}; exit 1", 1, True), ("exit 1", 1, False)],
)
def test_the_guide_s_slurm_script_queues_again_only_after_progress(torchrun, status, queued, place):
    found, calls = run_guide_script("train.sh", "exit 1", torchrun)  # 1: too large for one GPU
    assert found == status and "torchrun --nnodes=2" in calls
    assert ("scontrol requeue" in calls) == queued, calls


def test_the_guide_s_loop_starts_again_until_the_run_is_complete(place):
    twice = f"{SAVED}; [ $(grep -c torchrun calls.txt) -ge 3 ]"
    status, calls = run_guide_script("restart.sh", "exit 0", twice)
    assert status == 0 and sum(call.startswith("torchrun") for call in calls) == 3, calls


def test_the_guide_s_loop_ends_without_progress(place):
    status, calls = run_guide_script("restart.sh", "exit 0", "exit 1")
    assert status == 1 and sum(call.startswith("torchrun") for call in calls) == 1, calls


@pytest.fixture
def small_disk(place):
    """A file system with 60 MB that is really mounted; skipped where that is not allowed."""
    Path("disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", "disk"]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system here")
    yield Path("disk")
    subprocess.run(["umount", "-l", "disk"], check=True)


def assert_stopped_by_the_disk(run, out):
    (line,) = run.messages()
    step = state(out)["step"]
    assert run.process.returncode == 1 and "Traceback" not in run.text, run.text
    assert "cannot be written (" in line and "free some space" in line
    assert f"the last good checkpoint is that of step {step};" in line
    assert not list(Path(out).glob(".*.tmp")) and step > 0
    return step


def test_a_disk_that_fills_up_stops_the_run_and_keeps_the_last_checkpoint(small_disk):
    with Run("--out", "disk/out") as run:
        run.wait_until(lambda: Path("disk/out/last.pt").exists())
        with open("disk/ballast", "wb") as f:
            try:
                while True:
                    f.write(bytes(2**16))
                    f.flush()
            except OSError:
                pass
        run.exit_status()
    step = assert_stopped_by_the_disk(run, "disk/out")
    Path("disk/ballast").unlink()
    resume("disk/out", step, step + 3)
    assert_same_run("disk/out", undisturbed("whole", step + 3))


def test_a_file_that_may_not_grow_stops_the_run_and_keeps_the_last_checkpoint(place):
    """After two saves no file may be longer than a metrics file needs."""
    write_start_script(
        """real, _ = checkpoint.write_checkpoint, signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def write_checkpoint(data, folder, step, keep):
    if step > 6: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    real(data, folder, step, keep)
checkpoint.write_checkpoint = write_checkpoint
"""
    )
    with Run("--out", "out", program=["start.py"]) as run:
        run.exit_status()
    assert assert_stopped_by_the_disk(run, "out") == 6 and "File too large" in run.text


@pytest.mark.parametrize("damage", ["truncated", "a flipped bit", "missing"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_with_a_warning(damage, place):
    undisturbed("out", 8)  # saved at 3, 6 and 8
    last = Path("out/last.pt")
    if damage == "missing":
        last.unlink()
        Path("out/step-00000008.pt").unlink()
    if damage == "truncated":
        os.truncate(last, last.stat().st_size // 2)
    if damage == "a flipped bit":
        content = bytearray(last.read_bytes())
        content[len(content) // 2] ^= 4
        with open(last, "r+b") as f:
            f.write(content)  # in place: the numbered name is the same file
    text = resume("out", 6, 10)
    assert sum("warning: out/last.pt" in line for line in text.splitlines()) == 1, text
    if damage == "missing":
        assert_same_run("out", undisturbed("whole", 10))


def test_when_no_checkpoint_can_be_read_no_run_starts_from_scratch(place):
    undisturbed("out", 4)
    for path in Path("out").glob("*.pt"):
        path.write_bytes(b"")
    before = (Path("out") / "metrics.jsonl").read_bytes()
    status, text = run_here("--out", "out", "--max-steps", "6")
    (line,) = messages(text)
    assert status == 2 and "cannot be read" in line and "--resume never" in line
    assert (Path("out") / "metrics.jsonl").read_bytes() == before


def test_a_run_killed_between_its_last_probe_and_its_end_keeps_the_row(place):
    """The probe's row is on the disk before the checkpoint after which it is not repeated."""
    write_start_script(
        """real = checkpoint.write_checkpoint
def write_checkpoint(data, folder, step, keep):
    real(data, folder, step, keep)
    if step == 4: os.kill(os.getpid(), signal.SIGKILL)
checkpoint.write_checkpoint = write_checkpoint
"""
    )
    probing = ["--save-every", "2", "--probe", "match", "--probe-every", "2"]
    with Run("--out", "out", "--max-steps", "6", *probing, program=["start.py"]) as run:
        assert run.exit_status() == -signal.SIGKILL, run.text
    resume("out", 4, 6, *probing)
    found = [(row["step"], "probe" in row) for row in rows("out")]
    assert found == [(0, True)] + [(step, probe) for step in (2, 4, 6) for probe in (False, True)]


@pytest.mark.parametrize("clock", [0, -3600, 1])
@pytest.mark.parametrize("number", [0, 9, 99])
def test_tensorboard_reads_the_resumed_process_last(number, clock, tmp_path, monkeypatch):
    """Event files are named by second and number of the writer, and sorted as text: 9 after 10."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.summary.writer import event_file_writer

    for i, (steps, start) in enumerate(((range(1, 8), 0), (range(5, 10), 4), (range(8, 12), 7))):
        now = 1_700_000_000 + i * clock
        monkeypatch.setattr(time, "time", lambda now=now: now)
        numbers = iter([number + i])
        monkeypatch.setattr(event_file_writer._global_uid, "get", lambda n=numbers: next(n))
        with closing(MetricsLog(tmp_path, start)) as log:
            for step in steps:
                log.row(step=step, loss=float(10 * i))
    events = EventAccumulator(str(tmp_path / "events")).Reload().Scalars("loss")
    assert [event.step for event in events] == list(range(1, 12))
    assert [event.value for event in events] == 4 * [0] + 3 * [10] + 4 * [20]


def test_a_checkpoint_with_the_old_names_of_config_fields_continues(place):
    undisturbed("out", 4)
    saved = state("out")
    saved["config"]["keep"] = saved["config"].pop("keep_checkpoints")
    saved["config"]["bad_share"] = saved["config"].pop("max_corrupt_fraction")
    torch.save(saved, "out/last.pt")
    resume("out", 4, 6)
    assert_same_run("out", undisturbed("whole", 6))
