"""Prompts that a model shall answer, read from data files. Torch-free."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from attrs import frozen

from wmtp.data.base import BadExample
from wmtp.data.fields import keys_of, name_field, type_name
from wmtp.data.files import read_records
from wmtp.data.messages import message_tools, normal_messages
from wmtp.data.splits import data_files
from wmtp.errors import ConfigError

__all__ = ["Prompt", "fingerprint", "read_prompts"]

_SHOWN: Final = 10


@frozen(kw_only=True)
class Prompt:
    """One prompt.

    Args:
        id: of its record, or ``file:line``.
        text: to be continued as it stands, or said by a user; None for messages.
        messages: to be answered; None for a text.
        tools: that the model may call.
    """

    id: str
    text: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    tools: tuple[Mapping[str, Any], ...] | None = None


def read_prompts(paths: Sequence[Path]) -> list[Prompt]:
    """Read all prompts, in the order of the files.

    A record has a ``prompt``, a text or messages, or it is a conversation (``messages``, or ShareGPT's ``conversations``),
    whose last answer is left out.

    Raises:
        ConfigError: a record is no prompt, or there is none.
        WMTPError: a file cannot be read.
    """
    prompts: list[Prompt] = []
    problems: list[str] = []
    for path in paths:
        for record in read_records(data_files(path)):
            try:
                if isinstance(record, BadExample):
                    raise record
                prompts.append(_prompt(*record))
            except BadExample as bad:
                problems.append(str(bad))
    if problems:
        more = [f"and {len(problems) - _SHOWN:,} more records"] if len(problems) > _SHOWN else []
        raise ConfigError([*problems[:_SHOWN], *more])
    if not prompts:
        raise ConfigError(f"{', '.join(map(str, paths))}: holds no prompt")
    return prompts


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Hash the prompts and their order."""
    hashed = hashlib.sha256()
    for prompt in prompts:
        hashed.update(json.dumps([prompt.text, prompt.messages, prompt.tools], sort_keys=True).encode())
    return hashed.hexdigest()[:16]


def _prompt(where: str, record: Mapping[str, Any]) -> Prompt:
    given, name = record.get("prompt"), name_field(record, "id") or Path(where).name
    tools = message_tools(where, "tools", record.get("tools"))
    if isinstance(given, str):
        if not given:
            raise BadExample(where, '"prompt" is empty')
        return Prompt(id=name, text=given.replace("\r\n", "\n"), tools=tools)
    if given is not None:
        if not isinstance(given, list):
            raise BadExample(where, f'"prompt" must be a text or a list of messages, not {type_name(given)}')
        return Prompt(id=name, messages=normal_messages(where, "prompt", given), tools=tools)
    key = next((key for key in ("messages", "conversations") if record.get(key) is not None), None)
    if key is None:
        raise BadExample(where, f'no "prompt" and no "messages"; {keys_of(record)}')
    messages = normal_messages(where, key, record[key])
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise BadExample(where, f'"{key}" holds nothing to answer')
    return Prompt(id=name, messages=messages, tools=tools)
