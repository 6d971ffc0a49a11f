"""Suite for storage backends."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import pytest

from wmtp.errors import WMTPError
from wmtp.storage.base import Storage
from wmtp.testing.component import ComponentTests

__all__ = ["StorageTests"]


class StorageTests(ComponentTests):
    """Contract tests of a storage backend.

    Override the fixture ``root`` for anything but local files.
    """

    __test__ = False
    kind = "storages"

    @pytest.fixture
    def root(self, tmp_path: Path) -> str:
        """Return the URI of an empty folder to write to."""
        return (tmp_path / "root").as_uri()

    @pytest.fixture
    def storage(self) -> Storage:
        """Build the backend under test."""
        return self.config.build()

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """Make a folder with names and sizes that are easily got wrong."""
        folder = tmp_path / "source"
        for name, content in {
            "a": b"1",
            "empty": b"",
            "with space": b"2",
            "ünï/100%": b"3",
            "x/y/z#1": b"\0\xff" * 5000,
        }.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return folder

    @pytest.fixture
    def cache(self, tmp_path: Path) -> Path:
        """Where fetched files are kept; not there yet."""
        return tmp_path / "cache"

    def test_build_gives_a_storage(self, storage: Storage) -> None:
        """``build()`` gives a `Storage`, and ``schemes`` are words in lower case."""
        assert isinstance(storage, Storage)
        assert all(scheme == scheme.lower() and scheme.isascii() for scheme in type(self.config).schemes)

    @pytest.mark.parametrize("name", ["plain.bin", "with space", "ünï", "a/b/c", "100%", "#1?"])
    @pytest.mark.parametrize("content", [b"", b"content"], ids=["empty", "full"])
    def test_a_file_comes_back(
        self, storage: Storage, root: str, cache: Path, tmp_path: Path, name: str, content: bytes
    ) -> None:
        """A pushed file exists, and is the same once localized."""
        uri = f"{root}/{quote(name)}"
        (tmp_path / "file").write_bytes(content)
        assert not storage.exists(uri)
        storage.push(tmp_path / "file", uri)
        assert storage.exists(uri)
        assert storage.localize(uri, cache).read_bytes() == content

    def test_a_folder_comes_back(self, storage: Storage, root: str, cache: Path, folder: Path) -> None:
        """A pushed folder has every file, with or without a final slash."""
        storage.push(folder, f"{root}/model")
        for uri in (f"{root}/model", f"{root}/model/"):
            assert storage.exists(uri)
            assert _files(storage.localize(uri, cache)) == _files(folder)
        assert storage.localize(f"{root}/model/a", cache).read_bytes() == b"1"

    def test_localizing_again_sees_what_was_pushed_since(
        self, storage: Storage, root: str, cache: Path, tmp_path: Path
    ) -> None:
        """A cache never hides a newer file of the same size."""
        for content in (b"old", b"new"):
            (tmp_path / "file").write_bytes(content)
            storage.push(tmp_path / "file", f"{root}/file")
            assert storage.localize(f"{root}/file", cache).read_bytes() == content

    def test_a_push_replaces_a_folder_whole(self, storage: Storage, root: str, cache: Path, folder: Path) -> None:
        """Files of the old folder do not stay beside the new ones."""
        storage.push(folder, f"{root}/model")
        (folder / "a").unlink()
        (folder / "new").write_bytes(b"n")
        storage.push(folder, f"{root}/model")
        assert _files(storage.localize(f"{root}/model", cache)) == _files(folder)

    def test_a_push_touches_no_neighbour(self, storage: Storage, root: str, cache: Path, folder: Path) -> None:
        """``model`` and ``model-2`` share a beginning, and nothing else."""
        storage.push(folder, f"{root}/model-2")
        storage.push(folder / "a", f"{root}/model.bin")
        storage.push(folder, f"{root}/model")
        assert _files(storage.localize(f"{root}/model-2", cache)) == _files(folder)
        assert storage.localize(f"{root}/model.bin", cache).read_bytes() == b"1"
        assert not storage.exists(f"{root}/mod")

    def test_a_failed_push_leaves_things_as_they_were(
        self, storage: Storage, root: str, cache: Path, folder: Path, tmp_path: Path
    ) -> None:
        """A failed push leaves the old folder whole, and no new one."""
        storage.push(folder, f"{root}/model")
        before = _files(folder)
        (folder / "zz-dangling").symlink_to(tmp_path / "nowhere")
        (folder / "a").write_bytes(b"changed")
        for uri in (f"{root}/model", f"{root}/other"):
            with pytest.raises(WMTPError, match=r"model|other"):
                storage.push(folder, uri)
        assert _files(storage.localize(f"{root}/model", cache)) == before
        assert not storage.exists(f"{root}/other")

    def test_pushing_what_is_not_there(self, storage: Storage, root: str, tmp_path: Path) -> None:
        """Pushing a missing path names it in the error."""
        with pytest.raises(WMTPError, match="no-such-file"):
            storage.push(tmp_path / "no-such-file", f"{root}/x")
        assert not storage.exists(f"{root}/x")

    def test_localizing_what_is_not_there(self, storage: Storage, root: str, cache: Path) -> None:
        """Localizing a missing URI names it, and caches nothing."""
        uri = f"{root}/no/such/file"
        assert not storage.exists(uri)
        with pytest.raises(WMTPError) as error:
            storage.localize(uri, cache)
        assert uri in str(error.value)
        assert not cache.exists() or not [path for path in cache.rglob("*") if path.is_file()]

    def test_files_are_listed(self, storage: Storage, root: str, folder: Path) -> None:
        """Files of a folder are listed by their paths in it.

        Nothing of what is beside it is listed. A file is listed by its own name.
        """
        storage.push(folder, f"{root}/model")
        storage.push(folder, f"{root}/model-2")
        sizes = {name: len(content) for name, content in _files(folder).items()}
        for uri in (f"{root}/model", f"{root}/model/"):
            assert {file.name: file.size for file in storage.files(uri)} == sizes
        assert [(file.name, file.size) for file in storage.files(f"{root}/model/a")] == [("a", 1)]
        assert list(storage.files(f"{root}/nothing")) == []
        before = {file.name: (file.size, file.identity) for file in storage.files(f"{root}/model")}
        (folder / "a").write_bytes(b"22")  # the clock of a web server has seconds, so the size must tell
        storage.push(folder / "a", f"{root}/model/a")
        after = {file.name: (file.size, file.identity) for file in storage.files(f"{root}/model")}
        assert {name for name in after if after[name] != before[name]} == {"a"}

    def test_what_is_removed_is_gone(self, storage: Storage, root: str, cache: Path, folder: Path) -> None:
        """A removed file or folder is gone, and its neighbours stay.

        To remove what is not there is no error.
        """
        for name in ("model", "model-2"):
            storage.push(folder, f"{root}/{name}")
        storage.remove(f"{root}/model-2/a")
        storage.remove(f"{root}/model")
        storage.remove(f"{root}/model")
        assert not storage.exists(f"{root}/model")
        left = _files(folder)
        del left["a"]
        assert {file.name for file in storage.files(root)} == {f"model-2/{name}" for name in left}
        assert _files(storage.localize(f"{root}/model-2", cache)) == left

    def test_tidying_leaves_what_is_whole(self, storage: Storage, root: str, cache: Path, folder: Path) -> None:
        """Tidying removes nothing that is whole."""
        storage.tidy(root)
        storage.push(folder, f"{root}/model")
        storage.push(folder / "a", f"{root}/file")
        storage.tidy(root)
        assert _files(storage.localize(f"{root}/model", cache)) == _files(folder)
        assert storage.localize(f"{root}/file", cache).read_bytes() == b"1"


def _files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
