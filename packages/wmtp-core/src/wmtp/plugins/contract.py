"""Base classes of what plugins write, which refuse misspelt names.

A name that is nearly one of the contract's is an error, not silence.

A class that a plugin derives may have public names of its own (``resolved``, a TOML key): only what is easily taken for a name
of the contract is refused, because the host would never look at it (`wmtp.plugins.names`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MemberDescriptorType
from typing import TYPE_CHECKING, Any, ClassVar, Final

from wmtp.errors import PluginError
from wmtp.plugins.names import former_names, hidden_names, is_contract, is_function, misspelt_names, own_classes, wrong_calls

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from wmtp.config.schema import HeadsConfig
    from wmtp.data.base import ExampleLoader
    from wmtp.evaluation.base import Evaluator
    from wmtp.launchers.base import Launcher
    from wmtp.models.base import ModelLoader
    from wmtp.storage.base import Storage
    from wmtp.tokenizers.base import Tokenizer
    from wmtp.tracking.base import Tracker
    from wmtp.trainers.base import Trainer

__all__ = [
    "CONFIG_CLASSES",
    "ComponentConfig",
    "Contract",
    "DataLoaderConfig",
    "EvaluatorConfig",
    "LauncherConfig",
    "ModelLoaderConfig",
    "OptimizerConfig",
    "StorageBackendConfig",
    "TokenizerConfig",
    "TrackerConfig",
    "TrainerConfig",
]


class Contract:
    """Base of every class that plugins derive from.

    A class made with ``contract=True`` declares names; all other subclasses are a plugin's, and their names are compared.
    """

    _contract_methods: ClassVar[frozenset[str]] = frozenset()
    _contract_flags: ClassVar[frozenset[str]] = frozenset()
    _contract_keys: ClassVar[frozenset[str]] = frozenset()
    #: methods that the contract had earlier, each with its name of today
    _former_methods: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, *, contract: bool = False, keys: Sequence[str] = (), **options: Any) -> None:
        """Declare the contract's names, or refuse a plugin's that are nearly such.

        Args:
            contract: whether the class belongs to the contract.
            keys: names of the class that may be fields of a config class, so that TOML sets them.

        Raises:
            PluginError: naming the class, its name, and the one that was meant.
        """
        super().__init_subclass__(**options)
        own = public_members(cls)
        if contract:
            cls._contract_methods = cls._contract_methods | {name for name, member in own.items() if _is_method(member)}
            cls._contract_flags = (cls._contract_flags | own.keys()) - cls._contract_methods
            cls._contract_keys = cls._contract_keys | set(keys)
            return
        for owner in own_classes(cls):
            if owner is not cls and issubclass(owner, Contract):
                continue  # its names were compared when it was made
            for name, now in former_names(cls, owner):
                raise PluginError(
                    f"{owner.__module__}.{owner.__qualname__}: the method {name!r} is called {now!r} now; rename it. "
                    f"If it is a name of your own, call it _{name}"
                )
            for name, meant in misspelt_names(cls, public_members(owner), owner):
                raise PluginError(
                    f"{owner.__module__}.{owner.__qualname__} has {name!r}, which WMTP does not read; did you mean {meant!r}? "
                    f"If it is a name of your own, call it _{name}"
                )
        for owner, problem in wrong_calls(cls):
            raise PluginError(f"{owner.__module__}.{owner.__qualname__}: {problem}")
        for mixin, name, found in hidden_names(cls):
            raise PluginError(
                f"{cls.__module__}.{cls.__qualname__}: {mixin.__name__}.{name} is hidden by {found.__name__}.{name}; write the "
                f"mixin first: class {cls.__name__}({mixin.__name__}, {found.__name__})"
            )

    @classmethod
    def contract_problems(cls, instance: Contract | None = None) -> Iterator[str]:
        """Find flags with wrong values, one line each.

        For the host, at registration.

        Args:
            instance: what ``build()`` made, whose own attributes count; None: only the class is known.
        """
        fields = {attribute.name for attribute in getattr(cls, "__attrs_attrs__", ())}
        for name in sorted(cls._contract_flags - cls._contract_keys - {"type"}):
            if name in fields and instance is None:
                yield f"{name} is a field, which TOML could set; write it without an annotation, or with ClassVar"
                continue
            value = inspect.getattr_static(cls if instance is None else instance, name)
            if isinstance(value, MemberDescriptorType) and instance is not None:
                value = getattr(instance, name, None)
            declared = next(vars(base)[name] for base in reversed(cls.__mro__) if is_contract(base) and name in vars(base))
            if is_function(value):
                yield f"{name} is a method, which is not called; write @property above it"
            elif hasattr(type(value), "__get__"):
                continue  # a property or other descriptor: checked when it is read
            elif isinstance(declared, tuple) and isinstance(value, str):
                yield f"{name} is a text; write ({value!r},)"
            elif isinstance(declared, tuple) and not _is_words(value):
                yield f"{name} is {value!r:.60}; write a tuple of texts"
            elif isinstance(declared, bool | int) and type(value) is not type(declared):
                yield f"{name} is {value!r:.60}; write {'True or False' if isinstance(declared, bool) else 'a whole number'}"


def public_members(owner: type) -> dict[str, Any]:
    """List a class's own public names, annotated ones too (None)."""
    own = {name: member for name, member in vars(owner).items() if not name.startswith("_")}
    return own | {name: None for name in vars(owner).get("__annotations__", {}) if not name.startswith("_") and name not in own}


