"""Tokenises a data set once, and keeps the result by content."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal

import attrs

from wmtp.config.tree import components
from wmtp.data.base import BadExample, Example, ExampleLoader
from wmtp.data.store import StoreWriter, TokenStore
from wmtp.errors import PluginError, WMTPError
from wmtp.plugins.contract import DataLoaderConfig
from wmtp.tokenizers.base import Tokenizer

__all__ = ["cache_key", "token_store"]

#: part of every key: raise it when the same files would be read or tokenised differently
_VERSION: Final = 2
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
) -> TokenStore:
    """The tokenised documents of a data set: from the cache, else made now.

    Processes that do this at once each make their own, and the first to finish is kept.

    Args:
        name: the data set's name, for messages.
        component: its config.
        path: the local place of its ``uri``.
        tokenizer: what makes the tokens.
        cache_dir: the folder of all stores.
        on_bad_example: whether an example that cannot be read is an error.

    Raises:
        WMTPError: there is no example, a bad one, an unreadable file, or no space left.
    """
    loader: ExampleLoader = component.build()
    key = cache_key(component, loader, path, tokenizer)
    folder = cache_dir / key
    store = TokenStore.open_if_whole(folder, key)
    if store is None:
        if folder.exists():
            _log.warning("datasets.%s: the token cache %s is damaged; it is made again", name, folder)
        store = _build(name, loader, path, tokenizer, folder, on_bad_example)
    if store.info.bad and on_bad_example == "error":
        raise _bad_error(name, store.info.bad_messages, store.info.bad)
    return store


def cache_key(component: DataLoaderConfig, loader: ExampleLoader, path: Path | None, tokenizer: Tokenizer) -> str:
    """A hash of all that decides the tokens: the files' bytes, the config, the loader's own code and the tokenizer.

    Where the files are does not matter: ``uri`` is not part of it.
    """
    loaders = [loader]
    inside = list(components(component))
    configs: list[Any] = []
    for each in (component, *(placed.config for placed in inside)):
        config = attrs.asdict(each, filter=lambda attribute, _: attribute.name != "uri")  # type: ignore[arg-type]
        configs.append([each.type, config])
    loaders += [placed.config.build() for placed in inside if placed.kind == "data_loaders"]
    parts: list[Any] = [_VERSION, configs, tokenizer.fingerprint(), tokenizer.bos_id, tokenizer.eos_id]
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
    name: str, loader: ExampleLoader, path: Path | None, tokenizer: Tokenizer, folder: Path, on_bad_example: str
) -> TokenStore:
    _log.info("datasets.%s: tokenising …", name)
    began = time.monotonic()
    with _writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder.parent)
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    try:
        tokens = _write(name, loader, path, tokenizer, building, on_bad_example)
        with _writing(folder):
            _publish(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    _log.info("datasets.%s: %s tokens made in %.1f s, kept in %s", name, f"{tokens:,}", time.monotonic() - began, folder)
    return TokenStore(folder, folder.name)


def _write(
    name: str, loader: ExampleLoader, path: Path | None, tokenizer: Tokenizer, building: Path, on_bad_example: str
) -> int:
    writer = StoreWriter(building, tokenizer.vocab_size)
    bad: list[BadExample] = []
    bad_count = documents = tokens = 0
    examples = loader.examples(path)
    if not isinstance(examples, Iterable):
        raise PluginError(f"datasets.{name}: {_title(loader)}: examples() returned {examples!r:.60}, not an iterator")
    for example in examples:
        try:
            if isinstance(example, BadExample):
                raise example
            _check_types(name, loader, example)
            if bad and on_bad_example == "error" and example.weights is None:
                continue  # nothing will be kept: only look for more problems to report
            encoded, prompt_length, weights = encode_example(example, tokenizer)
        except BadExample as problem:
            bad_count += 1
            if len(bad) < _SHOWN:
                bad.append(problem)
            if len(bad) == _SHOWN and on_bad_example == "error":
                break
            continue
        with _writing(building):
            writer.add(example, encoded, prompt_length, weights)
        documents += 1
        tokens += len(encoded)
    with _writing(building):
        writer.close(bad, bad_count)
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


def _check_types(name: str, loader: ExampleLoader, example: Any) -> None:
    """Raise if what a loader yielded is no `Example`, or one whose fields have other types than the class says.

    Raises:
        PluginError: naming the loader.
    """
    problem = None
    if not isinstance(example, Example):
        problem = f"{example!r:.60} ({type(example).__name__}), not an Example"
    else:
        texts = (example.id, example.prompt, example.completion, example.group, example.where)
        if wrong := [value for value in texts if not isinstance(value, str)]:
            problem = f"an Example with {wrong[0]!r:.60} where a string belongs"
        elif example.is_correct not in (None, True, False):
            problem = f"an Example whose is_correct is {example.is_correct!r:.60}, not True, False or None"
        elif example.reward is not None and not (isinstance(example.reward, int | float) and math.isfinite(example.reward)):
            problem = f"an Example whose reward is {example.reward!r:.60}, not a finite number or None"
        elif example.weights is not None and not _are_weights(example.weights):
            problem = f"an Example whose weights are {example.weights!r:.60}, neither numbers nor (text, number) tuples"
    if problem is not None:
        raise PluginError(f"datasets.{name}: {_title(loader)}: examples() yielded {problem}")


def _title(loader: ExampleLoader) -> str:
    return f"data loader {type(loader).__module__}.{type(loader).__qualname__}"


def _are_weights(weights: Any) -> bool:
    if not isinstance(weights, tuple | list):
        return False
    if weights and isinstance(weights[0], tuple):
        return all(isinstance(pair, tuple) and [*map(type, pair)] in ([str, float], [str, int]) for pair in weights)
    return all(isinstance(weight, int | float) for weight in weights)


def encode_example(example: Example, tokenizer: Tokenizer) -> tuple[list[int], int, list[float] | None]:
    """The tokens of a document: begin token (where there is one), prompt, completion, end token.

    Prompt and completion are encoded each on its own, so that no token reaches over the border. So are the pieces of
    ``weights`` given as (text, weight).

    Returns:
        The tokens, how many come before the completion, and a weight for each token where the example has weights; tokens
        that it gives no weight have 1.

    Raises:
        BadExample: the weights do not fit the completion, or the text cannot be encoded.
    """
    where = example.where or example.id
    try:
        before = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        before += tokenizer.encode(example.prompt) if example.prompt else []
        if example.weights is not None and example.weights and isinstance(example.weights[0], tuple):
            completion, weights = _encode_weighted(where, example, tokenizer)
        else:
            completion = tokenizer.encode(example.completion) if example.completion else []
            weights = None if example.weights is None else [float(weight) for weight in example.weights]  # type: ignore[arg-type]
    except UnicodeEncodeError as error:
        raise BadExample(where, f"holds text that is no Unicode ({error.reason})") from error
    tokens = [*before, *completion, tokenizer.eos_id]
    if weights is None:
        return tokens, len(before), None
    if wrong := [weight for weight in weights if not 0 <= weight < math.inf]:
        raise BadExample(where, f"has a weight of {wrong[0]}; weights are finite and ≥ 0")
    if len(weights) == len(completion):
        weights.append(1.0)
    if len(weights) != len(completion) + 1:
        raise BadExample(
            where,
            f"has {len(weights)} weights, but its completion is {len(completion)} tokens with this tokenizer;"
            " give one for each token (and maybe one for the end), or [text, weight] pairs",
        )
    return tokens, len(before), [1.0] * len(before) + weights


def _encode_weighted(where: str, example: Example, tokenizer: Tokenizer) -> tuple[list[int], list[float]]:
    pieces: Sequence[tuple[str, float]] = example.weights  # type: ignore[assignment]
    if "".join(text for text, _ in pieces) != example.completion:
        raise BadExample(where, "the texts of its weights, joined, are not the completion")
    completion: list[int] = []
    weights: list[float] = []
    for text, weight in pieces:
        ids = tokenizer.encode(text) if text else []
        completion += ids
        weights += [float(weight)] * len(ids)
    return completion, weights
