"""Records with ``prompt`` and ``completion``, or ``text``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from wmtp.data.base import BadExample, Example, ExampleLoader
from wmtp.data.fields import bool_field, finite_number, name_field, number_field, text_field, type_name
from wmtp.data.files import data_files, given_path, parsed

__all__ = ["FIELDS", "JsonlLoader"]

FIELDS: Final = ("prompt", "completion", "text", "id", "group", "is_correct", "reward", "weights")


class JsonlLoader(ExampleLoader):
    """Reads one example a record; see `wmtp.data.config.Jsonl`.

    Args:
        keys: for each of `FIELDS` that has another name in the files, that name.
    """

    def __init__(self, keys: Mapping[str, str] | None = None) -> None:
        self._keys = {field: field for field in FIELDS} | dict(keys or {})

    def files(self, path: Path | None) -> Sequence[Path]:
        """List the data files at ``path``."""
        return data_files(given_path(path))

    def examples(self, path: Path | None) -> Iterator[Example | BadExample]:
        """Yield the records in the order of the files."""
        yield from parsed(given_path(path), self._example)

    def _example(self, where: str, record: Mapping[str, Any]) -> Iterator[Example]:
        keys = self._keys
        text, prompt, completion = (keys[field] for field in ("text", "prompt", "completion"))
        if text in record and (prompt in record or completion in record):
            other = prompt if prompt in record else completion
            raise BadExample(where, f'has both "{text}" and "{other}"; keep "{text}", or "{prompt}" and "{completion}"')
        if text in record:
            pair = ("", text_field(where, record, text))
        else:
            for key in (prompt, completion):
                if key not in record:
                    needed = f'needs "{prompt}" and "{completion}", or "{text}"'
                    raise BadExample(where, f'no "{key}"; {needed}; the keys here are {", ".join(record) or "none"}')
            pair = (text_field(where, record, prompt), text_field(where, record, completion))
        example_id = name_field(where, record, keys["id"]) or Path(where).name
        yield Example(
            id=example_id,
            prompt=pair[0],
            completion=pair[1],
            group=name_field(where, record, keys["group"]) or example_id,
            is_correct=bool_field(where, record, keys["is_correct"]),
            reward=number_field(where, record, keys["reward"]),
            weights=_weights(where, record, keys["weights"]),
            where=where,
        )


def _weights(where: str, record: Mapping[str, Any], key: str) -> tuple[float, ...] | tuple[tuple[str, float], ...] | None:
    value = record.get(key)
    if value is None:
        return None
    if not isinstance(value, list):
        raise BadExample(where, f'"{key}" must be a list of numbers or of [text, number] pairs, not {type_name(value)}')
    if value and isinstance(value[0], list):
        pairs: list[tuple[str, float]] = []
        for item in value:
            if not isinstance(item, list) or len(item) != 2 or not isinstance(item[0], str):
                raise BadExample(where, f'"{key}" must hold [text, number] pairs only, not {item!r:.60}')
            pairs.append((item[0].replace("\r\n", "\n"), _weight(where, item[1], key)))
        return tuple(pairs)
    return tuple(_weight(where, item, key) for item in value)


def _weight(where: str, value: Any, key: str) -> float:
    number = finite_number(where, value, f'a weight in "{key}"')
    if number < 0:
        raise BadExample(where, f'a weight in "{key}" is {number}; weights are ≥ 0')
    return number
