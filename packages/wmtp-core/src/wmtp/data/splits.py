"""Search for data files in a folder, and for their splits."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from attrs import evolve, frozen

from wmtp.data.compression import COMPRESSIONS, uncompressed_name
from wmtp.errors import FileError, InputError
from wmtp.json_files import read_json_object
from wmtp.storage.walk import files_below, is_hidden, not_there, require_target

__all__ = ["FORMATS", "Named", "chosen", "data_files", "format_of", "missing_shards", "named", "unread_files"]

FORMATS: Final = (".jsonl", ".json", ".parquet", ".arrow", ".csv", ".tsv")
#: other names of these
_SAME: Final = {".ndjson": ".jsonl", ".jsonlines": ".jsonl"}
#: how files end that may hold data, and are not read
_UNREAD: Final = (
    *(".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar", ".lz4", ".feather", ".orc", ".avro", ".xlsx", ".xls"),
    *(".pkl", ".pickle", ".npy", ".npz", ".h5", ".incomplete", ".part", ".partial", ".crdownload", ".tmp"),
)
#: what lies beside data, and is none
_METADATA: Final = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
_KINDS: Final = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation", "heldout", "holdout"), "test"),
}
#: what a name may say behind that: ``testset``
_SUFFIX: Final = re.compile(r"(?<=[a-z])(sets?|data|splits?|files?)$")
_PLURALS: Final = {"tests": "test", "evals": "test", "validate": "validation"}
_HELD_OUT: Final = re.compile(r"(?<![a-z])(held|hold)[-_ ]out(?![a-z])")
#: ``train-00000-of-00002``, and with a hash behind it
_SHARD: Final = re.compile(r"(?P<name>.+?)[-_.](?P<number>\d{5})-of-(?P<count>\d{5})(-[0-9a-f]+)?")
_EXPECTED: Final = f"expected {', '.join(FORMATS)}, as they are or compressed ({', '.join(COMPRESSIONS)})"
_SHOWN: Final = 8
#: searched for data in a folder that has none, which may be anybody's home
_MOST_FOLDERS: Final = 1000


@frozen
class Named:
    """A data file, and what its name says.

    Args:
        file: the file.
        split: as the name has it; None: it names none.
        kind: ``train``, ``validation`` or ``test``; None: it is none of these.
        word: the name itself, where ``split`` is the kind that it means (``dev``: ``validation``).
    """

    file: Path
    split: str | None = None
    kind: str | None = None
    word: str | None = None


def format_of(path: Path) -> str | None:
    """Return a data file's format suffix, without compression; None for others."""
    suffix = Path(uncompressed_name(path)).suffix.lower()
    suffix = _SAME.get(suffix, suffix)
    return suffix if suffix in FORMATS else None


def data_files(path: Path, split: str | None = None, *, preferred: str | None = None) -> Sequence[Path]:
    """Find the data files at ``path``, sorted by name.

    They are the file itself, or those of one split in the folder. Files in a folder ``data``, and in one that is named after a
    split, belong to the folder. Other files (a README, ``dataset_info.json``, hidden files) do not count.

    Args:
        path: a file or a folder.
        split: the split that is wanted; None: the names must leave no choice.
        preferred: the split that is taken where the names leave a choice.

    Raises:
        InputError: nothing is there, no data file, or no such split, several splits and none is wanted, or several formats.
    """
    if path.is_file():
        if format_of(path) is None:
            text = "; plain text is read by type = 'text'" if path.suffix in (".txt", ".md") else ""
            raise InputError("uri", f"{path}: not a data file; {_EXPECTED}{text}")
        return chosen(path, [named(path)], split)
    if not path.is_dir():
        raise InputError("uri", not_there(path))
    found = _saved(path) or list(_inside(path))
    if not found:
        raise InputError("uri", f"{path}: holds no data file; {_elsewhere(path) or _EXPECTED}")
    if twice := _twice([entry.file for entry in found]):
        names = " and ".join(file.name for file in twice)
        raise InputError("uri", f"{twice[0].parent}: holds {names}, which would be read both; keep one")
    files = chosen(path, found, split, preferred=preferred)
    formats = sorted({str(format_of(file)) for file in files})
    if len(formats) > 1:
        raise InputError("uri", f"{path}: mixes {' and '.join(formats)} files; name one file, or keep one format in the folder")
    return files


