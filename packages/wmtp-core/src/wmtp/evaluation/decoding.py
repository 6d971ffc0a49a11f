"""Evaluators of decoding speed and of draft acceptance."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, TypeVar

import torch

from wmtp.data.batch import PADDING
from wmtp.errors import ConfigError
from wmtp.evaluation.base import Estimate, Evaluator, Measured
from wmtp.evaluation.bootstrap import Bootstrap
from wmtp.generation import Generation, Sampling, generate
from wmtp.generation.cache import check_memory
from wmtp.models.ends import end_ids

if TYPE_CHECKING:
    from wmtp.evaluation.config import InferenceSpeed, Speculative

__all__ = ["InferenceSpeedEvaluator", "SpeculativeEvaluator", "prompts_of"]

_Result = TypeVar("_Result")

#: bytes of a token in lists of Python's, and while they are made
_TOKEN_BYTES: Final = 64


class SpeculativeEvaluator(Evaluator):
    """Self-speculative against plain decoding of the same prompts and batches.

    Args:
        config: its settings.
    """

    def __init__(self, config: Speculative) -> None:
        self._config = config

    def evaluate(self, measured: Measured) -> Mapping[str, Estimate]:
        """See `Evaluator.evaluate`.

        Returns:
            ``acceptance_head_k``: of the drafts of head k that were reached, the share that was accepted;
            ``tokens_per_forward``; ``speedup``: seconds of plain decoding by seconds of speculative decoding;
            ``speedup_over_transformers``: the same against the model's own ``generate`` of transformers, greedy only;
            ``identical``: the share of prompts with the same text, greedy only.
        """
        config, model = self._config, measured.model
        if model.horizon == 1:
            raise ConfigError("eval: 'speculative' needs extra heads, and this model has none (H = 1)")
        sampling = Sampling(temperature=config.temperature, top_p=config.top_p, seed=measured.seed)
        prompts = prompts_of(measured, config.prompts, config.max_new_tokens)
        batches = [prompts[start : start + config.batch_size] for start in range(0, len(prompts), config.batch_size)]

        ends = end_ids(model.base, measured.tokenizer)

        drafting = config.drafts or True

        def decode(batch: Sequence[list[int]], speculative: bool | int) -> list[Generation]:
            with measured.autocast():
                return generate(
                    model, batch, max_new_tokens=config.max_new_tokens, eos_id=ends,
                    speculative=speculative, sampling=sampling,
                )  # fmt: skip

        for speculative in (False, drafting):
            decode(batches[0], speculative)  # the first call compiles, allocates, and reads the weights
        plain_seconds, seconds, their_seconds = [], [], []
        plain_rows: list[Generation] = []
        rows: list[Generation] = []
        for batch in batches:
            plain, took = _timed(measured, lambda batch=batch: decode(batch, False))
            plain_rows += plain
            plain_seconds.append(took)
            drafted, took = _timed(measured, lambda batch=batch: decode(batch, drafting))
            rows += drafted
            seconds.append(took)
            if sampling.greedy:
                their_seconds.append(_timed(measured, lambda batch=batch: _theirs(measured, batch, config.max_new_tokens))[1])
        by_prompt = Bootstrap(len(rows), "prompts", measured.seed)
        by_batch = Bootstrap(len(batches), f"batches of {config.batch_size}", measured.seed)
        results = {}
        for k in range(2, (config.drafts or model.horizon - 1) + 2):
            tested, accepted = ([getattr(row.drafts, name)[k - 2] for row in rows] for name in ("tested", "accepted"))
            if sum(tested):
                results[f"acceptance_head_{k}"] = by_prompt.ratio(accepted, tested)
        # the prompt's own pass gives the first token in either way of decoding
        results["tokens_per_forward"] = by_prompt.ratio(
            [len(row.tokens) - 1 for row in rows], [row.drafts.steps for row in rows]
        )
        results["speedup"] = by_batch.ratio(plain_seconds, seconds)
        if sampling.greedy:
            results["speedup_over_transformers"] = by_batch.ratio(their_seconds, seconds)
            same = [float(a.tokens == b.tokens) for a, b in zip(plain_rows, rows, strict=True)]
            results["identical"] = by_prompt.ratio(same)
        return results


class InferenceSpeedEvaluator(Evaluator):
    """Tokens per second, without speculation, and memory.

    Args:
        config: its settings.
    """

    def __init__(self, config: InferenceSpeed) -> None:
        self._config = config

    def evaluate(self, measured: Measured) -> Mapping[str, Estimate | float]:
        """See `Evaluator.evaluate`.

        Returns:
            ``prefill_tokens_per_second``: of reading prompts; ``decode_tokens_per_second``: of new tokens after that, by this
            project's decoding; ``peak_memory_mb``: of the device (CUDA), or of the process.
        """
        config, model = self._config, measured.model
        longest = model.max_positions
        if longest is not None and config.prompt_length + config.new_tokens > longest:
            raise ConfigError(
                f"eval: inference-speed: prompt_length + new_tokens = {config.prompt_length + config.new_tokens}, and the model"
                f" has {longest} positions; write less"
            )
        rows, length = config.batch_size, config.prompt_length + config.new_tokens
        check_memory("tokens", _TOKEN_BYTES * rows * length, rows, length, torch.device("cpu"))
        ids = (torch.arange(config.batch_size * config.prompt_length) * 7919 + measured.seed).remainder(
            measured.tokenizer.vocab_size
        )
        prompts = ids.view(config.batch_size, -1).tolist()

        def decode(count: int) -> tuple[float, float]:
            """Time the first token, and those after it, in seconds."""
            known: list[float] = []
            started = time.perf_counter()
            with measured.autocast():
                # asked after every token of every row, when the device is done with it
                generate(
                    model, prompts, max_new_tokens=count, eos_id=None, stop=lambda _: bool(known.append(time.perf_counter()))
                )
            return known[0] - started, known[-1] - known[0]

        if measured.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(measured.device)
        decode(2)
        seconds = [decode(config.new_tokens) for _ in range(config.repeats)]
        bootstrap = Bootstrap(config.repeats, "repetitions", measured.seed)
        read = [config.batch_size * config.prompt_length] * config.repeats
        new = [config.batch_size * (config.new_tokens - 1)] * config.repeats
        return {
            "prefill_tokens_per_second": bootstrap.ratio(read, [first for first, _ in seconds]),
            "decode_tokens_per_second": bootstrap.ratio(new, [rest for _, rest in seconds]),
            "peak_memory_mb": _peak_memory(measured.device),
        }


def _timed(measured: Measured, action: Callable[[], _Result]) -> tuple[_Result, float]:
    """Run ``action``, and time it until the device is done."""
    wait = torch.cuda.synchronize if measured.device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    result = action()
    wait()
    return result, time.perf_counter() - started


def prompts_of(measured: Measured, count: int, new_tokens: int) -> list[list[int]]:
    """Take prompts from the evaluation data.

    A prompt is the text before the first token to learn, or a third of a plain text. Those that leave no room for
    ``new_tokens`` are left out.

    Raises:
        ConfigError: there is none.
    """
    longest = (measured.model.max_positions or 2**62) - new_tokens
    prompts: list[list[int]] = []
    for prompt in _prompts(measured):
        if 0 < len(prompt) <= longest:
            prompts.append(prompt)
        if len(prompts) == count:
            break
    if not prompts:
        raise ConfigError(
            f"no document of [data.eval] leaves room for {new_tokens} new tokens in the model's {measured.model.max_positions} "
            "positions; ask for fewer"
        )
    return prompts


def _prompts(measured: Measured) -> Iterator[list[int]]:
    for batch in measured.batches:
        for row, documents in zip(batch.input_ids.tolist(), batch.document.tolist(), strict=True):
            for number in dict.fromkeys(documents):
                if number == PADDING or batch.documents[number].start > 0:
                    continue
                places = [place for place, other in enumerate(documents) if other == number]
                learn = batch.loss_mask[batch.document == number]
                first = int(learn.int().argmax())
                yield [row[place] for place in places[: first if first > 1 else len(places) // 3 + 1]]


@torch.no_grad()
def _theirs(measured: Measured, prompts: Sequence[list[int]], new_tokens: int) -> None:
    """Generate the same with transformers, to compare its time."""
    eos, longest = measured.tokenizer.eos_id, max(map(len, prompts))
    ends = end_ids(measured.model.base, measured.tokenizer)
    ids = torch.tensor([[eos] * (longest - len(prompt)) + prompt for prompt in prompts], device=measured.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=measured.device)
    settings = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": ends, "pad_token_id": eos}
    with measured.autocast():
        measured.model.base.generate(ids, attention_mask=mask, **settings)  # type: ignore[operator]


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**10 if sys.platform != "darwin" else 2**20)
