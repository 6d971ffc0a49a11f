"""Validate what a data loader yields."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wmtp.data.base import Example, ExampleLoader, Span
from wmtp.errors import PluginError
from wmtp.plugins.built import typed

__all__ = ["check_example", "loader_files", "loader_title"]


def check_example(name: str, loader: ExampleLoader, example: Any) -> None:
    """Raise if a loader yielded anything but a valid `Example`.

    Args:
        name: of the data set.
        loader: what yielded it.
        example: what was yielded.

    Raises:
        PluginError: naming the loader.
    """
    if type(example) is Example and _is_plain(example):
        return
    problem = _problem(loader, example)
    if problem is not None:
        raise PluginError(f"datasets.{name}: {loader_title(loader)}: examples() yielded {problem}")


def _is_plain(example: Example) -> bool:
    """Tell whether an example has texts and nothing else.

    Most do, and each of many millions is checked.
    """
    return (
        type(example.id)
        is type(example.prompt)
        is type(example.completion)
        is type(example.group)
        is type(example.where)
        is str
        and example.unread == ()
        and example.is_cut is False
        and example.is_correct is example.reward is example.weights is example.spans is example.messages is None
    )


def _problem(loader: ExampleLoader, example: Any) -> str | None:
    if not isinstance(example, Example):
        return f"{example!r:.60} ({type(example).__name__}), not an Example"
    for field in ("id", "prompt", "completion", "group", "where"):
        if not isinstance(value := getattr(example, field), str):
            return f"an Example whose {field} is {value!r:.60}, not a text"
    if example.unread != () and not _are_keys(example.unread):
        return f"an Example whose unread is {example.unread!r:.60}, not a tuple of keys"
    if not isinstance(example.is_cut, bool):
        return f"an Example whose is_cut is {example.is_cut!r:.60}, not True or False"
    if example.is_correct not in (None, True, False):
        return f"an Example whose is_correct is {example.is_correct!r:.60}, not True, False or None"
    if example.reward is not None and not (isinstance(example.reward, int | float) and math.isfinite(example.reward)):
        return f"an Example whose reward is {example.reward!r:.60}, not a finite number or None"
    if example.weights is not None and not _are_weights(example.weights):
        return f"an Example whose weights are {example.weights!r:.60}, neither numbers nor (text, number) tuples"
    if example.spans is None and example.messages is None:
        return None
    if example.prompt or example.completion or (example.spans is not None and example.messages is not None):
        return "an Example with more than one of prompt and completion, spans, and messages"
    if example.weights is not None:
        return "an Example with weights beside spans or messages, which have their own"
    if example.messages is not None:
        return _message_problem(loader, example)
    return None if example.spans is None else _span_problem(example.spans)


def _message_problem(loader: ExampleLoader, example: Example) -> str | None:
    if not loader.conversations:
        return f"messages, and {type(loader).__name__} does not say so: write conversations = True in it"
    for name, values in (("messages", example.messages), ("tools", example.tools)):
        if values is not None and not (isinstance(values, tuple | list) and all(isinstance(v, Mapping) for v in values)):
            return f"an Example whose {name} are {values!r:.60}, not a tuple of mappings"
    return None


def _span_problem(spans: Any) -> str | None:
    if not isinstance(spans, tuple | list) or not spans or not all(isinstance(span, Span) for span in spans):
        return f"an Example whose spans are {spans!r:.60}, not a tuple of Span"
    for span in spans:
        if not isinstance(span.text, str) or not isinstance(span.learn, bool):
            return f"{span!r:.80}, whose text is no string, or learn neither True nor False"
        if not _is_number(span.weight) or not 0 <= span.weight < math.inf:
            return f"a Span with a weight of {span.weight!r:.40}; weights are finite and ≥ 0"
        given = span.token_weights
        if given is not None and not _is_number(given) and not (isinstance(given, tuple) and all(map(_is_number, given))):
            return f"a Span whose token_weights are {given!r:.60}, not a number or a tuple of numbers"
    return None


def loader_files(loader: ExampleLoader, path: Path | None) -> Sequence[Path]:
    """List a loader's files, and validate what it gives.

    Raises:
        PluginError: it is no list of paths; the message names the loader.
    """
    files = typed(loader_title(loader), "files", Sequence, loader.files(path))
    return [typed(loader_title(loader), "files", Path, file) for file in files]


def loader_title(loader: ExampleLoader) -> str:
    """Name a loader in messages."""
    return f"data loader {type(loader).__module__}.{type(loader).__qualname__}"


def _are_keys(keys: Any) -> bool:
    return isinstance(keys, tuple | list) and all(isinstance(key, str) for key in keys)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_weights(weights: Any) -> bool:
    if not isinstance(weights, tuple | list):
        return False
    if weights and isinstance(weights[0], tuple):
        return all(isinstance(pair, tuple) and [*map(type, pair)] in ([str, float], [str, int]) for pair in weights)
    return all(isinstance(weight, int | float) for weight in weights)
