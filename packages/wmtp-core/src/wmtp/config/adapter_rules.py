"""Rules of ``[models.base.lora]`` and ``quantize``. Needs neither torch nor peft."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from wmtp.config.problems import Problem
from wmtp.config.schema import Config, HeadsConfig, LoraConfig
from wmtp.json_files import read_json_object
from wmtp.storage.model_files import ADAPTER_CONFIG

__all__ = ["OWN_ADAPTER_CONFIG", "adapted_heads_problem", "adapter_problems", "is_start_model", "other_settings"]

#: what WMTP knows of an adapter and PEFT's config has no place for
OWN_ADAPTER_CONFIG: Final = "wmtp_adapter.json"


def is_start_model(config: Config, name: str) -> bool:
    """Tell whether ``[models.NAME]`` is the trained model before its adapter learned."""
    base = config.models["base"]
    return base.lora is not None and (name == "base" or (name == "ref" and config.models[name].loader == base.loader))


def adapter_problems(config: Config) -> Iterator[Problem]:
    """Report adapters where none can be, and missing packages."""
    for name, model in config.models.items():
        if model.quantize is not None:
            yield from _quantized(name, config)
        if model.lora is None:
            continue
        path = ("models", name, "lora")
        if name != "base":
            yield Problem(path, "only models.base has adapters; remove this table")
        elif model.lora.heads == "adapters" and model.heads and (problem := adapted_heads_problem(model.heads)):
            yield Problem((*path, "heads"), problem)
        elif model.loader.type != "hf":
            yield Problem(
                path,
                f"a model of type {model.loader.type!r} is no Hugging Face folder, on which PEFT could put the adapter again; "
                "remove this table, or train a model of type 'hf'",
            )
        elif not config.launcher.remote and find_spec("peft") is None:
            yield Problem(path, "needs peft: pip install 'wmtp-core[lora]'")


def adapted_heads_problem(heads: HeadsConfig) -> str | None:
    """Say why heads 2..H cannot learn by adapters alone.

    None where they can, as far as the config tells.
    """
    if heads.horizon == 1:
        return 'there are no heads 2..H (horizon = 1); write heads = "full", the default'
    if heads.kind in (None, "native") or (heads.kind == "block" and heads.init == "copy"):
        return None
    what = "begin with random layers" if heads.kind == "block" else f"are of kind '{heads.kind}'"
    return (
        f'heads that {what} must learn in full: an adapter changes little; write heads = "full", or take copies of the last '
        'layer: models.base.heads.kind = "block", init = "copy"'
    )


def other_settings(folder: Path, lora: LoraConfig, quantize: str | None) -> Iterator[Problem]:
    """Report settings that an adapter cannot go on learning under.

    Its targets are left to `wmtp.models.adapter_targets.check_same`, which knows the model.

    Args:
        folder: of the adapter.
        lora: the config's ``[models.base.lora]``.
        quantize: the config's ``models.base.quantize``.

    Raises:
        FileError: a file is damaged.
    """
    content, file = read_json_object(folder / ADAPTER_CONFIG), folder / OWN_ADAPTER_CONFIG
    own = read_json_object(file) if file.is_file() else None
    remedy = "write that, or merge it first: wmtp export --format wmtp"
    settings: dict[str, tuple[Any, Any]] = {
        "rank": (lora.rank, content.get("r")),
        "alpha": (lora.resolved_alpha, content.get("lora_alpha")),
        "dora": (lora.dora, bool(content.get("use_dora"))),
        "rslora": (lora.rslora, bool(content.get("use_rslora"))),
        "heads": (lora.heads, (own or {}).get("heads", "full")),
    }
    for key, (new, was) in settings.items():
        if new != was:
            new = int(new) if key == "alpha" and new.is_integer() else new
            yield Problem(("models", "base", "lora", key), f"{new!r}, but the adapter in {folder} has {was!r}; {remedy}")
    if own is not None and quantize != own.get("quantize"):  # PEFT's own files do not tell
        new, was = (f'"{kind}"' if kind else "no quantize" for kind in (quantize, own.get("quantize")))
        yield Problem(("models", "base", "quantize"), f"{new}, but the adapter in {folder} was learned with {was}; {remedy}")


def _quantized(name: str, config: Config) -> Iterator[Problem]:
    path = ("models", name, "quantize")
    if name != "base":
        yield Problem(path, "only models.base is quantized; remove this key")
    elif config.models[name].lora is None:
        yield Problem(path, "weights in 4 bits cannot learn; add the table [models.base.lora], or remove this key")
    elif config.devices.device == "mps":
        yield Problem(path, 'bitsandbytes has no kernels for devices.device = "mps"; remove this key')
    elif not config.launcher.remote and find_spec("bitsandbytes") is None:
        yield Problem(path, "needs bitsandbytes: pip install 'wmtp-core[bnb]'")
