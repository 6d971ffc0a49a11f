"""Dry run: facts about a run before a device is paid for."""

from __future__ import annotations

from typing import Any

import torch

from wmtp.checkpoints.remote import remote_checkpoints
from wmtp.config.places import Place
from wmtp.config.required_models import models_beside
from wmtp.config.schema import Config, HeadsConfig
from wmtp.devices import count_devices, pick_device
from wmtp.evaluation.measure import prepare
from wmtp.models.base import model_info
from wmtp.trainers.declarations import check_data
from wmtp.training.memory import adapter_parameters, estimate_memory, head_parameters, too_large
from wmtp.training.placement import check_device
from wmtp.training.setup import Source, build_trainer, open_source, planned_steps
from wmtp.training.speed import describe_speed
from wmtp.training.stages import StageBatches, StagePlan

__all__ = ["dry_run"]


def dry_run(config: Config) -> dict[str, Any]:
    """Do everything but load the weights and train.

    Metadata is read, the data is tokenized, memory is estimated.

    Returns:
        facts by name, to print; under ``documents`` a list of `wmtp.data.shown.ShownDocument`.

    Raises:
        ConfigError: the config does not fit the model, the data or the machine.
        WMTPError: files are missing or damaged.
    """
    from wmtp.data.batches import StepBatches
    from wmtp.data.prepare import prepare_data
    from wmtp.data.shown import shown_documents
    from wmtp.models.build import resolve_heads
    from wmtp.models.vocabulary import check_ids

    device = pick_device(config.devices.device)
    if not config.launcher.remote:
        check_device(config, device)
    if (remote := remote_checkpoints(config)) is not None:
        remote.steps()  # a bucket that is not there, or may not be read, is better known now
    trainer, name = build_trainer(config.trainer)
    prepare(config.eval, Place.of(config).fetch)
    source = open_source(config)
    info = source.model_info
    lora = config.models["base"].lora
    heads = resolve_heads(config.models["base"].heads, info.heads, info.native)
    data = prepare_data(config, source.tokenizer, source.dataset_paths)
    check_ids(source.rows, source.tokenizer, (data.train, data.eval))
    batches = StepBatches(data.train, config.data.train, seed=config.run.seed)
    total_steps = planned_steps(config, batches)
    check_data(trainer, data.train, name)
    plan = StagePlan.make(trainer.stages(), warmup_steps=heads.warmup_steps, total_steps=total_steps, trainer_name=name)
    StageBatches.make(plan, trainer, data.train, config.data.train, seed=config.run.seed, trainer_name=name)
    return {
        "trainer": name,
        "model": f"{info.architecture}, {info.parameters:,} parameters, {info.layers} layers, width {info.hidden_size}",
        "heads": f"{heads.horizon}, {heads.kind}, {head_parameters(info, heads):,} parameters",
        "adapters": "none" if lora is None else f"rank {lora.rank}, about {adapter_parameters(info, lora):,} parameters",
        "vocabulary": f"{info.vocab_size:,} in the model, {source.tokenizer.vocab_size:,} in the tokenizer",
        "training data": f"{len(data.train):,} documents",
        "evaluation data": "none" if data.eval is None else f"{len(data.eval):,} documents",
        "steps": f"{total_steps:,} of {config.data.train.batch_size} rows",
        "stages": ", ".join(f"{stage.name} to step {end:,}" for stage, end in zip(plan.stages, plan.ends, strict=True)),
        **_estimates(config, source, heads, device, total_steps),
        "documents": shown_documents(data.train, source.tokenizer),
    }


def _estimates(config: Config, source: Source, heads: HeadsConfig, device: torch.device, steps: int) -> dict[str, str]:
    """Estimate the memory, compared with the device's, and the speed on GPUs.

    There is no speed for a run on another kind of device.
    """
    others = {
        name: model_info(entry.loader, config.storage, source.place.path(entry.loader, f"models.{name}"))
        for name, entry in ((name, config.models[name]) for name in models_beside(config))
    }
    processes = config.launcher.processes
    world_size = processes if isinstance(processes, int) else count_devices(device) or 1
    estimate = estimate_memory(config, source.model_info, heads, world_size=world_size, others=others)
    given = config.devices.memory_gib
    there = round(given * 2**30) if given else None
    if there is None and device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    shortage = None if there is None else too_large(estimate, there)
    memory = f"{estimate}; on each of {world_size} × {device.type}"
    facts = {"memory": memory + (f"; likely out of memory: {shortage}" if shortage else "")}
    if config.devices.device in ("auto", "cuda"):
        facts["speed"] = describe_speed(config, source.model_info, heads, steps=steps, world_size=world_size, others=others)
    return facts
