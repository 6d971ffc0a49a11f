"""Config classes of the built-in data sources. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import field, frozen
from attrs.validators import deep_mapping, ge, in_, instance_of, optional

from wmtp.data.base import ExampleLoader
from wmtp.data.loaders.jsonl import FIELDS

__all__ = ["Jsonl", "PythonSource"]


@frozen(kw_only=True)
class Jsonl:
    """Records with ``prompt`` and ``completion``, or with ``text``; in ``.jsonl``, ``.json`` or ``.parquet`` files.

    A record may also have ``is_correct`` (true or false), ``reward`` (a number), ``weights`` (a number for each token of the
    completion, or [text, number] pairs that joined make it), ``id``, and ``group`` (the same for answers to one problem).
    Other keys are not read.

    Args:
        uri: a data file, or a folder of them, compressed (``.gz .bz2 .xz .zst``) or not.
        keys: what the files call these, where it is something else: ``keys = { prompt = "question", completion = "answer" }``.
    """

    type = "jsonl"
    uri: str
    keys: Mapping[str, str] = field(
        factory=dict, validator=deep_mapping(key_validator=in_(FIELDS), value_validator=instance_of(str))
    )

    def build(self) -> ExampleLoader:
        """Make the loader."""
        from wmtp.data.loaders.jsonl import JsonlLoader

        return JsonlLoader(self.keys)


@frozen(kw_only=True)
class PythonSource:
    """Functions and methods of Python source that have a docstring: signature and docstring → body.

    They come in the order of their files' names, without the indent of their class, without decorators. Folders named
    ``test``, ``tests``, ``site-packages`` and ``dist-packages`` are left out.

    Args:
        uri: a ``.py`` file or a folder. Default: the standard library of the Python that runs.
        max_functions: take the first so many.
        min_length: leave out what is shorter, in characters of signature, docstring and body.
        max_length: leave out what is longer.
    """

    type = "python-source"
    uri: str | None = None
    max_functions: int | None = field(default=None, validator=optional(ge(1)))
    min_length: int = field(default=0, validator=ge(0))
    max_length: int | None = field(default=None, validator=optional(ge(1)))

    def build(self) -> ExampleLoader:
        """Make the loader."""
        from wmtp.data.loaders.python_source import PythonSourceLoader

        return PythonSourceLoader(self.max_functions, self.min_length, self.max_length)
