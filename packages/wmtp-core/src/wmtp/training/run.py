"""One run on this machine, from a checked config to a saved model."""

from __future__ import annotations

import logging
import random
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from wmtp.config.rules import required_models
from wmtp.config.schema import Config, FsdpConfig, HeadsConfig
from wmtp.config.tree import flatten
from wmtp.distributed.ranks import ALONE, Ranks
from wmtp.distributed.sharding import Sharding, spread, whole_state
from wmtp.errors import ConfigError, PluginError, WMTPError
from wmtp.evaluation import Measured
from wmtp.evaluation.consent import code_execution_allowed
from wmtp.evaluation.measure import measure
from wmtp.report import write_report
from wmtp.result import Result
from wmtp.storage.atomic import remove_partial, write_folder
from wmtp.storage.uris import file_path, scheme_of
from wmtp.tracking import RunInfo, Tracker
from wmtp.tracking.jsonl import Jsonl
from wmtp.training.acceleration import accelerate
from wmtp.training.checkpoint import Checkpoint, list_checkpoints
from wmtp.training.devices import (
    Precision,
    autocast_context,
    count_devices,
    pick_device,
    pick_precision,
    prefer_fast_attention,
)
from wmtp.training.loop import Fit
from wmtp.training.master_weights import MasterWeights
from wmtp.training.memory import estimate_memory, explain_out_of_memory, head_parameters, too_large
from wmtp.training.modules import save_modules
from wmtp.training.optimizers import change_learning_rate
from wmtp.training.recording import Recorder
from wmtp.training.remote_checkpoints import CheckpointUpload, RemoteCheckpoints, remote_checkpoints
from wmtp.training.reward_scores import open_reward_scores
from wmtp.training.setup import Source, load_base_model, load_extra_model, open_source, open_token_numbers, provenance
from wmtp.training.stages import StageBatches, StagePlan, check_data
from wmtp.training.step import StepLoss
from wmtp.training.trainer import Trainer, TrainerSetup

if TYPE_CHECKING:
    from wmtp.data.batches import StepBatches
    from wmtp.data.dataset import TokenDataset
    from wmtp.data.prepare import PreparedData
    from wmtp.models.mtp import MTPModel
    from wmtp.tokenizers import Tokenizer

__all__ = ["checkpoint_folder", "dry_run", "planned_steps", "train"]

logger = logging.getLogger("wmtp")

_SAMPLE_TOKENS = 64
_SHOWN_CHARACTERS = 300


