"""Runs of ``bench/multi_gpu.py``: their config, and ``wmtp run``."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LENGTH = 2048


class Bench:
    """Runs ``wmtp run`` and keeps what it printed.

    Args:
        folder: for run directories; those of large models are removed once their numbers are read.
        device: ``cuda``, or ``cpu`` to try the script out.
        count: devices.
        trainers: those of the part ``algorithms``.
    """

    def __init__(self, folder: Path, device: str, count: int, trainers: Sequence[str] = ()) -> None:
        self.folder, self.device, self.count, self.trainers = folder, device, count, trainers
        self.length = LENGTH if device == "cuda" else 128
        #: what is timed runs so
        self.fast: dict[str, Any] = {"devices": {"compile": device == "cuda", "precision": "bf16-params"}}

    def config(self, model: dict[str, int], gpus: int, rows: int, **changes: object) -> dict[str, object]:
        config: dict[str, object] = {
            "run": {"output_dir": str(self.folder / "runs")},
            "models": {"base": {"type": "scratch", **model, "heads": {"horizon": 4, "init": "random"}}},
            "tokenizer": {"type": "hf-transformers", "uri": str(tokenizer(self.folder, model["vocab_size"]))},
            "datasets": {"text": {"type": "jsonl", "uri": str(text(self.folder))}},
            "data": {
                "train": {
                    "max_length": self.length,
                    "batch_size": rows,
                    "micro_batch_size": max(1, rows // gpus),
                    "overlong": "split",
                    "learn_prompt": True,
                }
            },
            "trainer": {"type": "baseline-mtp"},
            "optimizer": {"type": "adamw", "lr": 3e-4},
            "schedule": {"type": "constant"},
            "train": {"max_steps": 10},
            "devices": {"device": self.device, "precision": "bf16", "fsdp": {"strategy": "full"}},
            "checkpoints": {"save_final": False},
            "tracker": {"type": "jsonl"},
            "launcher": {"type": "local", "processes": gpus},
        }
        return merged(config, changes)

    def run(self, name: str, config: dict[str, Any], *options: str, saves: bool = True) -> tuple[list[dict[str, float]], Path]:
        """Lines of ``metrics.jsonl``, and the run directory.

        Without ``saves`` the run is killed once all numbers are there: a large model takes minutes to be saved.
        """
        file, said = self.folder / f"{name}.toml", self.folder / f"{name}.log"
        run_dir, steps = Path(config["run"]["output_dir"]) / name, config["train"]["max_steps"]
        file.write_text(toml(config))
        began = time.monotonic()
        command = [sys.executable, "-m", "wmtp", "run", file, "--run-name", name, *options]
        with said.open("w") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, env=os.environ | {"NCCL_NVLS_ENABLE": "0"}
            )
        try:
            while process.poll() is None and (saves or len(lines(run_dir)) < steps):
                time.sleep(0.2)
        finally:
            killed = kill(process)
        if process.returncode and not killed:
            raise RuntimeError(f"{name}: {said.read_text()[-3000:]}")
        print(f"# {name}: {time.monotonic() - began:.0f} s", flush=True)
        return [json.loads(line) for line in lines(run_dir)], run_dir


def kill(process: subprocess.Popen[bytes]) -> bool:
    """End a command and its processes, and wait until they are gone.

    Returns whether it still ran.

    Each rank has a session of its own and would hold its GPU's memory a while longer than the command lives.
    """
    if process.poll() is not None:
        return False
    family = [process.pid, *descendants(process.pid)]
    for one in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)
    process.wait()
    while any(one in family for one, _ in running()):
        time.sleep(0.1)
    return True


def descendants(parent: int) -> list[int]:
    children = [pid for pid, its_parent in running() if its_parent == parent]
    return children + [found for child in children for found in descendants(child)]


def running() -> list[tuple[int, int]]:
    """Each living process and its parent."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listed.splitlines()]
    return [(int(pid), int(parent)) for pid, parent, state in rows if not state.startswith("Z")]


def lines(run_dir: Path) -> list[str]:
    """Records of ``metrics.jsonl``, one a step.

    The last one may be half written.
    """
    file = run_dir / "metrics.jsonl"
    return file.read_text().split("\n")[:-1] if file.exists() else []


def merged(left: dict[str, object], right: dict[str, object]) -> dict[str, object]:
    out = dict(left)
    for key, value in right.items():
        before = out.get(key)
        if value is None:
            out.pop(key, None)
        elif (
            isinstance(value, dict) and isinstance(before, dict) and value.get("type", before.get("type")) == before.get("type")
        ):
            out[key] = merged(before, value)
        else:
            out[key] = value
    return out


def toml(table: dict[str, object]) -> str:
    lines = []

    def write(values: dict[str, object], path: str) -> None:
        plain = {key: value for key, value in values.items() if not isinstance(value, dict)}
        if path:
            lines.append(f"[{path}]")
        lines.extend(f"{key} = {json.dumps(value)}" for key, value in plain.items())
        for key, value in values.items():
            if isinstance(value, dict):
                write(value, f"{path}.{key}" if path else key)

    write(table, "")
    return "\n".join(lines) + "\n"


def text(folder: Path) -> Path:
    """Pieces of the standard library's modules.

    A piece with a docstring counts as correct.
    """
    file = folder / "text.jsonl"
    if file.exists():
        return file
    with file.open("w") as out:
        for source in sorted(Path(os.__file__).parent.glob("*.py")):
            code = source.read_text(errors="replace")
            for number, start in enumerate(range(0, len(code), 4 * LENGTH)):
                piece = code[start : start + 4 * LENGTH]
                if len(piece) > 200:
                    record = {"id": f"{source.name}-{number}", "prompt": piece[:50], "completion": piece[50:]}
                    out.write(json.dumps(record | {"is_correct": '"""' in piece}) + "\n")
    return file


def model_folder(folder: Path, model: dict[str, int]) -> Path:
    """Folder of that shape with random weights and a tokenizer, made once."""
    names = {
        "layers": "num_hidden_layers",
        "attention_heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "max_positions": "max_position_embeddings",
    }
    facts = {names.get(key, key): value for key, value in model.items()}
    target = folder / f"model-{model['hidden_size']}-{model['layers']}"
    if not target.exists():
        began = time.monotonic()
        script = Path(__file__).with_name("random_model.py")
        subprocess.run([sys.executable, script, target, json.dumps(facts)], check=True)
        shutil.copytree(tokenizer(folder, model["vocab_size"]), target, dirs_exist_ok=True)
        print(f"# {target.name}: written in {time.monotonic() - began:.0f} s", flush=True)
    return target


def tokenizer(folder: Path, vocab_size: int) -> Path:
    """Tokenizer trained on that text.

    No released one is at hand everywhere.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    target = folder / f"tokenizer-{vocab_size}"
    if target.exists():
        return target
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    pieces = (json.loads(line)["completion"] for line in text(folder).read_text().splitlines())
    initial = pre_tokenizers.ByteLevel.alphabet()
    settings = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["</s>"], initial_alphabet=initial, show_progress=False
    )
    made.train_from_iterator(pieces, settings)
    target.mkdir()
    made.save(str(target / "tokenizer.json"))
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": None}
    (target / "tokenizer_config.json").write_text(json.dumps(facts))
    return target
