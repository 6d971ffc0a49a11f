"""Decoding speed beside transformers' own and the memory's bandwidth.

    python bench/decode.py                                      # the shape of SmolLM2-135M, random weights
    python bench/decode.py --model runs/heads --cases fp32:1    # a trained model on code: its drafts count
    python bench/decode.py --cases fp32:1 fp32:16 --new 512 --heads shared
    python bench/decode.py --model runs/heads --cases fp32:1 --ends --drafts 3 4 5 --texts 64
    python bench/decode.py --model models/smollm2.gguf --oracle 1.9 2.5 3

The floor of one forward pass is its bytes (the base's parameters, keys and values) over the rate at which this card copies,
measured in the same run. Rows with compiled layers take some seconds more to start; `--kernels` lists what a step launches.
Heads of random weights accept what chance gives them: without `--model` the speculative row shows what a verify step costs, not
what it gains. With it, prompts are documented functions of the standard library, of files that bench/fast_prompts.py keeps from
training, and each row says how many texts are those of plain decoding. All rows write `--new` tokens, also after the token at
which the model ends a text, of which heads have learned nothing. With `--ends` a text ends there, transformers' too, as for
users: tokens are counted text by text. The rate in brackets is without the prompts, and without the first token of each text,
which the prompt's pass gives. With `--drafts`, speculative rows come once for each number, by so many of the first heads. With
`--oracle`, the heads compute as ever, and their drafts are then replaced: by the model's own next tokens, each with the
probability that gives so many tokens a step, or by wrong ones. So it shows what heads would gain that learned as much.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from attrs import define
from fast_prompts import held_out_prompts
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import wmtp
from wmtp.config.schema import HeadsConfig
from wmtp.generation import Generation, compile_model, generate, release, step
from wmtp.generation.decoder import Read
from wmtp.generation.drafting import Choose, Drafter
from wmtp.generation.text import encode_prompt
from wmtp.models.ends import end_ids
from wmtp.models.mtp import MTPModel

#: SmolLM2-135M
SHAPE = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROWS = (
    "ours, plain, compiled layers",
    "ours, speculative, compiled layers",
    "transformers, static cache, compiled",
    "ours, plain",
    "ours, speculative",
    "transformers, dynamic cache",
)


def main() -> None:
    """Measure the rows that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a run, model folder or file; one without heads gets copies; default: random weights")
    parser.add_argument("--heads", default="block", help="kind of new heads")
    parser.add_argument("--horizon", type=int, default=4)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--cases", nargs="+", default=["fp32:1", "bf16:1", "fp32:16", "fp32:64", "bf16:16", "bf16:64"])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt of random weights")
    parser.add_argument("--prompts", type=Path, help="JSON: a list of prompts, each a list of token ids")
    parser.add_argument("--texts", type=int, default=4, help="prompts of a trained model, at least a batch of them")
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--ends", action="store_true", help="a text ends at the model's end tokens; --new is the most")
    parser.add_argument("--drafts", nargs="+", type=int, default=[], help="of a step, each in turn; default: all heads draft")
    parser.add_argument("--oracle", nargs="+", type=float, default=[], metavar="TOKENS", help="tokens a step")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="in this order")
    parser.add_argument("--repeat", type=int, default=3, help="timed passes; 0: only the first ones, which compile")
    parser.add_argument("--kernels", action="store_true", help="count the kernels of a step, and list those that take longest")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.ends and not given.model:
        parser.error("--ends: random weights have no end token that means anything; give --model")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    rate = _copy_rate(device)
    print(f"{where}, torch {torch.__version__}, copies {rate / 1e12:.2f} TB/s; {given.new} new tokens", flush=True)
    first, results, models, later = _model(given, device), [], {}, []
    for case in given.cases:
        dtype, _, rows = case.partition(":")
        if dtype not in models:
            models = {dtype: copy.deepcopy(first).to(DTYPES[dtype])}  # one at a time
        results.append({"case": case})
        later += _measure(models[dtype], int(rows), rate, device, given, results)
        release(models[dtype])
    for list_kernels in later:
        list_kernels()