def train(config: Config, run_dir: Path, *, resume: bool, ranks: Ranks = ALONE) -> Result:
    """Train in this process.

    Args:
        config: complete and checked.
        run_dir: the run directory, locked by the caller.
        resume: go on from the newest checkpoint there, if there is one.
        ranks: the processes that train together; each of them calls this with the same arguments. Rank 0 writes.

    Raises:
        ConfigError: the config does not fit the model or the data.
        WMTPError: files are missing or damaged, the disk is full, or the loss became infinite.
    """
    from wmtp.data.batches import StepBatches, eval_batches
    from wmtp.data.prepare import prepare_data
    from wmtp.models.build import resolve_heads

    transformers.utils.logging.disable_progress_bar()  # one bar is enough: ours
    if config.devices.threads is not None:
        torch.set_num_threads(config.devices.threads)
    device = ranks.together(lambda: pick_device(config.devices.device, ranks.local_rank if ranks.world > 1 else None))
    folder = checkpoint_folder(config, run_dir)
    remote = remote_checkpoints(config)
    saved = ranks.on_main(lambda: _tidy(folder, run_dir, remote, resume=resume))
    if saved:
        ranks.together(lambda: _see(saved[-1].path))

    source = ranks.one_by_machine_first(lambda: open_source(config))
    data = ranks.one_by_machine_first(lambda: prepare_data(config, source.tokenizer, source.dataset_paths))
    _compare_data(data, ranks)
    total_steps = planned_steps(config, StepBatches(data.train, config.data.train, seed=config.run.seed))
    trainer, name = _build_trainer(config)
    ranks.together(lambda: check_data(trainer, data.train))
    if ranks.world > config.data.train.batch_size:
        logger.info(
            "data.train.batch_size: %d rows a step for %d processes: some compute for nothing; a larger batch uses them all",
            config.data.train.batch_size, ranks.world,
        )  # fmt: skip

    random.seed(config.run.seed)
    torch.manual_seed(config.run.seed)
    precision = pick_precision(config.devices.precision, device)
    fsdp = config.devices.fsdp or (FsdpConfig() if ranks.world > 1 else None)
    heads = resolve_heads(config.models["base"].heads, source.model_info.heads)
    explained = partial(explain_out_of_memory, config, source.model_info, heads, device=device, world=ranks.world)
    with explained():
        model, master_weights = _load_model(config, source, ranks, device, precision, fsdp)
    plan = StagePlan.make(trainer.stages(), warmup_steps=model.heads.warmup_steps, total_steps=total_steps, trainer_name=name)
    batches = StageBatches.make(plan, trainer, data.train, config.data.train, seed=config.run.seed, trainer_name=name)
    setup = TrainerSetup(
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        horizon=model.horizon,
        device=device,
        seed=config.run.seed,
        tokenizer=source.tokenizer,
        model=load_extra_model(config, source.place, device),
        token_numbers=open_token_numbers(config, source, data.train),
        reward_scores=open_reward_scores(config, source, data.train, device),
        fetch=source.place.fetch,
    )
    ranks.one_by_machine_first(lambda: trainer.setup(setup))
    modules = {key: module.to(device) for key, module in trainer.modules().items()}
    parameters = list(model.named_parameters())
    parameters += [(f"{key}.{inner}", p) for key, module in modules.items() for inner, p in module.named_parameters()]

    tracker = config.tracker.build() if ranks.is_main else Jsonl()
    run_info = RunInfo(
        name=run_dir.name,
        run_dir=run_dir,
        tags={"wmtp.trainer": config.trainer.type} | dict.fromkeys(config.run.tags, "true"),
        params=flatten(config),
        resumed_step=saved[-1].step if saved else None,
        backends=source.place.backends,
    )
    ranks.on_main(lambda: tracker.start(run_info))
    logger.info(
        "%s: %s, %s parameters, H = %d, on %s%s; %d steps of %d rows",
        name, source.model_info.architecture, f"{sum(p.numel() for _, p in parameters):,}", model.horizon,
        f"{ranks.world} × " if ranks.world > 1 else "", device, total_steps, config.data.train.batch_size,
    )  # fmt: skip
    upload = None
    if remote is not None and ranks.is_main:
        upload = CheckpointUpload(remote, run_dir, config.checkpoints.keep_last)
        if saved:  # it may have been written by a process that was killed before it was uploaded
            upload.put(saved[-1])
    status = "failed"
    saved_model: Path | None = None
    measurements: dict[str, float] = {}
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
            ),
            modules=modules,
            plan=plan,
            batches=batches,
            eval_batches=eval_batches(data.eval, config.data) if data.eval is not None else (),
            optimizer=_optimizer(config, model, parameters, trainer, modules, master_weights),
            schedule=config.schedule,
            train=config.train,
            checkpoints=config.checkpoints,
            checkpoint_dir=folder,
            metrics_path=run_dir / "metrics.jsonl",
            recorder=Recorder(
                config.report,
                source.tokenizer,
                total_steps=total_steps,
                followed=batches.at(plan, total_steps - 1)[0].batch(0),
            ),
            tracker=tracker,
            total_steps=total_steps,
            resumed=saved[-1] if saved else None,
            upload=upload,
        )
        with prefer_fast_attention(device), explained():
            outcome = fit.run()
        if outcome.status != "interrupted":
            saved_model = run_dir / "model"
            target = saved_model
            state = whole_state(model, ranks)

            def save(partial: Path) -> None:
                _save_model(model, modules, source.tokenizer, partial, state)

            ranks.on_main(lambda: write_folder(target, save))
            state = None
            with _ready_to_measure(fit.step_loss):
                measurements = _measure(config, run_dir, fit, source.tokenizer)
                fit.track(outcome.steps, measurements)
                _show_sample(model, source.tokenizer, data.eval or data.train, device)
        ranks.on_main(lambda: upload.finish(saved_model) if upload is not None else None)
        status = outcome.status
    except Exception:
        if upload is not None:  # what was saved before must not be lost too
            with suppress(WMTPError):  # it has been said
                upload.finish()
        raise
    finally:
        if ranks.is_main:
            _report(run_dir, status, tracker)
        try:
            tracker.finish(status, saved_model)
            if (location := tracker.location()) is not None:
                logger.info("tracking  %s", location)
        except Exception as error:
            logger.warning("the tracker failed at the end: %s; metrics.jsonl has everything", error)
    return Result(
        run_dir=run_dir,
        model=saved_model,
        checkpoint=outcome.checkpoint,
        steps=outcome.steps,
        metrics={**outcome.metrics, **measurements},
        status=outcome.status,
    )


