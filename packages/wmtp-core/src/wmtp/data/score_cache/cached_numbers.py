"""Cache of a model's outputs on the data, beside the token cache.

Files are keyed by the content of model and data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from wmtp.config.schema import Config
    from wmtp.data.dataset import TokenDataset
    from wmtp.data.score_cache.token_numbers import TokenNumbers
    from wmtp.training.setup import Source

__all__ = ["numbers_path", "open_token_numbers"]

#: part of the name of every file of numbers: raise it when the same model would give other numbers
_NUMBERS_VERSION = 1


def open_token_numbers(config: Config, source: Source, dataset: TokenDataset) -> Callable[[str, str], TokenNumbers]:
    """Return the function behind `TrainerSetup.token_numbers`."""
    from wmtp.data.score_cache.token_numbers import TokenNumbers

    def open_numbers(name: str, what: str) -> TokenNumbers:
        return TokenNumbers(numbers_path(config, source, dataset, name, what, "f32"), dataset)

    return open_numbers


def numbers_path(config: Config, source: Source, dataset: TokenDataset, name: str, what: str, suffix: str) -> Path:
    """Return the cache file of one computation, named by its inputs' content.

    Args:
        config: names the model and the folder of the token cache.
        source: resolves the model's URI.
        dataset: the data.
        name: of the section ``[models.NAME]``.
        what: identifies the computation.
        suffix: of the file.
    """
    from wmtp.data.prepare import token_cache_dir

    loader = config.models[name].loader
    options = attrs.asdict(loader)  # type: ignore[arg-type]
    options.pop("uri", None)  # what the files hold counts, not where they are
    path = source.place.path(loader, f"models.{name}")
    parts = [_NUMBERS_VERSION, what, loader.type, options, dataset.fingerprint, source.tokenizer.fingerprint()]
    # a trainer asks for the numbers of tokens to learn; a model from scratch is made by the seed
    train = config.data.train
    parts += [train.learned, sorted(train.prompt_weights), config.run.seed if path is None else None]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode())
    for file in [] if path is None else [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file():
            with file.open("rb") as stream:
                digest.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return token_cache_dir(config) / f"{digest.hexdigest()[:40]}.{suffix}"
