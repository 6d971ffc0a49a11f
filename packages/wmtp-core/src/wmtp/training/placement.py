"""Placement of the model on its devices, sharded or whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.distributed.fsdp import FSDPModule

from wmtp.config.schema import Config, FsdpConfig
from wmtp.devices import Precision
from wmtp.distributed.ranks import Ranks
from wmtp.errors import ConfigError
from wmtp.models.acceleration import accelerate
from wmtp.models.adapters import quantize_base
from wmtp.models.fp8 import check_fp8, multiply_in_fp8
from wmtp.models.low_rank_graph import join_weights
from wmtp.models.mapped import settle
from wmtp.models.sharding import spread
from wmtp.optim.master_weights import MasterWeights
from wmtp.training.setup import Source, load_base_model

if TYPE_CHECKING:
    from wmtp.models.mtp import MTPModel
    from wmtp.training.step import StepLoss

__all__ = ["check_device", "place_model", "ready_to_measure"]


def check_device(config: Config, device: torch.device, world_size: int = 1) -> None:
    """Refuse settings that the picked device cannot compute, before anything is read.

    Args:
        config: of the run.
        device: of this process.
        world_size: how many processes train together.

    Raises:
        ConfigError: every problem at once.
    """
    problems = [f"optimizer.{line}" for line in config.optimizer.check_device(device.type)]
    if config.devices.activation_checkpointing == "offload" and device.type != "cuda":
        problems.append(
            "devices.activation_checkpointing: 'offload' moves activations from a GPU to the host's memory, and the run "
            f'computes on {device.type}; write "full"'
        )
    if config.devices.cuda_graphs and device.type != "cuda":
        problems.append(
            f"devices.cuda_graphs: only NVIDIA GPUs have them, and the run computes on {device.type}; remove this key"
        )
    if config.devices.cuda_graphs and world_size > 1:
        problems.append(
            f"devices.cuda_graphs: records the passes of one process, and {world_size} train together; write "
            "launcher.processes = 1, or remove this key"
        )
    try:
        check_fp8(config.devices, device)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)


def place_model(
    config: Config, source: Source, ranks: Ranks, device: torch.device, precision: Precision, fsdp: FsdpConfig | None
) -> tuple[MTPModel, MasterWeights | None]:
    """Load the model onto its devices.

    Returned with its fp32 copies, if any.

    Raises:
        WMTPError: its files are missing or damaged.
    """
    if fsdp is None:
        model = load_base_model(config, source)
        _shrink_fixed(model, precision, device)
        multiply_in_fp8(model, config.devices, device=device)
        # bf16 parameters get their fp32 copies on the device; what never learns stays as it is
        settle(model, device, torch.float32 if precision != "bf16-params" else None)
        masters = MasterWeights(model, fixed=model.fixed_parameters()) if precision == "bf16-params" else None
        accelerate(model, config.devices)
        if device.type == "cuda":
            join_weights(model, config.devices)
        return model, masters

    sharded = fsdp.strategy != "none"

    def load() -> MTPModel:
        loaded = load_base_model(config, source)
        _shrink_fixed(loaded, precision, device, keep=loaded.stored)
        if not sharded:
            multiply_in_fp8(loaded, config.devices, device=device)
        if device.type == "cuda" and config.devices.attention == "auto":
            loaded.use_block_attention()  # found out by trying, which the empty models of the other ranks cannot
        return loaded

    def prepare(model: MTPModel) -> None:
        if precision == "bf16-params":
            _halve_fixed(model)
        multiply_in_fp8(model, config.devices, sharded=sharded)
        accelerate(model, config.devices)

    model = spread(load, ranks, device, fsdp, precision, prepare, folder=source.model_path)
    # a sharded model's own parameters are the fp32 copies, gathered in bf16
    if isinstance(model, FSDPModule) or precision != "bf16-params":
        return model, None
    return model, MasterWeights(model, fixed=model.fixed_parameters(), one_pass=ranks.world_size == 1)


def _shrink_fixed(model: MTPModel, precision: Precision, device: torch.device, *, keep: Iterable[str] = ()) -> None:
    """Shrink frozen parameters before they take memory of the device.

    Args:
        model: in place.
        precision: of the run.
        device: where weights are quantized.
        keep: names of parameters that every process reads from its files, as they are there.
    """
    if precision == "bf16-params":
        _halve_fixed(model, keep=keep)
    quantize_base(model, device)


def _halve_fixed(model: MTPModel, *, keep: Iterable[str] = ()) -> None:
    """Convert frozen parameters to bf16.

    No optimizer needs more of them.
    """
    kept = set(keep)
    left = {id(parameter) for name, parameter in model.named_parameters() if name in kept}
    for parameter in model.fixed_parameters():
        if parameter.is_floating_point() and id(parameter) not in left:
            parameter.data = parameter.data.to(torch.bfloat16)


@contextmanager
def ready_to_measure(step: StepLoss) -> Iterator[None]:
    """Allow calls of a sharded model's parts inside.

    The root's parameters are gathered, and layers may be bf16.
    """
    if not isinstance(step.model, FSDPModule):
        yield
        return
    step.model.unshard()
    with step.autocast():
        yield
