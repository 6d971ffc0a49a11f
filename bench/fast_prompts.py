"""Prompts for heads that draft: documented Python functions, whole files held out."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import lzma
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import wmtp

__all__ = ["held_out_prompts", "write_prompts"]

PACKAGES = (
    *("torch", "transformers", "numpy", "huggingface_hub", "tokenizers", "sympy", "networkx", "setuptools", "mpmath", "jinja2"),
    *("triton", "accelerate", "peft", "torchao", "gguf"),
)


def functions() -> Iterator[tuple[str, str, str, bool]]:
    """Yield file, prompt and body, no prompt twice.

    And whether it is of the standard library.
    """
    seen = set()
    library, packages = Path(sysconfig.get_paths()["stdlib"]), Path(sysconfig.get_paths()["purelib"])
    for root in (library, *(packages / name for name in PACKAGES)):
        if not root.is_dir():
            continue
        loader = wmtp.PythonSource(uri=str(root), max_length=2000, min_length=100).build()
        for example in loader.examples(root):
            if isinstance(example, wmtp.Example) and example.prompt not in seen and len(example.prompt) < 1200:
                seen.add(example.prompt)
                yield example.place.rpartition(":")[0], example.prompt, example.completion, root == library


def held_out_prompts(count: int) -> list[str]:
    """List prompts of the standard library's files that `write_prompts` keeps from training."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in library.rglob("*.py") if "site-packages" not in file.parts and _is_held_out(file)]
    loader = wmtp.PythonSource(uri=str(library), max_length=2000, min_length=100).build()
    examples = [example for file in files for example in loader.examples(file) if isinstance(example, wmtp.Example)]
    prompts = {example.prompt for example in examples if len(example.prompt) < 1200}
    return sorted(prompts, key=lambda prompt: hashlib.sha256(prompt.encode()).hexdigest())[:count]


def _is_held_out(file: Path) -> bool:
    return int(hashlib.sha256(file.name.encode()).hexdigest(), 16) % 10 == 0


def write_prompts(arguments: argparse.Namespace) -> tuple[Path, list[str]]:
    """Write the functions to learn from, and list the held-out prompts.

    Those are of every tenth file of the standard library.
    """
    data, other = arguments.folder / "functions.jsonl", arguments.folder / "held-out.json"
    if not other.exists():
        learned: list[tuple[int, dict[str, str]]] = []
        held_out: list[tuple[int, str]] = []
        for file, prompt, body, of_library in functions() if arguments.prompts_from is None else ():
            number = int(hashlib.sha256(prompt.encode()).hexdigest(), 16)
            if not _is_held_out(Path(file)):
                learned.append((number, {"prompt": prompt, "completion": body}))
            elif of_library:
                held_out.append((number, prompt))
        records = [record for _, record in sorted(learned, key=lambda pair: pair[0])]
        records += [half for record in records if (half := halved(record)) is not None]
        if arguments.prompts_from is not None:
            held_out = list(enumerate(held_out_prompts(10**6)))
            records = given_prompts(arguments.prompts_from, {prompt for _, prompt in held_out})
        records = [record for record in records if len(record["prompt"]) <= arguments.prompt_chars][: arguments.prompts]
        # rows that are decoded together are of like length: a batch's cache is as long as its longest
        records.sort(key=lambda record: len(record["prompt"]))
        data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        other.write_text(json.dumps([prompt for _, prompt in sorted(held_out)][: arguments.held_out]), encoding="utf-8")
    prompts = json.loads(other.read_text(encoding="utf-8"))
    return data, prompts


def given_prompts(file: Path, held_out: set[str]) -> list[dict[str, str]]:
    """Read records, but for those of a function that is held out.

    Packages keep copies of each other's functions, with other quotes or a longer documentation.
    """
    with (lzma.open if file.suffix == ".xz" else gzip.open)(file, "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    begins, marks = tuple(held_out), {mark for prompt in held_out for mark in _marks(prompt)}
    return [
        record for record in records if not record["prompt"].startswith(begins) and marks.isdisjoint(_marks(record["prompt"]))
    ]


def _marks(prompt: str) -> list[str]:
    """List what identifies a function, however it is quoted.

    The beginning of its documentation: with its name, and alone where it is long.
    """
    signature, *rest = re.split(r'"""|\'\'\'', prompt, maxsplit=1)
    documentation = " ".join((rest[0] if rest else prompt).split()).lower()
    named = re.search(r"def\s+\w+", signature)
    marks = [f"{named[0] if named else ''} {documentation[:40]}"]
    return [*marks, documentation[:50]] if len(documentation) >= 50 else marks


def halved(record: dict[str, str]) -> dict[str, str] | None:
    """Move the first half of a body's lines into the prompt.

    None where there are fewer than four.
    """
    lines = record["completion"].splitlines(keepends=True)
    if len(lines) < 4:
        return None
    half = len(lines) // 2
    return {"prompt": record["prompt"] + "".join(lines[:half]), "completion": "".join(lines[half:])}
