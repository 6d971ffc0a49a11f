"""Modules of a trainer: equal in all processes, and checked for gradients."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Final

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from wmtp.distributed.ranks import Ranks
from wmtp.errors import PluginError
from wmtp.models.checksum import checksum
from wmtp.trainers.base import Stage, Trainer
from wmtp.trainers.checks import asked
from wmtp.trainers.declarations import checked_modules
from wmtp.trainers.setup import TrainerSetup

__all__ = ["HEAD_WARMUP", "UntrainedModules", "set_up"]

#: name of the stage that the config puts before those of the trainer
HEAD_WARMUP: Final = "head-warmup"
#: steps of a stage after which a module without any gradient is named; single steps may have nothing for it
_SOON: Final = 20
_log = logging.getLogger("wmtp")


def set_up(trainer: Trainer, setup: TrainerSetup, name: str, ranks: Ranks) -> dict[str, nn.Module]:
    """Call `Trainer.setup`, and return `Trainer.modules` on the run's device.

    torch's random numbers come from the run's seed inside, whatever loading the model has used up: on rank 0 alone, say.

    Raises:
        PluginError: the modules break the contract, or differ between processes: their gradients are added up, and each would
            learn something else.
    """
    ranks.one_by_machine_first(lambda: _seeded(trainer, setup, name))
    modules = {key: module.to(setup.device) for key, module in checked_modules(trainer, name).items()}
    if ranks.world_size > 1:
        everywhere = ranks.objects({key: _checksums(module) for key, module in modules.items()})
        for key in dict.fromkeys(key for found in everywhere for key in found):
            if any(found.get(key) != everywhere[0].get(key) for found in everywhere):
                raise PluginError(
                    f"{name}: the module {key!r} is not the same in every process; draw its weights by torch's random numbers "
                    f"in setup, or from setup.seed"
                )
    return modules


class UntrainedModules:
    """Modules of a stage that no gradient has reached.

    What is made of them is detached, or in no auxiliary loss.

    Args:
        modules: the trainer's.
        stage: of the run.
        name: what messages call the trainer.

    Attributes:
        modules: that are still looked at; none: `after_backward` need not be called.
    """

    def __init__(self, modules: Mapping[str, nn.Module], stage: Stage, name: str) -> None:
        # in the heads' warm-up, which is no stage of the trainer's, its losses may leave its modules alone
        learn = {key: module for key, module in modules.items() if key not in stage.frozen and stage.name != HEAD_WARMUP}
        self.modules = {key: module for key, module in learn.items() if any(True for _ in module.parameters())}
        self._stage, self._name, self._steps = stage.name, name, 0

    def after_backward(self, *, last: bool) -> None:
        """Look at one step's gradients.

        In the run's ``last`` step, and after a while, name what has never had one.
        """
        self._steps += 1
        self.modules = {key: module for key, module in self.modules.items() if all(p.grad is None for p in module.parameters())}
        if last or self._steps >= _SOON:
            self.end()

    def end(self) -> None:
        """Warn of the modules that no gradient has reached."""
        if self.modules and self._steps:
            _log.warning(
                "%s: stage %r: no gradient has reached the module %s in %d steps, so it does not learn; is its part of "
                "auxiliary_losses detached or missing?",
                self._name, self._stage, ", ".join(map(repr, self.modules)), self._steps,
            )  # fmt: skip
        self.modules = {}


def _seeded(trainer: Trainer, setup: TrainerSetup, name: str) -> None:
    with torch.random.fork_rng([setup.device] if setup.device.type == "cuda" else []):
        torch.manual_seed(setup.seed)
        asked(trainer, "setup", name, setup)


def _checksums(module: nn.Module) -> list[tuple[str, list[int]]]:
    whole = ((key, value) for key, value in module.state_dict().items() if isinstance(value, torch.Tensor))
    return [(key, checksum(value).tolist()) for key, value in whole if not isinstance(value, DTensor)]
