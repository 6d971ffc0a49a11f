"""Evaluator pass-at-k: correctness of code that the model writes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from attrs import frozen

from wmtp.cores import usable_cores
from wmtp.errors import WMTPError
from wmtp.evaluation.base import Estimate, Evaluator, Measured
from wmtp.evaluation.bootstrap import Bootstrap
from wmtp.evaluation.consent import require_consent
from wmtp.evaluation.problems import Problem, code_contests, human_eval, mbpp
from wmtp.evaluation.samples import SampleFile, model_fingerprint
from wmtp.generation import Sampling
from wmtp.generation.text import encode_prompt, generate_texts
from wmtp.sandbox import Limits, Outcome, Sandbox
from wmtp.storage.atomic import replace_text

if TYPE_CHECKING:
    from wmtp.evaluation.config import PassAtK

__all__ = ["PassAtKEvaluator", "pass_at_k"]

logger = logging.getLogger("wmtp")


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Estimate pass@k without bias (arXiv 2107.03374, equation 1).

    It is 1 − C(n−c, k) / C(n, k).

    Args:
        samples: n ≥ k.
        passed: c.
        k: how many tries count.
    """
    if samples - passed < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(samples - passed + 1, samples + 1)))


@frozen(kw_only=True)
class _Job:
    """A completion to write."""

    problem: Problem
    row: int
    number: int