def _load_model(
    config: Config, source: Source, ranks: Ranks, device: torch.device, precision: Precision, fsdp: FsdpConfig | None
) -> tuple[MTPModel, MasterWeights | None]:
    """The model on its devices, ready to learn, and the fp32 copies of its parameters, where it needs any."""
    if fsdp is None:
        model = load_base_model(config, source).to(device)
        masters = MasterWeights(model) if precision == "bf16-params" else None
        accelerate(model, config.devices)
        return model, masters

    def load() -> MTPModel:
        loaded = load_base_model(config, source)
        if device.type == "cuda" and config.devices.attention == "auto":
            loaded.use_block_attention()  # found out by trying, which the empty models of the other ranks cannot
        return loaded

    def prepare(model: MTPModel) -> None:
        accelerate(model, config.devices)

    model = spread(load, ranks, device, fsdp, precision, prepare)
    # a divided model's own parameters are the fp32 copies: what is gathered of them is bf16
    whole = not isinstance(model, FSDPModule)
    return model, MasterWeights(model) if whole and precision == "bf16-params" else None


def _tidy(folder: Path, run_dir: Path, remote: RemoteCheckpoints | None, *, resume: bool) -> list[Checkpoint]:
    """Remove what killed processes left, and list the checkpoints to go on from; the newest may have to be fetched."""
    remove_partial(folder)
    remove_partial(run_dir)
    saved = list_checkpoints(folder)
    uploaded = remote.steps() if remote is not None else []
    if (saved or uploaded) and not resume:
        where = folder if remote is None else remote.uri
        raise ConfigError(
            f"checkpoints.uri: {where} holds checkpoints of another run; choose another folder, or resume that run"
        )
    if remote is not None:
        remote.tidy()
        if uploaded and (not saved or uploaded[-1] > saved[-1].step):
            saved = [*saved, remote.fetch(uploaded[-1], folder)]
    return saved


def _see(path: Path) -> None:
    if not path.is_dir():
        raise WMTPError(f"{path} is not there; all machines must see the checkpoints: put them on a file system they share")


def _compare_data(data: PreparedData, ranks: Ranks) -> None:
    """Whether every rank reads the same data.

    Raises:
        ConfigError: one does not; the message names it.
    """
    found = ranks.objects((socket.gethostname(), data.train.fingerprint, data.eval and data.eval.fingerprint))
    for rank, (host, *fingerprints) in enumerate(found):
        if fingerprints != list(found[0][1:]):
            raise ConfigError(
                f"datasets: rank {rank} ({host}) reads other data than rank 0 ({found[0][0]}); give all the same files"
            )


