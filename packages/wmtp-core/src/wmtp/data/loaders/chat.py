"""Conversations in the forms in which they are published."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Final, Literal, get_args

from attrs import evolve

from wmtp.data.base import BadExample, Example
from wmtp.data.fields import bool_field, is_cut, keys_of, name_field, number_field, shared_column, text_field, type_name
from wmtp.data.loaders.records import RecordLoader
from wmtp.data.messages import MESSAGE_KEYS, check_messages, common_length, from_json, message_tools, normal_messages
from wmtp.data.unread import unread_keys

__all__ = ["CONTENT", "FORMATS", "KEYS", "ChatLoader", "Format"]

Format = Literal["messages", "sharegpt", "prompt-completion", "alpaca", "preference"]
FORMATS: Final[tuple[str, ...]] = get_args(Format)
#: the keys that tell each format
_TELLING: Final[Mapping[str, tuple[str, ...]]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "preference": ("chosen", "rejected"),
    "prompt-completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
}
KEYS: Final = (
    *(key for keys in _TELLING.values() for key in keys),
    *("input", "history", "system", "tools", "id", "group", "is_correct", "reward", "finish"),
)
#: keys that become text, and those that are read besides
CONTENT: Final = {name: (*keys, "system") for name, keys in _TELLING.items()}
CONTENT["preference"] += ("prompt",)
CONTENT["alpaca"] += ("input", "history")
_LABELS: Final = ("tools", "id", "group", "is_correct", "reward", "finish")

Messages = tuple[Mapping[str, Any], ...]


class ChatLoader(RecordLoader):
    """Reads a conversation a record, or a pair of answers; see `wmtp.data.config.Chat`.

    Args:
        format: what the records are; None: what their keys say.
        keys: for each of `KEYS` that has another name in the files, that name.
        documents: whether a conversation is one document, or each turn of an assistant.
        answers: which answers of a pair are read; None: pairs are refused.
        split: which files of a folder are read.
    """

    conversations = True

    def __init__(
        self,
        format: Format | None = None,
        keys: Mapping[str, str] | None = None,
        documents: Literal["conversation", "turn"] = "conversation",
        answers: Literal["chosen", "both"] | None = None,
        split: str | None = None,
    ) -> None:
        super().__init__(split)
        self._format = format
        self._keys = {key: key for key in KEYS} | dict(keys or {})
        # a key that is not to be read is meant to be left out
        self._left_out = {key for key, name in self._keys.items() if not name}
        self._shared = {name: shared_column(self._keys, fields) for name, fields in CONTENT.items()}
        self._documents = documents
        self._answers = answers

    def _record(self, where: str, record: Mapping[str, Any], *, columns: bool) -> Iterator[Example]:
        record, keys = _without_nulls(record) if columns else record, self._keys
        example_id = name_field(record, keys["id"]) or Path(where).name
        whole = Example(
            id=example_id,
            group=name_field(record, keys["group"]) or example_id,
            is_correct=bool_field(where, record, keys["is_correct"]),
            reward=number_field(where, record, keys["reward"]),
            tools=message_tools(where, keys["tools"], record.get(keys["tools"])),
            where=where,
        )
        found = self._found_format(where, record)
        if (problem := self._shared[found]) is not None:
            raise BadExample(where, f"keys: {problem}")
        if found == "preference":
            examples = self._pair(whole, record)
        else:
            messages, first = self._conversation(where, record, found)
            messages = self._with_system(where, record, messages)
            cut = is_cut(record, keys["finish"])
            examples = self._turns(evolve(whole, messages=messages, first_learned=first, is_cut=cut))
        content, labels = ({keys[key] or key for key in names} for names in (CONTENT[found], _LABELS))
        unread = (*unread_keys(record, content, labels), *_unread_in_messages(record, content))
        for example in examples:
            yield evolve(example, unread=unread)

    def _keys_read(self, record: Mapping[str, Any]) -> Set[str] | None:
        try:
            found = self._found_format("", record)
        except BadExample:  # which is said elsewhere
            return None
        return {self._keys[key] for key in (*CONTENT[found], *_LABELS)} | self._left_out

    def _found_format(self, where: str, record: Mapping[str, Any]) -> str:
        keys = self._keys
        fitting = [name for name, telling in _TELLING.items() if all(record.get(keys[key]) is not None for key in telling)]
        if self._format is not None:
            if self._format not in fitting:
                needed = " and ".join(f'"{keys[key]}"' for key in _TELLING[self._format])
                raise BadExample(where, f'needs {needed} for format = "{self._format}"; {keys_of(record)}')
            return self._format
        if not fitting:
            known = "; ".join(" and ".join(f'"{keys[key]}"' for key in telling) for telling in _TELLING.values())
            raise BadExample(where, f"is no conversation of a known form ({known}); {keys_of(record)}")
        if len(fitting) > 1:
            choices = " or ".join(f'"{name}"' for name in fitting)
            raise BadExample(where, f"fits several forms; say which in the data set: format = {choices}")
        return fitting[0]

    def _conversation(self, where: str, record: Mapping[str, Any], found: str) -> tuple[Messages, int]:
        """Read a record's messages, and the number of the first learned."""
        keys = self._keys
        match found:
            case "messages" | "sharegpt":
                key = keys["messages" if found == "messages" else "conversations"]
                return normal_messages(where, key, record[key]), 0
            case "prompt-completion":
                prompt = _said(where, keys["prompt"], record[keys["prompt"]], "user")
                return prompt + _said(where, keys["completion"], record[keys["completion"]], "assistant"), len(prompt)
            case _:
                return self._alpaca(where, record), 0

    def _alpaca(self, where: str, record: Mapping[str, Any]) -> Messages:
        keys = self._keys
        request = text_field(where, record, keys["instruction"])
        if record.get(keys["input"]):
            request = f"{request}\n\n{text_field(where, record, keys['input'])}"
        before: Messages = ()
        history = from_json(where, f'"{keys["history"]}"', record.get(keys["history"]) or [])
        if not isinstance(history, Sequence):
            raise BadExample(
                where, f'"{keys["history"]}" must be a list of pairs of request and answer, not {type_name(history)}'
            )
        for turn in history:
            if not isinstance(turn, Sequence) or isinstance(turn, str) or len(turn) != 2:
                raise BadExample(where, f'"{keys["history"]}" must hold pairs of request and answer, not {type_name(turn)}')
            before += _said(where, keys["history"], turn[0], "user") + _said(where, keys["history"], turn[1], "assistant")
        answer = text_field(where, record, keys["output"])
        return (*before, {"role": "user", "content": request}, {"role": "assistant", "content": answer})

    def _pair(self, whole: Example, record: Mapping[str, Any]) -> Iterator[Example]:
        keys, where = self._keys, whole.where
        if self._answers is None:
            raise BadExample(
                where,
                "is a pair of a chosen and a rejected answer; say in the data set what is read: answers = 'chosen', or "
                "answers = 'both' for a trainer that tells right from wrong by is_correct, such as critic-wmtp",
            )
        prompt = () if record.get(keys["prompt"]) is None else _said(where, keys["prompt"], record[keys["prompt"]], "user")
        given = {name: _said(where, keys[name], record[keys[name]], "assistant") for name in ("chosen", "rejected")}
        if not prompt:
            shared = common_length(given["chosen"], given["rejected"])
            prompt, given = given["chosen"][:shared], {name: answer[shared:] for name, answer in given.items()}
        elif all(answer[: len(prompt)] == prompt for answer in given.values()):
            given = {name: answer[len(prompt) :] for name, answer in given.items()}
        elif all(len(answer) > 1 and answer[0] == prompt[0] for answer in given.values()):
            raise BadExample(where, f'"{keys["chosen"]}" and "{keys["rejected"]}" begin with only a part of "{keys["prompt"]}"')
        prompt = self._with_system(where, record, prompt)
        for name, is_correct in (("chosen", True), ("rejected", False)):
            if is_correct or self._answers == "both":
                yield evolve(
                    whole,
                    id=f"{whole.id} ({name})",
                    messages=prompt + given[name],
                    first_learned=len(prompt),
                    is_correct=is_correct,
                )

    def _with_system(self, where: str, record: Mapping[str, Any], messages: Messages) -> Messages:
        key = self._keys["system"]
        if not record.get(key):
            return messages
        system = text_field(where, record, key)
        if messages and messages[0]["role"] in ("system", "developer"):
            if messages[0]["content"] != system:
                raise BadExample(where, f'has both "{key}" and a first message of role {messages[0]["role"]}; keep one')
            return messages
        return ({"role": "system", "content": system}, *messages)

    def _turns(self, example: Example) -> Iterator[Example]:
        """Make one document of a conversation, or one of each answer."""
        messages = example.messages or ()
        check_messages(example.where, messages, example.first_learned)
        if self._documents == "conversation":
            yield example
            return
        answers = [
            number
            for number, message in enumerate(messages)
            if message["role"] == "assistant" and number >= example.first_learned and message.get("train") is not False
        ]
        for turn, number in enumerate(answers, start=1):
            name = example.id if len(answers) == 1 else f"{example.id} (answer {turn})"
            cut = example.is_cut and number == len(messages) - 1
            yield evolve(example, id=name, messages=messages[: number + 1], first_learned=number, is_cut=cut)


def _said(where: str, key: str, value: Any, role: str) -> Messages:
    """Messages, or a text as one message."""
    if isinstance(value, str):
        return ({"role": role, "content": value.replace("\r\n", "\n")},)
    return normal_messages(where, key, value)


def _unread_in_messages(record: Mapping[str, Any], content: Set[str]) -> Mapping[str, None]:
    """List keys of a record's messages whose text is not learned."""
    lists = {key: value for key, value in record.items() if key in content and isinstance(value, list)}
    messages = [(key, message) for key, value in lists.items() for message in value if isinstance(message, Mapping)]
    return {f"{key}[].{name}": None for key, message in messages for name in unread_keys(message, MESSAGE_KEYS, ())}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(element) for key, element in value.items() if element is not None}
    return [_without_nulls(element) for element in value] if isinstance(value, list) else value
