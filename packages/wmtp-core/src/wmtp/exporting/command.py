"""Export of a model in the layout of another tool."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from attrs import frozen

from wmtp.checkpoints.find import checkpoint_folder
from wmtp.checkpoints.local import Checkpoint, best_step, list_checkpoints, load_checkpoint_weights
from wmtp.config.load import load
from wmtp.config.schema import StorageConfig
from wmtp.errors import ConfigError
from wmtp.exporting import FORMATS
from wmtp.exporting.card import model_card
from wmtp.exporting.medusa import write_medusa
from wmtp.exporting.meta import write_meta
from wmtp.exporting.served import write_served
from wmtp.models.adapter_folder import tokenizer_place
from wmtp.models.mtp import MTPModel
from wmtp.models.opening import find_model, find_tokenizer, load_weights
from wmtp.models.vocabulary import check_vocabulary
from wmtp.runs.directory import CONFIG_FILE, is_run_dir
from wmtp.storage.atomic import write_folder
from wmtp.storage.model_files import ADAPTER_CONFIG, check_folder
from wmtp.storage.uris import local_path
from wmtp.tokenizers import Tokenizer
from wmtp.tokenizers.hf import HF_FILES, HfTokenizer
from wmtp.tokenizers.saved import SAVED_NAME
from wmtp.tokenizers.sentencepiece import MODEL_NAME

__all__ = ["Exported", "export_model"]

_log = logging.getLogger("wmtp")
_MODEL_FILES = ("config.json", "params.json", ADAPTER_CONFIG)


@frozen(kw_only=True)
class Exported:
    """Result of `export_model`.

    Args:
        model: the local path of the exported model.
        folder: where the export is.
        format: a key of `wmtp.exporting.FORMATS`.
        horizon: H of the model; in format ``hf`` only head 1 is in the folder.
        files: the files and their sizes in bytes.
    """

    model: Path
    folder: Path
    format: str
    horizon: int
    files: Mapping[str, int]


def export_model(
    name: str, folder: str | Path, *, format: str, checkpoint: str | None = None, storage: StorageConfig | None = None
) -> Exported:
    """Do what ``wmtp export`` does.

    The folder appears whole or not at all.

    Args:
        name: a run directory, a model folder, a ``.gguf`` file, or a URI of one.
        folder: a folder that is not there yet, or is empty.
        format: a key of `wmtp.exporting.FORMATS`.
        checkpoint: of a run, in place of its model: ``best``, ``last``, or the step of one that it has kept.
        storage: how to reach the store of a URI. Default: as without a config.

    Raises:
        ConfigError: there is no such model or format, the format cannot hold the model, or the folder is not empty.
        WMTPError: something cannot be read or written.
    """
    if format not in FORMATS:
        raise ConfigError(f"format: {format!r} is none of {', '.join(FORMATS)}")
    target = local_path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target}: exists already and is no empty folder; name a new one")
    path, run_dir = find_model(name, storage)
    if run_dir is None and path.name == "model" and is_run_dir(path.parent):
        run_dir = path.parent
    if path.is_dir() and not any((path / file).is_file() for file in _MODEL_FILES) and not any(path.glob("*.gguf")):
        check_folder(path)  # of an adapter's weights alone it says what is missing
        raise ConfigError(f"{name}: no model: the folder holds none of {', '.join(_MODEL_FILES)} or a .gguf file")
    kept = None if checkpoint is None else find_checkpoint(name, run_dir, checkpoint)
    model = load_weights(path, run_dir=run_dir, storage=storage)
    if kept is not None:
        load_checkpoint_weights(kept, model)
        _log.info("%s: the weights of step %d", name, kept.step)
    if model.adapter is not None:
        _log.info("%s: its adapter is merged into the model", name)
        model.merge_adapter()
    if model.draft_ids is not None and format in ("meta", "medusa"):
        raise ConfigError(
            f"format: {format!r} cannot say that heads 2..H draft from {len(model.draft_ids):,} of {model.vocab_size:,} tokens "
            "(models.base.heads.draft_vocabulary); export 'wmtp' or 'hf'"
        )
    place = path if run_dir is not None else tokenizer_place(path, storage=storage)
    tokenizer = None if format == "medusa" else _tokenizer(name, place, run_dir, model)
    write: dict[str, Callable[[Path], None]] = {
        "hf": lambda draft: _write_hf(model, tokenizer, draft),
        "wmtp": lambda draft: _write_wmtp(model, tokenizer, draft),
        "meta": lambda draft: _write_meta(model, tokenizer, place, draft),
        "mtp": lambda draft: _write_served(model, tokenizer, draft),
        "medusa": lambda draft: write_medusa(model, draft),
    }

    def fill(draft: Path) -> None:
        write[format](draft)
        step = None if kept is None else kept.step
        card = model_card(model, format=format, run_dir=run_dir, source=path, tokenizer=tokenizer, step=step)
        (draft / "README.md").write_text(card, encoding="utf-8")

    write_folder(target, fill)
    files = {file.relative_to(target).as_posix(): file.stat().st_size for file in sorted(target.rglob("*")) if file.is_file()}
    return Exported(model=path, folder=target, format=format, horizon=model.horizon, files=files)


def find_checkpoint(name: str, run_dir: Path | None, wanted: str) -> Checkpoint:
    """Find a checkpoint that a run has kept.

    Args:
        name: what messages call the run.
        run_dir: its directory; None where ``name`` is no run.
        wanted: ``best``, ``last`` or a step.

    Raises:
        ConfigError: there is none such; the message names those that there are.
    """
    if run_dir is None:
        raise ConfigError(f"--checkpoint {wanted}: {name} is no run directory, and only runs have checkpoints")
    folder = checkpoint_folder(load(run_dir / CONFIG_FILE).config, run_dir)
    kept = list_checkpoints(folder)
    steps = ", ".join(str(one.step) for one in kept) or "none"
    if wanted == "last" and kept:
        return kept[-1]
    step = best_step(kept[-1]) if wanted == "best" and kept else int(wanted) if wanted.isdecimal() else None
    found = next((one for one in kept if one.step == step), None)
    if found is not None:
        return found
    why = f"there are checkpoints of these steps in {folder}: {steps}"
    if wanted == "best" and step is None:
        why = f"the run has remembered no best one (checkpoints.best, or early stopping by [data.eval]); {why}"
    raise ConfigError(f"--checkpoint {wanted}: {why}")


def _tokenizer(name: str, path: Path, run_dir: Path | None, model: MTPModel) -> Tokenizer | None:
    known = (SAVED_NAME, MODEL_NAME, *HF_FILES)
    if run_dir is None and path.is_dir() and not any((path / file).is_file() for file in known):
        _log.warning("%s: the model has no tokenizer beside it, so the export has none", name)
        return None
    tokenizer = find_tokenizer(path, run_dir)
    check_vocabulary(model.vocab_size, tokenizer, key=name)
    return tokenizer


def _write_served(model: MTPModel, tokenizer: Tokenizer | None, folder: Path) -> None:
    layout = write_served(model, folder)
    _save_tokenizer(tokenizer, folder)
    if layout == "mimo" and isinstance(tokenizer, HfTokenizer):
        # beside a config of the type qwen2, transformers puts Qwen2's way of splitting in the place of the tokenizer's own
        own = folder / "tokenizer"
        own.mkdir()
        _save_tokenizer(tokenizer, own)
        _log.warning(
            "servers would split text as Qwen2 does: start them with --tokenizer and the folder 'tokenizer' in this one"
        )


def _write_hf(model: MTPModel, tokenizer: Tokenizer | None, folder: Path) -> None:
    model.save_base(folder)
    _save_tokenizer(tokenizer, folder)


def _save_tokenizer(tokenizer: Tokenizer | None, folder: Path) -> None:
    if tokenizer is not None:
        tokenizer.save(folder)
    if isinstance(tokenizer, HfTokenizer):  # transformers' own files say all of it
        (folder / SAVED_NAME).unlink()


def _write_wmtp(model: MTPModel, tokenizer: Tokenizer | None, folder: Path) -> None:
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save(folder)


def _write_meta(model: MTPModel, tokenizer: Tokenizer | None, source: Path, folder: Path) -> None:
    write_meta(model, folder)
    if tokenizer is None:
        return
    tokenizer.save(folder)
    if not (folder / MODEL_NAME).is_file():
        if source.is_dir() and (source / MODEL_NAME).is_file():
            shutil.copyfile(source / MODEL_NAME, folder / MODEL_NAME)
        else:
            _log.warning("Meta's own code reads a SentencePiece %s, and this model's tokenizer has none", MODEL_NAME)
