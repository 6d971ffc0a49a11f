"""Tokens per second of decoding, beside transformers' own, and beside what the card's memory allows.

    python bench/decode.py                                    # the shape of SmolLM2-135M, random weights
    python bench/decode.py --model runs/heads --dtype fp32    # a trained model on code: its drafts count
    python bench/decode.py --batch 1 16 --new 512 --heads shared

The floor of one forward pass is its bytes (the base's parameters, keys and values) over the rate at which this card copies,
measured in the same run. Rows with compiled layers take some seconds more to start; `--kernels` lists what a step launches.
Heads of random weights accept what chance gives them: without `--model` the speculative row shows what a verify step costs, not
what it gains. With it, prompts are documented functions of the standard library, of files that bench/fast_heads.py keeps from
training, a text ends where the model ends it, and each row says how many texts are those of plain decoding.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from attrs import define
from fast_heads import held_out_prompts
from transformers import LlamaConfig, LlamaForCausalLM

import wmtp
from wmtp.config.schema import HeadsConfig
from wmtp.generation import Generation, compile_model, generate
from wmtp.generation.text import encode_prompt
from wmtp.models.ends import end_ids
from wmtp.models.mtp import MTPModel

#: SmolLM2-135M
SHAPE = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    """Measure the rows that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a run or model folder; default: random weights")
    parser.add_argument("--heads", default="block", help="kind of heads of random weights")
    parser.add_argument("--horizon", type=int, default=4)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt of random weights")
    parser.add_argument("--texts", type=int, default=32, help="prompts of a trained model, at least a batch of them")
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--skip-peers", action="store_true")
    parser.add_argument("--only", default="", metavar="WORD", help="measure only rows with this in their names, as compiled")
    parser.add_argument("--kernels", action="store_true", help="count the kernels of a step, and list those that take longest")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    rate = _copy_rate(device)
    print(
        f"{where}, torch {torch.__version__}, copies {rate / 1e12:.2f} TB/s; {given.prompt} tokens of prompt, {given.new} new"
    )
    results = []
    for dtype in given.dtype:
        model, fast = _model(given, DTYPES[dtype], device), None
        if device.type == "cuda":
            fast = _model(given, DTYPES[dtype], device)
            compile_model(fast)
        for batch in given.batch:
            results.append({"dtype": dtype, "batch": batch} | _measure(model, fast, batch, rate, device, given))
            if given.json:
                given.json.write_text(json.dumps(results, indent=1))


