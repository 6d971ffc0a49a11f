"""Records with ``prompt`` and ``completion``, or ``text``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Set
from typing import Any, Final

from wmtp.data.base import BadExample, Example
from wmtp.data.fields import (
    Cell,
    bool_field,
    finite_number,
    is_cut,
    keys_of,
    name_field,
    number_field,
    text_field,
    type_name,
)
from wmtp.data.loaders.records import RecordLoader
from wmtp.data.unread import unread_keys

__all__ = ["FIELDS", "TEXTS", "JsonlLoader"]

TEXTS: Final = ("prompt", "completion", "text")
FIELDS: Final = (*TEXTS, "id", "group", "is_correct", "reward", "weights", "finish")
#: keys that tell conversations, which `chat` reads
_CONVERSATIONS: Final = (("messages",), ("conversations",), ("chosen", "rejected"), ("instruction", "output"))
#: what else the files of others call prompt and completion, or text
_ALIASES: Final = (
    {"prompt": "question", "completion": "answer"},
    {"prompt": "input", "completion": "output"},
    {"prompt": "prompt", "completion": "response"},
    {"prompt": "query", "completion": "response"},
    {"prompt": "problem", "completion": "solution"},
    {"text": "content"},
)


class JsonlLoader(RecordLoader):
    """Reads one example a record; see `wmtp.data.config.Jsonl`.

    Args:
        keys: for each of `FIELDS` that has another name in the files, that name; an empty one: it is not read.
        split: which files of a folder are read.
    """

    def __init__(self, keys: Mapping[str, str] | None = None, split: str | None = None) -> None:
        super().__init__(split)
        self._keys = {field: field for field in FIELDS} | dict(keys or {})
        self._content = (self._keys["text"], self._keys["prompt"], self._keys["completion"])
        self._texts_apart = not any(name in self._content for field, name in self._keys.items() if field not in TEXTS)
        # a field that is not to be read is meant to be left out
        self._read = {name or field for field, name in self._keys.items()}

    def _record(self, where: str, record: Mapping[str, Any], *, columns: bool) -> Iterator[Example]:
        keys = self._keys
        text, prompt, completion = self._content
        if columns and text in record and (prompt in record or completion in record):  # each row of a table has all its columns
            record = {key: value for key, value in record.items() if value is not None or key not in self._content}
        if text in record and (prompt in record or completion in record):
            other = prompt if prompt in record else completion
            raise BadExample(where, f'has both "{text}" and "{other}"; keep "{text}", or "{prompt}" and "{completion}"')
        if text in record:
            pair = ("", text_field(where, record, text))
        else:
            for key in (prompt, completion):
                if key not in record:
                    needed = f'needs "{prompt}" and "{completion}", or "{text}"'
                    raise BadExample(where, f'no "{key}"; {needed}; {keys_of(record)}{self._instead(record)}')
            pair = (text_field(where, record, prompt), text_field(where, record, completion))
        if self._texts_apart and len(record) == (1 if text in record else 2):  # many millions of records have no label
            name = where.rpartition("/")[2]
            yield Example(id=name, prompt=pair[0], completion=pair[1], group=name, where=where)
            return
        example_id = name_field(record, keys["id"]) or where.rpartition("/")[2]
        unread = unread_keys(record, self._content, self._read)
        yield Example(
            id=example_id,
            prompt=pair[0],
            completion=pair[1],
            is_cut=is_cut(record, keys["finish"]),
            group=name_field(record, keys["group"]) or example_id,
            is_correct=bool_field(where, record, keys["is_correct"]),
            reward=number_field(where, record, keys["reward"]),
            weights=_weights(where, record, keys["weights"]),
            where=where,
            unread=unread,
            unread_hint='; type = "chat" reads such records whole' if unread and _is_conversation(record) else "",
        )

    def _keys_read(self, record: Mapping[str, Any]) -> Set[str]:
        return self._read

    def _instead(self, record: Mapping[str, Any]) -> str:
        """Say what reads a record that this loader does not."""
        if _is_conversation(record):
            return '; it is a conversation: write type = "chat" in the data set'
        other = next((found for found in _ALIASES if all(name in record for name in found.values())), None)
        if other is None:
            return ""
        keys = ", ".join(f'{field} = "{name}"' for field, name in other.items())
        return f"; perhaps keys = {{ {keys} }}"


def _is_conversation(record: Mapping[str, Any]) -> bool:
    return any(set(telling) <= record.keys() for telling in _CONVERSATIONS)


def _weights(where: str, record: Mapping[str, Any], key: str) -> tuple[float, ...] | tuple[tuple[str, float], ...] | None:
    value = record.get(key)
    if isinstance(value, Cell) and value:
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadExample(where, f'"{key}": not valid JSON: {error}') from error
    if value is None or value == "":
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
