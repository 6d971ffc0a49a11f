"""Speed of tokenising: the token cache, beside `tokenizers` alone and `datasets.map`.

    uv run python bench/tokenise.py TOKENIZER_FOLDER [FILE.jsonl] [--rounds 3]

Texts are the records' ``text``; without a file, the standard library of Python in documents of 4,000 characters. What is
compared is measured in turn, in every round: the machine may have other work. CPU seconds say what it costs, wall seconds what
cores give.
`datasets.map` is measured where the package is installed (``uv pip install datasets``).
"""

from __future__ import annotations

import argparse
import json
import os
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from wmtp.data.cache import token_store
from wmtp.data.config import Jsonl
from wmtp.tokenizers.hf import HfTokenizer


def main() -> None:
    """Measure, and print a line for each round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    tokenizer = HfTokenizer(options.tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        data = options.data or write_sample(Path(scratch) / "sample.jsonl")
        texts = [json.loads(line)["text"] for line in data.open(encoding="utf-8")]
        tokens = sum(len(tokenizer.encode_first(text)) for text in texts)
        print(f"{len(texts):,} texts, {tokens:,} tokens, {os.cpu_count()} cores")
        work: dict[str, Callable[[], object]] = {
            "encode_batch": lambda: tokenizer._first.encode_batch(texts, add_special_tokens=False),
            "wmtp": lambda: store(data, tokenizer),
        }
        if find_spec("datasets") is not None:
            work["datasets.map"] = lambda: mapped(texts, tokenizer)
        for _ in range(options.rounds):
            report(tokens, {name: measured(each) for name, each in work.items()})


def report(tokens: int, found: Mapping[str, tuple[float, float]]) -> None:
    """Print tokens per second, and how each compares with `encode_batch`."""
    bare = found["encode_batch"]
    parts = [
        f"{name} {tokens / wall:,.0f} tokens/s ({bare[0] / wall:.2f} of encode_batch; by CPU time {bare[1] / cpu:.2f})"
        for name, (wall, cpu) in found.items()
    ]
    print("; ".join(parts), flush=True)


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """Return wall and CPU seconds."""
    began, cpu = time.monotonic(), time.process_time()
    kept = work()
    ended = time.monotonic() - began, time.process_time() - cpu
    del kept  # what it holds is freed outside of the time
    return ended


def store(data: Path, tokenizer: HfTokenizer) -> object:
    """Build a token cache."""
    with tempfile.TemporaryDirectory() as folder:
        config = Jsonl(uri=str(data))
        return len(token_store("bench", config, data, tokenizer, cache_dir=Path(folder), on_bad_example="error"))


def mapped(texts: Sequence[str], tokenizer: HfTokenizer) -> object:
    """Tokenise with the package datasets, in batches, into a cache of its own."""
    datasets = import_module("datasets")
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        table = datasets.Dataset.from_dict({"text": list(texts)})
        made = table.map(
            lambda batch: tokenizer._tokenizer(batch["text"], return_attention_mask=False, verbose=False),
            batched=True,
            remove_columns=["text"],
            cache_file_name=f"{folder}/tokens.arrow",
            load_from_cache_file=False,
        )
        return len(made)


def write_sample(path: Path) -> Path:
    """Write the standard library as documents."""
    root = Path(sysconfig.get_paths()["stdlib"])
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for source in sorted(root.rglob("*.py")):
            if "site-packages" in source.parts or count > 2000:
                continue
            text = source.read_text(encoding="utf-8", errors="replace")
            for start in range(0, len(text), 4000):
                file.write(json.dumps({"text": text[start : start + 4000]}) + "\n")
                count += 1
    return path


if __name__ == "__main__":
    main()
