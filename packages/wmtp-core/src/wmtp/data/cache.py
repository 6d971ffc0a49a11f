"""Tokenises a data set once, and keeps the result by content."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal

import attrs

from wmtp.config.data_rules import read_from
from wmtp.config.problems import dotted
from wmtp.config.tree import components
from wmtp.data.base import BadExample, ExampleLoader
from wmtp.data.conversation import Learn
from wmtp.data.example_checks import check_example, loader_title
from wmtp.data.render import Boundary, Renderer
from wmtp.data.store import StoreWriter, TokenStore
from wmtp.errors import ConfigError, InputError, PluginError, WMTPError
from wmtp.plugins.contract import DataLoaderConfig
from wmtp.tokenizers.base import Tokenizer

__all__ = ["cache_key", "token_store"]

#: part of every key: raise it when the same files would be read or tokenised differently
_VERSION: Final = 5
_SHOWN: Final = 10
_ABANDONED_SECONDS: Final = 24 * 3600
_log = logging.getLogger("wmtp")


def token_store(
    name: str,
    component: DataLoaderConfig,
    path: Path | None,
    tokenizer: Tokenizer,
    *,
    cache_dir: Path,
    on_bad_example: Literal["error", "skip"],
    learn: Learn = "assistant",
    boundary: Boundary = "apart",
) -> TokenStore:
    """Open the tokenised documents of a data set, tokenising them on a cache miss.

    Processes that do this at once each make their own, and the first to finish is kept.

    Args:
        name: the data set's name, for messages.
        component: its config.
        path: the local place of its ``uri``.
        tokenizer: makes the tokens.
        cache_dir: the folder of all stores.
        on_bad_example: stop at an unreadable example, or skip it.
        learn: the parts of a conversation to learn.
        boundary: see `Renderer`.

    Raises:
        ConfigError: the data holds conversations, and there is no chat template, or one that does not fit ``learn``.
        WMTPError: there is no example, a bad one, an unreadable file, or no space left.
    """
    loader: ExampleLoader = component.build()
    try:
        before = _stamps(loader, path)
    except InputError as error:
        place = read_from(component, ("datasets", name))[1]
        raise ConfigError(f"{dotted((*place, error.key))}: {error}") from error
    if loader.conversations and tokenizer.chat_template is None:
        raise ConfigError(
            f"datasets.{name}: holds conversations, and the model's tokenizer has no chat template; set "
            "data.train.chat_template to a file with one, or to its text"
        )
    renderer = Renderer(tokenizer, learn=learn, boundary=boundary)
    key = cache_key(component, loader, path, tokenizer, learn=learn, boundary=boundary)
    folder = cache_dir / key
    store = TokenStore.open_if_whole(folder, key)
    if store is None:
        if folder.exists():
            _log.warning("datasets.%s: the token cache %s is damaged; it is made again", name, folder)
        store = _build(name, loader, path, before, renderer, tokenizer.vocab_size, folder, on_bad_example)
    if store.info.bad and on_bad_example == "error":
        raise _bad_error(name, store.info.bad_messages, store.info.bad)
    return store


def cache_key(
    component: DataLoaderConfig,
    loader: ExampleLoader,
    path: Path | None,
    tokenizer: Tokenizer,
    *,
    learn: Learn = "assistant",
    boundary: Boundary = "apart",
) -> str:
    """A hash of all that decides the tokens: the files' bytes, the config, the loader's own code and the tokenizer.

    For conversations also the chat template, and what is learned of them.

    Where the files are does not matter: ``uri`` is not part of it.
    """
    loaders = [loader]
    inside = list(components(component))
    configs: list[Any] = []
    for each in (component, *(placed.config for placed in inside)):
        config = attrs.asdict(each, filter=lambda attribute, _: attribute.name != "uri")  # type: ignore[arg-type]
        configs.append([each.type, config])
    loaders += [placed.config.build() for placed in inside if placed.kind == "data_loaders"]
    parts: list[Any] = [_VERSION, configs, tokenizer.fingerprint(), tokenizer.bos_id, tokenizer.eos_id, boundary]
    if loader.conversations:
        parts += [tokenizer.chat_template, dict(tokenizer.special_tokens), sorted(tokenizer.control_tokens), learn]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode())
    for each in loaders:
        with suppress(TypeError, OSError):  # a class made in an interactive session has no file
            digest.update(Path(inspect.getfile(type(each))).read_bytes())
    for file in loader.files(path):
        try:
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").digest()
        except OSError as error:
            raise WMTPError(f"{file}: cannot be read ({error})") from error
        relative = file.relative_to(path).as_posix() if path is not None and file != path else file.name
        digest.update(json.dumps(relative).encode() + content)
    return digest.hexdigest()[:40]


def _build(
    name: str,
    loader: ExampleLoader,
    path: Path | None,
    before: Mapping[Path, tuple[int, ...]],
    renderer: Renderer,
    vocab_size: int,
    folder: Path,
    on_bad_example: str,
) -> TokenStore:
    _log.info("datasets.%s: tokenising …", name)
    began = time.monotonic()
    with _writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder.parent)
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    try:
        tokens = _write(name, loader, path, renderer, StoreWriter(building, vocab_size), building, on_bad_example)
        if changed := _changed(before, _stamps(loader, path)):
            raise WMTPError(f"datasets.{name}: {changed} has changed while it was read; run again once it is whole")
        with _writing(folder):
            _publish(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    _log.info("datasets.%s: %s tokens made in %.1f s, kept in %s", name, f"{tokens:,}", time.monotonic() - began, folder)
    return TokenStore(folder, folder.name)


def _stamps(loader: ExampleLoader, path: Path | None) -> dict[Path, tuple[int, ...]]:
    """Note of each file what changes when its content does."""
    stamps = {}
    for file in loader.files(path):
        try:
            found = file.stat()
        except OSError as error:
            raise WMTPError(f"{file}: cannot be read ({error})") from error
        stamps[file] = (found.st_size, found.st_mtime_ns, found.st_ino)
    return stamps


def _changed(before: Mapping[Path, tuple[int, ...]], after: Mapping[Path, tuple[int, ...]]) -> Path | None:
    """Find a file that is not what it was."""
    return next((file for file in {**before, **after} if before.get(file) != after.get(file)), None)


def _write(
    name: str,
    loader: ExampleLoader,
    path: Path | None,
    renderer: Renderer,
    writer: StoreWriter,
    building: Path,
    on_bad_example: str,
) -> int:
    bad: list[BadExample] = []
    bad_count = documents = tokens = 0
    examples = loader.examples(path)
    if not isinstance(examples, Iterable):
        raise PluginError(f"datasets.{name}: {loader_title(loader)}: examples() returned {examples!r:.60}, not an iterator")
    for example in examples:
        try:
            if isinstance(example, BadExample):
                raise example
            check_example(f"datasets.{name}: {loader_title(loader)}", loader, example)
            if bad and on_bad_example == "error" and example.weights is None and example.messages is None:
                continue  # nothing will be kept: only look for more problems to report
            document = renderer(example)
        except BadExample as problem:
            bad_count += 1
            if len(bad) < _SHOWN:
                bad.append(problem)
            if len(bad) == _SHOWN and on_bad_example == "error":
                break
            continue
        with _writing(building):
            writer.add(example, document)
        documents += 1
        tokens += len(document.tokens)
    with _writing(building):
        writer.close(bad, bad_count, renderer.notes.list())
    if bad and on_bad_example == "error":
        raise _bad_error(name, [str(problem) for problem in bad], bad_count)
    if not documents:
        what = (
            f"all {bad_count:,} examples are bad, the first: {bad[0]}"
            if bad
            else f"it holds no example{f' ({path})' if path else ''}"
        )
        raise WMTPError(f"datasets.{name}: {what}")
    return tokens


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WMTPError(
            f"{folder.parent}: the token cache cannot be written ({error.strerror or error});"
            " free some space, or set data.cache_dir"
        ) from error


def _publish(building: Path, folder: Path) -> None:
    for _ in range(2):
        try:
            os.rename(building, folder)
            return
        except OSError:
            if not folder.exists():
                raise
            if TokenStore.open_if_whole(folder, folder.name) is not None:
                return  # another process was faster
        aside = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
        with suppress(FileNotFoundError):  # another process has put the damaged one aside
            os.rename(folder, aside / "damaged")
        shutil.rmtree(aside, ignore_errors=True)
    raise WMTPError(f"{folder}: cannot be replaced; delete it")


def _remove_abandoned(cache_dir: Path) -> None:
    """Remove what processes that were killed a day or more ago have left."""
    for entry in cache_dir.glob(".building-*"):
        with suppress(OSError):
            if time.time() - entry.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(entry)


def _bad_error(name: str, messages: Sequence[str], count: int) -> WMTPError:
    shown = "\n".join(f"  {message}" for message in messages)
    more = "" if count <= len(messages) and len(messages) < _SHOWN else "\n  … and maybe more"
    return WMTPError(
        f"datasets.{name}: examples cannot be read; repair them, or set data.train.on_bad_example = 'skip'\n{shown}{more}"
    )
