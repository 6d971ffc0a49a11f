"""From a checked config to the parts that the loop works with."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from attrs import frozen
from torch.distributed.fsdp import FSDPModule

from wmtp.config.adapter_rules import adapted_heads_problem, is_start_model
from wmtp.config.data_rules import read_from
from wmtp.config.fp8_rules import fp8_misfits
from wmtp.config.places import Place
from wmtp.config.problems import dotted
from wmtp.config.required_models import required_models
from wmtp.config.schema import Config, HeadsConfig, LoraConfig, ModelConfig
from wmtp.errors import ConfigError, WMTPError
from wmtp.models.base import LoadedModel, ModelInfo, ModelLoader, load_model, make_loader, model_info
from wmtp.plugins.built import built
from wmtp.plugins.contract import TrainerConfig
from wmtp.plugins.provenance import provenance
from wmtp.storage.model_files import is_adapter, quantization, quantized_problem
from wmtp.storage.model_folders import LOADERS
from wmtp.tokenizers import Tokenizer
from wmtp.trainers.base import Trainer
from wmtp.trainers.declarations import check_trainer
from wmtp.trainers.setup import OpenModel

if TYPE_CHECKING:
    from wmtp.data.batches import StepBatches
    from wmtp.models.mtp import MTPModel

__all__ = [
    "Source",
    "build_trainer",
    "load_base_model",
    "load_extra_model",
    "open_source",
    "planned_steps",
]

logger = logging.getLogger("wmtp")


@frozen(kw_only=True, eq=False)
class Source:
    """Model, tokenizer and data as known before any weight is read.

    Args:
        place: resolves URIs.
        model_path: the local path of the base model; None for one from scratch.
        model_info: its metadata.
        rows: V of each model that reads the run's tokens, by its name in messages.
        tokenizer: checked against the model's vocabulary.
        dataset_paths: the local path of each data set.
    """

    place: Place
    model_path: Path | None
    model_info: ModelInfo
    rows: Mapping[str, int]
    tokenizer: Tokenizer
    dataset_paths: Mapping[str, Path | None]


def open_source(config: Config) -> Source:
    """Find a config's files, and check all that needs no weights.

    Raises:
        ConfigError: rows longer than a model's positions, a tokenizer that is not that of every model, settings of fp8 that
            the model excludes, or a base folder of which a part would be lost.
        WMTPError: files are missing or damaged.
    """
    from wmtp.data.prepare import use_chat_template
    from wmtp.models.vocabulary import check_vocabulary

    place = Place.of(config)
    base = config.models["base"]
    path = place.path(base.loader, "models.base")
    if path is not None and base.loader.type in LOADERS and (method := quantization(path)) is not None:
        raise ConfigError(f"models.base: {quantized_problem(path, method)}")
    info = model_info(base.loader, config.storage, path)
    if info.unsavable is not None and base.lora is None:  # the base of an adapter is not saved
        raise ConfigError(f"models.base: {info.unsavable}")
    if base.lora is not None:
        _check_lora(make_loader(base.loader, config.storage), base, base.lora, path, info)
    _check_length(info, config, "the model")
    _check_draft_vocabulary(info, config)
    shape = {"hidden_size": info.hidden_size, "layers": info.layers}
    if problems := fp8_misfits(config.devices, **shape, maps=info.linear_maps, heads=base.heads):
        raise ConfigError(problems)
    _check_evaluators(info, config)
    tokenizer = _open_tokenizer(config, place, path)
    use_chat_template(tokenizer, config.data.train)
    own = path is not None and (config.tokenizer is None or config.tokenizer.uri in (None, base.loader.uri))
    check_vocabulary(info.vocab_size, tokenizer, own=own)
    rows = {"the model": info.vocab_size}
    for name, kind in required_models(config).items():
        if kind.scores_texts:
            _check_reward_model(name, config, place)
        else:
            rows[f"[models.{name}]"] = _check_extra_model(name, config, place, tokenizer)
    if unneeded := config.models.keys() - {"base"} - required_models(config).keys():
        logger.info("models: %s: not used by the trainer '%s'", ", ".join(sorted(unneeded)), config.trainer.type)
    datasets = {}
    for name, dataset in config.datasets.items():
        component, where = read_from(dataset, ("datasets", name))
        datasets[name] = place.path(component, dotted(where))
    return Source(place=place, model_path=path, model_info=info, rows=rows, tokenizer=tokenizer, dataset_paths=datasets)


def _check_lora(loader: ModelLoader, model: ModelConfig, lora: LoraConfig, path: Path | None, info: ModelInfo) -> None:
    """Find what is to be adapted, on a model without weights."""
    from wmtp.models.adapter_folder import check_settings
    from wmtp.models.adapter_targets import resolve_targets, targets_within
    from wmtp.models.anatomy import find_layers
    from wmtp.models.build import resolve_heads
    from wmtp.models.loaders.hf import HfLoader

    if not isinstance(loader, HfLoader):  # `wmtp.config.adapter_rules` refuses others
        raise ConfigError("models.base.lora: models of this type have no adapters")
    base = loader.empty(path)
    if path is not None and is_adapter(path):
        check_settings(path, lora, model.quantize, base)
    else:
        targets = resolve_targets(base, lora)
        heads = resolve_heads(model.heads, info.heads, info.native)
        if lora.heads == "adapters" and (problem := adapted_heads_problem(heads)) is not None:
            raise ConfigError(f"models.base.lora.heads: {problem}")
        if lora.heads == "adapters" and heads.kind == "block":  # copies of the last layer
            targets_within(find_layers(base, base.base_model, ConfigError)[-1:], targets)
    if experts := sorted({name.rpartition(".")[2] for name, tensor in base.named_parameters() if tensor.ndim == 3}):
        logger.info(
            "models.base.lora: experts (%s) are no linear maps: they get no adapters, and stay as they are", ", ".join(experts)
        )


def _open_tokenizer(config: Config, place: Place, model_path: Path | None) -> Tokenizer:
    """Open the tokenizer that the config names, or the base model's own."""
    from wmtp.models.vocabulary import check_reading
    from wmtp.tokenizers.checks import check_tokenizer
    from wmtp.tokenizers.load import load_tokenizer

    if config.tokenizer is not None:
        named = place.path(config.tokenizer, "tokenizer")
        chosen = built(config.tokenizer, "tokenizers", model_path if named is None else named)
        check_tokenizer(chosen, provenance(config.tokenizer, "tokenizer"))
        if model_path is not None and (beside := _readable_tokenizer(config, model_path)) is not None:
            check_reading(beside, chosen)
        return chosen
    if model_path is None:
        raise ConfigError("tokenizer: a model from scratch brings none; add the table [tokenizer]")
    return load_tokenizer(_tokenizer_place(config, "base", model_path))


