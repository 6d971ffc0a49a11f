import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from wmtp.errors import WMTPError
from wmtp.storage.config import FileStorage
from wmtp.storage.lock import FileLock

STORAGE = FileStorage().build()


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "source/model"
    (folder / "sub/empty").mkdir(parents=True)
    (folder / "a b ü").write_bytes(b"1")
    (folder / "sub/none").write_bytes(b"")
    return folder


def test_push_makes_folders_and_copies(model, tmp_path):
    target = tmp_path / "x/y z/model"
    STORAGE.push(model, target.as_uri())
    assert tree(target) == tree(model)
    assert os.listdir(target.parent) == ["model"]


def test_push_replaces_a_folder_whole(model, tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "stale").write_text("x")
    STORAGE.push(model, f"{target}/")
    assert tree(target) == tree(model)
    assert sorted(os.listdir(tmp_path)) == ["model", "source"]


def test_push_replaces_a_file(tmp_path):
    (tmp_path / "a").write_text("new")
    (tmp_path / "b").write_text("old")
    STORAGE.push(tmp_path / "a", str(tmp_path / "b"))
    assert (tmp_path / "b").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_links_in_the_source_are_followed(model, tmp_path):
    (model / "link").symlink_to(model / "a b ü")
    (model / "folder").symlink_to(model / "sub")
    STORAGE.push(model, str(tmp_path / "copy"))
    copy = tmp_path / "copy"
    assert (copy / "link").read_bytes() == b"1"
    assert (copy / "folder/none").read_bytes() == b""
    assert (copy / "folder/empty").is_dir()
    assert not any(path.is_symlink() for path in copy.rglob("*"))


def test_linked_folders_are_listed_and_fetched_once(model, tmp_path):
    (model / "folder").symlink_to(tmp_path / "far")
    (tmp_path / "far").mkdir()
    (tmp_path / "far/b").write_bytes(b"2")
    (tmp_path / "far/back").symlink_to(model)
    assert "folder/b" in {file.name for file in STORAGE.files(str(model))}
    STORAGE.fetch(str(model), tmp_path / "copy")
    assert (tmp_path / "copy/folder/b").read_bytes() == b"2"
    assert not (tmp_path / "copy/folder/back").exists(), "a loop of links ends"


def test_a_fetch_names_a_link_to_nothing(model, tmp_path):
    (model / "link").symlink_to("nowhere")
    with pytest.raises(WMTPError, match="link to what does not exist"):
        STORAGE.fetch(str(model), tmp_path / "copy")


