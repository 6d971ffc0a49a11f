"""Evaluator lm-eval: tasks of lm-evaluation-harness, asked of head 1."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from attrs import frozen
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from wmtp.errors import ConfigError, WMTPError, described
from wmtp.evaluation.base import Estimate, Evaluator, Measured
from wmtp.generation import Sampling
from wmtp.generation.text import chat_ends, encode_prompt, generate_texts
from wmtp.models.ends import end_ids
from wmtp.spelling import did_you_mean
from wmtp.tokenizers.chat_template import ChatTemplate

if TYPE_CHECKING:
    from wmtp.evaluation.config import LmEval

__all__ = ["LmEvalEvaluator"]

#: tokens of a context where neither model nor config has a limit, and of an answer where the task has none; the harness's own
_CONTEXT: Final = 2048
_ANSWER: Final = 256
#: what a task may ask of generation; the first three are names of one thing
_LENGTHS: Final = ("max_gen_toks", "max_new_tokens", "max_tokens")
_GENERATION: Final = ("until", "do_sample", "temperature", "top_p", *_LENGTHS)
#: half of a 95 % interval, in standard errors
_NORMAL: Final = 1.96


class LmEvalEvaluator(Evaluator):
    """Has lm-evaluation-harness ask its tasks, and returns its numbers.

    Args:
        config: its settings.
    """

    def __init__(self, config: LmEval) -> None:
        self._config = config

    def prepare(self, fetch: Callable[[str, str], Path]) -> None:
        """Look for the tasks."""
        self._manager(fetch)

    def evaluate(self, measured: Measured) -> Mapping[str, float | Estimate]:
        """See `Evaluator.evaluate`.

        Returns:
            ``TASK_METRIC``, as ``hellaswag_acc_norm``, of tasks and of groups that compute one; ``TASK/METRIC`` of tasks in a
            group. A metric behind a filter has its name too: ``gsm8k_exact_match_strict-match``.
        """
        config, positions = self._config, measured.model.max_positions
        if config.max_length is not None and positions is not None and config.max_length > positions:
            raise ConfigError(f"eval.max_length: {config.max_length}, but the model has positions for {positions} tokens")
        with _kept_state(measured.device):
            manager = self._manager(measured.fetch)
            try:
                found = simple_evaluate(
                    model=_Model(measured, config),
                    tasks=list(config.tasks),
                    task_manager=manager,
                    num_fewshot=config.num_fewshot,
                    limit=config.limit,
                    apply_chat_template=config.chat_template,
                    fewshot_as_multiturn=config.chat_template,
                    bootstrap_iters=1000,
                    log_samples=False,
                )
            except (WMTPError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # data that is not at hand, a damaged task: of any type
                raise WMTPError(f"lm-eval: {', '.join(config.tasks)}: {described(error)}") from error
        return dict(_numbers(found))  # type: ignore[arg-type]

    def _manager(self, fetch: Callable[[str, str], Path]) -> TaskManager:
        uri = self._config.uri
        manager = TaskManager(include_path=None if uri is None else str(fetch(uri, "eval.uri")))
        _check_names(self._config.tasks, manager)
        return manager


def _check_names(tasks: Sequence[str], manager: TaskManager) -> None:
    for task in tasks:
        if not (manager.match_tasks([task]) or (Path(task).suffix == ".yaml" and Path(task).is_file())):
            hint = did_you_mean(task, manager.all_tasks) or "`lm-eval ls tasks` lists those that there are"
            raise ConfigError(f"lm-eval: there is no task {task!r}; {hint}")


@contextmanager
def _kept_state(device: torch.device) -> Iterator[None]:
    """Restore on exit what the harness sets for the whole process.

    Seeds of all generators, and its logger's level; meanwhile it starts no processes.
    """
    ours, theirs, before = random.getstate(), np.random.get_state(), os.environ.get("DISABLE_MULTIPROC")
    level = logging.getLogger("lm_eval").level
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(ours)
        np.random.set_state(theirs)
        logging.getLogger("lm_eval").setLevel(level)
        os.environ.pop("DISABLE_MULTIPROC")
        if before is not None:
            os.environ["DISABLE_MULTIPROC"] = before


def _numbers(found: Mapping[str, Any]) -> Iterator[tuple[str, float | Estimate]]:
    """Name the numbers, those of a group's tasks as details."""
    within = {task for tasks in found.get("group_subtasks", {}).values() for task in tasks}
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            name = f"{task}{'/' if task in within else '_'}{metric}{'' if filtered == 'none' else f'_{filtered}'}"
            error = values.get(f"{metric}_stderr,{filtered}")
            size = found.get("n-samples", {}).get(task, {}).get("effective")
            if not isinstance(error, int | float) or size is None:
                yield name, float(value)
                continue
            reach = _NORMAL * float(error)
            yield name, Estimate(value=float(value), low=value - reach, high=value + reach, n=int(size), unit="examples")


@frozen(kw_only=True)
class _Scored:
    """A continuation whose probability is asked for.

    Args:
        ids: of context and continuation, without the last one, which predicts nothing.
        answer: ids of the continuation.
    """

    ids: Sequence[int]
    answer: Sequence[int]


