"""Methods of a model for users: its tokenizer, completions, answers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from wmtp.errors import ConfigError, WMTPError
from wmtp.models.ends import end_ids

if TYPE_CHECKING:
    from wmtp.generation import Sampling
    from wmtp.models.mtp import MTPModel
    from wmtp.tokenizers import Tokenizer

__all__ = ["Generating"]


class Generating:
    """Part of `wmtp.models.MTPModel` that writes text."""

    source: Path | None
    _tokenizer: Tokenizer | None

    @property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer beside the model's files.

        Raises:
            WMTPError: the model has no files, or no tokenizer lies beside them.
            ConfigError: it is not this model's.
        """
        from wmtp.models.adapter_folder import tokenizer_place
        from wmtp.models.vocabulary import check_vocabulary
        from wmtp.tokenizers.load import load_tokenizer

        if self._tokenizer is None:
            if self.source is None:
                raise WMTPError("this model was not opened from files, so it has no tokenizer; give token ids")
            self._tokenizer = load_tokenizer(tokenizer_place(self.source))
            check_vocabulary(_model(self).vocab_size, self._tokenizer, key=str(self.source))
        return self._tokenizer

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor,
        *,
        max_new_tokens: int = 128,
        speculative: bool | int = False,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        eos_id: int | Collection[int] | None = None,
    ) -> Any:
        """Continue one prompt or several.

        Args:
            prompts: a text, or the token ids of one (``[S]``); or several of them, which are decoded as one batch. Texts get
                the tokenizer's begin token, as in training; ids are taken as they are.
            max_new_tokens: the most tokens that are added.
            speculative: whether heads 2..H draft (`wmtp.generation`); the text is the same, the wait is not. A number: so many
                of the first of them, as they are worth it.
            temperature: 0 is greedy.
            top_p: of nucleus sampling.
            seed: of the draws.
            stop: texts that end a completion; they are not part of it. Texts only.
            eos_id: the token that ends a text, or several. Default: those of the tokenizer and of the generation config.

        Returns:
            a `wmtp.generation.Generation`, whose ``str()`` is the completion; a list of them for several prompts.

        Raises:
            ConfigError: a prompt is empty, too long or not of this vocabulary; speculation without extra heads, or by more
                than there are; ``stop`` with token ids; an argument is wrong or has no effect.
            WMTPError: texts are given, and the model has no tokenizer.
        """
        from wmtp.generation import generate
        from wmtp.generation.text import generate_texts

        sampling = _sampling(temperature, top_p, seed)
        several, is_one = _several(prompts)
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "speculative": speculative, "sampling": sampling}
        ends = None if eos_id is None else _token_ids("eos_id", [eos_id] if isinstance(eos_id, Integral) else eos_id)
        if ends and not 0 <= min(ends) <= max(ends) < _model(self).vocab_size:
            raise ConfigError(f"eos_id: {eos_id} is outside the model's vocabulary of {_model(self).vocab_size}")
        if several and isinstance(several[0], str):
            found = generate_texts(_model(self), self.tokenizer, several, stop=stop, ends=ends, **options)
        else:
            if stop:
                raise ConfigError("stop: ends completions of texts, and the prompts are token ids; give texts, or eos_id")
            if ends is None and (self._tokenizer is not None or self.source is not None):
                ends = end_ids(_model(self).base, self.tokenizer)
            found = generate(_model(self), several, eos_id=ends, **options)
        return found[0] if is_one else found

    def chat(
        self,
        messages: str | Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        max_new_tokens: int = 512,
        speculative: bool | int = False,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Any:
        """Answer in one or several conversations.

        They are written by the tokenizer's chat template.

        Args:
            messages: each with ``role`` and ``content``, or a text, which is what a user says; or several conversations, which
                are decoded as one batch.
            tools: that the model may call.
            max_new_tokens: the most tokens of an answer.
            speculative: as for `generate`.
            temperature: as for `generate`.
            top_p: as for `generate`.
            seed: as for `generate`.
            stop: as for `generate`.

        Returns:
            a `wmtp.generation.Generation`, whose ``str()`` is the answer; a list of them for several conversations. An answer
            ends at any end token of tokenizer, generation config and template.

        Raises:
            ConfigError: there is no template, it refuses the messages, or they are too long.
            WMTPError: the model has no tokenizer.
        """
        from wmtp.generation.text import chat_ends, chat_prompt, generate_texts

        is_one = isinstance(messages, str) or not messages or isinstance(messages[0], Mapping)
        several: Any = [messages] if is_one else messages
        found = generate_texts(
            _model(self),
            self.tokenizer,
            [chat_prompt(self.tokenizer, each, tools) for each in several],
            max_new_tokens=max_new_tokens,
            speculative=speculative,
            sampling=_sampling(temperature, top_p, seed),
            stop=stop,
            ends=chat_ends(_model(self), self.tokenizer),
        )
        return found[0] if is_one else found


def _model(part: Generating) -> MTPModel:
    return cast("MTPModel", part)


def _several(prompts: Any) -> tuple[list[Any], bool]:
    """Return several texts or lists of ids, and whether one was given."""
    items = prompts.tolist() if hasattr(prompts, "tolist") else prompts  # of torch and numpy
    is_one = isinstance(items, str) or (isinstance(items, Sequence) and len(items) > 0 and isinstance(items[0], Integral))
    several = [items] if is_one else items
    if not isinstance(several, Sequence):
        kind = type(prompts).__name__
        raise ConfigError(f"prompts: give a text, token ids, or a list of several, not {kind}; of an encoding its input_ids")
    if all(isinstance(item, str) for item in several):
        return list(several), is_one
    return [_token_ids("prompts", item) for item in several], is_one


def _token_ids(name: str, given: Any) -> list[int]:
    ids = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(ids, str) or not isinstance(ids, Collection) or not all(isinstance(item, Integral) for item in ids):
        raise ConfigError(f"{name}: token ids are whole numbers, not {given!r:.60}")
    return [int(item) for item in ids]


def _sampling(temperature: float, top_p: float, seed: int) -> Sampling:
    from wmtp.generation import Sampling

    if top_p != 1.0 and temperature == 0.0:
        raise ConfigError("top_p: has no effect: temperature 0, the default, is greedy; give a temperature, or leave it out")
    try:
        return Sampling(temperature=temperature, top_p=top_p, seed=seed)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error.args[0])) from None