def dry_run(config: Config) -> dict[str, str]:
    """Everything but the weights and the training steps: metadata is read, the data is tokenised, memory is estimated.

    Returns:
        facts by name, to print.

    Raises:
        ConfigError: the config does not fit the model, the data or the machine.
        WMTPError: files are missing or damaged.
    """
    from wmtp.data.batches import StepBatches
    from wmtp.data.prepare import prepare_data
    from wmtp.models.build import resolve_heads

    device = pick_device(config.devices.device)
    source = open_source(config)
    info = source.model_info
    heads = resolve_heads(config.models["base"].heads, info.heads)
    data = prepare_data(config, source.tokenizer, source.dataset_paths)
    batches = StepBatches(data.train, config.data.train, seed=config.run.seed)
    total_steps = planned_steps(config, batches)
    trainer, name = _build_trainer(config)
    check_data(trainer, data.train)
    plan = StagePlan.make(trainer.stages(), warmup_steps=heads.warmup_steps, total_steps=total_steps, trainer_name=name)
    StageBatches.make(plan, trainer, data.train, config.data.train, seed=config.run.seed, trainer_name=name)
    first = batches.batch(0)
    real = first.document[0] >= 0
    sample = source.tokenizer.decode(first.input_ids[0][real].tolist())
    return {
        "trainer": name,
        "model": f"{info.architecture}, {info.parameters:,} parameters, {info.layers} layers, width {info.hidden_size}",
        "heads": f"{heads.horizon}, {heads.kind}, {head_parameters(info, heads):,} parameters",
        "vocabulary": f"{info.vocab_size:,} in the model, {source.tokenizer.vocab_size:,} in the tokenizer",
        "training data": f"{len(data.train):,} documents",
        "evaluation data": "none" if data.eval is None else f"{len(data.eval):,} documents",
        "steps": f"{total_steps:,} of {config.data.train.batch_size} rows",
        "stages": ", ".join(f"{stage.name} to step {end:,}" for stage, end in zip(plan.stages, plan.ends, strict=True)),
        "memory": _memory(config, source, heads, device),
        "first row": repr(sample if len(sample) <= _SHOWN_CHARACTERS else sample[:_SHOWN_CHARACTERS] + "…"),
    }


def _memory(config: Config, source: Source, heads: HeadsConfig, device: torch.device) -> str:
    """The estimate, and whether it is more than the device has."""
    others = {
        name: config.models[name].loader.build().info(source.place.path(config.models[name].loader, f"models.{name}"))
        for name in required_models(config)
    }
    processes = getattr(config.launcher, "processes", 1)
    world = processes if isinstance(processes, int) else count_devices(device) or 1
    estimate = estimate_memory(config, source.model_info, heads, world=world, others=others)
    given = config.devices.memory_gib
    there = round(given * 2**30) if given else None
    if there is None and device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    shortage = None if there is None else too_large(estimate, there)
    return f"{estimate}; on each of {world} × {device.type}" + (f"; it will hardly fit: {shortage}" if shortage else "")


def _build_trainer(config: Config) -> tuple[Trainer, str]:
    """The trainer, and what messages call it."""
    trainer, name = config.trainer.build(), provenance(config.trainer)
    if not isinstance(trainer, Trainer):
        raise PluginError(f"{name}: build returned a {type(trainer).__name__}, not a wmtp.training.Trainer")
    return trainer, name


def checkpoint_folder(config: Config, run_dir: Path) -> Path:
    """Where the checkpoints of a run are written on this machine."""
    uri = config.checkpoints.uri
    return run_dir / "checkpoints" if uri is None or scheme_of(uri) != "file" else file_path(uri)


def planned_steps(config: Config, batches: StepBatches) -> int:
    """Optimizer steps of the whole job: what ``train.max_steps`` and ``train.epochs`` give, the smaller of both."""
    limits = [] if config.train.max_steps is None else [config.train.max_steps]
    if config.train.epochs is not None or not limits:
        limits.append(batches.total_steps(config.train.epochs or 1.0))
    return min(limits)