class _Model(TemplateLM):
    """Adapter that gives head 1 and its tokenizer to the harness."""

    def __init__(self, measured: Measured, config: LmEval) -> None:
        super().__init__()
        self._measured = measured
        self._config = config
        self.max_length = config.max_length or measured.model.max_positions or _CONTEXT

    @property
    def eot_token_id(self) -> int:
        """End token of the tokenizer."""
        return self._measured.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Token before an empty context: the begin token, else the end token."""
        begin = self._measured.tokenizer.bos_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """Fingerprint of the tokenizer."""
        return self._measured.tokenizer.fingerprint()

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the tokenizer's own template."""
        template = self._measured.tokenizer.chat_template
        return template if isinstance(template, str) else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Write a conversation by the tokenizer's template."""
        tokenizer = self._measured.tokenizer
        if tokenizer.chat_template is None:
            raise WMTPError("lm-eval: chat_template = true, and the model's tokenizer has no chat template; remove the key")
        template = ChatTemplate(source=tokenizer.chat_template, special_tokens=tokenizer.special_tokens)
        return template.render(chat_history, None, prompt=add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Encode as training does, with the begin token if there is one."""
        tokenizer = self._measured.tokenizer
        return tokenizer.encode_first(string) if add_special_tokens is False else encode_prompt(tokenizer, string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log probability, and whether it is greedy.

        It is where each of its tokens is the most probable one.
        """
        jobs = []
        for _text, context, answer in requests:
            if len(answer) > self.max_length:
                raise WMTPError(f"lm-eval: a continuation has {len(answer)} tokens, max_length is {self.max_length}; raise it")
            jobs.append(_Scored(ids=[*context, *answer][-(self.max_length + 1) :][:-1], answer=answer))
        order = sorted(range(len(jobs)), key=lambda number: -len(jobs[number].ids))
        results: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(order), self._config.batch_size):
            numbers = order[start : start + self._config.batch_size]
            results |= zip(numbers, self._score([jobs[number] for number in numbers]), strict=True)
        return [results[number] for number in range(len(jobs))]

    @torch.no_grad()
    def _score(self, jobs: Sequence[_Scored]) -> Iterator[tuple[float, bool]]:
        model, device = self._measured.model, self._measured.device
        ids = torch.full((len(jobs), len(jobs[0].ids)), self.eot_token_id)
        for row, job in enumerate(jobs):  # padded behind, where causal attention never looks
            ids[row, : len(job.ids)] = torch.tensor(job.ids)
        with self._measured.autocast():
            hidden = model(ids.to(device)).hidden[0]
        for row, job in enumerate(jobs):
            end = len(job.ids)
            with self._measured.autocast():
                logits = model.unembedding(1).logits(hidden[row, end - len(job.answer) : end])
            wanted = torch.tensor(job.answer, device=device)
            chances = logits.float().log_softmax(-1).gather(1, wanted[:, None]).sum()
            yield float(chances), bool((logits.argmax(-1) == wanted).all())

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return each text's log probability, over windows of disjoint predictions."""
        results = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            results.append(sum(chance for chance, _ in self._loglikelihood_tokens(parts)))
        return results

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Write a text for each request, those with the same settings together."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        results: dict[int, str] = {}
        for members in groups.values():
            settings = requests[members[0]].args[1]
            size = self._config.batch_size
            for start in range(0, len(members), size):
                numbers = members[start : start + size]
                results |= zip(numbers, self._write([requests[number].args[0] for number in numbers], settings), strict=True)
        return [results[number] for number in range(len(requests))]

    def _write(self, contexts: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
        measured = self._measured
        if unknown := sorted(settings.keys() - set(_GENERATION)):
            raise WMTPError(f"lm-eval: a task asks for generation with {', '.join(unknown)}, which WMTP does not have")
        longest = next((int(settings[key]) for key in _LENGTHS if key in settings), _ANSWER)
        if longest >= self.max_length:
            raise WMTPError(f"lm-eval: a task asks for {longest} new tokens, max_length is {self.max_length}")
        until = settings.get("until") or []
        temperature = float(settings.get("temperature", 1.0 if settings.get("do_sample") else 0.0))
        ends = (chat_ends if self._config.chat_template else _text_ends)(measured.model, measured.tokenizer)
        with measured.autocast():
            texts = generate_texts(
                measured.model,
                measured.tokenizer,
                [self.tok_encode(context)[-(self.max_length - longest) :] for context in contexts],
                max_new_tokens=longest,
                speculative=self._config.speculative,
                sampling=Sampling(
                    temperature=temperature if settings.get("do_sample", temperature > 0) else 0.0,
                    top_p=float(settings.get("top_p", 1.0)),
                    seed=measured.seed,
                ),
                stop=[word for word in ([until] if isinstance(until, str) else until) if word],
                ends=ends,
            )
        return [text.text or "" for text in texts]


def _text_ends(model: Any, tokenizer: Any) -> list[int]:
    return end_ids(model.base, tokenizer)