class PassAtKEvaluator(Evaluator):
    """Evaluator that runs ``samples`` solutions of each problem in a sandbox.

    Args:
        config: its settings.
    """

    def __init__(self, config: PassAtK) -> None:
        self._config = config
        self._settings = config.resolved()

    def prepare(self, fetch: Callable[[str, str], Path]) -> None:
        """Try the sandbox, and read the problems."""
        self._sandbox()
        self._problems(fetch)

    def evaluate(self, measured: Measured) -> Mapping[str, float | Estimate]:
        """See `Evaluator.evaluate`.

        Returns:
            ``pass_at_k`` for every k, over the problems; with several temperatures ``pass_at_k_T0.2`` and so on, and
            ``pass_at_k_best`` of the best one.
        """
        require_consent([self._config], measured.allow_code_execution)
        settings = self._settings
        sandbox = self._sandbox()
        logger.info("pass-at-k: isolation in force: %s", sandbox.describe())
        problems = self._problems(measured.fetch)
        results: dict[str, float | Estimate] = {}
        for temperature in settings.temperatures:
            folder = self._folder(measured, temperature)
            samples = self._samples(measured, problems, temperature, folder)
            outcomes = self._score(sandbox, problems, samples, folder)
            passed = {problem.id: sum(outcomes[problem.id, n].passed for n in range(settings.samples)) for problem in problems}
            suffix = f"_T{temperature:g}" if len(settings.temperatures) > 1 else ""
            bootstrap = Bootstrap(len(problems), "problems", measured.seed)
            for k in settings.k:
                each = [pass_at_k(settings.samples, passed[problem.id], k) for problem in problems]
                results[f"pass_at_{k}{suffix}"] = bootstrap.ratio(each)
        if len(settings.temperatures) > 1:
            for k in settings.k:
                ours = [results[f"pass_at_{k}_T{temperature:g}"] for temperature in settings.temperatures]
                results[f"pass_at_{k}_best"] = max(ours, key=float)
        return results

    def _sandbox(self) -> Sandbox:
        limits = Limits(seconds=self._config.timeout, memory_mb=self._config.memory_mb)
        return Sandbox(limits, isolation=self._config.isolation)

    def _problems(self, fetch: Callable[[str, str], Path]) -> list[Problem]:
        config = self._config
        path = None if config.uri is None else fetch(config.uri, "eval.uri")
        match config.dataset:
            case "humaneval":
                problems = human_eval(path)
            case "mbpp":
                problems = mbpp(_given(path), split=config.split, shots=config.shots)
            case _:
                problems = code_contests(_given(path), split=config.split, max_tests=config.max_tests)
        if not problems:
            raise WMTPError(f"{path or config.dataset}: holds no problem")
        return problems[: config.max_problems]

    def _folder(self, measured: Measured, temperature: float) -> Path | None:
        if measured.output_dir is None:
            return None
        shots = f"-{self._config.shots}-shot" if self._config.dataset == "mbpp" else ""
        return measured.output_dir / f"{self._config.dataset}{shots}-T{temperature:g}-n{self._settings.samples}"

    def _samples(
        self, measured: Measured, problems: Sequence[Problem], temperature: float, folder: Path | None
    ) -> Mapping[tuple[str, int], str]:
        settings, config = self._settings, self._config
        key = {
            "model": model_fingerprint(measured.model, measured.tokenizer),
            "model_name": type(measured.model.base).__name__,
            "dataset": config.dataset,
            "temperature": temperature,
            "top_p": settings.top_p,
            "max_new_tokens": settings.max_new_tokens,
            "seed": measured.seed,
        }
        file = None if folder is None else SampleFile(folder, key, {problem.id: problem.prompt for problem in problems})
        samples: dict[tuple[str, int], str] = dict(file.samples) if file is not None else {}
        known = len(samples)
        jobs = [
            _Job(problem=problem, row=index * 1_000_000 + number, number=number)
            for index, problem in enumerate(problems)
            for number in range(settings.samples)
            if (problem.id, number) not in samples
        ]
        if known and jobs:
            logger.info("pass-at-k: %d completions are there already; %d are still to write", known, len(jobs))
        sampling = Sampling(temperature=temperature, top_p=settings.top_p if temperature else 1.0, seed=measured.seed)
        for done, batch in self._written(measured, jobs, sampling):
            samples |= {(task, number): text for task, number, text in batch}
            if file is not None:
                file.add(batch)
            logger.info("pass-at-k: T = %g: %d of %d completions", temperature, known + done, known + len(jobs))
        return samples

    def _written(
        self, measured: Measured, jobs: Sequence[_Job], sampling: Sampling
    ) -> Iterator[tuple[int, list[tuple[str, int, str]]]]:
        """Completions, batch by batch, and how many there are by then."""
        settings, model = self._settings, measured.model
        longest = model.max_positions or 2**62
        fits, too_long = [], []
        for job in jobs:
            (fits if len(encode_prompt(measured.tokenizer, job.problem.prompt)) < longest else too_long).append(job)
        if too_long:
            names = sorted({job.problem.id for job in too_long})
            logger.warning(
                "pass-at-k: %d prompts are longer than the model's context of %d, and count as failed", len(names), longest
            )
            yield len(too_long), [(job.problem.id, job.number, "") for job in too_long]
        for start in range(0, len(fits), self._config.batch_size):
            batch = fits[start : start + self._config.batch_size]
            with measured.autocast():
                rows = generate_texts(
                    model,
                    measured.tokenizer,
                    [job.problem.prompt for job in batch],
                    max_new_tokens=settings.max_new_tokens,
                    sampling=sampling,
                    rows=[job.row for job in batch],
                    stop=batch[0].problem.stop,
                    speculative=self._config.speculative,
                )
            texts = [(job.problem.id, job.number, str(row)) for job, row in zip(batch, rows, strict=True)]
            yield len(too_long) + start + len(batch), texts

    def _score(
        self, sandbox: Sandbox, problems: Sequence[Problem], samples: Mapping[tuple[str, int], str], folder: Path | None
    ) -> Mapping[tuple[str, int], Outcome]:
        keys = [(problem, number) for problem in problems for number in range(self._settings.samples)]
        with ThreadPoolExecutor(self._config.workers or usable_cores()) as pool:
            found = list(pool.map(lambda key: key[0].score(sandbox, samples[key[0].id, key[1]]), keys))
        outcomes = {(problem.id, number): outcome for (problem, number), outcome in zip(keys, found, strict=True)}
        if folder is not None:
            lines = [
                json.dumps({"task_id": task, "sample": number, "passed": outcome.passed, "result": outcome.detail})
                for (task, number), outcome in outcomes.items()
            ]
            replace_text(folder / "results.jsonl", "".join(f"{line}\n" for line in lines))
        return outcomes


def _given(path: Path | None) -> Path:
    if path is None:
        raise ValueError("the config's check() asks for a uri")
    return path
