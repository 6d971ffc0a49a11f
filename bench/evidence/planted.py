"""Makes training data with planted truth: functions with known noise.

    python bench/evidence/planted.py DIR [PACKAGE_FOLDER …] [--kind foreign] [--share 0.4] [--functions 10000] [--longest 1500]

``DIR/train-KIND-SHARE.jsonl.gz`` has functions of installed Python packages with noise in them, and a weight for every piece of
text: 1 for what is the function's own, 0 for what was planted. ``reference.jsonl.gz`` and ``heldout.jsonl.gz`` have other
functions, without noise. No function is in two of them. The same arguments and packages give the same files. ``--from FILE``
plants other noise in the functions of a file that was made before, on a machine with other packages too. ``--breaks FILE``
copies a file to ``DIR/breaks-…``, where the first word behind a planted line has no weight either.

Kinds of noise: ``foreign`` lines of other functions between the function's own; ``shuffled`` lines, in an order that is not
theirs; ``mutated`` names and numbers, in place of which stands one of another function; ``boilerplate``, one block of text in
every function; ``blobs``, lines of encoded data.
"""

from __future__ import annotations

import argparse
import ast
import base64
import gzip
import itertools
import json
import random
import re
import sysconfig
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

#: pieces of text, each with whether it was planted
Pieces = list[tuple[str, bool]]

_SKIPPED = {"test", "tests", "testing", "__pycache__", "node_modules", "site-packages", "dist-packages"}
_WORD = re.compile(r"[A-Za-z_]\w{2,}|\d+")
_FIRST_WORD = re.compile(r"\s*(\w+|\S)")
_BOILERPLATE = [
    "    # Licensed to the Example Software Foundation under one or more agreements.\n",
    "    # See the NOTICE file distributed with this work for additional information.\n",
    "    # Unless required by applicable law or agreed to in writing, software is\n",
    '    # distributed on an "AS IS" basis, without warranties of any kind.\n',
]


def functions(folders: Iterable[Path], *, shortest: int, longest: int, most: int, seed: int) -> Iterator[tuple[str, str]]:
    """Find functions with a docstring, once each.

    Yields their place and their text, in ASCII and of some length.

    Files come in an order by ``seed``, so that whoever takes the first so many has some of every package, and at most ``most``
    of each: some are written by programs, and all alike.
    """
    files = [(file, file.relative_to(folder)) for folder in folders for file in folder.rglob("*.py")]
    files = [(file, name) for file, name in files if not _SKIPPED.intersection(part.lower() for part in name.parts)]
    files.sort(key=lambda one: one[1].as_posix())
    random.Random(seed).shuffle(files)
    seen: set[str] = set()
    counts: Counter[str] = Counter()
    for file, name in files:
        if counts[name.parts[0]] >= most:
            continue
        try:
            source = file.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except (OSError, ValueError, SyntaxError, RecursionError):
            continue
        lines = source.split("\n")
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or ast.get_docstring(node, clean=False) is None:
                continue
            text = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])).rstrip() + "\n"
            if text.isascii() and shortest <= len(text) <= longest and text not in seen:
                seen.add(text)
                counts[name.parts[0]] += 1
                yield f"{name.as_posix()}:{node.name}:{node.lineno}", text


def foreign(lines: Sequence[str], share: float, others: Sequence[str], draw: random.Random) -> Pieces:
    """Insert lines of other functions until they are this share."""
    pieces: Pieces = []
    for line in lines:
        pieces.append((line, False))
        while draw.random() < share:
            pieces.append((draw.choice(others), True))
    return pieces


def shuffled(lines: Sequence[str], share: float, others: Sequence[str], draw: random.Random) -> Pieces:
    """Exchange lines of the body among themselves, until this share stands elsewhere."""
    chosen = sorted(draw.sample(range(1, len(lines)), round(share * (len(lines) - 1))))
    order = list(range(len(lines)))
    for place, taken in zip(chosen, [*chosen[1:], *chosen[:1]], strict=True):
        order[place] = taken
    return [(lines[taken], taken != place) for place, taken in enumerate(order)]


def mutated(lines: Sequence[str], share: float, others: Sequence[str], draw: random.Random) -> Pieces:
    """Replace a share of names and numbers by other functions'."""
    pieces: Pieces = []
    text, end = "".join(lines), 0
    for match in _WORD.finditer(text):
        found = _WORD.findall(draw.choice(others)) if draw.random() < share else []
        if found:
            pieces += [(text[end : match.start()], False), (draw.choice(found), True)]
            end = match.end()
    return [*pieces, (text[end:], False)]


def boilerplate(lines: Sequence[str], share: float, others: Sequence[str], draw: random.Random) -> Pieces:
    """Put one block of text, always the same, behind the first line."""
    return [(lines[0], False), *((line, True) for line in _BOILERPLATE), *((line, False) for line in lines[1:])]


def blobs(lines: Sequence[str], share: float, others: Sequence[str], draw: random.Random) -> Pieces:
    """Insert lines of encoded data until they are this share."""
    pieces: Pieces = []
    for line in lines:
        pieces.append((line, False))
        while draw.random() < share:
            pieces.append((f"{base64.b64encode(draw.randbytes(24)).decode()}\n", True))
    return pieces


