"""Messages of a conversation, each checked and brought to one form."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from wmtp.data.base import BadExample
from wmtp.data.fields import finite_number, type_name
from wmtp.json_files import unique_keys

__all__ = ["MESSAGE_KEYS", "ROLES", "check_messages", "common_length", "from_json", "message_tools", "normal_messages"]

ROLES: Final = ("system", "developer", "user", "assistant", "tool")
#: what other formats call these
_ALIASES: Final = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function_call": "function_call",
    "tool_call": "function_call",
}
_REASONING: Final = ("reasoning_content", "reasoning", "thinking")
#: keys of a message that are read
MESSAGE_KEYS: Final = frozenset(
    {"role", "content", "from", "value", "tool_calls", "function_call", "name", "tool_call_id", "train", "weight", *_REASONING}
)


def normal_messages(where: str, key: str, value: Any) -> tuple[Mapping[str, Any], ...]:
    """Normalize the messages of a record.

    Each gets a ``role``, ``content`` as text, and ``tool_calls`` with arguments as objects.

    Args:
        where: what an error calls the record.
        key: its key there.
        value: what stands there: a list of messages, of OpenAI's or ShareGPT's form, or JSON text of one.

    Raises:
        BadExample: it is no such list.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):  # a table without lists has them as JSON
        value = from_json(where, f'"{key}"', value)
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise BadExample(where, f'"{key}" must be a list of messages, not {type_name(value)}')
    if not value:
        raise BadExample(where, f'"{key}" holds no message')
    return tuple(_message(where, f"{key}, message {number}", message) for number, message in enumerate(value, start=1))


def _message(where: str, name: str, message: Any) -> Mapping[str, Any]:
    if not isinstance(message, Mapping):
        raise BadExample(where, f"{name}: must be an object, not {type_name(message)}")
    sharegpt = "role" not in message and "from" in message
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    given = message.get(role_key)
    role = _ALIASES.get(given, given) if isinstance(given, str) else given
    if role not in ROLES and role != "function_call":
        raise BadExample(where, f'{name}: "{role_key}" is {given!r:.40}; known are {", ".join(ROLES)}')
    found: dict[str, Any] = {"role": role, "content": _content(where, f"{name} ({given})", message.get(content_key))}
    if role == "function_call":
        found = {"role": "assistant", "content": "", "tool_calls": _calls(where, name, found["content"])}
    elif message.get("tool_calls"):
        found["tool_calls"] = _calls(where, name, message["tool_calls"])
    elif message.get("function_call"):
        found["tool_calls"] = _calls(where, name, [message["function_call"]])
    reasoning = next((message[key] for key in _REASONING if message.get(key)), None)
    if reasoning is not None:
        if not isinstance(reasoning, str):
            raise BadExample(where, f"{name}: its reasoning must be a text, not {type_name(reasoning)}")
        found["reasoning_content"] = reasoning
    for other in ("name", "tool_call_id"):
        if message.get(other) is not None:
            found[other] = message[other]
    train = message.get("train")
    if train is not None:
        if not isinstance(train, bool):
            raise BadExample(where, f'{name}: "train" must be true or false, not {type_name(train)}')
        found["train"] = train
    if message.get("weight") is not None:
        found["weight"] = finite_number(where, message["weight"], f'{name}: "weight"')
    return found


def _content(where: str, name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value.replace("\r\n", "\n")
    if not isinstance(value, Sequence):
        raise BadExample(where, f"{name}: its content must be a text or a list of parts, not {type_name(value)}")
    texts = []
    for part in value:
        kind = part.get("type", "text" if "text" in part else None) if isinstance(part, Mapping) else None
        if isinstance(part, str):
            texts.append(part)
        elif kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = kind or type_name(part)
            raise BadExample(where, f"{name}: has a part of type {kind!r:.40} in its content; only text can be learned from")
    return "\n".join(texts).replace("\r\n", "\n")


def _calls(where: str, name: str, value: Any) -> list[Mapping[str, Any]]:
    value = from_json(where, f"{name}: tool_calls", value)
    calls = value if isinstance(value, Sequence) else [value]
    return [_call(where, f"{name}, tool call {number}", call) for number, call in enumerate(calls, start=1)]


def _call(where: str, name: str, call: Any) -> Mapping[str, Any]:
    if not isinstance(call, Mapping):
        raise BadExample(where, f"{name}: must be an object, not {type_name(call)}")
    function = call["function"] if isinstance(call.get("function"), Mapping) else call
    if not isinstance(function.get("name"), str):
        raise BadExample(where, f"{name}: has no name of a function")
    arguments = function.get("arguments", function.get("parameters"))
    arguments = {} if arguments in (None, "") else from_json(where, f"{name}: arguments", arguments)
    if isinstance(arguments, str):
        raise BadExample(where, f"{name}: its arguments are JSON text of a text, not of an object; write them as an object")
    found = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": call["id"], **found} if call.get("id") is not None else found


def message_tools(where: str, key: str, value: Any) -> tuple[Mapping[str, Any], ...] | None:
    """Read the tools of a record; None where it has none.

    They are a list of objects, or JSON text of one.

    Raises:
        BadExample: it is something else.
    """
    if value in (None, "", []):
        return None
    tools = from_json(where, f'"{key}"', value)
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadExample(where, f'"{key}" must be a list of objects, not {type_name(tools)}')
    return tuple(tools) or None


def from_json(where: str, name: str, value: Any) -> Any:
    """Parse JSON text; any other value is returned as it is.

    Raises:
        BadExample: the text is no JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, object_pairs_hook=unique_keys)
    except ValueError as error:
        raise BadExample(where, f"{name}: is a text, but not JSON ({error})") from error


def common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Count the messages, or characters, that two sequences begin with alike."""
    for number, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return number
    return min(len(first), len(second))


def check_messages(where: str, messages: Sequence[Mapping[str, Any]], first_learned: int) -> None:
    """Refuse a conversation that cannot be learned as it says.

    Raises:
        BadExample: it has no assistant's message to learn, an empty one, or a weight where there can be none.
    """
    for number, message in enumerate(messages, start=1):
        if message.get("role") not in ROLES:
            raise BadExample(where, f"message {number}: unknown role {message.get('role')!r:.40}; known are {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise BadExample(where, f"message {number}: its content must be a text, not {type_name(message.get('content'))}")
        weight = message.get("weight")
        if weight is not None and not 0 <= weight < math.inf:
            raise BadExample(where, f"message {number}: has a weight of {weight}; weights are finite and ≥ 0")
        if message["role"] == "assistant":
            if not (message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content")):
                raise BadExample(where, f"message {number} (assistant): is empty")
        elif message.get("train") or (weight is not None and weight > 0):
            raise BadExample(
                where,
                f"message {number} ({message['role']}): only an assistant's message can be learned; remove train and weight",
            )
        elif message["role"] == "user" and not message["content"].strip():
            raise BadExample(where, f"message {number} (user): is empty")
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise BadExample(where, f"has no message of an assistant, so nothing to learn; its roles are {', '.join(roles)}")
    if "assistant" not in roles[first_learned:]:
        raise BadExample(where, "has no message of an assistant among those to learn")