def _is_method(member: object) -> bool:
    return is_function(member) or isinstance(member, property)


def _is_words(value: object) -> bool:
    return isinstance(value, tuple | list | frozenset | set) and all(isinstance(word, str) for word in value)


class ComponentConfig(Contract, contract=True, keys=("uri",)):
    """Base of all config classes, which are frozen attrs classes.

    Their fields are the keys of a component's table in TOML.
    """

    #: the component's name in TOML; every class must set it
    type: ClassVar[str]
    #: text, may be a field: an input, which must exist, or be of a scheme that a storage backend serves
    uri: Any = None
    #: further fields that are inputs, as ``uri`` is
    uri_keys: ClassVar[tuple[str, ...]] = ()
    #: keys that earlier versions of the component had, each with what to write instead; a config that has one is refused so
    former_keys: ClassVar[Mapping[str, str]] = {}
    #: modules that the component imports, each with what pip installs: a config that names it is refused where one is missing
    needs_packages: ClassVar[Mapping[str, str]] = {}

    def check(self) -> Iterable[str]:
        """Find wrong values.

        Called by ``wmtp check`` and before every run; imports no torch, uses no network.

        Returns:
            one line a problem, ``key: what is wrong; what to do``, where ``key`` is a key of the component's table.
        """
        return ()


class TrainerConfig(ComponentConfig, contract=True, keys=("reference_device", "reference_precision")):
    """Config class of an algorithm with state.

    A `wmtp.Trainer` without state is its own.
    """

    #: sections ``[models.*]`` besides ``base`` that the algorithm needs, with the base model's vocabulary; may be a property.
    #: ``base`` itself: the model as it was at the start, once more beside the one that learns
    required_models: ClassVar[tuple[str, ...]] = ()
    #: sections ``[models.*]`` with sequence classifiers of one output, with any vocabulary; may be a property
    reward_models: ClassVar[tuple[str, ...]] = ()
    #: ``train.normalizer`` that the algorithm was published with, where another one changes the size of its steps: a run with
    #: another one says so; None: any will do
    published_normalizer: ClassVar[str | None] = None
    #: whether the algorithm learns otherwise from documents with ``is_correct = false``; may be a property. Others are refused
    #: data in which right and wrong answers stand side by side
    tells_right_from_wrong: ClassVar[bool] = False
    #: text, may be a field: where the required models compute, for the memory estimate; None: where the trained model does
    reference_device: Any = None
    #: ``"fp32"`` or ``"bf16"``, may be a field: precision of the required models' parameters, for the memory estimate
    reference_precision: Any = "fp32"

    def build(self) -> Trainer:
        """Make the trainer."""
        raise NotImplementedError


class ModelLoaderConfig(ComponentConfig, contract=True, keys=("attn_implementation",)):
    """Config class of a model source.

    The local path of its ``uri`` is given to the loader.
    """

    #: text, may be a field: the attention kernel, where the loader lets choose
    attn_implementation: Any = None

    def check_heads(self, heads: HeadsConfig | None) -> Iterable[str]:
        """Find why ``[models.base.heads]`` do not fit the model.

        Called, and held to the same, as `check`.

        Args:
            heads: None where the config has no such table, so that the model brings its heads, or has none.

        Returns:
            one line a problem, ``key: what is wrong; what to do``, where ``key`` is a key of that table.
        """
        return ()

    def build(self) -> ModelLoader:
        """Make the loader."""
        raise NotImplementedError


class TokenizerConfig(ComponentConfig, contract=True, keys=("eos_token",)):
    """Config class of a tokenizer."""

    #: text, may be a field: the end-of-sequence token, for tokenizers of other models that are compared with this one
    eos_token: Any = None

    def build(self, path: Path | None) -> Tokenizer:
        """Make the tokenizer.

        Args:
            path: the local path of ``uri``, or where that is None, of the base model; None where that has no files.
        """
        raise NotImplementedError


