"""End of a run: save the model, evaluate, sample, report."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from wmtp.config.places import Place
from wmtp.config.schema import Config
from wmtp.errors import Terminated
from wmtp.evaluation import Measured
from wmtp.evaluation.consent import code_execution_allowed
from wmtp.evaluation.measure import measure
from wmtp.models.ends import end_ids
from wmtp.reporting import write_report
from wmtp.runs.files import SAMPLE_FILE, read_object
from wmtp.storage.atomic import replace_text
from wmtp.tracking import Tracker
from wmtp.tracking.base import failure
from wmtp.tracking.ending import AFTER_CTRL_C, within
from wmtp.trainers.modules import save_modules
from wmtp.training.loop import Fit

if TYPE_CHECKING:
    from wmtp.data.dataset import TokenDataset
    from wmtp.models.mtp import MTPModel
    from wmtp.tokenizers import Tokenizer

__all__ = ["end_tracking", "finish_tracking", "measure_model", "report", "save_model", "show_sample"]

logger = logging.getLogger("wmtp")

_SAMPLE_TOKENS = 64


def save_model(
    model: MTPModel,
    modules: Mapping[str, nn.Module],
    tokenizer: Tokenizer,
    folder: Path,
    state: Mapping[str, Tensor] | None,
) -> None:
    """Write what a run has learned into ``folder``.

    Args:
        model: with its heads.
        modules: what the trainer has learned besides, by name.
        tokenizer: goes along.
        folder: the model's.
        state: the gathered tensors of a sharded model; None for one that is not sharded.
    """
    model.save_pretrained(folder, state)
    save_modules(modules, folder)
    tokenizer.save(folder)


def measure_model(config: Config, run_dir: Path, fit: Fit, tokenizer: Tokenizer) -> dict[str, float]:
    """Run the evaluators of ``[[eval]]``, and write their results."""
    step = fit.step_loss
    measured = Measured(
        model=step.model,
        tokenizer=tokenizer,
        batches=fit.eval_batches,
        device=step.device,
        autocast=step.autocast,
        seed=config.run.seed,
        ranks=step.ranks,
        output_dir=run_dir / "evaluation",
        allow_code_execution=code_execution_allowed(),
        fetch=Place.of(config).fetch,
    )
    return measure(config.eval, measured, run_dir if step.ranks.is_main else None)


@torch.no_grad()
def show_sample(
    model: MTPModel,
    tokenizer: Tokenizer,
    dataset: TokenDataset,
    device: torch.device,
    *,
    run_dir: Path | None,
    when: Literal["before", "after"] = "after",
) -> None:
    """Generate from a prompt of the data; log and keep the text.

    The prompt is the first document's, or its first tokens.

    Args:
        model: every rank must call this.
        tokenizer: the model's.
        dataset: has the document.
        device: where the model is.
        run_dir: gets ``sample.json``; None on all ranks but the first.
        when: before or after training.
    """
    tokens, learned = dataset.document(0).tokens, dataset.document(0).loss_mask
    prompt_length = int(learned.argmax()) if not learned[0] else 0
    longest = (model.max_positions or 10**9) - _SAMPLE_TOKENS
    prompt = tokens[: min(prompt_length if prompt_length > 1 else len(tokens) // 3 + 1, max(1, longest))]
    ids = torch.tensor(prompt, dtype=torch.int64, device=device)[None]
    settings = {
        "max_new_tokens": _SAMPLE_TOKENS,
        "do_sample": False,
        "eos_token_id": end_ids(model.base, tokenizer),
        "pad_token_id": tokenizer.eos_id,
        "synced_gpus": isinstance(model, FSDPModule) and dist.get_world_size() > 1,
    }
    generated = model.base.generate(ids, attention_mask=torch.ones_like(ids), **settings)  # type: ignore[operator]
    completion = tokenizer.decode(generated[0, ids.shape[1] :].tolist())
    bar = "-" * 72
    given = tokenizer.decode(prompt.tolist())
    if run_dir is not None:
        file = run_dir / SAMPLE_FILE
        replace_text(file, json.dumps(read_object(file) | {"prompt": given, when: completion}, indent=1))
    logger.info(
        "a prompt, and the %s model's completion (greedy):\n%s\n%s\n%s\n%s\n%s",
        "trained" if when == "after" else "untrained",
        bar,
        given,
        bar,
        completion,
        bar,
    )


def end_tracking(
    tracker: Tracker,
    status: Literal["finished", "stopped", "interrupted", "failed"],
    saved_model: Path | None,
    run_dir: Path | None,
    *,
    patience: float | None = None,
) -> Literal["SIGINT", "SIGTERM"] | None:
    """Write the run's report and close its tracker.

    The run itself is done, so a signal ends this wait and changes nothing about how the run has ended.

    Args:
        tracker: of the run.
        status: how the run has ended.
        saved_model: the trained model's folder, where there is one.
        run_dir: where a report is to be written; None: none.
        patience: seconds after which the tracker is left behind. Default: see `within`.

    Returns:
        the signal that came meanwhile.
    """
    came: Literal["SIGINT", "SIGTERM"] | None = None
    try:
        if run_dir is not None:
            report(run_dir, status, tracker)
    except KeyboardInterrupt as error:
        came, patience = _named(error, status), AFTER_CTRL_C
    try:
        finish_tracking(tracker, status, saved_model, patience=patience)
    except KeyboardInterrupt as error:
        came = _named(error, status)
    return came


def _named(error: KeyboardInterrupt, status: str) -> Literal["SIGINT", "SIGTERM"]:
    name: Literal["SIGINT", "SIGTERM"] = "SIGTERM" if isinstance(error, Terminated) else "SIGINT"
    logger.warning("%s: its report and its tracker are waited for no longer; the run is %s", name, status)
    return name


def report(run_dir: Path, status: str, tracker: Tracker) -> None:
    """Write the report of the run; a failure is only logged."""
    try:
        page = write_report([run_dir], status=status)
    except Exception as error:
        logger.warning("no report was written: %s; see wmtp report %s", error, run_dir)
        return
    try:
        within(tracker, lambda: tracker.log_artifact(page))
    except Exception as error:
        logger.warning("%s; it has not got the report, %s", failure(tracker, error), page)


def finish_tracking(
    tracker: Tracker,
    status: Literal["finished", "stopped", "interrupted", "failed"],
    saved_model: Path | None,
    *,
    patience: float | None = None,
) -> None:
    """Tell the tracker that the run has ended; log its location.

    Args:
        tracker: of the run.
        status: how the run has ended.
        saved_model: the trained model's folder, where there is one.
        patience: seconds after which the tracker is left behind. Default: see `within`.
    """
    try:
        ended = within(tracker, lambda: tracker.finish(status, saved_model), patience=patience)
        if ended and (location := tracker.location()) is not None:
            logger.info("tracking  %s", location)
    except Exception as error:
        logger.warning("at the end %s; metrics.jsonl has everything", failure(tracker, error))
