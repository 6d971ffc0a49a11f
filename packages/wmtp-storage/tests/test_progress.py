"""Display of ``wmtp fetch``: on terminals of two widths, and in a log."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from datetime import UTC, datetime

import pytest

from wmtp.actions import files as actions
from wmtp.cli import main
from wmtp.storage.base import Fetched
from wmtp_storage.backend import StoredObject
from wmtp_storage.listing import Listing
from wmtp_storage.progress import Progress
from wmtp_storage.work import Part

KB = 2**10


@pytest.fixture
def model(s3):
    bucket = s3.bucket()
    for number in range(12):
        s3.store(bucket).put(f"a/folder/{'deep/' * 5}model-{number:05d}-of-00012.safetensors", bytes(100 * KB))
    return f"s3://{bucket}/a"


@pytest.fixture
def words(faulty, model, tmp_path):
    """The command, over a line that takes a while."""
    proxy = faulty((), edit=lambda path, content: time.sleep(0.05 * ("list-type" not in path)) or content)
    options = {"endpoint": proxy.endpoint, "region": "us-east-1", "max_connections": 2, "chunk_size": 0.02}
    sets = [word for name, value in options.items() for word in ("--set", f"storage.s3.{name}={value}")]
    return [sys.executable, "-m", "wmtp", "fetch", model, str(tmp_path / "out"), *sets]


def on_terminal(words, columns):
    """Everything that a command writes on a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True)
    os.close(theirs)
    written = b""
    while True:
        try:
            data = os.read(ours, 2**16)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        written += data
    os.close(ours)
    assert process.wait(timeout=300) == 0, written
    return written.decode()


@pytest.mark.parametrize("columns", [40, 80])
def test_on_a_terminal_no_line_is_broken_in_two(words, columns):
    written = on_terminal(words, columns)
    *pictures, last = written.split("\x1b[J")
    assert len(pictures) > 3
    above, files = 0, []
    for picture in pictures[:-1]:
        up = re.match(r"\x1b\[(\d+)A", picture)
        assert (int(up[1]) if up else 0) == above, "each picture is painted over the one before"
        lines = re.sub(r"\x1b\[\d*[AK]|\r", "", picture).splitlines()
        above = len(lines)
        assert all(len(line) < columns for line in lines)
        assert above < 10
        files += [line for line in lines[1:] if line.endswith("safetensors")]
    assert files, "each with its own bar"
    assert re.fullmatch(rf"\x1b\[{above}A", pictures[-1]), "nothing of it stays"
    assert re.match(r"\S+: 12 files, 1.2 MB, whole and verified", last.strip())
    assert ("of 12 files" in written) == (columns > 40)


def test_an_empty_file_has_no_bar(tmp_path, monkeypatch, capsys):
    """It is open for a moment, in the thread that verifies it."""
    empty = StoredObject("a", "a", 0, '"etag"', datetime.now(UTC))
    part = Part(empty, tmp_path / "a")
    part.open()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = Progress("s3://bucket", Listing((empty,), is_folder=True), [part])
    progress._draw()
    part.close()
    assert "0 B of 0 B (100 %)" in capsys.readouterr().err


def test_in_a_log_there_are_plain_lines_and_one_object(words):
    done = subprocess.run([*words, "--json"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stderr + done.stdout
    answer = json.loads(done.stdout)
    assert (answer["files"], answer["checked"], answer["size"], answer["transferred"]) == (12, 12, 1200 * KB, 1200 * KB)


@pytest.mark.parametrize(
    ("checked", "said"),
    [
        (3, "whole and verified"),
        (0, "whole by size (there is no checksum to compare with)"),
        (1, "whole; 1 of 3 verified, the others by size (the store has no checksum of them)"),
    ],
)
def test_verified_is_said_of_what_was_compared(checked, said, monkeypatch, tmp_path, capsys):
    done = Fetched(uri="x", target=tmp_path, files=3, checked=checked, size=3, transferred=0, seconds=1.0)
    monkeypatch.setattr(actions, "fetch", lambda *_, **__: done)
    assert main(["fetch", "x", str(tmp_path)]) == 0
    assert f": 3 files, 3 B, {said}; 0 B came" in capsys.readouterr().out


def test_a_copy_of_local_files_is_compared_with_nothing(tmp_path):
    (tmp_path / "a").write_text("1")
    assert actions.fetch(tmp_path / "a", tmp_path / "out").checked == 0
