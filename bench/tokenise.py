"""Speed of tokenizing: the token cache, beside `tokenizers` alone and `datasets.map`.

    uv run python bench/tokenise.py TOKENIZER_FOLDER [FILE.jsonl] [--rounds 3] [--megabytes 24] [--forms long,short,pairs]
    uv run python bench/tokenise.py TOKENIZER_FOLDER --memory 300

Texts are the records' ``text``, or their ``prompt`` and ``completion``; without a file, the standard library of Python in
documents of 4,000 characters (``long``), of 300 (``short``), and in pairs of 200 and 400 (``pairs``). `encode_batch` encodes
the same texts, all at once, and is to the store what a disk's speed is to a copy.

What is compared is measured in turn, in every round: the machine may have other work. CPU seconds say what it costs, wall
seconds what cores give; ``taskset -c 0,1`` says what two cores give. The last line has the best of all rounds. A cache starts
processes after 4 million characters, half a second of work of each core; less data shows that start, more the steady state.
`datasets.map` is measured where the package is installed (``uv pip install datasets``), also with a process a core.

With ``--memory`` a cache is made of so many megabytes and of a tenth of them; the peaks of all its processes together should be
alike.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Final

from wmtp.data.cache import token_store
from wmtp.data.config import Jsonl
from wmtp.tokenizers.hf import HfTokenizer

#: characters of a document, and of them those of its prompt
FORMS: Final = {"long": (4000, 0), "short": (300, 0), "pairs": (600, 200)}


def main() -> None:
    """Measure, and print a line for each round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=float, default=24.0)
    parser.add_argument("--memory", type=float, help="measure memory, with so many megabytes")
    parser.add_argument("--forms", default=",".join(FORMS))
    options = parser.parse_args()
    tokenizer = HfTokenizer(options.tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        if options.memory is not None:
            memory(Path(scratch), tokenizer, options.memory)
            return
        if options.data is not None:
            compared(options.data.name, options.data, tokenizer, options.rounds)
            return
        for form in options.forms.split(","):
            sample = write_sample(Path(scratch) / f"{form}.jsonl", *FORMS[form], round(options.megabytes * 1e6))
            compared(form, sample, tokenizer, options.rounds)
            sample.unlink()


def compared(name: str, data: Path, tokenizer: HfTokenizer, rounds: int) -> None:
    """Measure the ways to tokenize a file."""
    texts = list(texts_of(data))
    tokens = sum(len(ids) for start in range(0, len(texts), 1000) for ids in tokenizer.encode_many(texts[start : start + 1000]))
    print(f"{name}: {len(texts):,} texts, {tokens:,} tokens, {len(os.sched_getaffinity(0))} cores", flush=True)
    work: dict[str, Callable[[], object]] = {
        "encode_batch": lambda: tokenizer._first.encode_batch(texts, add_special_tokens=False),
        "wmtp": lambda: store(data, tokenizer),
    }
    if find_spec("datasets") is not None:
        work["datasets.map"] = lambda: mapped(texts, tokenizer)
        work["datasets.map with processes"] = lambda: mapped(texts, tokenizer, len(os.sched_getaffinity(0)))
    found: list[dict[str, tuple[float, float]]] = []
    for _ in range(rounds):
        found.append({name: measured(each) for name, each in work.items()})
        report("  ", tokens, found[-1])
    best = {name: (min(each[name][0] for each in found), min(each[name][1] for each in found)) for name in work}
    report("  best: ", tokens, best)
    print(f"  peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB", flush=True)


def memory(folder: Path, tokenizer: HfTokenizer, megabytes: float) -> None:
    """Print the peak memory of a small and of a large cache."""
    print(f"before: {resident() / 1e6:.0f} MB", flush=True)
    for size in (megabytes / 10, megabytes):
        sample = write_sample(folder / "memory.jsonl", *FORMS["short"], round(size * 1e6))
        began = time.monotonic()
        peak = peak_of(partial(store, sample, tokenizer))
        print(f"{size:.0f} MB of texts in {time.monotonic() - began:.0f} s: peak {peak / 1e6:.0f} MB", flush=True)


def peak_of(work: Callable[[], object]) -> int:
    """Return the most bytes that were in memory meanwhile."""
    ended, peaks = threading.Event(), [0]

    def watch() -> None:
        while not ended.wait(0.1):
            peaks.append(resident())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        work()
    finally:
        ended.set()
        thread.join()
    return max(peaks)


def resident() -> int:
    """Return the bytes in memory of this process and its children."""
    children: list[str] = []
    for thread in Path("/proc/self/task").iterdir():  # each lists the processes that it has started itself
        with suppress(OSError):
            children += (thread / "children").read_text().split()
    total = 0
    for each in ("self", *children):
        with suppress(OSError):
            total += int(Path(f"/proc/{each}/statm").read_text().split()[1]) * resource.getpagesize()
    return total


def report(title: str, tokens: int, found: Mapping[str, tuple[float, float]]) -> None:
    """Print tokens per second, and how each compares with `encode_batch`."""
    bare = found["encode_batch"]
    parts = [
        f"{name} {tokens / wall:,.0f} tokens/s ({bare[0] / wall:.2f} of encode_batch; by CPU time {bare[1] / cpu:.2f})"
        for name, (wall, cpu) in found.items()
    ]
    print(title + "; ".join(parts), flush=True)


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """Return wall and CPU seconds."""
    began, cpu = time.monotonic(), cpu_seconds()
    kept = work()
    ended = time.monotonic() - began, cpu_seconds() - cpu
    del kept  # what it holds is freed outside of the time
    return ended


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of its ended children."""
    used = [resource.getrusage(which) for which in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def store(data: Path, tokenizer: HfTokenizer) -> object:
    """Build a token cache."""
    with tempfile.TemporaryDirectory() as folder:
        config = Jsonl(uri=str(data))
        return len(token_store("bench", config, data, tokenizer, cache_dir=Path(folder), on_bad_example="error"))


def mapped(texts: Sequence[str], tokenizer: HfTokenizer, processes: int | None = None) -> object:
    """Tokenize with the package datasets, in batches, into its cache."""
    datasets = import_module("datasets")
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        table = datasets.Dataset.from_dict({"text": list(texts)})
        made = table.map(
            lambda batch: tokenizer._tokenizer(batch["text"], return_attention_mask=False, verbose=False),
            batched=True,
            remove_columns=["text"],
            num_proc=processes,
            cache_file_name=f"{folder}/tokens.arrow",
            load_from_cache_file=False,
        )
        # with processes, datasets sets it to false for all that follows; and tokenizers goes down to one thread after a fork
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        return len(made)


def texts_of(data: Path) -> Iterator[str]:
    """Read the texts of a file, prompts and completions apart."""
    with data.open(encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            yield from (record[key] for key in ("prompt", "completion", "text") if record.get(key))


def write_sample(path: Path, length: int, prompt: int, size: int) -> Path:
    """Write the standard library's documents until the file has its size."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = [source for source in sorted(root.rglob("*.py")) if "site-packages" not in source.parts]
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for source in cycle(sources):
            text = source.read_text(encoding="utf-8", errors="replace")
            for start in range(0, len(text), length):
                part = text[start : start + length]
                record = {"prompt": part[:prompt], "completion": part[prompt:] or "\n"} if prompt else {"text": part}
                written += file.write(json.dumps(record) + "\n")
            if written > size:
                return path
    return path


if __name__ == "__main__":
    main()