def _tokenizer_place(config: Config, name: str, path: Path) -> Path:
    from wmtp.models.adapter_folder import tokenizer_place

    return tokenizer_place(path, getattr(config.models[name].loader, "base_uri", None), config.storage)


def _readable_tokenizer(config: Config, model_path: Path) -> Tokenizer | None:
    """Open the tokenizer beside a model; None if that fails.

    The table ``[tokenizer]`` is for such models.
    """
    from wmtp.tokenizers.load import load_tokenizer

    named = None if config.tokenizer is None else config.tokenizer.eos_token
    for eos_token in (None, named):  # its own, or where it names none the config's
        with suppress(WMTPError):
            return load_tokenizer(model_path, eos_token=eos_token)
    return None


def _check_length(info: ModelInfo, config: Config, model: str) -> None:
    longest = info.max_positions
    if longest is not None and config.data.train.max_length > longest:
        raise ConfigError(
            f"data.train.max_length: {config.data.train.max_length}, but {model} has positions for {longest} tokens; "
            f"write at most {longest}"
        )
    switching = info.switching_length
    if config.data.train.packing and switching is not None and config.data.train.max_length > switching:
        raise ConfigError(
            f"data.train.packing: {model} scales its positions by the length of a text beyond {switching} tokens, so the "
            "longest document of a row would change the others; set data.train.packing = false, or data.train.max_length to "
            f"at most {switching}"
        )


def _check_draft_vocabulary(info: ModelInfo, config: Config) -> None:
    heads = config.models["base"].heads
    size = None if heads is None else heads.draft_vocabulary
    if size is not None and size > info.vocab_size:
        raise ConfigError(
            f"models.base.heads.draft_vocabulary: {size}, but the model has a vocabulary of {info.vocab_size}; write less, or "
            "leave it out"
        )


