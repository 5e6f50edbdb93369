"""Tar shards behind a web server: byte ranges, faults of the server, read-ahead, exact resume."""

import os
import random
import signal
import tarfile
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from test_survival import (
    ENV,
    Run,
    assert_same_run,
    checkpoint_step,
    last_step,
    rank_processes,
    torchrun,
    undisturbed,
)

from densecl.data import __main__ as data_command
from densecl.data.dataset import open_source
from densecl.data.loader import build_loader, build_views
from densecl.data.remote import RemoteShardSource, index_remote_shards
from densecl.runtime.io import RunError, UsageError
from tiny import TINY

pytest.importorskip("aiohttp")


class RangeHandler(BaseHTTPRequestHandler):
    """Serves the files of a folder with byte ranges; `faults` says what goes wrong."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def answer(self, status, body=b"", headers=()):
        self.send_response(status)
        for name, value in (("Content-Length", str(len(body))), *headers):
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        server = self.server
        with server.lock:
            server.waiting += 1
            server.most_waiting = max(server.most_waiting, server.waiting)
        time.sleep(server.latency)
        with server.lock:
            server.waiting -= 1
        server.requests.append((self.command, self.path, self.headers.get("Range")))
        if server.fail_every and len(server.requests) % server.fail_every == 0:
            return self.answer(503)
        path = server.folder / self.path.lstrip("/")
        if self.path in server.forbidden:
            return self.answer(403)
        if not path.is_file():
            return self.answer(404)
        info = path.stat()
        headers = [("ETag", f'"{info.st_mtime_ns}"')]
        wanted = self.headers.get("Range")
        if not (wanted and server.ranges):
            return self.answer(200, path.read_bytes(), headers)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        with open(path, "rb") as file:
            file.seek(int(first))
            part = file.read(int(last) + 1 - int(first) if last else None)
        if not part:
            return self.answer(416)
        span = f"bytes {first}-{int(first) + len(part) - 1}/{info.st_size}"
        return self.answer(
            206, part, [*headers, ("Content-Range", span), ("Accept-Ranges", "bytes")]
        )


class Server(ThreadingHTTPServer):
    """Many connections may wait at the same time."""

    daemon_threads = True
    request_queue_size = 256


@contextmanager
def serve(folder, **options):
    """A server of a folder in a thread; yields the server, with its `url`."""
    server = Server(("127.0.0.1", 0), RangeHandler)
    server.folder, server.requests = Path(folder), []
    server.lock, server.waiting, server.most_waiting = threading.Lock(), 0, 0
    defaults = {"latency": 0, "fail_every": 0, "ranges": True, "forbidden": ()}
    for name, value in (defaults | options).items():
        setattr(server, name, value)
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def shards(tmp_path, make_images, monkeypatch):
    """A folder of three shards of eight images each."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(ENV, "XDG_CACHE_HOME", str(tmp_path / "cache"))
    images = sorted(make_images(tmp_path / "images", 24).iterdir())
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(3):
        with tarfile.open(folder / f"set-{shard:02d}.tar", "w") as tar:
            for path in images[8 * shard : 8 * shard + 8]:
                tar.add(path, path.name)
    return folder


RANGE = "set-{00..02}.tar"


def test_remote_images_are_the_local_ones(shards):
    local = open_source(shards)
    with serve(shards) as server:
        stored = index_remote_shards(f"{server.url}/{RANGE}")
        assert all("remote1" in path for path in stored)  # a web server cannot store the index
        source = open_source(f"{server.url}/{RANGE}")
        assert [source.name(i) for i in range(24)] == [local.name(i) for i in range(24)]
        server.requests.clear()
        source.prefetch(range(0, 24, 2))
        assert [source.read(i) for i in range(24)] == [local.read(i) for i in range(24)]
        assert len(server.requests) == 24  # one request per image, announced or not


def test_an_index_beside_the_shards_is_used(shards, tmp_path):
    stored = index_remote_shards(f"file://{shards}/{RANGE}")
    assert stored[0].endswith("set-00.tar.index.npz") and (shards / "set-00.tar.index.npz").exists()
    assert len(RemoteShardSource(f"file://{shards}/{RANGE}")) == 24


