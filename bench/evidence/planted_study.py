"""Runs a planted-truth study, and scores each arm's weights.

    python bench/evidence/planted_study.py bench/evidence/study-a.toml --data DIR --model MODEL --out OUT \
        [--noise foreign-40] [--arms A,B] [--seeds 0,1] [--jobs 2] [--minutes 9] [--set KEY=VALUE]

It goes on where it ended before; on another machine from OUT/results.tar.gz of the last call (``--from FILE``). A ``.gguf``
file is turned into a folder first, once. OUT/results.tar.gz has the records of all runs, the measurements, the table and the
page.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import wmtp


def model_folder(model: str, beside: Path) -> str:
    """Turn a GGUF file into a Hugging Face folder, once.

    A folder is returned as it is.
    """
    if not model.endswith(".gguf"):
        return model
    folder = beside / "base-model"
    if not (folder / "config.json").exists():
        wmtp.export(model, folder, format="hf")
    return str(folder)


def planted(path: Path) -> dict[str, tuple[str, list[bool]]]:
    """Read each document's text, and which characters were planted."""
    found: dict[str, tuple[str, list[bool]]] = {}
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            found[record["id"]] = (record["completion"], [weight == 0.0 for text, weight in record["weights"] for _ in text])
    return found


def token_labels(tokens: Sequence[str], text: str, planted: Sequence[bool]) -> list[bool | None]:
    """Label each token by its first character that is no space.

    None for tokens that are no part of the text.
    """
    labels: list[bool | None] = []
    place = 0
    for token in tokens:
        if not token or not text.startswith(token, place):
            labels.append(None)
            continue
        inside = next((i for i, character in enumerate(token) if not character.isspace()), 0)
        labels.append(planted[place + inside])
        place += len(token)
    return labels


def auc(own: Sequence[float], foreign: Sequence[float]) -> float | None:
    """Compute how probably a true token outweighs a planted one.

    Ties count half: this is the area under the curve.
    """
    if not own or not foreign:
        return None
    ranked = sorted([(value, True) for value in own] + [(value, False) for value in foreign])
    total, place = 0.0, 0
    while place < len(ranked):
        end = place
        while end < len(ranked) and ranked[end][0] == ranked[place][0]:
            end += 1
        total += sum(is_own for _, is_own in ranked[place:end]) * (place + 1 + end) / 2  # the mean rank of ties, from 1
        place = end
    return (total - len(own) * (len(own) + 1) / 2) / (len(own) * len(foreign))


