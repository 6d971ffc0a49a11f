"""Config classes of the built-in evaluators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, Literal

from attrs import field, frozen
from attrs.validators import deep_iterable, ge, gt, le, min_len, optional

from wmtp.plugins.components import idle_keys
from wmtp.plugins.contract import EvaluatorConfig

if TYPE_CHECKING:
    from wmtp.evaluation.base import Evaluator

__all__ = ["InferenceSpeed", "LmEval", "PassAtK", "PassAtKSettings", "Perplexity", "Speculative", "TokenAccuracy"]


@frozen(kw_only=True)
class Perplexity(EvaluatorConfig):
    """Perplexity of every head: exp of its mean token loss on ``[data.eval]``.

    Only valid predictions count. ``evaluation-details.json`` also has it by the predicted token's place in its document and by
    how common it is.
    """

    type = "perplexity"
    needs_eval_data = True

    def build(self) -> Evaluator:
        """Make the evaluator."""
        from wmtp.evaluation.perplexity import PerplexityEvaluator

        return PerplexityEvaluator()


@frozen(kw_only=True)
class TokenAccuracy(EvaluatorConfig):
    """Share of predictions whose most probable token is right, by head.

    Measured on ``[data.eval]``. Only valid predictions count. ``evaluation-details.json`` also has it by the predicted token's
    place in its document and by how common it is.
    """

    type = "token-accuracy"
    needs_eval_data = True

    def build(self) -> Evaluator:
        """Make the evaluator."""
        from wmtp.evaluation.perplexity import TokenAccuracyEvaluator

        return TokenAccuracyEvaluator()


@frozen(kw_only=True)
class Speculative(EvaluatorConfig):
    """Self-speculative decoding: accepted drafts, tokens per forward pass, speed-up.

    Prompts are from ``[data.eval]``.

    Args:
        prompts: number of prompts.
        batch_size: prompts that are decoded together, with and without speculation.
        max_new_tokens: new tokens of each prompt.
        temperature: 0 is greedy.
        top_p: of nucleus sampling.
        drafts: number of the first heads that draft. Default: all of heads 2..H.
    """

    type = "speculative"
    one_process = True
    needs_eval_data = True
    prompts: int = field(default=16, validator=ge(1))
    batch_size: int = field(default=1, validator=ge(1))
    max_new_tokens: int = field(default=128, validator=ge(2))
    temperature: float = field(default=0.0, validator=ge(0.0))
    top_p: float = field(default=1.0, validator=[gt(0.0), le(1.0)])
    drafts: int | None = field(default=None, validator=optional(ge(1)))

    @property
    def needs_extra_heads(self) -> int:  # type: ignore[override]
        """With ``drafts`` so many."""
        return self.drafts or 1

    @property
    def needed_positions(self) -> int:  # type: ignore[override]
        """Of the model, for a prompt of one token."""
        return 1 + self.max_new_tokens

    def check(self) -> Iterator[str]:
        """Name the keys that others leave without effect."""
        if self.temperature == 0.0:
            yield from idle_keys(self, ("top_p",), "temperature = 0 is greedy")

    def build(self) -> Evaluator:
        """Make the evaluator."""
        from wmtp.evaluation.decoding import SpeculativeEvaluator

        return SpeculativeEvaluator(self)


@frozen(kw_only=True)
class InferenceSpeed(EvaluatorConfig):
    """Tokens per second of prompt reading and of plain decoding, and memory.

    Args:
        batch_size: prompts at once.
        prompt_length: tokens of a prompt.
        new_tokens: decoded after it.
        repeats: measurements.
    """

    type = "inference-speed"
    one_process = True
    batch_size: int = field(default=1, validator=ge(1))
    prompt_length: int = field(default=128, validator=ge(1))
    new_tokens: int = field(default=64, validator=ge(2))
    repeats: int = field(default=5, validator=ge(1))

    @property
    def needed_positions(self) -> int:  # type: ignore[override]
        """Of the model."""
        return self.prompt_length + self.new_tokens

    def build(self) -> Evaluator:
        """Make the evaluator."""
        from wmtp.evaluation.decoding import InferenceSpeedEvaluator

        return InferenceSpeedEvaluator(self)


@frozen(kw_only=True)
class PassAtKSettings:
    """Settings that a preset decides.

    Args:
        samples: n.
        temperatures: each gets n samples.
        top_p: of nucleus sampling.
        k: of pass@k.
        max_new_tokens: of a completion.
    """

    samples: int
    temperatures: tuple[float, ...]
    top_p: float
    k: tuple[int, ...]
    max_new_tokens: int


_PRESETS: Final = {
    "greedy": PassAtKSettings(samples=1, temperatures=(0.0,), top_p=1.0, k=(1,), max_new_tokens=512),
    "human-eval": PassAtKSettings(samples=200, temperatures=(0.2, 0.8), top_p=0.95, k=(1, 10, 100), max_new_tokens=512),
    "meta-mtp": PassAtKSettings(
        samples=1000, temperatures=(0.5, 0.6, 0.7, 0.8, 0.9), top_p=0.95, k=(1, 10, 100), max_new_tokens=512
    ),
}


@frozen(kw_only=True)
class PassAtK(EvaluatorConfig):
    """pass@k: the share of problems that one of k solutions solves.

    Programming problems, by the unbiased estimate over n samples. Solutions are code that the model wrote. They run only if you
    say ``--allow-code-execution``, each in a sandbox.

    Args:
        dataset: ``humaneval``, ``mbpp`` or ``code-contests``.
        uri: its files. Default for ``humaneval``: those of the package ``human-eval``.
        split: of ``mbpp`` and ``code-contests``: ``test``, ``validation`` or ``train``, of which a folder's files tell it.
        shots: of ``mbpp``: 3 is the prompt of its paper, 0 a docstring of task and tests.
        max_problems: use the first problems only. Default: all.
        max_tests: of ``code-contests``: maximum number of tests a problem. Default: all.
        preset: settings named after whom they compare with: ``greedy`` (n = 1, T = 0), ``human-eval`` (arXiv
            2107.03374: n = 200, T = 0.2 and 0.8, top-p 0.95) or ``meta-mtp`` (arXiv 2404.19737, appendix F: n = 1000, T from
            0.5 to 0.9, the best one for each k). The keys below take precedence over it.
        samples: n, solutions of a problem.
        temperatures: each gets n samples; 0 is greedy.
        top_p: of nucleus sampling.
        k: of pass@k; none above n.
        max_new_tokens: of a solution.
        batch_size: solutions that are written together.
        speculative: whether heads 2..H draft; a number: so many of the first of them.
        timeout: seconds for a solution and its tests.
        memory_mb: address space of a solution's process.
        workers: sandboxes at once. Default: the number of processors.
        isolation: ``auto`` needs Linux namespaces; ``process`` sets limits only, which a hostile solution can get around.
    """

    type = "pass-at-k"
    one_process = True
    executes_code = True
    dataset: Literal["humaneval", "mbpp", "code-contests"] = "humaneval"
    uri: str | None = None
    split: Literal["train", "validation", "test"] = "test"
    shots: Literal[0, 3] = 3
    max_problems: int | None = field(default=None, validator=optional(ge(1)))
    max_tests: int | None = field(default=None, validator=optional(ge(1)))
    preset: Literal["greedy", "human-eval", "meta-mtp"] = "greedy"
    samples: int | None = field(default=None, validator=optional(ge(1)))
    temperatures: tuple[float, ...] | None = field(default=None, validator=optional([min_len(1), deep_iterable(ge(0.0))]))
    top_p: float | None = field(default=None, validator=optional([gt(0.0), le(1.0)]))
    k: tuple[int, ...] | None = field(default=None, validator=optional([min_len(1), deep_iterable(ge(1))]))
    max_new_tokens: int | None = field(default=None, validator=optional(ge(1)))
    batch_size: int = field(default=16, validator=ge(1))
    speculative: bool | int = field(default=False, validator=ge(0))
    timeout: float = field(default=10.0, validator=[gt(0.0), le(1e6)])
    memory_mb: int = field(default=1024, validator=ge(64))
    workers: int | None = field(default=None, validator=optional(ge(1)))
    isolation: Literal["auto", "process"] = "auto"

    @property
    def needs_extra_heads(self) -> int:  # type: ignore[override]
        """With ``speculative``, a number of them."""
        return int(self.speculative)

    def resolved(self) -> PassAtKSettings:
        """Combine the preset with the keys that are given."""
        preset = _PRESETS[self.preset]
        samples = self.samples if self.samples is not None else preset.samples
        return PassAtKSettings(
            samples=samples,
            temperatures=self.temperatures if self.temperatures is not None else preset.temperatures,
            top_p=self.top_p if self.top_p is not None else preset.top_p,
            k=self.k if self.k is not None else tuple(k for k in preset.k if k <= samples),
            max_new_tokens=self.max_new_tokens if self.max_new_tokens is not None else preset.max_new_tokens,
        )

    def check(self) -> Iterator[str]:
        """Report contradictions between keys."""
        settings = self.resolved()
        if self.uri is None and self.dataset != "humaneval":
            yield f"uri: required for the data set '{self.dataset}': say where its files are"
        if max(settings.k, default=0) > settings.samples:
            yield f"k: {max(settings.k)} is more than the {settings.samples} samples of a problem; raise samples"
        if settings.samples > 1 and 0.0 in settings.temperatures:
            yield f"temperatures: 0 gives {settings.samples} times the same solution; write samples = 1 or other ones"
        if self.dataset != "mbpp":
            yield from idle_keys(self, ("shots",), "only the data set 'mbpp' has it")
        if self.dataset == "humaneval":
            yield from idle_keys(self, ("split",), "HumanEval has one")
        if self.dataset != "code-contests":
            yield from idle_keys(self, ("max_tests",), "only the data set 'code-contests' has it")
        if not any(settings.temperatures):
            yield from idle_keys(self, ("top_p",), "temperature 0 is greedy")

    def build(self) -> Evaluator:
        """Make the evaluator."""
        from wmtp.evaluation.pass_at_k import PassAtKEvaluator

        return PassAtKEvaluator(self)


@frozen(kw_only=True)
class LmEval(EvaluatorConfig):
    """Tasks of lm-evaluation-harness, by head 1 of the model. Needs ``wmtp-core[lm-eval]``.

    Scores are those of the harness, with its seeds. Tasks that run code which the model wrote are refused: ``pass-at-k`` has a
    sandbox. A folder of your own tasks may bring Python functions, which run.

    Args:
        tasks: names of tasks, groups or tags, as ``hellaswag``; or ``.yaml`` files of single tasks.
        uri: a folder with further tasks in ``.yaml`` files.
        num_fewshot: examples before each question. Default: what the task says.
        limit: measure the first examples of each task only.
        batch_size: requests that are computed together.
        max_length: tokens of context and answer together; longer contexts lose their beginning. Default: the model's positions,
            2048 where it has no limit.
        chat_template: ask by the model's chat template, examples as turns before.
        speculative: whether heads 2..H draft where tasks let the model write; a number: so many of the first of them.
    """

    type = "lm-eval"
    one_process = True
    needs_packages = {"lm_eval": "wmtp-core[lm-eval]"}  # noqa: RUF012
    tasks: tuple[str, ...] = field(validator=min_len(1))
    uri: str | None = None
    num_fewshot: int | None = field(default=None, validator=optional(ge(0)))
    limit: int | None = field(default=None, validator=optional(ge(1)))
    batch_size: int = field(default=8, validator=ge(1))
    max_length: int | None = field(default=None, validator=optional(ge(2)))
    chat_template: bool = False
    speculative: bool | int = field(default=False, validator=ge(0))

    @property
    def needs_extra_heads(self) -> int:  # type: ignore[override]
        """With ``speculative``, a number of them."""
        return int(self.speculative)

    @property
    def needed_positions(self) -> int:  # type: ignore[override]
        """Of the model, with ``max_length``."""
        return self.max_length or 0

    def build(self) -> Evaluator:
        """Make the evaluator."""
        from wmtp.evaluation.lm_eval import LmEvalEvaluator

        return LmEvalEvaluator(self)
