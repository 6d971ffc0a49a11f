"""Promises about memory and many objects, measured on the process of the command itself."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from wmtp.storage.manifest import MANIFEST, Manifest

MB = 2**20
#: what a process may need beside ``max_memory``: docs/storage.md says so
BESIDE = 128
COUNT = 2100  # three pages of a listing

#: the command, and then the largest size that the process ever had; that of its parent, before exec, is not in it
MEASURED = """
import re, sys
from wmtp.cli import main
code = main(sys.argv[1:])
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
sys.exit(code)
"""


def fetch(uri, target, **options):
    """Run the command; return its answer, and its peak memory in MB."""
    words = [word for name, value in options.items() for word in ("--set", f"storage.s3.{name}={value}")]
    command = [sys.executable, "-c", MEASURED, "fetch", uri, target, "--json", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    answer, peak = done.stdout.splitlines()
    return json.loads(answer), int(peak) / 1000


@pytest.fixture(scope="module")
def large(s3_server):
    bucket = s3_server.bucket()
    for number in range(3):
        s3_server.store(bucket).put(f"m/{number}", bytes([number]) * (64 * MB), use_multipart=True)
    return f"s3://{bucket}/m"


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize(
    ("most", "options"),
    [(128, {}), (16, {"max_memory": 16}), (64, {"max_memory": 64, "chunk_size": 64, "max_connections": 64})],
)
def test_memory_has_a_bound_whatever_the_sizes(s3, large, tmp_path, most, options):
    answer, peak = fetch(large, tmp_path / "out", **options)
    assert answer["transferred"] == 192 * MB
    assert peak < most + BESIDE


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_thousands_of_small_objects(s3, tmp_path):
    bucket = s3.bucket()
    store = s3.store(bucket)
    content = {f"m/{number % 7}/{number}": str(number).encode() * (number % 50) for number in range(COUNT)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.put(key, content[key], use_multipart=False), content))
    answer, peak = fetch(f"s3://{bucket}/m", tmp_path / "out")
    assert (answer["files"], answer["transferred"]) == (COUNT, sum(map(len, content.values())))
    assert peak < 128 + BESIDE
    assert {f"m/{file.name}" for file in Manifest.read(tmp_path / "out" / MANIFEST).files} == content.keys()
    assert all((tmp_path / "out" / key.removeprefix("m/")).read_bytes() == data for key, data in content.items())
    # one that changed, one that is new, one that is gone
    store.put("m/1/1", b"changed")
    store.put("m/new", b"new")
    store.delete("m/2/2")
    again, _ = fetch(f"s3://{bucket}/m", tmp_path / "out")
    assert (again["files"], again["transferred"]) == (COUNT, len(b"changednew"))
