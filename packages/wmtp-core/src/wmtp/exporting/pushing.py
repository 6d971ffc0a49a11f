"""Push of a run's model to a store, with a model card."""

from __future__ import annotations

import tempfile
from pathlib import Path

from wmtp.config.places import build_backends
from wmtp.config.schema import StorageConfig
from wmtp.exporting.card import model_card
from wmtp.models.opening import find_model, find_tokenizer, load_weights
from wmtp.storage.uris import backend_for

__all__ = ["push_run"]


def push_run(run_dir: Path, uri: str, storage: StorageConfig) -> None:
    """Push a run's model with all heads and a model card.

    ``model/`` is copied to ``uri``, with the card as ``README.md``.

    Args:
        run_dir: the run directory.
        uri: the target, whose content is replaced.
        storage: how to reach it.

    Raises:
        ConfigError: the run has saved no model, or nothing serves the URI.
        WMTPError: it could not be read or written.
    """
    backend = backend_for(uri, build_backends(storage))
    path, _ = find_model(run_dir)
    model, tokenizer = load_weights(path, run_dir=run_dir), find_tokenizer(path, run_dir)
    format = "wmtp" if model.adapter is None else "adapter"
    card = model_card(model, format=format, run_dir=run_dir, source=path, tokenizer=tokenizer)
    with tempfile.TemporaryDirectory(prefix="wmtp-") as temporary:
        folder = Path(temporary, run_dir.resolve().name)
        folder.mkdir()
        for file in path.iterdir():
            (folder / file.name).symlink_to(file.resolve())
        (folder / "README.md").unlink(missing_ok=True)
        (folder / "README.md").write_text(card, encoding="utf-8")
        backend.push(folder, uri)
