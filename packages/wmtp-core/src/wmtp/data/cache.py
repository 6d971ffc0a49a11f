"""Tokenizes a data set once, and keeps the result by content."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any, Final, Literal

import attrs

from wmtp.config.data_rules import read_from
from wmtp.config.problems import dotted
from wmtp.config.tree import components
from wmtp.data.base import ExampleLoader
from wmtp.data.building import Building, bad_error, stamps
from wmtp.data.conversation import Learn
from wmtp.data.example_checks import loader_files
from wmtp.data.loader_code import loader_code
from wmtp.data.render import Boundary, Renderer
from wmtp.data.store import TokenStore
from wmtp.errors import ConfigError, FileError, InputError
from wmtp.plugins.built import built
from wmtp.plugins.contract import DataLoaderConfig
from wmtp.tokenizers.base import Tokenizer

__all__ = ["cache_key", "token_store"]

#: part of every key: raise it when the same files would be read or tokenized differently
_VERSION: Final = 5
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
    """Open a data set's token store, tokenizing on a cache miss.

    Of processes of a machine that do this at once one makes them, and the others wait. A build that was killed is resumed.

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
    loader = built(component, "data_loaders")
    try:
        before = stamps(loader, path)
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
        building = Building(
            name=name, loader=loader, path=path, renderer=renderer, folder=folder, on_bad_example=on_bad_example
        )
        store = building.build(before)
    if store.info.bad and on_bad_example == "error":
        raise bad_error(name, store.info.bad_messages, store.info.bad)
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
    """Hash everything that decides the tokens.

    That is the files' bytes, the config, the loader's own code and the tokenizer; for conversations also the chat template, and
    what is learned of them. Where the files are does not matter: ``uri`` is not part of it.
    """
    loaders = [loader]
    inside = list(components(component))
    configs: list[Any] = []
    for each in (component, *(placed.config for placed in inside)):
        config = attrs.asdict(each, filter=lambda attribute, _: attribute.name != "uri")  # type: ignore[arg-type]
        configs.append([each.type, config])
    loaders += [built(placed.config, "data_loaders") for placed in inside if placed.kind == "data_loaders"]
    parts: list[Any] = [_VERSION, configs, tokenizer.fingerprint(), tokenizer.bos_id, tokenizer.eos_id, boundary]
    if loader.conversations:
        parts += [tokenizer.chat_template, dict(tokenizer.special_tokens), sorted(tokenizer.control_tokens), learn]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode())
    for each in loaders:
        digest.update(loader_code(type(each)))
    for file in loader_files(loader, path):
        try:
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").digest()
        except OSError as error:
            raise FileError(f"{file}: cannot be read ({error})") from error
        relative = file.relative_to(path).as_posix() if path is not None and file != path else file.name
        digest.update(json.dumps(relative).encode() + content)
    return digest.hexdigest()[:40]
