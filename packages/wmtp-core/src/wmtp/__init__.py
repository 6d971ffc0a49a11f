"""WMTP: weighted multi-token-prediction fine-tuning of language models.

``wmtp.run("recipe.toml")`` does what ``wmtp run recipe.toml`` does. Importing this package is cheap: every name is loaded
when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wmtp import moved

if TYPE_CHECKING:
    from wmtp.api import run
    from wmtp.config.load import load_config
    from wmtp.config.schema import Config
    from wmtp.errors import ConfigError, PluginError, WMTPError
    from wmtp.models import load_model
    from wmtp.plugins.contract import (
        DataLoaderConfig,
        EvaluatorConfig,
        LauncherConfig,
        ModelLoaderConfig,
        OptimizerConfig,
        StorageBackendConfig,
        TokenizerConfig,
        TrackerConfig,
        TrainerConfig,
    )
    from wmtp.plugins.hookspecs import hookimpl
    from wmtp.runs.result import Result
    from wmtp.trainers.base import HiddenView, Stage, StepView, Trainer
    from wmtp.trainers.setup import TrainerSetup

    __version__: str

moved.install()

__all__ = [
    "Config",
    "ConfigError",
    "DataLoaderConfig",
    "EvaluatorConfig",
    "HiddenView",
    "LauncherConfig",
    "ModelLoaderConfig",
    "OptimizerConfig",
    "PluginError",
    "Result",
    "Stage",
    "StepView",
    "StorageBackendConfig",
    "TokenizerConfig",
    "TrackerConfig",
    "Trainer",
    "TrainerConfig",
    "TrainerSetup",
    "WMTPError",
    "__version__",
    "hookimpl",
    "load_config",
    "load_model",
    "run",
]

_HOMES = {
    "Config": "wmtp.config.schema",
    "ConfigError": "wmtp.errors",
    "DataLoaderConfig": "wmtp.plugins.contract",
    "EvaluatorConfig": "wmtp.plugins.contract",
    "HiddenView": "wmtp.trainers.base",
    "LauncherConfig": "wmtp.plugins.contract",
    "ModelLoaderConfig": "wmtp.plugins.contract",
    "OptimizerConfig": "wmtp.plugins.contract",
    "PluginError": "wmtp.errors",
    "Result": "wmtp.runs.result",
    "Stage": "wmtp.trainers.base",
    "StepView": "wmtp.trainers.base",
    "StorageBackendConfig": "wmtp.plugins.contract",
    "TokenizerConfig": "wmtp.plugins.contract",
    "TrackerConfig": "wmtp.plugins.contract",
    "Trainer": "wmtp.trainers.base",
    "TrainerConfig": "wmtp.plugins.contract",
    "TrainerSetup": "wmtp.trainers.setup",
    "WMTPError": "wmtp.errors",
    "hookimpl": "wmtp.plugins.hookspecs",
    "load_config": "wmtp.config.load",
    "load_model": "wmtp.models",
    "run": "wmtp.api",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("wmtp-core")
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
