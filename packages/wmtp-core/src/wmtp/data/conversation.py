"""Text of a conversation, and the part of it that is learned."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal

from attrs import define, frozen

from wmtp.data.base import BadExample, Example
from wmtp.data.messages import check_messages, common_length
from wmtp.data.notes import Notes
from wmtp.data.tokenized import CONTEXT, LEARNED, NEVER
from wmtp.errors import ConfigError
from wmtp.tokenizers.chat_template import ChatTemplate, TemplateFailure

__all__ = ["Learn", "Part", "conversation_text"]

Learn = Literal["assistant", "last", "all"]

_SHOWN: Final = 60


@define
class Part:
    """Characters of a text that are learned alike.

    Args:
        text: the characters.
        kind: `NEVER`, `CONTEXT` or `LEARNED`.
        scale: multiplies the weights that a trainer gives them.
    """

    text: str
    kind: int
    scale: float = 1.0


@frozen
class _Turn:
    """An answer in a text, from ``start`` to ``stop``.

    ``message`` is the number of its message, −1 for all messages.
    """

    start: int
    stop: int
    message: int


def conversation_text(
    example: Example, template: ChatTemplate, learn: Learn, control_tokens: frozenset[str], notes: Notes
) -> list[Part]:
    """Apply a chat template, and find what is learned.

    Args:
        example: with messages.
        template: the model's.
        learn: which assistants' messages: all, the last, or everything in the text.
        control_tokens: of the tokenizer.
        notes: takes what is to be said.

    Returns:
        parts of the text, which joined are all of it.

    Raises:
        BadExample: the conversation has nothing to learn, or the template refuses it or leaves out what would be learned.
        ConfigError: the template rewrites earlier turns, so that ``learn`` cannot be done exactly.
    """
    messages, tools, where = example.messages or (), example.tools, example.place
    check_messages(where, messages, example.first_learned)
    try:
        turns, text = _turns(example, template, learn, control_tokens, notes)
    except TemplateFailure as failure:
        raise BadExample(where, f"the chat template refuses it ({failure})") from failure
    learned = [turn for turn in turns if turn.message < 0 or _is_learned(messages[turn.message])]
    _check_written(where, text, messages, tools, learned, notes)
    _check_ends(where, text, learned, template, control_tokens, notes)
    if example.is_cut:
        turns = _without_end(text, turns, len(messages) - 1, control_tokens)
    return list(_parts(text, turns, messages))


def _turns(
    example: Example, template: ChatTemplate, learn: Learn, control_tokens: frozenset[str], notes: Notes
) -> tuple[list[_Turn], str]:
    messages, tools = example.messages or (), example.tools
    wanted = [
        number for number, message in enumerate(messages) if message["role"] == "assistant" and number >= example.first_learned
    ]
    if learn == "last":
        wanted = wanted[-1:]
    if template.marked(tools):
        text, marks = template.render_marked(messages, tools)
        return _marked_turns(example, template, text, marks, wanted, control_tokens), text
    text = template.render(messages, tools)
    found: list[_Turn] = []
    for number in wanted:
        turn = _rendered_turn(example, template, text, number, control_tokens, notes)
        if turn is not None:
            found.append(turn)
        elif learn == "all" and all(_is_learned(message) and message.get("weight", 1) == 1 for message in messages):
            return [_Turn(0, len(text), -1)], text  # everything is learned alike, so whose turn it is does not matter
        elif learn == "all" or _is_learned(messages[number]):
            raise _rewrites(example, template, text, number)
    return found, text


def _is_learned(message: Mapping[str, Any]) -> bool:
    return message.get("train") is not False and message.get("weight") != 0


def _marked_turns(
    example: Example,
    template: ChatTemplate,
    text: str,
    marks: Sequence[tuple[int, int]],
    wanted: Sequence[int],
    control_tokens: frozenset[str],
) -> list[_Turn]:
    """Take the turns from the template's marks."""
    messages = example.messages or ()
    assistants = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    turns: list[_Turn] = []
    places = [(start, stop) for start, stop in marks if stop > start]
    # an end token that is marked by itself belongs to the turn before it
    owning = [place for place in places if text[slice(*place)].strip() not in control_tokens]
    owners = assistants if len(owning) == len(assistants) else _owners(example, template, len(owning))
    if not set(owners) <= set(assistants) or len(owners) != len(owning):
        raise BadExample(
            example.place,
            f"the chat template marks {len(owning)} places as generated, which do not belong to the {len(assistants)} messages "
            "of an assistant; use another chat_template",
        )
    owner_of = dict(zip(owning, owners, strict=True))
    for place in places:
        owner = owner_of.get(place, turns[-1].message if turns else None)
        if owner is not None:
            turns.append(_Turn(*place, owner))
    return [turn for turn in turns if turn.message in wanted]


