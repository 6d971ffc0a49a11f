"""package:// URIs, on packages that are really importable."""

import sys
from pathlib import Path

import pytest

import wmtp
from wmtp.errors import WMTPError
from wmtp.storage.config import PackageStorage


@pytest.fixture
def storage():
    return PackageStorage().build()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package whose code must not run: only its files are wanted."""
    folder = tmp_path / "site" / "carries_files"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "data" / "a file.txt").write_text("hello")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert "carries_files" not in sys.modules
    return folder


def test_a_file_and_a_folder_are_found_in_place_and_nothing_is_imported(storage, package, tmp_path):
    assert storage.localize("package://carries_files/data/a%20file.txt", tmp_path) == package / "data" / "a file.txt"
    assert storage.localize("package://carries_files/data", tmp_path) == package / "data"
    assert storage.exists("package://carries_files/data")
    assert storage.localize("package://wmtp/py.typed", tmp_path) == Path(wmtp.__file__).parent / "py.typed"
    assert "carries_files" not in sys.modules


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("package://no_such_package/x", "no Python package 'no_such_package' is installed"),
        ("package://wmtp/no_such_file", "the installed package 'wmtp' holds no 'no_such_file'"),
        ("package://carries_files/../secret", "write package://MODULE/PATH"),
        ("package://not-a-module/x", "write package://MODULE/PATH"),
        ("package://json/x", "holds no 'x'"),
        ("package://sys/x", "no Python package 'sys'"),
    ],
)
def test_what_is_not_there_is_named(storage, package, tmp_path, uri, words):
    assert not storage.exists(uri)
    with pytest.raises(WMTPError) as error:
        storage.localize(uri, tmp_path)
    assert words in str(error.value)


def test_nothing_is_written_into_a_package(storage, package, tmp_path):
    with pytest.raises(WMTPError, match="not changed"):
        storage.push(package / "data", "package://carries_files/new")
    assert not (package / "new").exists()
