"""One run on this machine, from checked config to saved model."""

from __future__ import annotations

import logging
import random
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn

from wmtp.checkpoints.find import checkpoint_folder, compare_data, find_checkpoints
from wmtp.checkpoints.local import list_checkpoints
from wmtp.checkpoints.remote import CheckpointUpload, remote_checkpoints
from wmtp.config.inputs import anchored, with_uris
from wmtp.config.places import Place
from wmtp.config.schema import Config, FsdpConfig
from wmtp.config.tree import flatten
from wmtp.data.score_cache.cached_numbers import open_token_numbers
from wmtp.devices import (
    apart_from_the_caller,
    autocast_context,
    device_name,
    few_cpu_threads,
    pick_device,
    pick_precision,
    prefer_fast_attention,
)
from wmtp.distributed.ranks import SINGLE_PROCESS, Ranks
from wmtp.errors import Terminated, WMTPError
from wmtp.evaluation.measure import prepare
from wmtp.models.draft_vocabulary import frequent_tokens
from wmtp.models.ends import end_ids, learn_turn_end
from wmtp.models.fp8 import fp8_logits, products_in_bf16
from wmtp.models.reward_scores import open_reward_scores
from wmtp.models.sharding import Sharding, whole_state
from wmtp.optim.build import build_optimizer
from wmtp.plugins.built import built
from wmtp.runs.directory import record
from wmtp.runs.fixed import pins
from wmtp.runs.result import Result
from wmtp.runs.step_file import last_steps
from wmtp.signals import stopped_by_sigterm
from wmtp.storage.atomic import write_folder
from wmtp.tracking import RunInfo
from wmtp.tracking.ending import AFTER_CTRL_C
from wmtp.tracking.jsonl import Jsonl
from wmtp.tracking.starting import starting_beside
from wmtp.trainers.declarations import check_data, checked_rates
from wmtp.trainers.setup import TrainerSetup
from wmtp.training.finish import end_tracking, measure_model, save_model, show_sample
from wmtp.training.loop import Fit, FitResult
from wmtp.training.memory import explain_out_of_memory
from wmtp.training.placement import check_device, place_model, ready_to_measure
from wmtp.training.recorded import record_passes
from wmtp.training.setup import build_trainer, load_extra_model, open_source, planned_steps
from wmtp.training.stages import StageBatches, StagePlan
from wmtp.training.step import StepLoss
from wmtp.training.telemetry import Recorder
from wmtp.training.trainer_modules import set_up

__all__ = ["train"]

logger = logging.getLogger("wmtp")