class DataLoaderConfig(ComponentConfig, contract=True, keys=("allow_training",)):
    """Config class of a data source.

    The local path of its ``uri`` is given to the loader.
    """

    #: bool, may be a field: whether a run may learn from a source whose loader says ``evaluation_only``
    allow_training: Any = False
    #: whether right and wrong answers are given side by side, told by ``is_correct``; may be a property
    gives_wrong_answers: ClassVar[bool] = False

    def build(self) -> ExampleLoader:
        """Make the loader."""
        raise NotImplementedError


class StorageBackendConfig(ComponentConfig, contract=True):
    """Config class of a storage backend."""

    #: the URI schemes that the backend serves; at least one
    schemes: ClassVar[tuple[str, ...]] = ()
    #: whether ``checkpoints.uri`` may be one of its URIs: files are listed, replaced and removed at any time
    holds_checkpoints: ClassVar[bool] = True

    @staticmethod
    def check_uri(uri: str) -> None:
        """Raise `wmtp.ConfigError` for a URI that the backend cannot serve.

        Uses no network.
        """

    def build(self) -> Storage:
        """Make the backend."""
        raise NotImplementedError


class OptimizerConfig(ComponentConfig, contract=True, keys=("lr",)):
    """Config class of an optimizer."""

    #: it takes whole parameters only, not those that FSDP divides among processes
    takes_whole_only: ClassVar[bool] = False
    #: bytes of state for each parameter that learns, for the memory estimate
    state_bytes: ClassVar[int] = 8
    #: float, a field of every config class: the peak learning rate
    lr: Any = None

    def check_device(self, device: str) -> Iterable[str]:
        """Find why the optimizer cannot compute on a device.

        Called, and held to the same, as `check`.

        Called again when a run or a dry run has picked its device.

        Args:
            device: ``cpu``, ``cuda`` or ``mps``.

        Returns:
            one line a problem, ``key: what is wrong; what to do``, where ``key`` is a key of the component's table.
        """
        return ()

    def build(self, parameters: Sequence[tuple[str, torch.nn.Parameter]]) -> torch.optim.Optimizer:
        """Make the optimizer.

        Args:
            parameters: pairs of name and parameter.
        """
        raise NotImplementedError


class TrackerConfig(ComponentConfig, contract=True, keys=("tracking_uri",)):
    """Config class of a tracker."""

    #: text, may be a field: the place of the runs
    tracking_uri: Any = None
    #: schemes of ``tracking_uri`` that the tracker serves itself, without what follows a ``+``; a URI of any other is a place
    #: of a storage backend's, which must be installed
    own_schemes: ClassVar[tuple[str, ...]] = ("http", "https")

    def preload(self) -> None:
        """Import what the tracker needs, in a thread.

        It is called while other packages are imported. What fails fails in `start`.
        """

    def build(self) -> Tracker:
        """Make the tracker."""
        raise NotImplementedError


class EvaluatorConfig(ComponentConfig, contract=True):
    """Config class of an evaluator."""

    #: measures ``[data.eval]``: a config without that is refused before the training instead of after it
    needs_eval_data: ClassVar[bool] = False
    #: measures heads 2..H: a model that has none is refused, or with a number one that has fewer; may be a property
    needs_extra_heads: ClassVar[bool | int] = False
    #: tokens that the model must have positions for; may be a property
    needed_positions: ClassVar[int] = 0
    #: rank 0 measures alone; left out, with a warning, where processes hold parts of the model
    one_process: ClassVar[bool] = False
    #: runs code that the model writes: refused unless the user says ``--allow-code-execution``
    executes_code: ClassVar[bool] = False

    def build(self) -> Evaluator:
        """Make the evaluator."""
        raise NotImplementedError


class LauncherConfig(ComponentConfig, contract=True, keys=("processes",)):
    """Config class of a launcher."""

    #: builds a `wmtp.launchers.RemoteLauncher`: files of the config are those of another place
    remote: ClassVar[bool] = False
    #: ``"auto"`` or a whole number, may be a field: training processes on each machine
    processes: Any = 1

    def build(self) -> Launcher:
        """Make the launcher."""
        raise NotImplementedError


#: kind of component (a key of `wmtp.plugins.components.KINDS`) → the base of its config classes
CONFIG_CLASSES: Final[dict[str, type[ComponentConfig]]] = {
    "trainers": TrainerConfig,
    "model_loaders": ModelLoaderConfig,
    "tokenizers": TokenizerConfig,
    "data_loaders": DataLoaderConfig,
    "storages": StorageBackendConfig,
    "optimizers": OptimizerConfig,
    "trackers": TrackerConfig,
    "evaluators": EvaluatorConfig,
    "launchers": LauncherConfig,
}
