"""Checksums of parts, computed as the parts become whole, against the whole file read at the end."""

import hashlib
import itertools
import random
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from wmtp_storage.checksums import PartDigests, StoreChecksum

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
    """What is missing, by looking at every byte."""
    there = bytearray(size)
    for start, end in segments:
        there[start:end] = b"\1" * (end - start)
    return [match.span() for match in re.finditer(b"\0+", there)]
