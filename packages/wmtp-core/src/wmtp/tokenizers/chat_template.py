"""Chat templates, which write the text of a conversation for a model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from attrs import field, frozen

from wmtp.errors import ConfigError, WMTPError

if TYPE_CHECKING:
    from wmtp.tokenizers.base import Tokenizer

__all__ = ["TEMPLATE_NAME", "ChatTemplate", "TemplateFailure", "template_source", "turn_end_id"]

#: where transformers keeps a template beside a tokenizer
TEMPLATE_NAME: Final = "chat_template.jinja"

_MARKS: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")
#: keys of a message that are for WMTP, not for the template
_OWN_KEYS: Final = frozenset({"train", "weight"})


def template_source(given: str) -> str:
    """Read the template that a config names.

    A text with Jinja's braces is the template itself, any other the path of a file.

    Raises:
        ConfigError: there is no such file, or it is no template.
    """
    if "{{" in given or "{%" in given:
        return given
    path = Path(given).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # a NUL character is in no path
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"{given!r:.80} cannot be read ({reason}); write a Jinja template, or the path of a file with one"
        ) from error
    if "{{" not in text and "{%" not in text:
        raise ConfigError(f"{given!r:.80} holds no Jinja template")
    return text


class TemplateFailure(WMTPError):
    """A template that refuses a conversation, or fails with it."""


@frozen(kw_only=True)
class ChatTemplate:
    """Chat template of transformers, in Jinja.

    There may be several: one for conversations with tools, one for all others.

    Args:
        source: the template, or named ones (``default``, ``tool_use``).
        special_tokens: what it may write by name (``bos_token`` …).
    """

    source: str | Mapping[str, str]
    special_tokens: Mapping[str, str] = field(factory=dict)

    def text(self, tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """Choose the template for conversations with these tools."""
        if isinstance(self.source, str):
            return self.source
        if tools and "tool_use" in self.source:
            return self.source["tool_use"]
        return self.source["default"] if "default" in self.source else next(iter(self.source.values()))

    def marked(self, tools: Sequence[Mapping[str, Any]] | None = None) -> bool:
        """Tell whether the template marks what an assistant generates."""
        return _MARKS.search(self.text(tools)) is not None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        prompt: bool = False,
    ) -> str:
        """Write a conversation.

        Args:
            messages: each with ``role`` and ``content``; arguments of tool calls are objects.
            tools: that the model may call.
            prompt: whether the beginning of an assistant's turn follows.

        Raises:
            TemplateFailure: the template refuses it.
        """
        return self._rendered(messages, tools, prompt=prompt, marks=False)[0]

    def render_marked(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """Write a conversation, and find where the template marks that assistants generate.

        Raises:
            TemplateFailure: the template refuses it.
        """
        return self._rendered(messages, tools, prompt=False, marks=True)

    def _rendered(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, *, prompt: bool, marks: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        as_text = self._arguments_as_text if any(message.get("tool_calls") for message in messages) else False
        if self._content_as_parts:
            messages = [_in_parts(message) for message in messages]
        return self._apply(messages, tools, prompt=prompt, marks=marks, arguments_as_text=as_text)

    def _apply(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        prompt: bool,
        marks: bool,
        arguments_as_text: bool,
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            options: dict[str, Any] = dict(self.special_tokens)
            texts, places = render_jinja_template(
                conversations=[[_for_template(message, arguments_as_text) for message in messages]],
                tools=[dict(tool) for tool in tools] if tools else None,
                chat_template=self.text(tools),
                return_assistant_tokens_mask=marks,
                add_generation_prompt=prompt,
                **options,
            )
        except ImportError:
            raise
        except Exception as error:  # a template is a program: it may fail in any way
            raise TemplateFailure(f"{type(error).__name__}: {' '.join(str(error).split()) or 'without a reason'}") from error
        return texts[0], [(int(start), int(stop)) for start, stop in places[0]] if places else []

    @cached_property
    def _content_as_parts(self) -> bool:
        """Tell whether contents must be lists of parts.

        Templates of models that also see images want them so.
        """
        probe = {"role": "user", "content": "c9c9"}

        def writes(message: Mapping[str, Any]) -> bool:
            try:
                return "c9c9" in self._apply([message], None, prompt=False, marks=False, arguments_as_text=False)[0]
            except TemplateFailure:
                return False

        return not writes(probe) and writes(_in_parts(probe))

    @cached_property
    def _arguments_as_text(self) -> bool:
        """Tell whether a tool call's arguments must be JSON text.

        Neither text nor object is a standard: an object may be refused, or written as Python writes it; a text may be quoted
        once more.
        """
        call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": {"k9": "v9"}}}
        probe = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        for as_text in (False, True):
            try:
                text, _ = self._apply(probe, None, prompt=False, marks=False, arguments_as_text=as_text)
            except TemplateFailure:
                continue
            if "{'k9'" not in text and '\\"k9\\"' not in text:
                return as_text
        return False


def turn_end_id(tokenizer: Tokenizer) -> int | None:
    """Find the special token that the chat template writes behind answers.

    None where it writes none.
    """
    if tokenizer.chat_template is None:
        return None
    template = ChatTemplate(source=tokenizer.chat_template, special_tokens=tokenizer.special_tokens)
    try:
        text = template.render([{"role": "user", "content": "u9u9"}, {"role": "assistant", "content": "a9a9"}])
    except TemplateFailure:
        return None
    after = text.rpartition("a9a9")[2].lstrip()
    written = [token for token in tokenizer.control_tokens if token and after.startswith(token)]
    ids = tokenizer.encode(max(written, key=len)) if written else []
    return ids[0] if len(ids) == 1 else None


def _for_template(message: Mapping[str, Any], arguments_as_text: bool) -> dict[str, Any]:
    found = {key: value for key, value in message.items() if key not in _OWN_KEYS and value is not None}
    if arguments_as_text and "tool_calls" in found:
        found["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _as_text(call["function"]["arguments"])}}
            for call in found["tool_calls"]
        ]
    return found


def _in_parts(message: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