def _owners(example: Example, template: ChatTemplate, count: int) -> list[int]:
    """Find each mark's message, counting the marks up to every message."""
    messages = example.messages or ()
    counts = [0]
    for number in range(1, len(messages)):
        try:
            counts.append(len(template.render_marked(messages[:number], example.tools)[1]))
        except TemplateFailure:
            counts.append(counts[-1])
    counts.append(count)
    return [number for number in range(len(messages)) for _ in range(max(0, counts[number + 1] - counts[number]))]


def _rendered_turn(
    example: Example, template: ChatTemplate, text: str, number: int, control_tokens: frozenset[str], notes: Notes
) -> _Turn | None:
    """Find a turn by rendering the conversation up to it.

    None: what follows changes what was before.
    """
    before = _before(example, template, text, number, notes)
    stop = _stop(example, template, text, number, control_tokens)
    if before is None or stop is None or before > stop:
        return None
    return _Turn(before, _without_space_after(text, before, stop, control_tokens), number)


def _before(example: Example, template: ChatTemplate, text: str, number: int, notes: Notes) -> int | None:
    """Find where a message's turn starts in the text.

    That is behind what the model is given to write it. None: the text does not begin with it.
    """
    messages, tools = example.messages or (), example.tools
    prompt = template.render(messages[:number], tools, prompt=True) if number else ""
    if number and text.startswith(prompt):
        return len(prompt)
    # what the template writes before an answer, whatever the answer is
    variants = [template.render([*messages[:number], {"role": "assistant", "content": c}], tools) for c in ("0", "1")]
    header = variants[0][: common_length(*variants)]
    if not text.startswith(header):
        return None
    if number:
        asked = prompt[common_length(prompt, header) :]
        notes.add(
            f"the chat template begins an answer with {asked!r:.{_SHOWN}} when it asks the model for one, and "
            f"does not write that before a recorded one: the model is asked otherwise than it learns",
            example.place,
        )
    return len(header)


def _stop(example: Example, template: ChatTemplate, text: str, number: int, control_tokens: frozenset[str]) -> int | None:
    """Find where a message's turn ends in the text.

    None: what follows it has changed it.
    """
    messages, tools = example.messages or (), example.tools
    last = number == len(messages) - 1
    whole = text if last else template.render(messages[: number + 1], tools)
    if not last and text.startswith(whole):
        return len(whole)
    # some templates write an end of text where the conversation ends, behind the end of the turn
    end = template.special_tokens.get("eos_token", "")
    shorter = whole.removesuffix(end) if end else whole
    if shorter == whole or not shorter.rstrip().endswith(_tuple(control_tokens)):
        return len(whole) if last else None
    if not last:
        return len(shorter) if text.startswith(shorter) else None
    try:
        continued = template.render([*messages, {"role": "user", "content": "0"}], tools)
    except TemplateFailure:
        return len(whole)
    return len(shorter) if continued.startswith(shorter) and not continued.startswith(whole) else len(whole)


def _tuple(control_tokens: frozenset[str]) -> tuple[str, ...]:
    return tuple(token for token in control_tokens if token)


def _without_space_after(text: str, start: int, stop: int, control_tokens: frozenset[str]) -> int:
    """Exclude white space behind the token that ends a turn.

    The model has stopped before it.
    """
    stripped = text[start:stop].rstrip()
    return start + len(stripped) if stripped.endswith(_tuple(control_tokens)) else stop


def _without_end(text: str, turns: Sequence[_Turn], last: int, control_tokens: frozenset[str]) -> list[_Turn]:
    """Exclude the tokens that end the last message.

    Its author was stopped before them.
    """
    found = []
    for turn in turns:
        stop = turn.stop
        while turn.message in (-1, last) and (stripped := text[turn.start : stop].rstrip()).endswith(_tuple(control_tokens)):
            end = max((token for token in _tuple(control_tokens) if stripped.endswith(token)), key=len)
            stop = turn.start + len(stripped) - len(end)
        found.append(_Turn(turn.start, stop, turn.message))
    return found