def weights_of(run_dir: Path, texts: Mapping[str, tuple[str, list[bool]]]) -> dict[str, Any]:
    """Measure by head how a run's weights tell planted tokens.

    Over the second half of its records.
    """
    path = run_dir / "samples.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    by_head: dict[int, tuple[list[float], list[float]]] = {}
    for record in records[len(records) // 2 :]:
        for document in record["documents"]:
            if document["id"] not in texts or document["start"] or not document["weight"]:
                continue
            of_tokens = token_labels(document["tokens"], *texts[document["id"]])
            for head, weights in enumerate(document["weight"], start=1):
                own, foreign = by_head.setdefault(head, ([], []))
                for weight, label in zip(weights, of_tokens, strict=True):
                    if weight is not None and label is not None:
                        (foreign if label else own).append(weight)
    return {
        f"head_{head}": {
            "auc": auc(own, foreign),
            "own_tokens": len(own),
            "planted_tokens": len(foreign),
            "own_weight": fmean(own) if own else None,
            "planted_weight": fmean(foreign) if foreign else None,
        }
        for head, (own, foreign) in by_head.items()
    }


def tokens_to_reach(curve: Sequence[Sequence[float]], level: float, tokens_per_step: float) -> float | None:
    """Find after how many tokens a curve first reaches a level.

    Between measurements it is a straight line.
    """
    steps, values = curve
    if values and values[0] <= level:
        return steps[0] * tokens_per_step
    for i in range(1, len(values)):
        if values[i] <= level:
            share = (values[i - 1] - level) / (values[i - 1] - values[i])
            return (steps[i - 1] + share * (steps[i] - steps[i - 1])) * tokens_per_step
    return None


def summary(result: wmtp.StudyResult, measured: Mapping[str, Mapping[str, Any]]) -> Iterator[list[str]]:
    """Lay out one line an arm.

    Losses of the heads, AUC, share of the planted truth's gain, tokens to the baseline's end.
    """
    by_arm: dict[str, dict[int, Any]] = {}
    for record in result.finished.values():
        by_arm.setdefault(record.arm, {})[record.seed] = record
    heads = [f"eval/loss/head_{head}" for head in range(1, 5)]
    yield [
        "arm",
        "n",
        *(f"head {head}" for head in range(1, 5)),
        "AUC",
        "share of the truth's gain",
        "tokens to the baseline's end",
    ]
    for arm, runs in by_arm.items():
        cells = [_spread([value for run in runs.values() if (value := run.value(head)) is not None]) for head in heads]
        aucs = [measured[run.name]["head_1"]["auc"] for run in runs.values() if measured.get(run.name, {}).get("head_1")]
        shares, reached = [], []
        for seed, run in runs.items():
            baseline, truth = (by_arm.get(name, {}).get(seed) for name in ("baseline", "column"))
            level = None if baseline is None else baseline.value(heads[0])
            if level is None or (own := run.value(heads[0])) is None:
                continue
            if truth is not None and (best := truth.value(heads[0])) not in (None, level):
                shares.append((level - own) / (level - best))
            curve = run.page["curves"].get(heads[0], ([], []))
            reached.append(tokens_to_reach(curve, level, run.tokens / max(run.steps, 1)))
        there = [value for value in reached if value is not None]
        ends = f"{fmean(there):,.0f} ({len(there)} of {len(reached)})" if there else "never" if reached else ""
        yield [arm, str(len(runs)), *cells, _spread([a for a in aucs if a is not None]), _spread(shares), ends]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def main() -> None:
    """Run what is left of the study, and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="what planted.py wrote")
    parser.add_argument("--model", required=True, help="a folder, a .gguf file, or a URI")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--from", dest="before", type=Path, help="results.tar.gz of an earlier call")
    parser.add_argument("--noise", default="foreign-40")
    parser.add_argument("--arms", type=lambda text: text.split(","))
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--retry", action="store_true")
    parser.add_argument("--allow-code-execution", action="store_true")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    arguments = parser.parse_args()
    place = Path("studies")
    place.mkdir(exist_ok=True)
    if arguments.before is not None and arguments.before.exists():
        with tarfile.open(arguments.before) as archive:
            archive.extractall(place, filter="data")
    # relative: an absolute path would be another study on another machine
    os.environ["WMTP_MODEL"] = os.path.relpath(model_folder(arguments.model, place))
    os.environ["WMTP_PLANTED"] = os.path.relpath(arguments.data)
    os.environ["WMTP_NOISE"] = arguments.noise
    result = wmtp.study(
        arguments.study,
        overrides=arguments.overrides,
        arms=arguments.arms,
        seeds=arguments.seeds,
        jobs=arguments.jobs,
        minutes=arguments.minutes,
        retry=arguments.retry,
        allow_code_execution=arguments.allow_code_execution,
    )
    folder = result.folder
    measured = folder / "planted"
    measured.mkdir(exist_ok=True)
    texts = planted(arguments.data / f"train-{arguments.noise}.jsonl.gz")
    for name in result.finished:
        if not (measured / f"{name}.json").exists() and (folder / "runs" / name).is_dir():
            (measured / f"{name}.json").write_text(json.dumps(weights_of(folder / "runs" / name, texts), indent=1))
    found = {path.stem: json.loads(path.read_text()) for path in measured.glob("*.json")}
    lines = list(summary(result, found))
    (folder / "summary.md").write_text(
        "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], ["---"] * len(lines[0]), *lines[1:]]) + "\n"
    )
    print((folder / "summary.md").read_text())
    print(result.table.sentence())
    for note in result.table.notes:
        print("note:", note)
    for name, reason in result.failed.items():
        print("failed:", name, reason)
    print(f"{len(result.left)} runs are left")
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(arguments.out / "results.tar.gz", "w:gz") as archive:
        for part in ("record", "planted", "table.csv", "summary.md", "report.html"):
            if (folder / part).exists():
                archive.add(folder / part, f"{folder.name}/{part}")
        for run in result.failed:
            if (log := folder / "logs" / f"{run}.log").exists():
                archive.add(log, f"{folder.name}/logs/{log.name}")


if __name__ == "__main__":
    main()
