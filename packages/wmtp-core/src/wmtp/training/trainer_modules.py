"""Sets a trainer up: its modules are the same in every process that trains."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from wmtp.distributed.ranks import Ranks
from wmtp.errors import PluginError
from wmtp.models.checksum import checksum
from wmtp.trainers.base import Trainer
from wmtp.trainers.checks import checked_modules
from wmtp.trainers.setup import TrainerSetup

__all__ = ["set_up"]


def set_up(trainer: Trainer, setup: TrainerSetup, name: str, ranks: Ranks) -> dict[str, nn.Module]:
    """Call `Trainer.setup`, and return `Trainer.modules` on the run's device.

    torch's random numbers come from the run's seed inside, whatever loading the model has used up: on rank 0 alone, say.

    Raises:
        PluginError: the modules break the contract, or differ between processes: their gradients are added up, and each would
            learn something else.
    """
    ranks.one_by_machine_first(lambda: _seeded(trainer, setup))
    modules = {key: module.to(setup.device) for key, module in checked_modules(trainer, name).items()}
    if ranks.world_size > 1:
        everywhere = ranks.objects({key: _checksums(module) for key, module in modules.items()})
        for key, own in everywhere[0].items():
            if any(found.get(key) != own for found in everywhere):
                raise PluginError(
                    f"{name}: the module {key!r} is not the same in every process; draw its weights by torch's random numbers "
                    f"in setup, or from setup.seed"
                )
    return modules


def _seeded(trainer: Trainer, setup: TrainerSetup) -> None:
    with torch.random.fork_rng([setup.device] if setup.device.type == "cuda" else []):
        torch.manual_seed(setup.seed)
        trainer.setup(setup)


def _checksums(module: nn.Module) -> list[tuple[str, list[int]]]:
    whole = ((key, value) for key, value in module.state_dict().items() if isinstance(value, torch.Tensor))
    return [(key, checksum(value).tolist()) for key, value in whole if not isinstance(value, DTensor)]
