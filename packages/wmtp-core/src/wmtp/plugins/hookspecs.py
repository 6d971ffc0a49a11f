"""Hooks by which a package adds components to WMTP.

A plugin is a module named by an entry point of the group ``wmtp``. Each hook takes no argument and returns an iterable of
*config classes*: frozen attrs classes with a class variable ``type``, the component's name in TOML, and a method
``build`` that makes the component. A plugin module imports no torch; ``build`` does. Each kind has a base class in
`wmtp.plugins.contract` (``wmtp.TrainerConfig``, ``wmtp.EvaluatorConfig`` …), which declares all that WMTP reads of a
config class. A public name that is nearly one of those is an error; other names are a plugin's own, and names that begin with
``_`` always.

Every key of the component's table is a field of the class, checked strictly against its annotation; attrs validators and
``__attrs_post_init__`` may refuse values by raising ``ValueError``. A field ``uri`` names an input: it must exist, or be of a
scheme that a storage backend serves. A field made with `wmtp.config.component` holds another component.

Values that look like secrets are refused, because configs are kept and shown. A table named ``secrets`` holds the *names* that
secrets have on a service.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pluggy

__all__ = ["PROJECT", "hookimpl", "hookspec"]

PROJECT = "wmtp"
hookspec = pluggy.HookspecMarker(PROJECT)
#: Decorator of a plugin's functions that are named after hooks.
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def wmtp_trainers() -> Iterable[type[Any]]:  # type: ignore[empty-body]
    """Algorithms: which predicted tokens matter, which extra modules learn, in which stages.

    A `wmtp.Trainer` without state is its own config class. One with state has a `wmtp.TrainerConfig`, whose
    ``build() -> wmtp.Trainer`` makes it. `Trainer.setup` loads what ``required_models`` names with ``setup.model("ref")``, asks
    for the scores of ``reward_models`` with ``setup.reward_scores("rm", …)``, and gets the local path of the fields in
    ``uri_keys`` by ``setup.fetch``.

    Example::

        import attrs
        import wmtp


        @attrs.frozen(kw_only=True)
        class EveryOtherToken(wmtp.Trainer):
            \"\"\"Learns every other token only.\"\"\"

            type = "every-other"
            offset: int = 0

            def token_weights(self, view):
                return ((view.batch.position + self.offset) % 2).float()


        @wmtp.hookimpl
        def wmtp_trainers():
            return [EveryOtherToken]
    """


@hookspec
def wmtp_model_loaders() -> Iterable[type[Any]]:  # type: ignore[empty-body]
    """Model sources: how a file or folder becomes a causal language model.

    ``build() -> wmtp.models.ModelLoader``. A config class with a field ``uri`` has it resolved by the storage backends;
    the loader gets the local path.

    Example::

        @attrs.frozen(kw_only=True)
        class MyFormat(wmtp.ModelLoaderConfig):
            type = "my-format"
            uri: str

            def build(self):
                from my_package.loader import MyFormatLoader

                return MyFormatLoader()


        @wmtp.hookimpl
        def wmtp_model_loaders():
            return [MyFormat]
    """


@hookspec
def wmtp_tokenizers() -> Iterable[type[Any]]:  # type: ignore[empty-body]
    """Tokenizers.

    ``build(path) -> wmtp.tokenizers.Tokenizer``; ``path`` is the local path of the config's ``uri`` field, or, where that
    is absent or None, of the base model.

    Example::

        @attrs.frozen(kw_only=True)
        class Characters(wmtp.TokenizerConfig):
            type = "characters"
            alphabet: str

            def build(self, path):
                from my_package.tokenizer import CharacterTokenizer

                return CharacterTokenizer(self.alphabet)


        @wmtp.hookimpl
        def wmtp_tokenizers():
            return [Characters]
    """


@hookspec
def wmtp_data_loaders() -> Iterable[type[Any]]:  # type: ignore[empty-body]
    """Data sources: how files become examples.

    ``build() -> wmtp.data.ExampleLoader``. A config class with a field ``uri`` has it resolved by the storage backends.

    Example::

        @attrs.frozen(kw_only=True)
        class Dialogues(wmtp.DataLoaderConfig):
            type = "dialogues"
            uri: str

            def build(self):
                from my_package.dialogues import DialogueLoader

                return DialogueLoader()


        @wmtp.hookimpl
        def wmtp_data_loaders():
            return [Dialogues]
    """


@hookspec
def wmtp_storages() -> Iterable[type[Any]]:  # type: ignore[empty-body]
    """Storage backends for URIs of some schemes.

    ``build() -> wmtp.storage.Storage``.

    Example::

        @attrs.frozen(kw_only=True)
        class Archive(wmtp.StorageBackendConfig):
            type = "archive"
            schemes = ("archive",)

            def build(self):
                from my_package.archive import ArchiveStorage

                return ArchiveStorage()


        @wmtp.hookimpl
        def wmtp_storages():
            return [Archive]
    """


@hookspec
def wmtp_optimizers() -> Iterable[type[Any]]:  # type: ignore[empty-body]
    """Optimizers.

    ``build(parameters) -> torch.optim.Optimizer``; ``parameters`` is a list of ``(name, parameter)``, and each must be in
    one of its groups: one left out would never learn, and is an error. Every config class has
    the field ``lr``. ``check_device(device)``, optional, says what it cannot do on ``cpu``, ``cuda`` or ``mps``.

    Example::

        @attrs.frozen(kw_only=True)
        class SGD(wmtp.OptimizerConfig):
            type = "sgd"
            lr: float = 1e-2
            momentum: float = 0.9

            def build(self, parameters):
                import torch

                return torch.optim.SGD([p for _, p in parameters], lr=self.lr, momentum=self.momentum)


        @wmtp.hookimpl
        def wmtp_optimizers():
            return [SGD]
    """


@hookspec
def wmtp_trackers() -> Iterable[type[Any]]:  # type: ignore[empty-body]
    """Experiment trackers: where parameters and metrics go besides ``metrics.jsonl``.

    ``build() -> wmtp.tracking.Tracker``.

    Example::

        @attrs.frozen(kw_only=True)
        class Printer(wmtp.TrackerConfig):
            type = "printer"

            def build(self):
                from my_package.tracker import PrinterTracker

                return PrinterTracker()


        @wmtp.hookimpl
        def wmtp_trackers():
            return [Printer]
    """


@hookspec
def wmtp_evaluators() -> Iterable[type[Any]]:  # type: ignore[empty-body]
    """Measurements of a model, run by ``[[eval]]`` after training.

    ``build() -> wmtp.evaluation.Evaluator``. `wmtp.testing.EvaluatorTests` tests one.

    Example::

        @attrs.frozen(kw_only=True)
        class Surprise(wmtp.EvaluatorConfig):
            type = "surprise"

            def build(self):
                from my_package.surprise import SurpriseEvaluator

                return SurpriseEvaluator()


        @wmtp.hookimpl
        def wmtp_evaluators():
            return [Surprise]
    """


@hookspec
def wmtp_launchers() -> Iterable[type[Any]]:  # type: ignore[empty-body]
    """Places where a run happens.

    ``build() -> wmtp.launchers.Launcher``, or with ``remote = True`` a `RemoteLauncher`, which hands the run to a service:
    ``wmtp launch``, ``status``, ``logs``, ``cancel`` and ``metrics`` use it.

    Example::

        @attrs.frozen(kw_only=True)
        class Slurm(wmtp.LauncherConfig):
            type = "slurm"
            partition: str

            def build(self):
                from my_package.slurm import SlurmLauncher

                return SlurmLauncher(self.partition)


        @wmtp.hookimpl
        def wmtp_launchers():
            return [Slurm]
    """