def chosen(path: Path, found: Sequence[Named], split: str | None, *, preferred: str | None = None) -> Sequence[Path]:
    """Choose the files of a split.

    Without one, all files must be of one split, and that must be no other than ``train``: nobody is to learn from
    a test file because it lies in the folder.

    Args:
        path: what the config names, for messages.
        found: the files there.
        split: the split that is wanted, or None.
        preferred: see `data_files`.

    Raises:
        InputError: there is no such split, or one must be named.
    """
    found = _told_apart(found)
    splits = {entry.split: entry.kind for entry in found if entry.split is not None}
    if split is None:
        if path.is_file() or not splits or (len(splits) == 1 and {None, "train"} >= set(splits.values())):
            return [entry.file for entry in found]
        if preferred is None:
            files = ", ".join(f"{name} ({_files(found, name)})" for name in sorted(splits))
            what = f"holds the splits {files}" if len(splits) > 1 else f"holds the split {files} and no other"
            shown = min(splits, key=lambda name: (splits[name] != "train", name))
            raise InputError("split", f"{path}: {what}; write which of them is read, as split = {shown!r}")
        split = preferred
    matching = [entry.file for entry in found if entry.split == split]
    if not matching:
        kind = _KINDS.get(split)
        same = {name for name, other in splits.items() if kind is not None and other == kind}
        matching = [entry.file for entry in found if entry.split in same and entry.split is not None] if len(same) == 1 else []
    if not matching:
        if path.is_file():
            raise InputError(
                "split", f"{path}: is one file, of which split = {split!r} chooses nothing; remove split, or name the folder"
            )
        there = ", ".join(sorted(splits)) if splits else f"none, by the names of its files ({_files(found, None)})"
        raise InputError("split", f"{path}: has no split {split!r}; the splits here: {there}")
    return matching


def _told_apart(found: Sequence[Named]) -> Sequence[Named]:
    """Keep ``eval`` and ``test`` apart where a folder has both.

    Likewise ``dev`` and ``val``: one of them is meant.
    """
    words: dict[str | None, set[str]] = {}
    for entry in found:
        if entry.word is not None and entry.kind != "train":
            words.setdefault(entry.split, set()).add(entry.word)
    several = {split for split, names in words.items() if len(names) > 1}
    return [evolve(entry, split=entry.word) if entry.word and entry.split in several else entry for entry in found]


def _twice(files: Sequence[Path]) -> Sequence[Path]:
    """Find a file that is there as it is and compressed."""
    plain = {file.parent / uncompressed_name(file): file for file in reversed(files)}
    return next(([plain[name], file] for file in files if plain[name := file.parent / uncompressed_name(file)] != file), ())


def missing_shards(files: Sequence[Path]) -> Sequence[str]:
    """Report missing shards, and shards of more than one count."""
    shards: dict[str, dict[int, set[int]]] = {}
    for file in files:
        if found := _SHARD.fullmatch(Path(uncompressed_name(file)).stem):
            counts = shards.setdefault(str(file.parent / found["name"]), {})
            counts.setdefault(int(found["count"]), set()).add(int(found["number"]))
    said = []
    for name, counts in shards.items():
        if len(counts) > 1:
            divisions = " and of ".join(map(str, sorted(counts)))
            said.append(f"{name}: there are shards of {divisions}, which may hold the same records; keep those of one")
        for count, there in counts.items():
            if missing := sorted(set(range(count)) - there):
                shown = ", ".join(map(str, missing[:_SHOWN])) + (" …" if len(missing) > _SHOWN else "")
                said.append(f"{name}: {len(there)} of {count} shards are here; missing: {shown} (from 0)")
    return said


def unread_files(path: Path, files: Sequence[Path]) -> Sequence[str]:
    """Report what may be data in a folder, and is not read.

    Args:
        path: what the config names.
        files: what is read of it.
    """
    said = [f"{file}: is empty; was it fetched whole?" for file in files if len(files) > 1 and not file.stat().st_size]
    if not path.is_dir() or _saved(path):
        return said
    known = {entry.file for entry in _inside(path)}
    visible = [file for file in files_below(path) if not is_hidden(file.relative_to(path))]
    others = sorted({file.parent.relative_to(path).as_posix() for file in visible if _is_data(file) and file not in known})
    if others:
        said.append(
            f"{path}: the folders {_list(others)} in it hold data that is not read; name one of them, or move their files"
        )
    if unknown := [file.name for file in visible if file.parent == path and file.name.lower().endswith(_UNREAD)]:
        said.append(f"{path}: {_list(unknown)} in it is not read; {_EXPECTED}")
    return said


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (" …" if len(names) > _SHOWN else "")


