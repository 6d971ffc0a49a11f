"""Rules about data sets for training and evaluation. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Final

from wmtp.config.problems import KeyPath, Problem, dotted
from wmtp.config.schema import Config
from wmtp.config.tree import components
from wmtp.errors import ConfigError, InputError, PluginError, WMTPError
from wmtp.plugins.built import built, returned
from wmtp.plugins.contract import DataLoaderConfig
from wmtp.plugins.registry import Registry
from wmtp.storage.uris import file_path, scheme_of
from wmtp.storage.walk import special_kind

__all__ = [
    "check_answers",
    "check_first_examples",
    "check_sources",
    "doubts",
    "eval_sources",
    "read_from",
    "train_sources",
    "unread_keys",
]

#: examples that are looked at for a good one, where bad ones are skipped
_LOOKED_AT: Final = 32
_MIXTURE: Final = ("data", "train", "mixture")


def train_sources(config: Config) -> tuple[str, ...]:
    """Names of the data sets to learn from.

    Those that the config names, else all that ``[data.eval]`` does not name.
    """
    if config.data.train.mixture is not None:
        return tuple(sorted(config.data.train.mixture))  # however it is written
    if config.data.train.sources is not None:
        return config.data.train.sources
    measured = eval_sources(config)
    return tuple(name for name in config.datasets if name not in measured)


def eval_sources(config: Config) -> tuple[str, ...]:
    """Names of the data sets that are only measured."""
    return () if config.data.eval is None else config.data.eval.sources or ()


def read_from(dataset: DataLoaderConfig, path: KeyPath) -> tuple[DataLoaderConfig, KeyPath]:
    """Find the config that names a data set's files.

    Returns it with its key path. For a transform that is the source inside it, else the data set itself.
    """
    for placed in components(dataset, path):
        if placed.kind == "data_loaders":
            return read_from(placed.config, placed.path)
    return dataset, path


def check_sources(config: Config) -> Iterator[Problem]:
    """Report problems of ``data.train.sources``, ``data.eval`` and their data sets."""
    train, measured = train_sources(config), eval_sources(config)
    installed = ", ".join(dotted((name,)) for name in config.datasets)
    yield from _mixture_problems(config)
    trained, held_out = ("data", "train", "sources"), ("data", "eval", "sources")
    for path, names in ((trained if config.data.train.mixture is None else _MIXTURE, train), (held_out, measured)):
        for name in names:
            if name not in config.datasets:
                yield Problem(path, f"there is no [{dotted(('datasets', name))}]; there are: {installed}")
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield Problem(path, f"names '{name}' twice; name it once")
    if not train and config.data.train.mixture is None:
        yield Problem(trained, "names no data set; name the training data")
    for name in train:
        if name in measured:
            yield Problem(held_out, f"'{name}' is training data too; leave it out of one, or use data.eval.holdout")
    if config.data.eval is not None:
        if config.data.eval.sources is not None and config.data.eval.holdout is not None:
            yield Problem(("data", "eval", "holdout"), "conflicts with data.eval.sources; keep one of them")
        if not config.data.eval.sources and config.data.eval.holdout is None:
            yield Problem(("data", "eval"), "has neither sources nor holdout; name one, or leave the table out")
    for name in train:
        if name in config.datasets:
            component = config.datasets[name]
            source, place = read_from(component, ("datasets", name))
            if built(component, "data_loaders").evaluation_only and not source.allow_training:
                yield Problem(
                    place,
                    f"'{source.type}' is for evaluation only, training on it would make its results worthless; name other data "
                    f"sets in data.train.sources, or set {dotted(place)}.allow_training = true",
                )


def check_answers(config: Config, registry: Registry) -> Iterator[Problem]:
    """Refuse wrong answers for a trainer that would learn them too."""
    trainers = [config.trainer, *(placed.config for placed in components(config.trainer) if placed.kind == "trainers")]
    if any(trainer.tells_right_from_wrong for trainer in trainers):
        return
    telling = [provided.type for provided in registry.of_kind("trainers") if provided.cls.tells_right_from_wrong]
    others = f", or take a trainer that tells them apart: {', '.join(sorted(telling))}" if telling else ""
    for name in train_sources(config):
        if name in config.datasets and config.datasets[name].gives_wrong_answers:
            yield Problem(
                ("datasets", name, "answers"),
                f"'both' gives right and wrong answers, and the trainer '{config.trainer.type}' would learn them alike; write "
                f"'chosen'{others}",
            )


def _mixture_problems(config: Config) -> Iterator[Problem]:
    mixture = config.data.train.mixture
    if mixture is None:
        return
    if config.data.train.sources is not None:
        yield Problem(_MIXTURE, "conflicts with data.train.sources; remove one of them")
    if not mixture:
        yield Problem(_MIXTURE, "names no data set; write each with its share, as { a = 0.7, b = 0.3 }")
    wrong = {name: share for name, share in mixture.items() if not 0 < share < math.inf}
    for name, share in wrong.items():
        yield Problem((*_MIXTURE, name), f"{share:g} must be a finite number above 0; leave out what is not to be learned from")
    if not wrong and sum(mixture.values()) == math.inf:
        yield Problem(
            _MIXTURE, "the shares add up to more than a number can hold; write smaller ones, only their proportions count"
        )


def require_sources(config: Config) -> None:
    """Raise the problems that `check_sources` finds.

    Raises:
        ConfigError: there are some.
    """
    if problems := list(check_sources(config)):
        raise ConfigError([f"{dotted(problem.path)}: {problem.message}" for problem in problems])


def check_first_examples(config: Config) -> Iterator[Problem]:
    """Check the names and the first records of local data files."""
    looked_at = _LOOKED_AT if config.data.train.on_bad_example == "skip" else 1
    for place, dataset, path in _local_data(config):
        try:
            found = list(islice(_asked(dataset, "first_examples", Iterable, path), looked_at))
        except InputError as error:
            yield Problem((*place, error.key), str(error))
        except WMTPError as error:
            yield Problem((*place, "uri"), str(error))
        else:
            if found and all(isinstance(example, WMTPError) for example in found):  # BadExample
                yield Problem((*place, "uri"), str(found[0]))


def unread_keys(config: Config) -> Iterator[tuple[KeyPath, Mapping[str, str | None]]]:
    """Yield the unread keys in the first records of local files.

    See `ExampleLoader.unread_keys`.
    """
    for place, dataset, path in _local_data(config):
        with _said_elsewhere():
            if found := _asked(dataset, "unread_keys", Mapping, path):
                yield place, found


def doubts(config: Config) -> Iterator[tuple[KeyPath, str]]:
    """Yield what may be wrong with the data files here, see `ExampleLoader.doubts`."""
    for place, dataset, path in _local_data(config):
        with _said_elsewhere():
            for found in _asked(dataset, "doubts", Iterable, path):
                yield (*place, "uri"), found


@contextmanager
def _said_elsewhere() -> Iterator[None]:
    """Leave unreadable files to `check_first_examples`."""
    try:
        yield
    except PluginError:
        raise
    except WMTPError:
        pass


def _asked(dataset: DataLoaderConfig, method: str, wanted: Any, path: Path) -> Any:
    return returned(dataset, "data_loaders", method, wanted, getattr(built(dataset, "data_loaders"), method)(path))


def _local_data(config: Config) -> Iterator[tuple[KeyPath, DataLoaderConfig, Path]]:
    if config.launcher.remote:  # a path is one of the other machine
        return
    for name in dict.fromkeys((*train_sources(config), *eval_sources(config))):
        if (dataset := config.datasets.get(name)) is not None:
            source, place = read_from(dataset, ("datasets", name))
            if (path := _local_path(source.uri)) is not None:
                yield place, dataset, path


def _local_path(uri: object) -> Path | None:
    """Find the file or folder that a URI names on this machine.

    None where it is elsewhere, or another rule reports it.
    """
    try:
        path = file_path(uri) if isinstance(uri, str) and scheme_of(uri) == "file" else None
        return path if path is not None and path.exists() and not special_kind(path) else None
    except (ConfigError, OSError):
        return None
