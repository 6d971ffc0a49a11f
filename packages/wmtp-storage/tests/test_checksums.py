"""Checksums of parts, computed as the parts become whole, against the whole file read at the end."""

import hashlib
import itertools
import random
import re
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest

from wmtp_storage.checksums import PartDigests, StoreChecksum, from_headers

PART_SIZES = [(5000,), (1000, 1000, 1000, 7), (1, 4096, 300000, 2), (100,) * 30]


def of_parts(data, sizes):
    """As S3 makes them: the MD5 of the parts' MD5s."""
    whole, position = hashlib.md5(), 0
    for size in sizes:
        whole.update(hashlib.md5(data[position : position + size]).digest())
        position += size
    return StoreChecksum("md5", whole.digest(), sizes)


@pytest.mark.parametrize("sizes", PART_SIZES)
@pytest.mark.parametrize("seed", range(6))
def test_whatever_the_order_in_which_ranges_come(tmp_path, sizes, seed):
    """A part's bytes are read only when all of them are written: a part read too early would have another checksum."""
    generator = random.Random(seed)
    data = generator.randbytes(sum(sizes))
    path = tmp_path / "file"
    path.write_bytes(bytes(len(data)))
    there = []
    cuts = sorted({0, len(data), *(generator.randrange(len(data)) for _ in range(generator.randrange(9)))})
    ranges = list(itertools.pairwise(cuts))
    generator.shuffle(ranges)
    with ThreadPoolExecutor(3) as pool, path.open("rb+") as file:
        digests = PartDigests(of_parts(data, sizes), path, pool, lambda: False)
        for number, (start, end) in enumerate(ranges):
            file.seek(start)
            file.write(data[start:end])
            file.flush()
            there.append((start, end))
            if number % 3 != seed % 3:  # the store's answer may be late: what came before is made up for at the end
                digests.begin(start, end, gaps(there, len(data)))
        assert digests.match()


def test_one_wrong_bit_in_any_part(tmp_path):
    sizes = (100, 100, 50)
    data = random.Random(0).randbytes(250)
    with ThreadPoolExecutor(2) as pool:
        for where in (0, 99, 100, 199, 200, 249):
            path = tmp_path / str(where)
            path.write_bytes(data[:where] + bytes([data[where] ^ 1]) + data[where + 1 :])
            assert not PartDigests(of_parts(data, sizes), path, pool, lambda: False).match()


def gaps(segments, size):
    """Find what is missing by looking at every byte."""
    there = bytearray(size)
    for start, end in segments:
        there[start:end] = b"\1" * (end - start)
    return [match.span() for match in re.finditer(b"\0+", there)]


CONTENT = b"0123456789" * 7


@pytest.mark.parametrize(
    ("headers", "sizes", "expected"),
    [
        ({"x-amz-checksum-sha256": "cGFzcw=="}, None, StoreChecksum("sha256", b"pass")),
        # the cheapest of several; a checksum of parts only where their sizes are known, all of them
        (
            {"x-amz-checksum-sha256": "cGFzcw==", "x-amz-checksum-crc32c": "AAAAAQ=="},
            None,
            StoreChecksum("crc32c", b"\0\0\0\1"),
        ),
        ({"x-amz-checksum-sha256": "cGFzcw==-2"}, (5, 3), StoreChecksum("sha256", b"pass", (5, 3))),
        ({"x-amz-checksum-sha256": "cGFzcw==-2"}, None, None),
        ({"x-amz-checksum-sha256": "cGFzcw==-3"}, (5, 3), None),
        ({"etag": f'"{"0a" * 16}"'}, None, StoreChecksum("md5", b"\x0a" * 16)),
        ({"etag": f'"{"0a" * 16}-2"'}, (5, 3), StoreChecksum("md5", b"\x0a" * 16, (5, 3))),
        ({"etag": f'"{"0a" * 16}-2"'}, (8,), None),
        ({"etag": f'"{"0a" * 16}-2"'}, None, None),
        ({"etag": f'"{"0a" * 16}"', "x-amz-server-side-encryption": "AES256"}, None, StoreChecksum("md5", b"\x0a" * 16)),
        # encrypted with a key of somebody's, an ETag is no MD5, whatever it looks like
        ({"etag": f'"{"0a" * 16}"', "x-amz-server-side-encryption": "aws:kms"}, None, None),
        ({"etag": f'"{"0a" * 16}"', "x-amz-server-side-encryption-customer-algorithm": "AES256"}, None, None),
        ({"etag": f'"{"0A" * 16}"'}, None, None),
        ({"etag": '"of-another-kind"'}, None, None),
        ({}, None, None),
    ],
)
def test_what_the_headers_say(headers, sizes, expected):
    assert from_headers(headers, sizes) == expected


@pytest.mark.parametrize(
    ("algorithm", "digest"),
    [
        ("md5", hashlib.md5(CONTENT).digest()),
        ("sha1", hashlib.sha1(CONTENT).digest()),
        ("sha256", hashlib.sha256(CONTENT).digest()),
        ("crc32", zlib.crc32(CONTENT).to_bytes(4, "big")),
        ("crc32c", bytes.fromhex("e3069283")),  # of 123456789: RFC 3720's check value
        ("crc64nvme", bytes.fromhex("ae8b14860a799888")),  # of 123456789: the catalogue's check value
    ],
)
def test_each_algorithm(tmp_path, algorithm, digest):
    path = tmp_path / "file"
    path.write_bytes(b"123456789" if "crc32c" in algorithm or "crc64" in algorithm else CONTENT)
    assert StoreChecksum(algorithm, digest).matches(path)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert not StoreChecksum(algorithm, digest).matches(path)