KINDS: dict[str, Callable[[Sequence[str], float, Sequence[str], random.Random], Pieces]] = {
    "foreign": foreign,
    "shuffled": shuffled,
    "mutated": mutated,
    "boilerplate": boilerplate,
    "blobs": blobs,
}


def joined(pieces: Pieces) -> list[list[object]]:
    """Join neighbours that are alike.

    ``[text, weight]`` pairs, as the data loader ``jsonl`` reads them.
    """
    pairs: list[list[object]] = []
    for text, planted in pieces:
        weight = 0.0 if planted else 1.0
        if pairs and pairs[-1][1] == weight:
            pairs[-1][0] = f"{pairs[-1][0]}{text}"
        elif text:
            pairs.append([text, weight])
    return pairs


def write(path: Path, records: Iterable[dict[str, object]]) -> None:
    """Write records; the same ones give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as file:
        for record in records:
            file.write((json.dumps(record) + "\n").encode())
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


def clean(found: Iterable[tuple[str, str]]) -> Iterator[dict[str, object]]:
    """Records of functions as they are."""
    for place, text in found:
        yield {"id": place, "prompt": "", "completion": text, "is_correct": True}


def noisy(found: Sequence[tuple[str, str]], kind: str, share: float, seed: int) -> Iterator[dict[str, object]]:
    """Records with planted noise and a weight for every piece."""
    draw = random.Random(f"{kind} {share} {seed}")
    others = [line for _, text in found for line in text.splitlines(keepends=True)[1:] if line.strip()]
    for place, text in found:
        lines = text.splitlines(keepends=True)
        pairs = joined(KINDS[kind](lines, share, others, draw) if share else [(text, False)])
        whole = "".join(str(part) for part, _ in pairs)
        yield {"id": place, "prompt": "", "completion": whole, "weights": pairs, "is_correct": True}


def unplanted(path: Path) -> list[tuple[str, str]]:
    """Read the functions of a file with noise, without it.

    Only kinds that add lines leave a function whole.
    """
    if path.name.startswith(("train-shuffled", "train-mutated")):
        raise SystemExit(f"{path}: its functions are not whole any more; take a file of another kind")
    found: list[tuple[str, str]] = []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for record in map(json.loads, file):
            found.append((record["id"], "".join(text for text, weight in record["weights"] if weight)))
    return found


def broken(path: Path) -> Iterator[dict[str, object]]:
    """Take the weight from the first word behind planted lines too.

    Nothing before it foretells its place.
    """
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for record in map(json.loads, file):
            pairs: list[list[object]] = []
            for text, weight in record["weights"]:
                first = _FIRST_WORD.match(text) if weight and pairs else None
                cut = first.end() if first is not None else 0
                pairs += [[part, value] for part, value in ((text[:cut], 0.0), (text[cut:], weight)) if part]
            yield {**record, "weights": pairs}


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("packages", type=Path, nargs="*", help="default: the standard library and all that is installed")
    parser.add_argument("--kind", choices=list(KINDS), default="foreign")
    parser.add_argument("--share", type=float, default=0.4)
    parser.add_argument("--functions", type=int, default=10000, help="with noise")
    parser.add_argument("--reference", type=int, default=5000, help="functions without noise, for a reference")
    parser.add_argument("--heldout", type=int, default=300)
    parser.add_argument("--shortest", type=int, default=200, help="characters")
    parser.add_argument("--longest", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--from", dest="before", type=Path, metavar="FILE", help="functions of an earlier train-foreign-… file")
    parser.add_argument(
        "--breaks", type=Path, metavar="FILE", help="of a train-foreign-… file one without the breaks' weights, too"
    )
    arguments = parser.parse_args()
    if arguments.breaks is not None:
        write(arguments.folder / arguments.breaks.name.replace("train-", "breaks-"), broken(arguments.breaks))
        return
    name = f"train-{arguments.kind}-{round(100 * arguments.share)}.jsonl.gz"
    if arguments.before is not None:
        records = noisy(unplanted(arguments.before), arguments.kind, arguments.share, arguments.seed)
        write(arguments.folder / name, records)
        return
    paths = sysconfig.get_paths()
    folders = arguments.packages or [Path(paths["stdlib"]), Path(paths["purelib"])]
    wanted = arguments.functions + arguments.reference + arguments.heldout
    lengths = {"shortest": arguments.shortest, "longest": arguments.longest}
    most = wanted if arguments.packages else wanted // 12
    every = functions(folders, **lengths, most=most, seed=arguments.seed)
    found = list(itertools.islice(every, wanted))
    if len(found) < wanted:
        parser.error(f"{len(found)} functions were found in {', '.join(map(str, folders))}, and {wanted} are wanted")
    random.Random(arguments.seed).shuffle(found)
    heldout, rest = found[: arguments.heldout], found[arguments.heldout :]
    reference, train = rest[: arguments.reference], rest[arguments.reference :][: arguments.functions]
    write(arguments.folder / "heldout.jsonl.gz", clean(heldout))
    write(arguments.folder / "reference.jsonl.gz", clean(reference))
    write(arguments.folder / name, noisy(train, arguments.kind, arguments.share, arguments.seed))


if __name__ == "__main__":
    main()
