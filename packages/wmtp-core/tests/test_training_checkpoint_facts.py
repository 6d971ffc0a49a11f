"""Sizes and checksums in `checkpoint.json`, and damage that they reveal."""

import json
import os
import zlib

import pytest
from tiny_recipe import tiny_recipe

from wmtp.checkpoints.find import find_checkpoints
from wmtp.checkpoints.manifest import check_files, hash_files, write_facts
from wmtp.config.load import load_config
from wmtp.distributed.ranks import SINGLE_PROCESS
from wmtp.errors import WMTPError


@pytest.fixture
def folder(tmp_path):
    for name, size in {"shard-1": 5 * 2**20 + 3, "shard-2": 70_000, "shard-3": 1, "state.pt": 0}.items():
        (tmp_path / name).write_bytes(os.urandom(size))
    write_facts(tmp_path, 7, hash_files(tmp_path, ["shard-1", "shard-2"]))
    return tmp_path


def test_checksums_are_those_of_plain_crc32(folder):
    facts = json.loads((folder / "checkpoint.json").read_text())
    assert (facts["format"], facts["step"]) == (1, 7)
    contents = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "checkpoint.json"}
    assert facts["files"] == {name: len(content) for name, content in contents.items()}
    assert facts["hashes"] == {name: f"crc32:{zlib.crc32(content):08x}" for name, content in contents.items()}


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_ranks_that_share_the_work_leave_no_file_out(folder, world_size):
    for rank in range(world_size):
        check_files(folder, rank, world_size)
    for name in ("shard-1", "shard-2", "shard-3"):
        path = folder / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        found = []
        for rank in range(world_size):
            try:
                check_files(folder, rank, world_size)
            except ValueError as error:
                found.append(str(error))
        assert found == [f"{path}: its content was changed or damaged"]
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda facts: facts.pop("hash"), "checkpoint.json is damaged"),
        (lambda facts: facts.pop("hashes"), "checkpoint.json is damaged"),
        (lambda facts: facts["files"].update({"shard-1": 4}), "checkpoint.json is damaged"),
        (lambda facts: facts.update(step=8), "checkpoint.json is damaged"),
        (lambda facts: facts.clear(), "checkpoint.json is damaged"),
    ],
)
def test_changed_facts_are_found_out(folder, change, words):
    path = folder / "checkpoint.json"
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=words):
        check_files(folder)


def test_a_file_that_is_missing_or_cut_is_named(folder):
    (folder / "shard-2").write_bytes(b"")
    (folder / "shard-3").unlink()
    with pytest.raises(ValueError, match=r"shard-2: has 0 bytes in place of 70000; .*shard-3: is missing"):
        check_files(folder)


def test_a_later_format_is_called_so(folder):
    (folder / "checkpoint.json").write_text('{"format": 2, "step": 7, "files": {}}')
    with pytest.raises(WMTPError, match="format 2, but this version of wmtp reads format 1"):
        check_files(folder)


@pytest.mark.parametrize("resume", [False, True])
def test_a_resume_that_finds_no_checkpoint_says_that_it_starts_anew(tmp_path, caplog, resume):
    config = load_config(tiny_recipe(datasets={"py": {"type": "python-source"}}))
    with caplog.at_level("WARNING", logger="wmtp"):
        assert find_checkpoints(config, tmp_path, None, SINGLE_PROCESS, resume=resume) == []
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"no checkpoint to resume from in {tmp_path}/checkpoints; training starts anew"] * resume
