"""``wmtp cache`` as a person sees it: whole, damaged, half-filled entries, and one that another process uses."""

import json
import os
import re
import subprocess
import sys

import pytest

from wmtp.cli import main

KB = 2**10

#: takes an entry into use, says so, and lives until its standard input is closed
USER = """
import sys
from pathlib import Path
from wmtp_storage import S3Storage
S3Storage().build().localize(sys.argv[1], Path(sys.argv[2]))
print("in use", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def bucket(s3):
    bucket = s3.bucket()
    for name, size in {"old/x": 300 * KB, "new/x": 200 * KB, "busy/x": 100 * KB, "half/x": 700 * KB}.items():
        s3.store(bucket).put(name, os.urandom(size))
    return bucket


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def wmtp(cache, capsys):
    """``wmtp cache …``: its exit code, the lines that it printed, and what it said."""

    def run(*words):
        code = main(["cache", *words, "--cache-dir", str(cache)])
        printed, said = capsys.readouterr()
        assert "Traceback" not in said
        return code, printed.splitlines(), said

    return run


def entry(path):
    """The folder of an entry, from a path in it."""
    return next(parent for parent in (path, *path.parents) if parent.parent.name == "cache")


def localize(bucket, name, cache, used):
    """Fetch in a process that ends, and say when the entry was used last."""
    done = subprocess.run([sys.executable, "-c", USER, f"s3://{bucket}/{name}", str(cache)], input="", text=True)
    assert done.returncode == 0
    (found,) = (each for each in cache.glob("*/complete.json") if f"/{name}" in each.read_text())
    os.utime(found, (used, used))
    return found.parent


def test_list_verify_prune(bucket, s3, cache, wmtp, faulty, tmp_path):
    old, new = localize(bucket, "old", cache, 1e9), localize(bucket, "new", cache, 2e9)
    words = [sys.executable, "-c", USER, f"s3://{bucket}/busy", str(cache)]
    user = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    # a process that is killed while it fills an entry
    running = []
    proxy = faulty((), on_get=lambda number: number == 5 and running[0].kill())
    code = USER.replace("S3Storage()", f"S3Storage(endpoint={proxy.endpoint!r}, chunk_size=1/64, max_connections=1)")
    running.append(subprocess.Popen([sys.executable, "-c", code, f"s3://{bucket}/half", str(cache)]))
    running[0].wait(timeout=300)
    assert user.stdout.readline() == "in use\n"
    try:
        code, lines, _ = wmtp("list")
        assert code == 0
        assert re.fullmatch(rf"{re.escape(str(cache))}: 4 entries, [\d.]+ (k|M)B", lines[-1])
        by_name = {re.split("  +", line)[-1].split("/")[-1]: line for line in lines[:-1]}
        assert [name for name, line in by_name.items() if "in use" in line] == ["busy"]
        assert by_name.keys() == {"old", "new", "busy", "not complete: another fetch continues it, or prune removes it"}
        assert wmtp("verify")[:2] == (0, [f"{cache}: all is as it was fetched"])

        # one byte of a file, and a file that is gone
        file = old / "files/old/x"
        file.write_bytes(b"?" + file.read_bytes()[1:])
        (new / "files/new/x").unlink()
        code, lines, _ = wmtp("verify")
        assert code == 1
        assert sorted(lines) == sorted([f"{file}: its content was changed or damaged", f"{new / 'files/new/x'}: is missing"]), (
            "each is named"
        )

        # what failed goes first, whatever the size; then what is damaged or was used longest ago; what is in use stays
        code, lines, _ = wmtp("prune", "--max-size", "10 GB")
        assert (code, lines[0].partition(":")[2].partition(",")[0]) == (0, " 1 entry removed")
        assert {each.parent for each in cache.glob("*/complete.json")} == {old, new, entry(busy(cache))}
        said = wmtp("prune", "--max-size", "620kB")[1][0]
        assert said.endswith(" kB left"), "it fits: a damaged entry counts with what it has"
        answer = wmtp("prune", "--max-size", "0", "--json")
        assert answer[0] == 0
        found = json.loads(answer[1][0])
        assert {each["path"] for each in found["removed"]} == {str(old), str(new)}
        assert found["size"] > 100 * KB, "what is in use is still there, and counted"
        assert busy(cache).stat().st_size == 100 * KB
        assert wmtp("prune", "--max-size", "0")[1][0].endswith("left: more than --max-size, for running processes use it")
    finally:
        user.communicate(timeout=300)
    assert wmtp("prune", "--max-size=0")[1] == [f"{cache}: 1 entry removed, 0 B left"]
    assert list(cache.iterdir()) == []


def busy(cache):
    return next(cache.glob("*/files/busy/x"))


def test_the_limit_is_hard_and_the_last_used_stay(bucket, cache, wmtp):
    first, second, third = (localize(bucket, name, cache, 1e9 + number) for number, name in enumerate(("old", "new", "busy")))
    assert not list(cache.glob("*/.wmtp-fetch")), "nothing of the transfers is left"
    assert wmtp("prune", "--max-size", "700KiB")[1][0].startswith(f"{cache}: 0 entries removed, 61")
    # the oldest is used again, without being fetched: it is the youngest now
    subprocess.run([sys.executable, "-c", USER, f"s3://{bucket}/old", str(cache)], input="", text=True, check=True)
    assert f"s3://{bucket}/old" in wmtp("list")[1][0]
    assert wmtp("prune", "--max-size", "420kB")[0] == 0
    assert (first.exists(), second.exists(), third.exists()) == (True, False, True)
    # 300 KiB and a manifest are more than 300 KiB
    assert wmtp("prune", "--max-size", "310kB")[0] == 0
    assert (first.exists(), third.exists()) == (True, False)
    assert wmtp("prune", "--max-size", str(300 * KB))[0] == 0
    assert not first.exists()


def test_a_damaged_entry_is_filled_anew(bucket, cache, wmtp):
    damaged = localize(bucket, "old", cache, 1e9)
    (damaged / "complete.json").write_text("{")
    assert "not complete" in wmtp("list")[1][0]
    assert wmtp("verify")[:2] == (0, [f"{cache}: all is as it was fetched"])
    localize(bucket, "old", cache, 1e9)
    assert f"s3://{bucket}/old" in wmtp("list")[1][0]
    # a file of the wrong size is seen without reading it
    (damaged / "files/old/x").write_bytes(b"short")
    localize(bucket, "old", cache, 1e9)
    assert (damaged / "files/old/x").stat().st_size == 300 * KB


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prune"], "--max-size SIZE says how much 'prune' leaves"),
        (["list", "--max-size", "1GB"], "--max-size SIZE says how much 'prune' leaves"),
        (["prune", "--max-size=-5GB"], "--max-size: '-5GB' is no size; write, for instance, 200GB or 1.5TB"),
        (["prune", "--max-size=lots"], "--max-size: 'lots' is no size"),
        (["prune", "--max-size=10PB"], "--max-size: '10PB' is no size"),
        (["prune", "--max-size="], "--max-size: '' is no size"),
        (["prune", "--max-size=1,5GB"], "--max-size: '1,5GB' is no size"),
    ],
)
def test_what_is_no_size(wmtp, words, said):
    code, printed, error = wmtp(*words)
    assert (code, printed) == (2, [])
    assert said in error


@pytest.mark.parametrize("size", ["500 MB", "0.5GB", "500m", "1GiB", " 1 tb ", "7"])
def test_no_cache_at_all(wmtp, cache, size):
    assert wmtp("prune", "--max-size", size) == (0, [f"{cache}: 0 entries removed, 0 B left"], "")
    assert wmtp("list") == (0, [f"{cache}: 0 entries, 0 B"], "")
    assert wmtp("verify") == (0, [f"{cache}: all is as it was fetched"], "")
    assert not cache.exists(), "looking makes nothing"