def named(path: Path, folder: Path | None = None, *, words: bool = True) -> Named:
    """Read the split in a file's name, or in its folder's.

    Args:
        path: the file.
        folder: a folder that is named after a split.
        words: whether one word among others tells it (``my_train``); else it must stand alone or between dots.
    """
    if folder is not None:
        return Named(path, *_split(folder.name, words=words))
    return Named(path, *_split(Path(uncompressed_name(path)).stem, words=words))


def _split(stem: str, *, words: bool = True) -> tuple[str | None, str | None, str | None]:
    """Read the split in a name, its kind, and its word."""
    shard = _SHARD.fullmatch(stem)
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", shard["name"] if shard else stem).lower()
    name = _HELD_OUT.sub("heldout", name)
    parts = [part for part in re.split(r"[-.]" if words else r"\.", name) if part]
    for part in reversed(parts):
        pieces = [piece for piece in re.split(r"[^a-z]+", part) if piece]
        known = [(piece, kind) for piece in pieces if (kind := _kind(piece, words=words)) is not None]
        if not known or (not words and len(pieces) > 1):
            continue
        word, kind = known[0]
        # train_sft and test_sft, in shards, are splits of their own; train_1 and train_2 are not
        return (part, kind, None) if shard and len(pieces) > 1 else (kind, kind, word)
    return None, None, None


def _kind(piece: str, *, words: bool) -> str | None:
    found = _KINDS.get(piece) or _KINDS.get(_SUFFIX.sub("", piece))
    return found or (_KINDS.get(_PLURALS.get(piece, "")) if words else None)


def _inside(folder: Path) -> Iterator[Named]:
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    for entry in entries:
        if _is_data(entry):
            yield named(entry)
        elif entry.is_dir() and entry.name == "data":
            yield from _inside(entry)
        elif entry.is_dir() and _split(entry.name, words=False)[0] is not None:
            for file in files_below(entry):
                if _is_data(file) and not is_hidden(file.relative_to(entry)):
                    yield named(file, entry)


def _is_data(file: Path) -> bool:
    if format_of(file) is None or file.name.startswith(".") or file.name in _METADATA:
        return False
    require_target(file)
    return file.is_file()


def _saved(folder: Path) -> list[Named]:
    """Find the files that ``save_to_disk`` of the package datasets wrote.

    They are of one data set, or of several splits.
    """
    if (listed := folder / "dataset_dict.json").is_file():
        splits = read_json_object(listed).get("splits")
        if not isinstance(splits, list):
            raise FileError(f"{listed}: names no splits; save the data set again")
        return [Named(file, str(split), _split(str(split))[1]) for split in splits for file in _shards(folder / str(split))]
    if not (folder / "state.json").is_file():
        return []
    name = str(read_json_object(folder / "state.json").get("_split") or "")
    split, kind, _ = _split(name)
    return [Named(file, split and name, kind) for file in _shards(folder)]


def _shards(folder: Path) -> list[Path]:
    state = folder / "state.json"
    entries = read_json_object(state).get("_data_files") if state.is_file() else None
    if not isinstance(entries, list) or not entries:
        raise FileError(f"{state}: {'names no files' if state.is_file() else 'no such file'}; save the data set again")
    files = [folder / Path(str(entry.get("filename") if isinstance(entry, dict) else entry)).name for entry in entries]
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileError(f"{folder}: {', '.join(missing[:_SHOWN])} missing, which state.json names; save the data set again")
    return files


def _elsewhere(folder: Path) -> str:
    """Name the inner folders that hold data; one may be meant."""
    there: list[str] = []
    for number, (place, inside, _) in enumerate(os.walk(folder, followlinks=True)):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        entry = Path(place)
        if number > 0 and (_saved(entry) or any(True for _ in _inside(entry))):
            there.append(entry.relative_to(folder).as_posix())
        if len(there) == _SHOWN or number == _MOST_FOLDERS:
            break
    return f"the folders {', '.join(there)} in it do: name one of them" if there else ""


def _files(found: Sequence[Named], split: str | None) -> str:
    names = [entry.file.name for entry in found if entry.split == split]
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