def _measure(
    model: MTPModel, batch: int, rate: float, device: torch.device, given: argparse.Namespace, results: list[dict[str, Any]]
) -> list[Callable[[], None]]:
    """Time one case. Returns what lists kernels."""
    later: list[Callable[[], None]] = []
    groups, found = _prompts(model, batch, given), results[-1]
    count, longest = sum(map(len, groups)), max(len(prompt) for group in groups for prompt in group)
    pass_seconds = _floor(model, batch, longest + given.new // 2) / rate
    found["floor_ms"] = 1000 * pass_seconds
    print(f"\n{results[-1]['case']}, {count} texts: floor {1000 * pass_seconds:.3f} ms a forward", flush=True)
    fast: MTPModel | None = None
    plain: list[tuple[int, ...]] = []
    ends = end_ids(model.base, model.tokenizer) if given.ends else None
    for name, drafts, oracle in _rows(given, model.horizon - 1):
        if ("compiled" in name and device.type != "cuda") or (oracle is not None and not plain):
            continue
        label = f"{name}, {drafts} drafts" if "speculative" in name and given.drafts else name
        label = label if oracle is None else f"{label}, oracle"
        used = model
        if name.startswith("ours") and "compiled" in name:
            if fast is None:
                fast = copy.deepcopy(model)
                compile_model(fast)
            used = fast
        truth = None if oracle is None else _Truth(groups, plain, oracle, drafts, device)
        if name.startswith("transformers"):
            action = partial(_theirs, model, groups, "static" if "static" in name else None, ends)
        else:
            action = partial(_ours, used, groups, truth, drafts, ends)
        try:
            with _oracle(used, truth):
                done, row = _time(action, given.new, device, given.repeat)
        except RuntimeError as error:
            print(f"  {label:44} {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            continue
        if not given.repeat:
            continue
        if name.startswith("ours"):
            plain = plain or done.texts
        row["tokens_a_step"] = done.a_step
        row["step_ms"] = 1000 * (row["seconds"] - row["prompt_seconds"]) / max(done.forwards - len(groups), 1)
        row["tokens_per_second"] = done.tokens / row["seconds"]
        row["decoded_per_second"] = (done.tokens - count) / (row["seconds"] - row["prompt_seconds"])
        row["tokens"] = done.tokens
        if plain:
            row["same_texts"] = sum(a == b for a, b in zip(done.texts, plain, strict=True)) / count
        found[f"{label} {oracle or ''}".strip()] = row
        print(
            f"  {label:44} {row['tokens_per_second']:8.0f} tokens/s ({row['decoded_per_second']:.0f}) {row['step_ms']:7.3f} ms "
            f"a step after prompts of {1000 * row['prompt_seconds'] / len(groups):5.1f} ms  {done.a_step:5.2f} tokens a step  "
            f"{row['step_ms'] / 1000 / pass_seconds:5.1f} x floor  {row['first_seconds']:5.1f} s the first time  "
            f"{row.get('same_texts', math.nan):4.0%} of the texts are plain's",
            flush=True,
        )
        if given.json:
            given.json.write_text(json.dumps(results, indent=1))
        if given.kernels and name.startswith("ours") and device.type == "cuda" and oracle is None:
            # last of all: whatever runs after a profile has been made is slower, a graph by a third
            later.append(partial(_list_kernels, label, action, given.new, done.forwards))
        gc.collect()
    return later


def _rows(given: argparse.Namespace, most: int) -> Iterator[tuple[str, int, float | None]]:
    """Yield what is measured, in order.

    The name, drafts of a step, and an oracle's tokens a step.
    """
    for name in given.rows:
        if "speculative" not in name:
            yield name, 0, None
            continue
        for drafts in given.drafts or [most]:
            for oracle in (None, *given.oracle):
                yield name, drafts, oracle


def _time(action: Callable[[int], _Done], tokens: int, device: torch.device, repeat: int) -> tuple[_Done, dict[str, float]]:
    """Run until graphs are recorded, then time some passes.

    Returns the median, and that of one token, which is prompts alone.
    """

    def timed(new: int = tokens) -> float:
        _wait(device)
        start = time.perf_counter()
        done.append(action(new))
        _wait(device)
        return time.perf_counter() - start

    done: list[_Done] = []
    first = timed()
    for _ in range(2 if device.type == "cuda" and repeat else 0):
        timed()
    seconds = sorted(timed() for _ in range(repeat))
    whole = done[-1]
    prompts = sorted(timed(1) for _ in range(repeat))
    middle = repeat // 2
    return whole, {"first_seconds": first} | (
        {"seconds": seconds[middle], "fastest_seconds": seconds[0], "prompt_seconds": prompts[middle]} if repeat else {}
    )


@define
class _Done:
    """Results of decoding some batches.

    Their new tokens, passes of the model, tokens a pass and row, and texts.
    """

    tokens: int
    forwards: float
    a_step: float
    texts: list[tuple[int, ...]]


class _Truth:
    """Texts of plain decoding, as graphs read them, and right drafts.

    Args:
        groups: batches of prompts.
        texts: new tokens of each prompt.
        a_step: tokens a step, from 1 to one more than drafts.
        drafts: of a step.
    """

    def __init__(
        self, groups: list[list[list[int]]], texts: list[tuple[int, ...]], a_step: float, drafts: int, device: torch.device
    ) -> None:
        prompts = [prompt for group in groups for prompt in group]
        rows = [[*prompt, *text] for prompt, text in zip(prompts, texts, strict=True)]
        longest = max(map(len, rows)) + 2 + drafts
        every = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
        self._groups = every.split(len(groups[0]))
        low, high = 0.0, 1.0  # of the share of right drafts: 1 + share + share² + … = a_step
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(middle**k for k in range(drafts + 1)) < a_step else (low, middle)
        self._chance = torch.rand(*every.shape, drafts, device=device).split(len(groups[0]))
        self.table, self.share, self.ahead = torch.zeros_like(self._groups[0]), low, torch.arange(drafts, device=device)
        self.right = torch.zeros_like(self._chance[0], dtype=torch.bool)

    def load(self, group: int) -> None:
        """Make the next request one of this batch."""
        self.table.copy_(self._groups[group])
        self.right.copy_(self._chance[group] < self.share)


class _Oracle:
    """Drafter whose drafts are replaced by right or wrong ones."""

    def __init__(self, inner: Drafter, truth: _Truth) -> None:
        self._inner, self._truth = inner, truth

    def draft(self, read: Read, last: Tensor, tokens: Tensor, choose: Choose) -> Tensor:
        """Draft as the heads do, and replace."""
        self._inner.draft(read, last, tokens, choose)
        table = self._truth.table
        rows, place = torch.arange(len(last), device=last.device), last.clamp(max=table.shape[1] - 3 - len(self._truth.ahead))
        right = table[rows[:, None], place[:, None] + 2 + self._truth.ahead]
        return torch.where(self._truth.right[rows, place], right, (right + 1) % 1000)

    def clear(self) -> None:
        """See `Drafter.clear`."""
        self._inner.clear()

    def with_rows(self, rows: Tensor, decoder: Any) -> Self:
        """See `Drafter.with_rows`."""
        copied = copy.copy(self)
        copied._inner, copied._truth = self._inner.with_rows(rows, decoder), copy.copy(self._truth)
        copied._truth.table, copied._truth.right = self._truth.table[rows], self._truth.right[rows]
        return copied


@contextmanager
def _oracle(model: MTPModel, truth: _Truth | None) -> Iterator[None]:
    """Replace the drafts inside the context."""
    make = step.make_drafter
    release(model)
    if truth is not None:
        step.make_drafter = lambda *given: _Oracle(make(*given), truth)  # type: ignore[assignment, return-value]
    try:
        yield
    finally:
        step.make_drafter = make


def _prompts(model: MTPModel, batch: int, given: argparse.Namespace) -> list[list[list[int]]]:
    """Make batches of prompts."""
    if given.prompts:
        prompts = json.loads(given.prompts.read_text())[: max(given.texts, batch)]
    elif not given.model:
        torch.manual_seed(1)
        lengths = [given.prompt - row % 7 for row in range(batch)]
        prompts = [torch.randint(5, model.vocab_size, (length,)).tolist() for length in lengths]
    else:
        prompts = [encode_prompt(model.tokenizer, text) for text in held_out_prompts(max(given.texts, batch))]
    # the longest first: the next ones fit into its cache, and are decoded by its graphs
    prompts.sort(key=len, reverse=True)
    return [prompts[at : at + batch] for at in range(0, len(prompts) // batch * batch, batch)]


def _list_kernels(name: str, action: Callable[[int], object], new: int, forwards: float) -> None:
    """Print how many kernels a step launches, and the longest ones."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        action(new)
    events = [event for event in profile.key_averages() if event.self_device_time_total > 0]
    total = sum(event.self_device_time_total for event in events)
    count = sum(event.count for event in events)
    print(f"\n{name}: {count / forwards:.0f} kernels and {total / forwards / 1000:.3f} ms a step; of it")
    for event in sorted(events, key=lambda event: -event.self_device_time_total)[:10]:
        share, each = event.self_device_time_total / total, event.self_device_time_total / event.count
        print(f"      {share:6.1%}  {event.count / forwards:6.1f} a step of {each:6.1f} us  {event.key[:90]}")


def _ours(
    model: MTPModel, groups: list[list[list[int]]], truth: _Truth | None, drafts: int, ends: list[int] | None, new: int
) -> _Done:
    done: list[list[Generation]] = []
    for number, prompts in enumerate(groups):
        if truth is not None:
            truth.load(number)
        done.append(generate(model, prompts, max_new_tokens=new, eos_id=ends, speculative=drafts))
    rows = [row for group in done for row in group]
    tokens, steps = sum(len(row.tokens) for row in rows), sum(row.drafts.steps for row in rows)
    forwards = sum(1 + max(row.drafts.steps for row in group) for group in done)
    return _Done(tokens, forwards, (tokens - len(rows)) / max(steps, 1), [row.tokens for row in rows])


@torch.no_grad()
def _theirs(model: MTPModel, groups: list[list[list[int]]], cache: str | None, ends: list[int] | None, new: int) -> _Done:
    device = model.anatomy.output.weight.device
    settings: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    settings |= {"min_new_tokens": new} if ends is None else {"eos_token_id": ends}
    texts: list[tuple[int, ...]] = []
    forwards = 0
    for prompts in groups:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        found = model.base.generate(ids, attention_mask=mask, cache_implementation=cache, **settings)  # type: ignore[operator]
        rows = found[:, longest:].tolist()
        forwards += len(rows[0])
        texts += [tuple(row[: next((at + 1 for at, token in enumerate(row) if token in (ends or ())), None)]) for row in rows]
    return _Done(sum(map(len, texts)), forwards, 1.0, texts)


def _floor(model: MTPModel, batch: int, length: int) -> float:
    """Bytes of one plain forward.

    Parameters of the base, and keys and values of ``length`` tokens a row.
    """
    config = model.base.config
    size = next(model.base.parameters()).element_size()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * head * length * batch
    return size * (sum(parameter.numel() for parameter in model.base.parameters()) + cache)


def _model(given: argparse.Namespace, device: torch.device) -> MTPModel:
    heads = HeadsConfig(horizon=given.horizon, kind=given.heads, init="copy")
    if given.model:
        model = wmtp.load_model(given.model, dtype=torch.float32, device=device)
        if model.horizon > 1:
            return model
        with_heads = MTPModel(model.base, heads, seed=1).to(device).eval()
        with_heads.source = model.source  # its tokenizer lies there
        return with_heads
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_hidden_layers": given.layers}))
    return MTPModel(base.eval(), heads, seed=1).to(device).eval()


def _copy_rate(device: torch.device) -> float:
    """Bytes a second of this device's memory, measured by a copy."""
    data = torch.empty(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(data)
    target.copy_(data)
    _wait(device)
    start = time.perf_counter()
    for _ in range(8):
        target.copy_(data)
    _wait(device)
    return 8 * 2 * len(data) / (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