def _check_evaluators(info: ModelInfo, config: Config) -> None:
    """Check before training that the evaluators can run after it."""
    from wmtp.models.build import resolve_heads

    heads = resolve_heads(config.models["base"].heads, info.heads, info.native)
    problems = []
    for index, evaluator in enumerate(config.eval):
        wanted = int(evaluator.needs_extra_heads)
        if wanted >= heads.horizon:
            few = "has none" if heads.horizon == 1 else f"has {heads.horizon - 1}"
            many = "extra heads" if wanted == 1 else f"{wanted} extra heads"
            problems.append(
                f"eval.{index}: '{evaluator.type}' needs {many}, and this model {few} (H = {heads.horizon}); write "
                f"models.base.heads.horizon = {wanted + 1} or more, or leave it out"
            )
        needed = evaluator.needed_positions
        if info.max_positions is not None and needed > info.max_positions:
            problems.append(
                f"eval.{index}: '{evaluator.type}' needs positions for {needed} tokens, and the model has "
                f"{info.max_positions}; write fewer tokens"
            )
    if problems:
        raise ConfigError(problems)


def _check_extra_model(name: str, config: Config, place: Place, tokenizer: Tokenizer) -> int:
    """Check a further model's vocabulary and length; return its V."""
    from wmtp.models.vocabulary import check_vocabulary, compare_tokenizers

    key = f"models.{name}"
    loader = config.models[name].loader
    path = place.path(loader, key)
    info = model_info(loader, config.storage, path)
    if path is not None and loader != config.models["base"].loader:  # the base itself need have no tokenizer beside it
        compare_tokenizers(tokenizer, _own_tokenizer(config, _tokenizer_place(config, name, path), key), key=key)
    check_vocabulary(info.vocab_size, tokenizer, own=path is not None, key=key)  # its tokens are those of its own
    _check_length(info, config, f"[{key}]")
    return info.vocab_size


def _check_reward_model(name: str, config: Config, place: Place) -> None:
    """Check that a reward model exists.

    It has a vocabulary of its own.
    """
    from wmtp.models.config import HfModel
    from wmtp.models.reward import check_reward_model

    loader = config.models[name].loader
    if not isinstance(loader, HfModel):
        raise ConfigError(f"models.{name}.type: {loader.type!r} loads no reward model; write 'hf'")
    check_reward_model(place.path(loader, f"models.{name}") or Path(), f"models.{name}")


def _own_tokenizer(config: Config, path: Path, key: str) -> Tokenizer:
    """Open the tokenizer that lies beside a model."""
    from wmtp.tokenizers.load import load_tokenizer
    from wmtp.tokenizers.saved import read_saved

    saved = read_saved(path) if path.is_dir() else None
    try:
        if saved is not None and config.tokenizer is not None and saved["type"] == config.tokenizer.type:
            return built(config.tokenizer, "tokenizers", path)  # of another plugin, perhaps, which only the config can name
        return load_tokenizer(path, eos_token=None if config.tokenizer is None else config.tokenizer.eos_token)
    except WMTPError as error:
        raise ConfigError(
            f"{key}: its vocabulary must be the base model's, and cannot be read: {error}; put the files of its tokenizer "
            "beside the model"
        ) from error


def load_base_model(config: Config, source: Source) -> MTPModel:
    """Load the model to train, with its heads, on the CPU.

    Its parameters may be those of its files (`wmtp.models.base.ModelLoader.open_stored`), which the trained ones are made of
    where they shall be; not where an adapter is merged into them, or measures them (DoRA).

    Raises:
        ConfigError: the heads do not fit the model, or its rows cannot hold several documents.
        WMTPError: the files are missing or damaged, or the trained model could not be saved.
    """
    base = config.models["base"]
    loader = make_loader(base.loader, config.storage)
    path = source.model_path
    whole = base.lora.dora if base.lora is not None else path is not None and is_adapter(path)
    stored = None if whole else loader.open_stored(path, seed=config.run.seed)
    if stored is not None and stored.model.dtype == torch.float32:
        return _build_base(config, source, stored)
    if stored is not None:
        with suppress(ConfigError):  # a trial in few bits may fail where one in fp32 does not, which then decides
            return _build_base(config, source, stored)
    return _build_base(
        config, source, load_model(base.loader, loader, source.model_path, dtype=torch.float32, seed=config.run.seed)
    )