def _measure(
    model: MTPModel, fast: MTPModel | None, batch: int, rate: float, device: torch.device, given: argparse.Namespace
) -> dict[str, float]:
    groups, ends = _prompts(model, batch, given)
    count = sum(map(len, groups))
    step = _floor(model, batch, given.prompt + given.new // 2) / rate
    found: dict[str, float] = {"floor_ms": 1000 * step}
    print(f"\n{next(model.base.parameters()).dtype}, batch {batch}: floor {1000 * step:.3f} ms a forward")
    rows: dict[str, Any] = {"ours, plain": lambda: _ours(model, groups, given.new, ends, speculative=False)}
    if model.horizon > 1:
        rows["ours, speculative"] = lambda: _ours(model, groups, given.new, ends, speculative=True)
    if fast is not None:
        rows["ours, plain, compiled layers"] = lambda: _ours(fast, groups, given.new, ends, speculative=False)
        if model.horizon > 1:
            rows["ours, speculative, compiled layers"] = lambda: _ours(fast, groups, given.new, ends, speculative=True)
    if not given.skip_peers:
        rows["transformers, dynamic cache"] = lambda: _theirs(model, groups, given.new, None)
        if device.type == "cuda":
            rows["transformers, static cache, compiled"] = lambda: _theirs(model, groups, given.new, "static")
    plain: list[tuple[int, ...]] = []
    for name, action in [(name, action) for name, action in rows.items() if given.only in name]:
        try:
            began = time.perf_counter()
            action()
            first = time.perf_counter() - began
            done, seconds = action(), []
            for _ in range(3):
                _wait(device)
                start = time.perf_counter()
                done = action()
                _wait(device)
                seconds.append(time.perf_counter() - start)
        except RuntimeError as error:
            print(f"  {name:40} {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        took, plain = sorted(seconds)[1], plain or done.texts
        found[name] = done.tokens / took
        print(
            f"  {name:40} {found[name]:10.0f} tokens/s  {1000 * took / done.forwards:7.3f} ms a step"
            f"  {done.a_step:5.2f} tokens a step  {took / done.forwards / step:6.1f} x floor"
            f"  {first:5.1f} s the first time",
            flush=True,
        )
        if name.startswith("ours"):
            same = sum(a == b for a, b in zip(done.texts, plain, strict=True))
            found[f"{name}: tokens a step"], found[f"{name}: same texts"] = done.a_step, same / count
            print(f"      {same} of {count} texts are those of plain decoding", flush=True)
            if given.kernels and device.type == "cuda":
                _list_kernels(action, done.forwards)
        gc.collect()
    return found


@define
class _Done:
    """Results of decoding some batches: their new tokens, passes of the model, tokens a pass and row, and texts."""

    tokens: int
    forwards: float
    a_step: float
    texts: list[tuple[int, ...]]


def _prompts(model: MTPModel, batch: int, given: argparse.Namespace) -> tuple[list[list[list[int]]], tuple[int, ...] | None]:
    """Make batches of prompts, and name the tokens that end a text; None: none does."""
    if not given.model:
        torch.manual_seed(1)
        lengths = [given.prompt - row % 7 for row in range(batch)]
        return [[torch.randint(5, model.vocab_size, (length,)).tolist() for length in lengths]], None
    tokenizer = model.tokenizer
    prompts = [encode_prompt(tokenizer, text) for text in held_out_prompts(max(given.texts, batch))]
    # the longest first: the next ones fit into its cache, and are decoded by its graphs
    prompts.sort(key=len, reverse=True)
    return [prompts[at : at + batch] for at in range(0, len(prompts) // batch * batch, batch)], tuple(
        end_ids(model.base, tokenizer)
    )


def _list_kernels(action: Callable[[], object], forwards: float) -> None:
    """Print how many kernels a step launches, and which take longest in all."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        action()
    events = [event for event in profile.key_averages() if event.self_device_time_total > 0]
    total = sum(event.self_device_time_total for event in events)
    count = sum(event.count for event in events)
    print(f"      {count / forwards:.0f} kernels and {total / forwards / 1000:.3f} ms a step; of it")
    for event in sorted(events, key=lambda event: -event.self_device_time_total)[:10]:
        share, each = event.self_device_time_total / total, event.self_device_time_total / event.count
        print(f"      {share:6.1%}  {event.count / forwards:6.1f} a step of {each:6.1f} us  {event.key[:90]}")


def _ours(
    model: MTPModel, groups: list[list[list[int]]], new: int, ends: tuple[int, ...] | None, *, speculative: bool
) -> _Done:
    done: list[list[Generation]] = [
        generate(model, prompts, max_new_tokens=new, eos_id=ends, speculative=speculative) for prompts in groups
    ]
    rows = [row for group in done for row in group]
    tokens, steps = sum(len(row.tokens) for row in rows), sum(1 + row.drafts.steps for row in rows)
    forwards = sum(1 + max(row.drafts.steps for row in group) for group in done)
    return _Done(tokens, forwards, tokens / steps, [row.tokens for row in rows])


@torch.no_grad()
def _theirs(model: MTPModel, groups: list[list[list[int]]], new: int, cache: str | None) -> _Done:
    device = model.anatomy.output.weight.device
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    for prompts in groups[:1]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        model.base.generate(ids, attention_mask=mask, cache_implementation=cache, **settings)  # type: ignore[operator]
    return _Done(new * len(groups[0]), new, 1.0, [])


def _floor(model: MTPModel, batch: int, length: int) -> float:
    """Bytes of one plain forward: parameters of the base, and keys and values of ``length`` tokens a row."""
    config = model.base.config
    size = next(model.base.parameters()).element_size()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * head * length * batch
    return size * (sum(parameter.numel() for parameter in model.base.parameters()) + cache)


def _model(given: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> MTPModel:
    if given.model:
        return wmtp.load_model(given.model, dtype=dtype, device=device)
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_hidden_layers": given.layers}))
    heads = HeadsConfig(horizon=given.horizon, kind=given.heads, init="copy")
    return MTPModel(base.eval(), heads, seed=1).to(device=device, dtype=dtype).eval()


def _copy_rate(device: torch.device) -> float:
    """Bytes a second that this device reads, from a copy, which reads and writes."""
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