@apart_from_the_caller()
def train(config: Config, run_dir: Path, *, resume: bool, ranks: Ranks = SINGLE_PROCESS) -> Result:
    """Train in this process.

    Args:
        config: complete and checked.
        run_dir: the run directory, locked by the caller.
        resume: continue from the newest checkpoint there, if there is one.
        ranks: the processes that train together; each of them calls this with the same arguments. Rank 0 writes.

    Raises:
        ConfigError: the config does not fit the model or the data.
        WMTPError: files are missing or damaged, the disk is full, or the loss became infinite.
    """
    from wmtp.data.batches import EvalBatches, StepBatches
    from wmtp.data.prepare import prepare_data
    from wmtp.models.build import resolve_heads
    from wmtp.models.vocabulary import check_ids

    transformers.utils.logging.disable_progress_bar()  # one bar is enough: ours
    if config.devices.threads is not None:
        torch.set_num_threads(config.devices.threads)
    pinned = ranks.main_only(lambda: pins(run_dir, config))
    config = with_uris(config, pinned)
    params = flatten(config)  # as they were written
    config = anchored(config)  # a trainer may change the working folder
    device = ranks.collective(lambda: pick_device(config.devices.device, ranks.local_rank if ranks.world_size > 1 else None))
    ranks.collective(lambda: check_device(config, device, ranks.world_size))
    remote = remote_checkpoints(config)
    saved = find_checkpoints(config, run_dir, remote, ranks, resume=resume)

    trainer, name = build_trainer(config.trainer)  # its errors show before anything is read
    ranks.main_only(lambda: prepare(config.eval, Place.of(config).fetch))
    source = ranks.one_by_machine_first(lambda: open_source(config))
    data = ranks.one_by_machine_first(lambda: prepare_data(config, source.tokenizer, source.dataset_paths))
    ranks.collective(lambda: check_ids(source.rows, source.tokenizer, (data.train, data.eval)))
    compare_data(data, ranks)
    held_out = None if data.eval is None else data.eval.fingerprint
    facts = {"data": {"train": data.train.fingerprint, "eval": held_out}, "device": device_name(device)}
    ranks.main_only(lambda: record(run_dir, facts))
    total_steps = planned_steps(config, StepBatches(data.train, config.data.train, seed=config.run.seed))
    ranks.collective(lambda: check_data(trainer, data.train, name))
    if ranks.world_size > config.data.train.batch_size:
        logger.info(
            "data.train.batch_size: %d rows a step for %d processes: some have no rows; a larger batch uses them all",
            config.data.train.batch_size, ranks.world_size,
        )  # fmt: skip

    random.seed(config.run.seed)
    np.random.seed(config.run.seed)
    torch.manual_seed(config.run.seed)
    precision = pick_precision(config.devices.precision, device)
    fsdp = config.devices.fsdp or (FsdpConfig() if ranks.world_size > 1 else None)
    heads = resolve_heads(config.models["base"].heads, source.model_info.heads, source.model_info.native)
    explained = partial(
        explain_out_of_memory, config, source.model_info, heads,
        device=device, world_size=ranks.world_size, per_machine=ranks.per_machine,
    )  # fmt: skip
    tracker = built(config.tracker, "trackers") if ranks.is_main else Jsonl()
    run_info = RunInfo(
        name=run_dir.name,
        run_dir=run_dir,
        tags={"wmtp.trainer": config.trainer.type} | dict.fromkeys(config.run.tags, "true"),
        params=params,
        resumed_step=saved[-1].step if saved else None,
        logged=last_steps(run_dir / "metrics.jsonl") if resume and ranks.is_main else {},
        backends=source.place.backends,
    )
    with starting_beside(tracker, run_info) as starting:
        with explained():
            model, master_weights = place_model(config, source, ranks, device, precision, fsdp)
        if data.train.conversations:
            learn_turn_end(model.base, source.tokenizer, "models.base")
        if (size := model.heads.draft_vocabulary) is not None and model.horizon > 1:
            model.draft_ids = frequent_tokens(data.train, size, model.vocab_size, end_ids(model.base, source.tokenizer))
        plan = StagePlan.make(
            trainer.stages(), warmup_steps=model.heads.warmup_steps, total_steps=total_steps, trainer_name=name
        )
        batches = StageBatches.make(plan, trainer, data.train, config.data.train, seed=config.run.seed, trainer_name=name)
        setup = TrainerSetup(
            hidden_size=model.hidden_size,
            vocab_size=model.vocab_size,
            horizon=model.horizon,
            device=device,
            seed=config.run.seed,
            tokenizer=source.tokenizer,
            model=load_extra_model(config, source.place, device, model),
            token_numbers=open_token_numbers(config, source, data.train),
            reward_scores=open_reward_scores(config, source, data.train, device),
            fetch=source.place.fetch,
        )
        modules = set_up(trainer, setup, name, ranks)
        rates = checked_rates(trainer, name, modules)
        fixed = {id(parameter) for parameter in model.fixed_parameters()}
        parameters = [(key, parameter) for key, parameter in model.named_parameters() if id(parameter) not in fixed]
        parameters += [(f"{key}.{inner}", p) for key, module in modules.items() for inner, p in module.named_parameters()]
        ranks.main_only(starting.wait)
    logger.info(
        "%s: %s, %s parameters, H = %d with %s%s, on %s%s; %d steps of %d rows",
        name, source.model_info.architecture, _count(model.base), model.horizon, _count(model.extra_heads, *modules.values()),
        "" if model.adapter is None else f", of which {sum(parameter.numel() for _, parameter in parameters):,} learn",
        f"{ranks.world_size} × " if ranks.world_size > 1 else "", device, total_steps, config.data.train.batch_size,
    )  # fmt: skip
    upload = None
    if remote is not None and ranks.is_main:
        upload = CheckpointUpload(remote, run_dir, config.checkpoints.keep_last)
    status = "failed"
    saved_model: Path | None = None
    outcome: FitResult | None = None
    is_aborted = False
    measurements: dict[str, float] = {}
    ending = ExitStack()
    try:
        fit = Fit(
            step_loss=StepLoss(
                model=model,
                trainer=trainer,
                trainer_name=name,
                micro_batch_size=config.data.train.micro_batch_size or config.data.train.batch_size,
                normalizer=config.train.normalizer,
                device=device,
                autocast=autocast_context(precision, device),
                seed=config.run.seed,
                ranks=ranks,
                master_weights=master_weights,
                sharding=None if fsdp is None else Sharding(config=fsdp),
                sources=data.train.names if len(data.train.names) > 1 else (),
                fp8_logits=fp8_logits(config.devices),
                recorded=record_passes(model, config.devices, master_weights),
            ),
            modules=modules,
            batches=batches,
            eval_batches=EvalBatches(data.eval, config.data) if data.eval is not None else (),
            eval_data=held_out,
            optimizer=build_optimizer(config, model, parameters, modules, rates, master_weights),
            schedule=config.schedule,
            train=config.train,
            checkpoints=config.checkpoints,
            checkpoint_dir=checkpoint_folder(config, run_dir),
            metrics_path=run_dir / "metrics.jsonl",
            recorder=Recorder(config.report, source.tokenizer, total_steps=total_steps, followed=batches.followed),
            tracker=tracker,
            total_steps=total_steps,
            resumed=saved[-1] if saved else None,
            upload=upload,
        )
        written = run_dir if ranks.is_main else None
        if config.train.eval_start and not saved:
            with ready_to_measure(fit.step_loss):
                show_sample(model, source.tokenizer, data.eval or data.train, device, run_dir=written, when="before")
        with prefer_fast_attention(device), few_cpu_threads(device, config.devices.threads), explained():
            outcome = fit.run()
        ending.enter_context(stopped_by_sigterm())  # from here on it ends at once: there is a checkpoint, or a model soon
        if outcome.status == "stopped":
            fit.take_best()
        if outcome.status != "interrupted":
            saved_model = run_dir / "model"
            target = saved_model
            state = whole_state(model, ranks)

            def save(partial: Path) -> None:
                save_model(model, modules, source.tokenizer, partial, state)

            ranks.main_only(lambda: write_folder(target, save))
            state = None
            with products_in_bf16(model), ready_to_measure(fit.step_loss):
                measurements = measure_model(config, run_dir, fit, source.tokenizer)
                fit.track(outcome.steps, measurements)
                show_sample(model, source.tokenizer, data.eval or data.train, device, run_dir=written)
        ranks.main_only(lambda: upload.finish(saved_model) if upload is not None else None)
        status = outcome.status
    except KeyboardInterrupt as error:  # the second Ctrl-C, or the first one after the last step: it ends now
        status, is_aborted = "interrupted", True
        saved_model = saved_model if saved_model is not None and saved_model.is_dir() else None
        kept = list_checkpoints(checkpoint_folder(config, run_dir)) if ranks.is_main else []
        if not kept:
            raise
        result = Result(
            run_dir=run_dir,
            model=saved_model,
            checkpoint=kept[-1].path,
            steps=kept[-1].step if outcome is None else outcome.steps,
            metrics={} if outcome is None else {**outcome.metrics, **measurements},
            status="interrupted",
            signal="SIGTERM" if isinstance(error, Terminated) else "SIGINT",
        )
        if ranks.world_size == 1 and isinstance(error, Terminated):
            return result
        error.result = result  # type: ignore[attr-defined]
        raise
    except Exception:
        if upload is not None:  # what was saved before must not be lost too
            with suppress(WMTPError):  # it has been said
                upload.finish()
        raise
    finally:
        with ending:
            page = run_dir if ranks.is_main and not is_aborted else None
            left_by = end_tracking(tracker, status, saved_model, page, patience=AFTER_CTRL_C if is_aborted else None)
    return Result(
        run_dir=run_dir,
        model=saved_model,
        checkpoint=outcome.checkpoint,
        steps=outcome.steps,
        metrics={**outcome.metrics, **measurements},
        status=outcome.status,
        signal=outcome.signal or left_by,
    )


def _count(*modules: nn.Module) -> str:
    """Count parameters, as the dry run does."""
    return f"{sum(parameter.numel() for module in modules for parameter in module.parameters()):,}"