def test_a_server_that_fails_now_and_then_changes_nothing(shards):
    local = open_source(shards)
    with serve(shards, fail_every=3) as server:
        index_remote_shards(f"{server.url}/{RANGE}")
        source = open_source(f"{server.url}/{RANGE}")
        assert source.read_many(range(24)) == [local.read(i) for i in range(24)]
        assert len(server.requests) > 30


def test_the_command_indexes_once_and_refuses_what_is_no_url(shards, capsys):
    data_command.main(["index", f"file://{shards}/{RANGE}"])
    assert "24 images; indices in file://" in capsys.readouterr().out
    assert "not a URL" in message(data_command.main, ["index", str(shards)])
    assert "must name .tar shards" in message(data_command.main, ["index", "http://127.0.0.1/x"])


def message(function, *args):
    with pytest.raises(UsageError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_faults_are_named(shards):
    with serve(shards) as server:
        root = f"{server.url}/{RANGE}"
        assert "no index yet; densecl data index" in message(open_source, root)
        index_remote_shards(root)
        source = open_source(root)
        server.forbidden = ("/set-01.tar",)
        assert "access denied; check the credentials" in message(source.read, 8)
        assert "access denied" in message(open_source, root)
        server.forbidden = ()
        path = shards / "set-02.tar"
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        assert "was changed" in message(source.read, 23)
        assert "changed since its index" in message(open_source, root)
        path.unlink()
        assert "set-02.tar: not found" in message(source.read, 23)
        assert "set-02.tar: not found" in message(open_source, root)
        with pytest.raises(RunError):  # ends the run; a missing shard is no corrupt image
            source.load_or_replace(23, None)


def test_a_server_without_byte_ranges_is_named(shards):
    with serve(shards) as server:
        index_remote_shards(f"{server.url}/{RANGE}")
        source = open_source(f"{server.url}/{RANGE}")
        server.ranges = False
        assert "complete files instead of byte ranges" in message(source.read, 5)


@pytest.mark.parametrize("root", ["http://host/images", "nothing://x.tar", "s3:/x.tar"])
def test_urls_that_cannot_be_opened(root):
    assert message(open_source, root).startswith("--data-root")


def batches_of(config, first=0, last=6):
    return list(build_loader(config, build_views(config), first, last))


def test_batches_are_those_of_the_local_shards_for_any_number_of_workers(shards, tmp_path):
    config = replace(TINY, data_root=str(shards), augment="fast")
    expected = batches_of(config)
    with serve(shards, latency=0.02, fail_every=11) as server:
        root = f"{server.url}/{RANGE}"
        index_remote_shards(root)
        for workers in (0, 2):
            server.most_waiting = 0
            cache = {"cache_dir": str(tmp_path / "disk"), "cache_gb": 1e-3 * workers}
            remote = replace(config, data_root=root, workers=workers, **cache)
            for a, b in zip(expected, batches_of(remote), strict=True):
                assert torch.equal(a["im_q"], b["im_q"]) and a["bad"] == b["bad"]
            assert server.most_waiting >= 4  # a batch is requested at once, ahead of its use
        server.requests.clear()
        batches_of(remote)  # every image is in the cache now
        assert not [r for r in server.requests if r[2] and "index" not in r[1]]


@pytest.mark.long
def test_two_ranks_killed_while_reading_a_slow_server_end_like_a_run_on_the_disk(
    shards, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with serve(shards, latency=0.01, fail_every=13) as server:
        root = f"{server.url}/{RANGE}"
        index_remote_shards(root)
        options = ["--data-root", root, "--out", "killed"]
        restarts = torchrun("--standalone", "--max-restarts=3")
        with Run(*options, workers=2, before=restarts) as run:
            run.wait_until(lambda: last_step("killed") >= 8)
            os.kill(random.Random(0).choice(rank_processes(run.process.pid)[:2]), signal.SIGKILL)
            run.wait_until(lambda: run.resumed_steps() and last_step("killed") >= 12)
        goal = ["--max-steps", str(checkpoint_step("killed") + 4)]
        with Run(*options, *goal, workers=2, before=torchrun()) as run:
            assert run.exit_status() == 0, run.text
    local = undisturbed("whole", int(goal[1]), "--data-root", str(shards), before=torchrun())
    assert_same_run("killed", local)
