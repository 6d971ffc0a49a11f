"""Killed, interrupted, out of space: nothing is half-named, and the next fetch goes on."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from wmtp.errors import WMTPError
from wmtp.storage.cache import Cache, CacheEntry
from wmtp.storage.manifest import MANIFEST, Manifest, verify
from wmtp_storage import S3Storage
from wmtp_storage.journal import read_journal

KB = 2**10


@pytest.fixture
def model(s3):
    """The URI of a folder in a bucket."""
    bucket = s3.bucket()
    generator = random.Random(2)
    for name, size in {"large": 700 * KB, "two": 150 * KB, "small": 100}.items():
        s3.store(bucket).put(f"m/{name}", generator.randbytes(size))
    return f"s3://{bucket}/m"


def start(uri, target, proxy, chunk=16, **options):
    """``wmtp fetch`` in a process of its own."""
    sets = {"endpoint": proxy.endpoint, "region": "us-east-1", "chunk_size": chunk / 1024, "max_connections": 4} | options
    words = [word for name, value in sets.items() for word in ("--set", f"storage.s3.{name}={value}")]
    return subprocess.Popen(
        [sys.executable, "-m", "wmtp", "fetch", uri, str(target), "--json", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kept(target):
    """Bytes that the journal says are there."""
    journal = read_journal(target / ".wmtp-fetch/journal")
    return sum(segment.end - segment.start for state in journal.values() for segment in state.segments)


def is_whole(target):
    manifest = Manifest.read(target / MANIFEST)
    return manifest is not None and not verify(target, manifest.files) and not (target / ".wmtp-fetch").exists()


def named(target):
    return {path.name for path in target.iterdir()} - {".wmtp-fetch"} if target.exists() else set()


def test_kill_at_random_moments(faulty, model, tmp_path):
    """With another chunk size and number of connections each time; only what is missing comes again."""
    generator = random.Random(3)
    target = tmp_path / "out"
    before = 0
    for _ in range(5):
        running = []
        at = generator.randrange(2, 12)
        proxy = faulty((), on_get=lambda number, at=at, running=running: number == at and running[0].kill())
        running.append(start(model, target, proxy, generator.choice((8, 16, 24)), max_connections=generator.choice((1, 3))))
        running[0].communicate(timeout=300)
        if running[0].returncode == 0:
            break
        assert running[0].returncode == -signal.SIGKILL
        assert named(target) == set()
        assert kept(target) >= before
        before = kept(target)
    assert before > 0
    proxy = faulty(())
    done = S3Storage(endpoint=proxy.endpoint, region="us-east-1").build().fetch(model, target)
    assert done.transferred == done.size - before
    assert is_whole(target)


def test_a_kill_keeps_what_came_of_a_range(faulty, s3, tmp_path):
    """One range is the whole object, and the store stops within it: hours of a slow line must not be lost."""
    bucket, size = s3.bucket(), 4 * KB * KB
    s3.store(bucket).put("m/x", random.Random(4).randbytes(size), use_multipart=False)
    target, proxy = tmp_path / "out", faulty(["stall"], share=1, seed=6, stall=600)  # stops after 3.88 MB
    running = start(f"s3://{bucket}/m", target, proxy, 64 * KB, read_timeout=600)
    part = target / ".wmtp-fetch/files/x"
    # less than a piece is on its way, and less than 1 MiB was written since the last note
    noted, end = 3 * KB * KB // 2, time.monotonic() + 100
    while kept(target) < noted:
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < end, f"{kept(target)} bytes are noted"
        time.sleep(0.02)
    running.kill()
    running.communicate(timeout=300)
    assert part.stat().st_size == size
    before = kept(target)
    assert before >= noted
    done = S3Storage(endpoint=faulty(()).endpoint, region="us-east-1").build().fetch(f"s3://{bucket}/m", target)
    assert done.transferred == size - before
    assert is_whole(target)


def test_ctrl_c_ends_soon_and_can_go_on(faulty, model, tmp_path):
    running = []
    proxy = faulty(["stall"], share=1, stall=600, on_get=lambda number: number == 4 and running[0].send_signal(signal.SIGINT))
    running.append(start(model, tmp_path / "out", proxy, read_timeout=600))
    _, said = running[0].communicate(timeout=300)  # far less than a request takes
    assert running[0].returncode == 130
    assert "error: interrupted" in said
    assert "Traceback" not in said
    assert named(tmp_path / "out") == set()
    before = kept(tmp_path / "out")
    done = S3Storage(endpoint=faulty(()).endpoint, region="us-east-1").build().fetch(model, tmp_path / "out")
    assert done.transferred == done.size - before
    assert is_whole(tmp_path / "out")


FORK = """
import os, sys
from wmtp_storage import S3Storage
if sys.argv[2] == "used":
    S3Storage().build().exists(sys.argv[1])
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(S3Storage().build().exists(sys.argv[1]), flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("parent", ["used", "not"])
def test_a_fork_of_a_process_that_used_a_store_does_not_hang(model, parent):
    """obstore's threads are not in the child: it would wait for ever."""
    done = subprocess.run([sys.executable, "-c", FORK, model, parent], capture_output=True, text=True, timeout=300)
    if parent == "used":
        assert "it is a fork of one that has used an object store; start processes by another method" in done.stderr
    assert (done.returncode, done.stdout) == ((1, "") if parent == "used" else (0, "True\n"))


class Killed(BaseException):
    """A kill, as code in the middle of something sees it."""


@pytest.mark.parametrize("at", range(3))
def test_a_kill_while_files_are_put_into_their_places(s3, model, tmp_path, monkeypatch, at):
    target = tmp_path / "out"
    replace, count = Path.replace, [0]

    def replaced(self, other):
        if ".wmtp-fetch/files" in str(self):
            count[0] += 1
            if count[0] > at:
                raise Killed
        return replace(self, other)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replaced)
        with pytest.raises(Killed):
            S3Storage().build().fetch(model, target)
    assert len(named(target)) == at
    assert S3Storage().build().fetch(model, target).transferred == 0
    assert is_whole(target)