def test_a_linked_target_stays_a_link(model, tmp_path):
    disk = tmp_path / "disk/model"
    disk.mkdir(parents=True)
    (tmp_path / "link").symlink_to(disk)
    STORAGE.push(model, str(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink()
    assert tree(disk) == tree(model)


def test_push_onto_itself_changes_nothing(model):
    before = tree(model)
    STORAGE.push(model, str(model))
    assert tree(model) == before


@pytest.mark.parametrize(
    ("source", "target", "says"),
    [
        ("none", "x", "does not exist"),
        ("file", "folder", "folder/file"),
        ("folder", "file", "a file is there"),
        ("folder", "folder/sub/copy", "into itself"),
        ("folder/sub", "folder", "it would replace"),
        ("folder/sub", ".", "it would replace"),
        ("folder/sub", "work", "which holds"),
        ("folder", "file/x", "exists"),
        ("folder/sub", "home", "which holds"),
    ],
)
def test_refused_pushes_change_nothing(source, target, says, tmp_path, monkeypatch):
    for folder in ("folder/sub", "work/here", "home"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "file").write_text("1")
    (tmp_path / "folder/x").write_text("1")
    monkeypatch.chdir(tmp_path / "work/here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    before = tree(tmp_path)
    with pytest.raises(WMTPError) as error:
        STORAGE.push(tmp_path / source, str(tmp_path / target))
    assert says in str(error.value)
    assert str(tmp_path / source) in str(error.value)
    assert str(tmp_path / target) in str(error.value)
    assert tree(tmp_path) == before


def test_a_dangling_link_leaves_the_target_as_it_was(model, tmp_path):
    (model / "link").symlink_to("nowhere")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/old").write_text("1")
    with pytest.raises(WMTPError, match="as it was"):
        STORAGE.push(model, str(tmp_path / "model"))
    assert tree(tmp_path / "model") == {"old": b"1"}
    assert sorted(os.listdir(tmp_path)) == ["model", "source"]


def test_a_write_that_fails_halfway_leaves_the_target_as_it_was(model, tmp_path):
    """The size limit of a process stands for a full disk: both fail in the middle of a write."""
    (model / "weights").write_bytes(b"x" * 300_000)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/old").write_text("1")
    script = """if True:
        import resource, sys
        from pathlib import Path
        from wmtp.errors import WMTPError
        from wmtp.storage.config import FileStorage
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            FileStorage().build().push(Path(sys.argv[1]), sys.argv[2])
        except WMTPError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", script, str(model), str(tmp_path / "model")], capture_output=True, text=True, check=True
    )
    assert f"{model} could not be copied to {tmp_path / 'model'}: File too large" in done.stdout
    assert tree(tmp_path / "model") == {"old": b"1"}
    assert sorted(os.listdir(tmp_path)) == ["model", "source"]


def test_a_killed_push_leaves_the_old_or_the_new_whole(tmp_path):
    script = """if True:
        import sys
        from pathlib import Path
        from wmtp.storage.config import FileStorage
        storage = FileStorage().build()
        print("ready", flush=True)
        while True:
            storage.push(Path(sys.argv[1]), sys.argv[3])
            storage.push(Path(sys.argv[2]), sys.argv[3])
    """
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(name.encode() * 300_000)
    target = tmp_path / "target"
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "one"), str(tmp_path / "two"), str(target)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        while not target.exists():
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert target.read_bytes() in ((tmp_path / "one").read_bytes(), (tmp_path / "two").read_bytes())
    FileStorage().build().push(tmp_path / "one", str(target))
    # one that was killed before it had its lock stays for a minute: it could be somebody who has just begun
    assert not [path for path in tmp_path.iterdir() if (path / "lock").exists()], "the next one removes what they left"


def leftover(folder: Path, name: str, *inside: str) -> Path:
    """Make what a killed push leaves: a folder whose lock nobody holds any more."""
    staging = folder / name
    for each in ("lock", *inside):
        (staging / each).parent.mkdir(parents=True, exist_ok=True)
        (staging / each).write_text(each)
    return staging


def test_a_push_that_is_under_way_is_not_a_leftover(tmp_path):
    live, dead, other = (leftover(tmp_path, f".target.abcdefg{n}.part", "new") for n in "123")
    (other / "notes").write_text("of somebody else")
    (tmp_path / "one").write_text("1")
    with FileLock(live / "lock") as lock:
        lock.acquire()
        FileStorage().build().push(tmp_path / "one", str(tmp_path / "target"))
        assert (live.exists(), dead.exists(), other.exists()) == (True, False, True)
        assert FileStorage().build().clean(str(tmp_path), older_than=0) == []
    (found,) = FileStorage().build().clean(str(tmp_path), older_than=0, dry_run=True)
    assert (found.uri, found.size, live.exists()) == (str(live), len("lock" + "new"), True)
    assert FileStorage().build().clean(str(tmp_path), older_than=3600) == []
    FileStorage().build().clean(str(tmp_path), older_than=0)
    assert not live.exists()


@pytest.mark.parametrize("how", ["push", "clean", "tidy"])
def test_a_kill_between_the_two_renames_loses_no_folder(model, tmp_path, how):
    """The folder that was there is in the killed copy's folder alone then."""
    leftover(tmp_path, ".target.abcdefgh.part", "new/weights", "old/weights")
    storage, target = FileStorage().build(), tmp_path / "target"
    if how == "push":
        storage.push(model, str(target))
        assert tree(target) == tree(model)
    else:
        storage.clean(str(tmp_path), older_than=0) if how == "clean" else storage.tidy(str(tmp_path))
        assert tree(target) == {"weights": b"old/weights"}
    assert not (tmp_path / ".target.abcdefgh.part").exists()


def test_exists(tmp_path):
    (tmp_path / "dangling").symlink_to("nowhere")
    assert STORAGE.exists(str(tmp_path))
    assert not STORAGE.exists(str(tmp_path / "none"))
    assert not STORAGE.exists(str(tmp_path / "dangling"))


@pytest.mark.parametrize("name", [".wmtp-manifest.json", "weights"])
def test_a_folder_in_the_way_of_a_file_is_named(tmp_path, name):
    (tmp_path / "source").mkdir()
    (tmp_path / "source/weights").write_text("x")
    (tmp_path / "out" / name / "inside").mkdir(parents=True)
    with pytest.raises(WMTPError, match=f"out/{name}: "):
        STORAGE.fetch(str(tmp_path / "source"), tmp_path / "out")