def _rewrites(example: Example, template: ChatTemplate, text: str, number: int) -> ConfigError:
    messages, tools = example.messages or (), example.tools
    alone = template.render(messages[: number + 1], tools)
    common = common_length(alone, text)
    return ConfigError(
        f"data.train.learn: {example.place}: the chat template writes message {number + 1} (assistant) otherwise once another "
        f"follows ({alone[common:]!r:.{_SHOWN}} becomes {text[common:]!r:.{_SHOWN}}), as reasoning models do, so that not all "
        "answers of a conversation can be learned as they were written; set data.train.learn = 'last', or documents = 'turn' "
        "in the data set (one document an answer), or data.train.chat_template to a template that keeps them"
    )


def _parts(text: str, turns: Sequence[_Turn], messages: Sequence[Mapping[str, Any]]) -> Iterator[Part]:
    place = 0
    for turn in turns:
        start, message = max(place, turn.start), {} if turn.message < 0 else messages[turn.message]
        if start > place:
            yield Part(text[place:start], CONTEXT)
        if turn.stop > start:
            kind = LEARNED if _is_learned(message) else NEVER
            yield Part(text[start : turn.stop], kind, float(message.get("weight", 1.0)) if kind == LEARNED else 1.0)
        place = max(place, turn.stop)
    if place < len(text):
        yield Part(text[place:], CONTEXT)


def _check_written(
    where: str,
    text: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    turns: Sequence[_Turn],
    notes: Notes,
) -> None:
    """Refuse a conversation of which the template leaves out a part.

    Raises:
        BadExample: naming the message and the part.
    """
    learned: dict[int, str] = {}
    for turn in turns:
        learned[turn.message] = learned.get(turn.message, "") + text[turn.start : turn.stop]
    for number, message in enumerate(messages):
        name = f"message {number + 1} ({message['role']})"
        inside = learned.get(number, learned.get(-1, text))
        for call in message.get("tool_calls") or ():
            if call["function"]["name"] not in inside:
                raise BadExample(where, f"{name}: the chat template does not write its tool calls; use another chat_template")
        is_learned = number in learned
        for what, content in _contents(message):
            # parts without learning may be left out by the template, such as an earlier thought
            if (is_learned or what != "thought") and not _holds(inside if is_learned else text, content):
                raise BadExample(
                    where,
                    f"{name}: the chat template does not write its {what} ({content!r:.{_SHOWN}}); use another chat_template, "
                    "or take it out",
                )
    if tools and not any(_tool_name(tool) in text for tool in tools):
        notes.add("the chat template does not write the tools that they have", where)


def _contents(message: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """List the texts in a message that a template should write."""
    content = message["content"]
    if message["role"] == "assistant" and "</think>" in content:
        thought, _, content = content.rpartition("</think>")
        yield "thought", thought.replace("<think>", "").strip()
    if message.get("reasoning_content"):
        yield "thought", message["reasoning_content"].strip()
    yield "content", content.strip()


def _holds(text: str, content: str) -> bool:
    return content in text or json.dumps(content, ensure_ascii=False)[1:-1] in text


def _tool_name(tool: Mapping[str, Any]) -> str:
    function = tool.get("function")
    return str((function if isinstance(function, Mapping) else tool).get("name", ""))


def _check_ends(
    where: str,
    text: str,
    turns: Sequence[_Turn],
    template: ChatTemplate,
    control_tokens: frozenset[str],
    notes: Notes,
) -> None:
    """Say where an end of turn is not learned."""
    for turn in turns:
        after = text[turn.stop :].lstrip()
        if text[turn.start : turn.stop].rstrip().endswith(_tuple(control_tokens)):
            continue
        if ends := [token for token in _tuple(control_tokens) if after.startswith(token)]:
            notes.add(
                f"the token that ends an answer ({max(ends, key=len)!r}) lies outside what the chat template marks as "
                "generated: it is not learned, and the model may not learn to stop",
                where,
            )
        else:
            remedy = (
                "write {{ eos_token }} behind answers in data.train.chat_template"
                if template.special_tokens.get("eos_token")
                else "this tokenizer's end token is no text that a template could write"
            )
            lacking = "the chat template writes no special token behind an answer: the model does not learn to stop"
            notes.add(f"{lacking}; {remedy}", where)
        return
