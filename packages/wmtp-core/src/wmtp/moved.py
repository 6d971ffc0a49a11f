"""Old names of modules, whose import names the new one.

Plugins and scripts that followed the repository before 0.1.0 have them. The whole module can go with 0.2.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Final

__all__ = ["MOVED", "install"]

MOVED: Final = {
    "wmtp.training.acceleration": "wmtp.models.acceleration",
    "wmtp.config.components": "wmtp.plugins.components",
    "wmtp.data.document_numbers": "wmtp.data.score_cache.document_numbers",
    "wmtp.data.sources": "wmtp.config.data_rules",
    "wmtp.data.token_numbers": "wmtp.data.score_cache.token_numbers",
    "wmtp.data.units": "wmtp.data.groups",
    "wmtp.distributed.sharding": "wmtp.models.sharding",
    "wmtp.distributed.share": "wmtp.distributed.ranks",
    "wmtp.export": "wmtp.exporting",
    "wmtp.hookspecs": "wmtp.plugins.hookspecs",
    "wmtp.launchers.cluster": "wmtp.distributed.environment",
    "wmtp.launchers.records": "wmtp.runs.records",
    "wmtp.logs": "wmtp.log_lines",
    "wmtp.loss.fused": "wmtp.loss.triton.fused",
    "wmtp.loss.kernels": "wmtp.loss.triton.kernels",
    "wmtp.loss.lists": "wmtp.loss.torch_backend.lists",
    "wmtp.loss.plain": "wmtp.loss.torch_backend.plain",
    "wmtp.loss.problem": "wmtp.loss.cross_entropy",
    "wmtp.loss.solve": "wmtp.loss.cross_entropy",
    "wmtp.models.remote": "wmtp.storage.model_folders",
    "wmtp.plugins.builtin": "wmtp.builtin",
    "wmtp.report": "wmtp.reporting",
    "wmtp.result": "wmtp.runs.result",
    "wmtp.run_dir": "wmtp.runs.directory",
    "wmtp.run_files": "wmtp.runs.files",
    "wmtp.runner": "wmtp.api",
    "wmtp.storage.backends": "wmtp.config.places",
    "wmtp.trainers.views": "wmtp.trainers.base",
    "wmtp.training.adamw_kernel": "wmtp.optim.adamw_kernel",
    "wmtp.training.cached_numbers": "wmtp.data.score_cache.cached_numbers",
    "wmtp.training.checkpoint": "wmtp.checkpoints.local",
    "wmtp.training.checkpoint_facts": "wmtp.checkpoints.manifest",
    "wmtp.training.contract": "wmtp.trainers.checks",
    "wmtp.training.devices": "wmtp.devices",
    "wmtp.training.gradients": "wmtp.optim.update",
    "wmtp.training.master_adamw": "wmtp.optim.master_adamw",
    "wmtp.training.master_weights": "wmtp.optim.master_weights",
    "wmtp.training.metrics": "wmtp.runs.step_file",
    "wmtp.training.modules": "wmtp.trainers.modules",
    "wmtp.training.optimizer_config": "wmtp.optim.config",
    "wmtp.training.optimizers": "wmtp.optim.build",
    "wmtp.training.prefetch": "wmtp.training.stages",
    "wmtp.training.progress": "wmtp.training.telemetry",
    "wmtp.training.random_state": "wmtp.training.checkpointing",
    "wmtp.training.readback": "wmtp.training.telemetry",
    "wmtp.training.remote_checkpoints": "wmtp.checkpoints.remote",
    "wmtp.training.resumption": "wmtp.checkpoints.find",
    "wmtp.training.reward_scores": "wmtp.models.reward_scores",
    "wmtp.training.schedule": "wmtp.optim.update",
    "wmtp.training.step_log": "wmtp.training.telemetry",
    "wmtp.training.step_numbers": "wmtp.training.telemetry",
    "wmtp.training.trainer": "wmtp.trainers.base",
    "wmtp.training.weight_bins": "wmtp.runs.weight_bins",
    "wmtp.training.weights": "wmtp.loss.weights",
}


class _Finder:
    """Asked last, after every finder that could have found the module."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        """Raise for a module that has moved; find nothing else."""
        if name in MOVED:
            raise ModuleNotFoundError(f"{name} has moved; import {MOVED[name]}, or what it offers from wmtp", name=name)


def install() -> None:
    """Answer imports of old names."""
    if not any(finder is _Finder for finder in sys.meta_path):
        sys.meta_path.append(_Finder)  # type: ignore[arg-type]
