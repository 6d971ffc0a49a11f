"""Whatever the network does: the right bytes, or an error and a state to go on from."""

import gc
import os
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from obstore.exceptions import PreconditionError

from wmtp.errors import WMTPError
from wmtp.storage.manifest import MANIFEST, Manifest, verify
from wmtp_storage import S3Storage
from wmtp_storage.journal import read_journal
from wmtp_storage.throttle import Throttle
from wmtp_storage.transfer import Transfer

KB = 2**10
SIZES = {"a/small": 1, "empty": 0, "a/b/one": 16 * KB, "two": 32 * KB + 1, "large": 300 * KB, "multipart": 6 * 2**20}
FAULTS = ("cut", "reset", "stall", "500", "503", "429", "shifted", "short", "whole", "corrupt", "other-etag", "garbage")
#: schedules of each; more for a soak: WMTP_FAULT_SEEDS=500 pytest packages/wmtp-storage/tests/test_faults.py
MANY = int(os.environ.get("WMTP_FAULT_SEEDS", "4"))
each_schedule = pytest.mark.parametrize("seeds", [range(MANY), pytest.param(range(MANY, 3 * MANY), marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def model(s3_server):
    """A folder in a bucket, and what is in it."""
    generator = random.Random(1)
    content = {name: generator.randbytes(size) for name, size in SIZES.items()}
    bucket = s3_server.bucket()
    store = s3_server.store(bucket)
    for name, data in content.items():
        store.put(f"model/{name}", data, use_multipart=name == "multipart", chunk_size=5 * 2**20)
    return f"s3://{bucket}/model", content


def storage(proxy, **options):
    options = {"chunk_size": 16 / 1024, "retry_timeout": 3, "read_timeout": 60} | options
    return S3Storage(endpoint=proxy.endpoint, region="us-east-1", **options).build()


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST}


def is_whole(target, content):
    manifest = Manifest.read(target / MANIFEST)
    return manifest is not None and not verify(target, manifest.files) and files(target) == content


def fetch_and_resume(uri, content, target, proxy, clean, **options):
    """Fetch through the faults; where that fails, look at what is left, and go on without faults."""
    said = ""
    try:
        done = storage(proxy, **options).fetch(uri, target, exclude=["multipart"])
    except WMTPError as error:
        said = str(error)
    if said:
        assert uri.partition("://")[2] in said or str(target) in said
        assert not (target / MANIFEST).exists()
        assert set(files(target)) - {".wmtp-fetch/journal", ".wmtp-fetch/lock"} == {
            name for name in files(target) if name.startswith(".wmtp-fetch/files/")
        }, "a file has its name before all are whole"
        kept = read_journal(target / ".wmtp-fetch/journal")
        there = sum(segment.end - segment.start for state in kept.values() for segment in state.segments)
        patient = storage(clean, chunk_size=40 / 1024, max_connections=3, retry_timeout=300, read_timeout=60)
        again = patient.fetch(uri, target, exclude=["multipart"])
        if "corrupt" not in proxy.done:
            assert again.transferred == again.size - there, "what was there came once more"
        outcome = "resumed"
    else:
        assert done.transferred >= done.size
        outcome = "whole"
    assert is_whole(target, {name: data for name, data in content.items() if name != "multipart"})
    return outcome


@each_schedule
@pytest.mark.parametrize("fault", FAULTS)
def test_seeded_schedules_of_one_fault(faulty, model, tmp_path, fault, seeds):
    uri, content = model
    clean = faulty(())

    def schedule(seed):
        share = (0.1, 0.3, 0.6, 1.0)[seed % 4]
        most = (None, 3, 10)[seed % 3]
        proxy = faulty([fault], seed=seed, share=share, most=most, stall=1.0)
        # faults that end are survived, however slow the machine is
        options = {"retry_timeout": 60 if most else 1, "read_timeout": 0.5 if fault == "stall" else 60}
        outcome = fetch_and_resume(uri, content, tmp_path / str(seed), proxy, clean, **options)
        return outcome, len(proxy.done)

    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(schedule, seeds))
    assert sum(count for _, count in outcomes) > len(seeds), "hardly a fault happened"
    # S3 signs the range: a request without it is refused, and whether one comes depends on which requests come first
    assert fault == "whole" or "whole" in {outcome for outcome, _ in outcomes}


@each_schedule
def test_seeded_schedules_of_all_faults(faulty, model, tmp_path, seeds):
    uri, content = model
    clean = faulty(())

    def schedule(seed):
        proxy, patience = faulty(FAULTS, seed=seed, share=0.4, most=None if seed % 2 else 12), 3 if seed % 2 else 60
        return fetch_and_resume(uri, content, tmp_path / str(seed), proxy, clean, retry_timeout=patience, read_timeout=0.5)

    with ThreadPoolExecutor(4) as pool:
        assert {"whole", "resumed"} <= set(pool.map(schedule, range(1000 + 3 * seeds.start, 1000 + 3 * seeds.stop)))


def test_an_object_that_changes_under_the_transfer_is_never_mixed(faulty, s3, tmp_path):
    """Whichever request comes first after the change: all files are of one version."""
    bucket = s3.bucket()
    store = s3.store(bucket)

    def write(version):
        for name in ("first", "second"):
            store.put(f"m/{name}", bytes([version]) * 200 * KB)

    for moment in (1, 2, 5, 9, 14, 20):
        write(moment)
        changed = []

        def change(number, moment=moment, changed=changed):
            if number >= moment and not changed:
                changed.append(number)
                write(100 + moment)

        target = tmp_path / str(moment)
        storage(faulty((), on_get=change)).fetch(f"s3://{bucket}/m", target)
        assert files(target) == dict.fromkeys(("first", "second"), bytes([100 + moment]) * 200 * KB)


def test_many_objects_that_change_at_once_are_one_line(s3, tmp_path, caplog, monkeypatch):
    """Every connection finds its object changed in the same moment; asyncio prints a traceback for errors nobody takes."""
    bucket, seen, read = s3.bucket(), [], Transfer._read
    for number in range(8):
        s3.store(bucket).put(f"m/{number}", bytes(30 + number))

    async def changed(self, running):
        seen.append(running)
        if len(seen) <= 8:
            raise PreconditionError("")
        await read(self, running)

    monkeypatch.setattr(Transfer, "_read", changed)
    S3Storage().build().fetch(f"s3://{bucket}/m", tmp_path / "out")
    gc.collect()
    said = [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert said == [f"s3://{bucket}/m changed while it was fetched; continuing with its present content"]
    assert len(files(tmp_path / "out")) == 8


def test_what_keeps_changing_is_an_error(faulty, s3, tmp_path):
    bucket = s3.bucket()
    store = s3.store(bucket)
    store.put("m/x", b"0" * 100 * KB)
    with pytest.raises(WMTPError, match="keeps changing"):
        storage(faulty((), on_get=lambda number: store.put("m/x", bytes([number % 251]) * 100 * KB))).fetch(
            f"s3://{bucket}/m", tmp_path / "out"
        )
    assert not (tmp_path / "out/x").exists()


def test_a_listing_that_changes_is_seen(faulty, s3, tmp_path):
    """A shard that is added, and one that is removed, while others are fetched."""
    bucket = s3.bucket()
    store = s3.store(bucket)
    store.put("m/x", b"x" * 100 * KB)
    store.put("m/zz", b"old")

    def change(number):
        if number == 3:
            store.put("m/y", b"new")
            store.delete("m/zz")

    storage(faulty((), on_get=change), max_connections=1).fetch(f"s3://{bucket}/m", tmp_path / "out")
    assert files(tmp_path / "out") == {"x": b"x" * 100 * KB, "y": b"new"}


def test_large_objects_are_compared_with_the_checksums_of_their_parts(faulty, model, tmp_path):
    uri, content = model
    done = storage(faulty(()), chunk_size=1).fetch(uri, tmp_path / "a", include=["multipart"])
    assert done.transferred == SIZES["multipart"]
    assert Manifest.read(tmp_path / "a" / MANIFEST).files[0].checked == "md5 of parts"
    assert (tmp_path / "a/multipart").read_bytes() == content["multipart"]
    with pytest.raises(WMTPError, match="multipart: what was received does not match the store's checksum"):
        storage(faulty(["corrupt"], share=1), chunk_size=1).fetch(uri, tmp_path / "b", include=["multipart"])
    storage(faulty(["corrupt"], share=1, most=1), chunk_size=1).fetch(uri, tmp_path / "b", include=["multipart"])
    assert (tmp_path / "b/multipart").read_bytes() == content["multipart"]


def test_fewer_requests_at_once_where_the_store_says_that_it_is_too_much():
    throttle = Throttle(64)
    throttle.slow_down()
    throttle.slow_down()  # of the same moment: it counts once
    assert throttle.limit == 4