def _build_base(config: Config, source: Source, loaded: LoadedModel) -> MTPModel:
    from wmtp.models.adapter_folder import name_base
    from wmtp.models.build import build_model, merge_brought
    from wmtp.models.saving import make_savable

    base = config.models["base"]
    make_savable(loaded.model, source.tokenizer, source=source.model_path, untouched=loaded.untouched)
    name = None if source.model_path is None else name_base(str(base.loader.uri), source.model_path)
    model = build_model(loaded, base.heads, config.run.seed, lora=base.lora, name=name, quantize=base.quantize)
    if base.lora is None:
        merge_brought(model)
    if config.data.train.packing:
        model.check_packing()
    return model


def load_extra_model(config: Config, place: Place, trained_on: torch.device, trained: MTPModel | None = None) -> OpenModel:
    """Return the function by which a trainer loads ``[models.NAME]``; see `OpenModel`.

    Args:
        config: names the models.
        place: resolves their URIs.
        trained_on: the trained model's device.
        trained: the model that is trained. With an adapter it is its own start model too, where it computes as that would.
    """
    from wmtp.models.acceleration import accelerate
    from wmtp.models.build import build_model
    from wmtp.models.mapped import settle
    from wmtp.models.start_model import StartModel

    def load(name: str, *, dtype: torch.dtype = torch.float32, device: torch.device | None = trained_on) -> MTPModel:
        entry: ModelConfig | None = config.models.get(name)
        if entry is None:
            raise ConfigError(f"models.{name}: the trainer needs this model; add the table [models.{name}]")
        path = place.path(entry.loader, f"models.{name}")
        if trained is not None and device == trained_on and is_start_model(config, name) and _has_start(trained, path, dtype):
            logger.info("models.%s: the trained model with its adapter off; there is no second one", name)
            return StartModel(trained)
        loader = make_loader(entry.loader, config.storage)
        merges = path is not None and is_adapter(path)
        stored = None if merges else loader.open_stored(path, seed=config.run.seed)
        loaded = stored or load_model(entry.loader, loader, path, dtype=dtype, seed=config.run.seed)
        if loaded.stored is not None:  # else it has its type already, and perhaps an adapter to come
            # there it is tried out too, which needs numbers
            settle(loaded.model, torch.device("cpu") if device is None or device.type == "meta" else device, dtype)
        try:
            model = build_model(loaded, HeadsConfig(horizon=1), config.run.seed)
        except ConfigError as error:  # it says so of the model that is trained
            raise ConfigError([problem.replace("models.base:", f"models.{name}:", 1) for problem in error.problems]) from error
        if config.data.train.packing and model.packing.problem is not None:
            raise ConfigError(f"data.train.packing: [models.{name}]: {model.packing.problem}; set data.train.packing = false")
        model = model.to(device).eval().requires_grad_(False)
        if device == trained_on:
            accelerate(model, config.devices, learns=False)
        return model

    return load


def _has_start(trained: MTPModel, path: Path | None, dtype: torch.dtype) -> bool:
    """Tell whether the model without its adapter is the base.

    It then computes as another copy of the base would in ``dtype``. It does not where it began with an adapter that had
    learned, or where its processes hold a part each.

    It does not where it began with an adapter that had learned, or where its processes hold a part each.
    """
    began_plain = path is None or not is_adapter(path)
    return began_plain and not isinstance(trained, FSDPModule) and trained.anatomy.output.weight.dtype == dtype


def build_trainer(component: TrainerConfig) -> tuple[Trainer, str]:
    """Make a trainer, and the name that messages give it.

    Raises:
        PluginError: what is made breaks the contract.
    """
    name = provenance(component)
    return check_trainer(component.build(), name), name


def planned_steps(config: Config, batches: StepBatches) -> int:
    """Count the run's optimizer steps.

    The smaller of what ``train.max_steps`` and ``train.epochs`` give.
    """
    limits = [] if config.train.max_steps is None else [config.train.max_steps]
    if config.train.epochs is not None or not limits:
        limits.append(batches.total_steps(config.train.epochs or 1.0))
    steps = min(limits)
    if mixed := batches.mixed(steps):
        parts = (f"{name} {share:.1%} of the tokens, {epochs:.2f} epochs" for name, (share, epochs) in mixed.items())
        logger.info("data.train.mixture: %s", "; ".join(parts))
    return steps