def test_bytes_that_a_loss_of_power_took_come_again(faulty, model, tmp_path):
    """The journal says that they are there, and the disk does not have them."""
    proxy = faulty(["503"], share=0.1, seed=1)
    storage = S3Storage(endpoint=proxy.endpoint, region="us-east-1", chunk_size=16 / 1024, retry_timeout=0, max_connections=1)
    with pytest.raises(WMTPError):
        storage.build().fetch(model, tmp_path / "out")
    before = kept(tmp_path / "out")
    assert before
    parts = [path for path in (tmp_path / "out/.wmtp-fetch/files").iterdir() if path.stat().st_size > KB]
    for path in parts:
        path.write_bytes(bytes(path.stat().st_size))
    assert S3Storage().build().fetch(model, tmp_path / "out").transferred >= before
    assert is_whole(tmp_path / "out")


def test_a_journal_that_was_cut_off_is_read_as_far_as_it_goes(s3, model, tmp_path, faulty):
    proxy = faulty(["503"], share=0.1, seed=1)
    storage = S3Storage(endpoint=proxy.endpoint, region="us-east-1", chunk_size=16 / 1024, retry_timeout=0, max_connections=1)
    with pytest.raises(WMTPError):
        storage.build().fetch(model, tmp_path / "out")
    journal = tmp_path / "out/.wmtp-fetch/journal"
    before = kept(tmp_path / "out")
    journal.write_bytes(journal.read_bytes()[:-7])
    assert 0 < kept(tmp_path / "out") < before
    done = S3Storage().build().fetch(model, tmp_path / "out")
    assert done.size - before < done.transferred < done.size
    assert is_whole(tmp_path / "out")


def test_two_processes_do_the_work_once(faulty, model, tmp_path):
    proxy = faulty(())
    both = [start(model, tmp_path / "out", proxy) for _ in range(2)]
    for process in both:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    gets = [path for method, path in proxy.requests if method == "GET" and "list-type" not in path]
    assert len(gets) < 1.5 * (850 / 16 + 3)
    assert is_whole(tmp_path / "out")


@contextlib.contextmanager
def small_disk(folder, size="40m"):
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]).returncode:
        pytest.skip("a small disk can only be mounted by root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_is_too_small_is_seen_before_anything_is_fetched(faulty, model, tmp_path):
    with small_disk(tmp_path / "disk", "4m") as disk:
        proxy = faulty(())
        with pytest.raises(WMTPError, match=r"does not fit: it needs 0\.00 GB more, but .* only 0\.00 GB are free"):
            S3Storage(endpoint=proxy.endpoint, region="us-east-1").build().fetch(model, disk / "out")
        assert not [path for method, path in proxy.requests if method == "GET" and "list-type" not in path]


def test_a_disk_that_fills_up_under_the_transfer(faulty, model, tmp_path):
    with small_disk(tmp_path / "disk") as disk:

        def fill(number):
            if number == 5:
                with contextlib.suppress(OSError), (disk / "other").open("wb", buffering=0) as file:
                    while True:
                        file.write(bytes(64 * KB))

        proxy = faulty((), on_get=fill)
        storage = S3Storage(endpoint=proxy.endpoint, region="us-east-1", chunk_size=16 / 1024, max_connections=2).build()
        with pytest.raises(WMTPError, match="No space left on device"):
            storage.fetch(model, disk / "out")
        assert named(disk / "out") == set()
        (disk / "other").unlink()
        before = kept(disk / "out")
        done = storage.fetch(model, disk / "out")
        assert done.transferred == done.size - before
        assert is_whole(disk / "out")


def test_a_target_that_cannot_be_written(model, tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(WMTPError, match=r"disk/out cannot be written to: Read-only file system"):
            S3Storage().build().fetch(model, disk / "out")
        with pytest.raises(WMTPError, match=r"disk/cache cannot be written to: Read-only file system"):
            S3Storage().build().localize(model, disk / "cache")


def test_many_ask_the_cache_for_the_same(faulty, model, tmp_path, monkeypatch):
    """All find it empty at the same moment; one fetches it, and the others have it as soon as that is done, in use or not."""
    proxy = faulty(())
    paths = []
    together, is_complete, waited = threading.Barrier(4), CacheEntry.is_complete, threading.local()

    def is_complete_for_none_at_first(entry):
        there = is_complete(entry)
        if not hasattr(waited, "done"):
            waited.done = True
            together.wait(timeout=300)
        return there

    def localize():
        storage = S3Storage(endpoint=proxy.endpoint, region="us-east-1", chunk_size=16 / 1024).build()
        paths.append(storage.localize(model, tmp_path / "cache"))

    monkeypatch.setattr(CacheEntry, "is_complete", is_complete_for_none_at_first)
    threads = [threading.Thread(target=localize, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    assert len(paths) == 4
    assert len(set(paths)) == 1
    gets = [path for method, path in proxy.requests if method == "GET" and "list-type" not in path]
    assert len(gets) < 1.5 * (850 / 16 + 3)
    assert [entry.is_in_use for entry in Cache(tmp_path / "cache").list()] == [True]
    assert Cache(tmp_path / "cache").prune(0) == []
    shutil.rmtree(tmp_path / "cache")
