"""Records from files in every format and compression, whole and damaged."""

import bz2
import json
import lzma
import random
import sys

import pyarrow
import pyarrow.parquet
import pytest
from loaded import good, lines, packed, read

from wmtp.data import compression
from wmtp.data.base import BadExample
from wmtp.data.config import Jsonl
from wmtp.data.files import read_records
from wmtp.data.splits import data_files
from wmtp.errors import WMTPError

RECORDS = [{"text": f"eins {n} ä"} for n in range(5)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines(*RECORDS)),
        ("a.jsonl", b"\xef\xbb\xbf" + lines(*RECORDS).replace(b"\n", b"\r\n\r\n")),
        ("a.jsonl", lines(*RECORDS).removesuffix(b"\n")),
        ("a.jsonl.gz", packed(lines(*RECORDS))),
        ("a.jsonl.gz", packed(lines(*RECORDS[:2])) + packed(lines(*RECORDS[2:]))),
        ("a.jsonl.bz2", bz2.compress(lines(*RECORDS))),
        ("a.jsonl.xz", lzma.compress(lines(*RECORDS))),
        ("a.json", json.dumps(RECORDS).encode()),
        ("a.json", json.dumps({"version": 1, "data": RECORDS}, ensure_ascii=False).encode()),
        ("a.json.gz", packed(json.dumps(RECORDS, indent=2).encode())),
    ],
)
def test_records_are_read_from_every_form(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert [example.completion for example in good(Jsonl(uri=""), tmp_path / name)] == [r["text"] for r in RECORDS]
    assert [example.completion for example in good(Jsonl(uri=""), tmp_path)] == [r["text"] for r in RECORDS]


@pytest.mark.parametrize("name", ["a.parquet", "a.parquet.gz"])
def test_records_are_read_from_parquet(tmp_path, name):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(packed((tmp_path / "a.parquet").read_bytes()))
    found = good(Jsonl(uri=""), tmp_path / name)
    assert [example.completion for example in found] == [r["text"] for r in RECORDS]
    assert found[2].where == f"{tmp_path / name}: row 3"


def test_zst_without_its_package_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(compression, "_ZSTD", ("no_such_module",))
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(WMTPError, match=r"a\.jsonl\.zst.*pip install wmtp-core\[zstd\]"):
        read(Jsonl(uri=""), tmp_path / "a.jsonl.zst")


def zstd_module():
    return pytest.importorskip("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")


def test_zst_is_read_in_several_frames_and_with_a_large_window(tmp_path):
    zstd = zstd_module()
    large = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 30})
    middle = large.compress(lines(*RECORDS)) + large.flush()
    (tmp_path / "a.jsonl.zst").write_bytes(zstd.compress(lines(RECORDS[0])) + middle + zstd.compress(lines(RECORDS[1])))
    assert [example.completion for example in good(Jsonl(uri=""), tmp_path)] == [
        record["text"] for record in (RECORDS[0], *RECORDS, RECORDS[1])
    ]


@pytest.mark.parametrize("damage", [lambda c: c[:-5], lambda c: c + b"junk", lambda c: b"text", lambda c: b""])
def test_damaged_zst_is_named(tmp_path, damage):
    (tmp_path / "a.jsonl.zst").write_bytes(damage(zstd_module().compress(lines(*RECORDS))))
    with pytest.raises(WMTPError, match=r"a\.jsonl\.zst: damaged or truncated \.zst file"):
        read(Jsonl(uri=""), tmp_path)


def test_parquet_without_pyarrow_names_the_extra(tmp_path):
    import subprocess

    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"  # how Python marks a module that cannot be imported
        "from pathlib import Path; from wmtp.data.files import read_records\n"
        "list(read_records([Path(sys.argv[1])]))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a.parquet"], capture_output=True, text=True)
    assert "pip install wmtp-core[parquet]" in done.stderr


def truncated(compressed):
    return compressed[: len(compressed) * 2 // 3]


NOISE = [{"text": random.Random(0).randbytes(10_000).hex()}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", truncated(packed(lines(*NOISE))), "a.jsonl.gz: damaged or truncated .gz file"),
        ("a.jsonl.bz2", truncated(bz2.compress(lines(*NOISE))), "a.jsonl.bz2: damaged or truncated .bz2 file"),
        ("a.jsonl.xz", truncated(lzma.compress(lines(*NOISE))), "a.jsonl.xz: damaged or truncated .xz file"),
        ("a.jsonl.gz", lines(*RECORDS), "a.jsonl.gz: damaged or truncated .gz file"),
        ("a.jsonl.xz", b"", "a.jsonl.xz: damaged or truncated .xz file"),
        ("a.json", b"[1, ", r"a.json:1: not valid JSON"),
        ("a.json", b'[{"text": "x"}]\n[', r"a.json:2: not valid JSON: Extra data"),
        ("a.json", b"\xff\xfe", r"a.json: is text in UTF-16; save it in UTF-8"),
        ("a.json", b'{"text": "x"}', 'a.json: neither a list of objects nor an object with such a list in "data"'),
        ("a.parquet", b"PAR1 no", "a.parquet: does not end as .parquet files do: it was cut off"),
        ("a.parquet", b"PAR1 no PAR1", "a.parquet: not a readable Parquet file"),
        ("a.csv", b"", "a.csv: is empty; its first line must name the columns"),
        ("a.csv", b"a,b,a\n", "a.csv:1: names the column 'a' twice"),
        ("a.csv", b"prompt;completion\n", r"a.csv:1: has one column, .*separated by ';'; write commas"),
        ("a.csv", b'text\n"a\n\nb\n', "a.csv:2: not valid CSV from here on: "),
        ("a.arrow", b"ARROW1 no", "a.arrow: does not end as .arrow files do: it was cut off"),
        ("a.arrow", b"ARROW1 no ARROW1", "a.arrow: not a readable Arrow file"),
        ("a.txt", b"", "a.txt: not a data file; expected .jsonl, .json, .parquet.*plain text is read by type = 'text'"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WMTPError, match=message) as error:
        list(read_records(data_files(tmp_path / name)))
    assert not isinstance(error.value, BadExample)


def test_folders(tmp_path):
    with pytest.raises(WMTPError, match="no such file or folder"):
        data_files(tmp_path / "missing")
    (tmp_path / "README.md").write_text("…")
    (tmp_path / ".hidden.json").write_text("…")
    with pytest.raises(WMTPError, match="holds no data file"):
        data_files(tmp_path)
    for name in ("b.jsonl", "a.jsonl.gz", "c.jsonl"):
        (tmp_path / name).write_text("")
    assert [file.name for file in data_files(tmp_path)] == ["a.jsonl.gz", "b.jsonl", "c.jsonl"]
    (tmp_path / "d.json").write_text("[]")
    with pytest.raises(WMTPError, match=r"mixes \.json and \.jsonl files"):
        data_files(tmp_path)