def _report(run_dir: Path, status: str, tracker: Tracker) -> None:
    """Write the page that shows the run. A run that has ended, however, is not to fail by this."""
    try:
        tracker.log_artifact(write_report([run_dir], status=status))
    except Exception as error:
        logger.warning("no report was written: %s; see wmtp report %s", error, run_dir)


@contextmanager
def _ready_to_measure(step: StepLoss) -> Iterator[None]:
    """A divided model can be called part by part inside: what is the root's own is gathered, and layers may be bf16."""
    if not isinstance(step.model, FSDPModule):
        yield
        return
    step.model.unshard()
    with step.autocast():
        yield


def _measure(config: Config, run_dir: Path, fit: Fit, tokenizer: Tokenizer) -> dict[str, float]:
    """What ``[[eval]]`` asks for, which goes into the run directory's files too."""
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
    )
    return measure(config.eval, measured, run_dir if step.ranks.is_main else None)


def _optimizer(
    config: Config,
    model: MTPModel,
    parameters: list[tuple[str, nn.Parameter]],
    trainer: Trainer,
    modules: Mapping[str, nn.Module],
    master_weights: MasterWeights | None,
) -> torch.optim.Optimizer:
    of_heads = list(model.extra_heads.parameters())
    if master_weights is not None:
        names, plain = zip(*parameters, strict=True)
        parameters = list(zip(names, master_weights.replace(plain), strict=True))
        of_heads = master_weights.replace(of_heads)
    optimizer = config.optimizer.build(parameters)
    if master_weights is not None:
        master_weights.follow(optimizer)
    # groups of their own, however many ranks there are: a fused step takes parameters of one kind, and these are never divided
    change_learning_rate(optimizer, [p for module in modules.values() for p in module.parameters()], lambda lr: lr)
    if model.heads.lr_factor != 1.0:
        change_learning_rate(optimizer, of_heads, lambda lr: lr * model.heads.lr_factor)
    for module, rate in trainer.learning_rates().items():
        change_learning_rate(optimizer, modules[module].parameters(), lambda _, rate=rate: rate)
    return optimizer


def _save_model(
    model: MTPModel,
    modules: Mapping[str, nn.Module],
    tokenizer: Tokenizer,
    folder: Path,
    state: Mapping[str, Tensor] | None,
) -> None:
    generation = model.base.generation_config
    if generation is not None and generation.eos_token_id is None:
        # a new model does not know yet where a text ends
        generation.eos_token_id = model.base.config.eos_token_id = tokenizer.eos_id
    model.save_pretrained(folder, state)
    save_modules(modules, folder)
    tokenizer.save(folder)


@torch.no_grad()
def _show_sample(model: MTPModel, tokenizer: Tokenizer, dataset: TokenDataset, device: torch.device) -> None:
    """Log how the trained model goes on from the first document's prompt, or from its first tokens."""
    tokens, learned = dataset.document(0).tokens, dataset.document(0).learn
    prompt_length = int(learned.argmax()) if not learned[0] else 0
    longest = (model.max_positions or 10**9) - _SAMPLE_TOKENS
    prompt = tokens[: min(prompt_length if prompt_length > 1 else len(tokens) // 3 + 1, max(1, longest))]
    ids = torch.tensor(prompt, dtype=torch.int64, device=device)[None]
    settings = {
        "max_new_tokens": _SAMPLE_TOKENS,
        "do_sample": False,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.eos_id,
        "synced_gpus": isinstance(model, FSDPModule) and dist.get_world_size() > 1,
    }
    generated = model.base.generate(ids, attention_mask=torch.ones_like(ids), **settings)  # type: ignore[operator]
    completion = tokenizer.decode(generated[0, ids.shape[1] :].tolist())
    bar = "-" * 72
    logger.info(
        "a prompt, and how the trained model goes on (greedy):\n%s\n%s\n%s\n%s\n%s",
        bar,
        tokenizer.decode(prompt.tolist()),
        bar,
        completion,
        bar,
    )
