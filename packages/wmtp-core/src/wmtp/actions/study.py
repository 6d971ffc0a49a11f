"""Run a study: train what is missing, compare what is done.

Imports no torch before a run begins.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from wmtp.actions.memory import outlook, time_outlook
from wmtp.actions.study_pool import Outcome, Pool, worker_environments
from wmtp.actions.study_result import StudyResult, left_line
from wmtp.config.load import ConfigSource, as_list
from wmtp.config.tree import dump_config
from wmtp.cores import check_memory_of_processes
from wmtp.errors import ConfigError
from wmtp.evaluation.consent import code_execution_allowed, require_consent
from wmtp.json_files import writing
from wmtp.log_lines import lines_by_itself
from wmtp.public import public
from wmtp.reporting.records import record_failure, record_of
from wmtp.storage.lock import FileLock
from wmtp.studies.config import load_study
from wmtp.studies.plan import PlannedRun, StudyPlan, make_plan
from wmtp.studies.record import RunRecord, changed_keys, of_plan, read_records, remove_record, write_record
from wmtp.studies.table import StudyTable, make_table

__all__ = ["study"]

logger = logging.getLogger("wmtp")


@public
def study(
    study: str | os.PathLike[str] | Mapping[str, Any],
    *,
    recipe: ConfigSource | Sequence[ConfigSource] | None = None,
    overrides: Iterable[str] = (),
    arms: Iterable[str] | None = None,
    seeds: Iterable[int] | None = None,
    jobs: int | None = None,
    retry: bool = False,
    dry_run: bool = False,
    minutes: float | None = None,
    allow_code_execution: bool = False,
) -> StudyResult:
    """Train a study's missing runs, and compare its arms.

    The same call continues where the last one ended: finished runs are skipped, interrupted ones resumed.

    Args:
        study: a study file, or a mapping of the same shape.
        recipe: what every arm begins with, in place of ``study.recipe``.
        overrides: ``KEY=VALUE`` texts, as for ``--set``, laid over every run.
        arms: only these, and what they need.
        seeds: only these, and what they need.
        jobs: in place of ``study.jobs``.
        retry: also run what failed before.
        dry_run: only say what would be done, in ``facts``.
        minutes: begin no run that could not be done after so long, going by those that are done; shorter ones still begin.
        allow_code_execution: as for `wmtp.run`.

    Raises:
        ConfigError: the study or an arm is wrong, or no run has a metric that it names.
        WMTPError: a record is damaged or cannot be written. A run that fails raises nothing: see `StudyResult.failed`.
        KeyboardInterrupt: Ctrl-C; runs that were being trained have saved a checkpoint.
    """
    with lines_by_itself():
        plan = make_plan(load_study(study), as_list(recipe), overrides)
        for warning in plan.warnings:
            logger.warning("%s", warning)
        chosen = plan.chosen(arms, seeds)
        if jobs is not None and jobs < 1:
            raise ConfigError(f"--jobs: {jobs} is not at least 1")
        if minutes is not None and not minutes >= 0:
            raise ConfigError(f"--minutes: {minutes} is no time; write a number of at least 0")
        allowed = allow_code_execution or code_execution_allowed()
        for run in chosen:
            require_consent(run.config.eval, allowed)
        session = _Session(plan, chosen, jobs=jobs, retry=retry, minutes=minutes, allow_code_execution=allowed)
        return session.outlook() if dry_run else session.run()


class _Session:
    """One call of `study`.

    Args:
        plan: of the whole study.
        chosen: the runs that this call is about.
        jobs: at once.
        retry: whether what failed is run again.
        minutes: see `study`.
        allow_code_execution: see `study`.
    """

    def __init__(
        self,
        plan: StudyPlan,
        chosen: Sequence[PlannedRun],
        *,
        jobs: int | None,
        retry: bool,
        minutes: float | None,
        allow_code_execution: bool,
    ) -> None:
        self._plan, self._chosen, self._retry = plan, chosen, retry
        self._jobs = jobs or plan.file.config.study.jobs
        self._jobs_key = "study.jobs" if jobs is None else "--jobs"
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        self._allow_code_execution = allow_code_execution
        self._records: dict[str, RunRecord] = {}
        self._failed: dict[str, str] = {}
        self._total = 0
        self._ended = 0
        self._lacks_time = False
        self._said_lacking = False

    # --- what is there

    def _read(self) -> list[PlannedRun]:
        """Read the records, and find the runs to do now.

        Raises:
            ConfigError: memory does not hold so many at once.
        """
        folder = self._plan.folder
        found = read_records(folder)
        self._records, left_behind = of_plan(found, self._plan.runs)
        for line in _left_behind(left_behind, len(self._records), self._plan.runs):
            logger.info("%s", line)
        for run in self._plan.runs:  # finished, and stopped before that was recorded
            if run.name not in self._records and (record := self._record(run)) is not None:
                self._records[run.name] = record
        self._failed = {
            record.name: record.error or "failed"
            for record in self._records.values()
            if not record.counts and not (self._retry and any(record.name == run.name for run in self._chosen))
        }
        todo = self._to_do()
        at_once = min(self._jobs, len(todo))
        check_memory_of_processes(f"{self._jobs_key}: {at_once} runs at once", at_once)
        return todo

    def _record(self, run: PlannedRun, seconds: float | None = None) -> RunRecord | None:
        run_dir = self._plan.folder / "runs" / run.name
        return record_of(run_dir, arm=run.arm, seed=run.seed, key=run.key, seconds=seconds)

    def _is_done(self, name: str) -> bool:
        return name in self._records and self._records[name].counts

    def _to_do(self) -> list[PlannedRun]:
        """Find the runs to do, with those whose models they need.

        The latter only where the model is not there.
        """
        todo = {run.name for run in self._chosen if run.name not in self._failed and not self._is_done(run.name)}
        for run in reversed(self._plan.runs):
            if run.name in todo:
                todo |= {name for name in run.needs if name not in self._failed and not self._has_model(name)}
        return [run for run in self._plan.runs if run.name in todo]

    def _has_model(self, name: str) -> bool:
        return (self._plan.folder / "runs" / name / "model").is_dir()

    def outlook(self) -> StudyResult:
        """Say what would be done."""
        todo = self._read()
        table = make_table(self._plan, self._records)
        facts = self._facts(todo)
        if table.lacking:
            facts["metrics"] = "; ".join(table.lacking)
        return self._result(table, [run.name for run in todo], facts)

    def _facts(self, todo: Sequence[PlannedRun]) -> dict[str, str]:
        done = sum(record.counts for record in self._records.values())
        tokens = [_tokens(run) for run in todo]
        known = [count for count in tokens if count is not None]
        facts = {
            "study": str(self._plan.folder),
            "arms": f"{len(self._plan.arms)}: {', '.join(arm.name for arm in self._plan.arms)}",
            "runs": f"{len(self._plan.runs)}; {done} done, {len(self._failed)} failed, {len(todo)} to do, {self._jobs} at once",
            "tokens": f"at most {sum(known):,}" if len(known) == len(tokens) else "not known before the data is read",
        }
        expected = [seconds for run in todo if (seconds := self._expected(run)) is not None]
        if todo and len(expected) == len(todo):
            facts["time"] = f"{sum(expected) / 3600 / self._jobs:.2f} hours, going by the runs that are done"
        elif todo:
            facts["time"] = self._time(todo)
        outlooks = {outlook(run.config)[0]["memory"] for run in self._plan.runs}
        facts["memory"] = " | ".join(sorted(outlooks)) if len(outlooks) <= 3 else max(outlooks, key=len)
        comparisons = [f"{arm.name} − {other.name} in {metric}" for arm, other, metric in self._plan.comparisons]
        facts["comparisons"] = "; ".join(comparisons) or "none is named: all are exploratory"
        if max(len(arm.seeds) for arm in self._plan.arms if arm.compared) == 1:
            facts["intervals"] = "none: every arm has one seed"
        return facts

    def _time(self, todo: Sequence[PlannedRun]) -> str:
        """Estimate the time of runs before one is done."""
        unmade = {
            str(self._plan.folder / "runs" / run.name / "model"): run.config.models["base"].loader for run in self._plan.runs
        }
        found = time_outlook([run.config for run in todo], unmade)
        if found is None:
            return "not known before a run is done"
        return f"{found}, one run after another, the training steps alone with full rows"

    def _expected(self, run: PlannedRun) -> float | None:
        """Estimate a run's seconds by the slowest run of its arm.

        Where its arm has none, by the slowest of all.
        """
        times = {name: one.seconds for name, one in self._records.items() if one.counts and one.seconds}
        own = [seconds for name, seconds in times.items() if self._records[name].arm == run.arm]
        return max(own or times.values(), default=None)

    # --- what is done

    def run(self) -> StudyResult:
        """Train, record and compare."""
        folder = self._plan.folder
        try:
            for name in ("runs", "configs", "logs", "record"):
                (folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"study.output_dir: cannot write to {error.filename or folder}: {error.strerror or error}"
            ) from None
        with _locked(folder):
            todo = self._read()
            for record in self._records.values():
                write_record(folder, record)
            counting = sum(record.counts for record in self._records.values())
            logger.info("%s: %d runs, %d done, %d to do", folder, len(self._plan.runs), counting, len(todo))
            self._total = len(todo)
            try:
                if todo:
                    self._train(todo)
            except KeyboardInterrupt:
                logger.info("%s", left_line(self._finish().left))
                raise
            for run in self._plan.runs:
                self._tidy(run.name)
            return self._finish()

    def _forget(self, run: PlannedRun) -> None:
        """Forget how a run ended that is now done again."""
        if (record := self._records.pop(run.name, None)) is None:
            return
        if record.counts:
            done = [other.name for other in self._plan.runs if run.name in other.needs and self._is_done(other.name)]
            earlier = f"; {_runs(done)} that {'is' if len(done) == 1 else 'are'} done had the earlier one, which may differ"
            logger.info("%s is trained again: others need its model, which is not here%s", run.name, earlier if done else "")
            shutil.rmtree(self._plan.folder / "runs" / run.name, ignore_errors=True)
        remove_record(self._plan.folder, run.name)

    def _train(self, todo: Sequence[PlannedRun]) -> None:
        Pool(
            todo,
            failed=self._failed,
            job=self._job,
            environments=worker_environments(min(self._jobs, len(todo))),
            done=self._done,
            may_begin=self._may_begin,
        ).run()

    def _job(self, run: PlannedRun) -> dict[str, Any]:
        folder = self._plan.folder
        config = folder / "configs" / f"{run.name}.toml"
        with writing(config):
            config.write_text(dump_config(run.config), encoding="utf-8")
        return {
            "config": str(config),
            "log": str(folder / "logs" / f"{run.name}.log"),
            "argv": sys.argv,
            "allow_code_execution": self._allow_code_execution,
        }

    def _may_begin(self, run: PlannedRun) -> bool:
        if self._end is None or time.monotonic() + (self._expected(run) or 0.0) <= self._end:
            self._forget(run)
            return True
        if not self._lacks_time:
            logger.info("--minutes: %s would not be done by then; what is shorter still begins", run.name)
        self._lacks_time = True
        return False

    def _done(self, outcome: Outcome) -> bool:
        """Record how a run ended; called by one thread at a time."""
        run, folder = outcome.run, self._plan.folder
        log = folder / "logs" / f"{run.name}.log"
        if outcome.status == "interrupted":
            logger.info("%s was interrupted", run.name)
            return False
        self._ended += 1
        counter = f"{self._ended}/{self._total}"
        if outcome.is_good:
            record = self._record(run, outcome.seconds)
            if record is None:
                outcome = Outcome(run=run, status="failed", error=f"it left no result; see {log}", seconds=outcome.seconds)
            else:
                self._records[run.name] = record
                write_record(folder, record)
                table = make_table(self._plan, self._records)
                shown = next((f", {name} {v:.4g}" for name in table.metrics if (v := record.value(name)) is not None), "")
                logger.info("%s %s: %s in %.0f s%s", counter, run.name, outcome.status, outcome.seconds, shown)
                if not self._said_lacking:  # once: an arm to come may have them
                    for line in table.lacking:
                        logger.warning("%s", line)
                        self._said_lacking = True
                for name in run.needs:
                    self._tidy(name)
                self._tidy(run.name)
                return True
        self._failed[run.name] = outcome.error or "failed"
        if outcome.status == "failed":
            self._records[run.name] = record_failure(run, outcome.error or "failed", outcome.seconds)
            write_record(folder, self._records[run.name])
        where = f"; its log: {log}" if outcome.status == "failed" else ""
        logger.warning("%s %s: %s: %s%s", counter, run.name, outcome.status, outcome.error, where)
        return True

    def _tidy(self, name: str) -> None:
        """Remove a finished run's model once no other run needs it.

        Only where the study says so.
        """
        record = self._records.get(name)
        if self._plan.file.config.study.keep_models or record is None or not record.counts:
            return
        if any(name in run.needs and not self._is_done(run.name) for run in self._plan.runs):
            return
        for part in ("model", "checkpoints"):
            shutil.rmtree(self._plan.folder / "runs" / name / part, ignore_errors=True)

    def _finish(self) -> StudyResult:
        from wmtp.reporting.study import write_study_report

        left = [run.name for run in self._chosen if run.name not in self._failed and not self._is_done(run.name)]
        counting = {name: record for name, record in self._records.items() if record.counts}
        table = make_table(self._plan, counting)
        result = self._result(table, left, {})
        result.to_csv(self._plan.folder / "table.csv")
        if counting:
            section, page = self._plan.file.config.study, self._plan.folder / "report.html"
            write_study_report(section.name, section.baseline, table, list(counting.values()), page)
        return result

    def _result(self, table: StudyTable, left: Sequence[str], facts: Mapping[str, str]) -> StudyResult:
        return StudyResult(
            folder=self._plan.folder,
            table=table,
            finished={name: record for name, record in self._records.items() if record.counts},
            failed=dict(self._failed),
            left=tuple(left),
            facts=facts,
        )


def _left_behind(records: Sequence[RunRecord], still: int, runs: Sequence[PlannedRun]) -> Iterator[str]:
    """Describe records that no longer count, and what has changed.

    And records that are no runs of this study.
    """
    planned = {(run.arm, run.seed) for run in runs}
    foreign = [record.name for record in records if (record.arm, record.seed) not in planned]
    names = []
    for record in records:
        if record.name not in foreign:
            keys = changed_keys(record, runs)
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            names.append(f"{record.name} ({', '.join(keys[:3])}{more})" if keys else record.name)
    if names:
        yield (
            "configs have changed, by an edit or another version of WMTP: "
            f"{_runs(names)} no longer count{'s' if len(names) == 1 else ''}, {still} still {'does' if still == 1 else 'do'}; "
            f"of another config than now: {_first(names)}"
        )
    if foreign:
        yield f"{_runs(foreign)} left out, of arms or seeds that this study does not have: {_first(foreign)}"


def _runs(names: Sequence[str]) -> str:
    return "1 run" if len(names) == 1 else f"{len(names)} runs"


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _tokens(run: PlannedRun) -> int | None:
    """Tokens of a run at most; None where the data decides."""
    steps, data = run.config.train.max_steps, run.config.data.train
    return None if steps is None else steps * data.batch_size * data.max_length


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with FileLock(folder / ".lock") as lock:
        if not lock.acquire(wait=False):
            raise ConfigError(f"{folder}: another process works on this study; wait for it, or give the study another name")
        yield
