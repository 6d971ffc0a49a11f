"""LoRA and QLoRA steps of WMTP and of a plain loop.

The loop has PEFT and Liger. Tokens per second and peak memory, on one GPU.

    python bench/lora.py --batch 4
    python bench/lora.py --rows qlora-full loop-qlora-full --batch 1 --json lora.json
    python bench/lora.py --rows qlora-selective --batch 1 --limit 24

Every row trains a 7B Llama of random weights (V = 32,000) with block heads that learn in full, adapters of rank 16 on every
linear map of the base's layers, and a weight for each token. The plain loop keeps all that learns in bf16, its optimizer too;
WMTP keeps fp32 copies and fp32 means of it, and so does ``loop-fp32-…``, in fp32 parameters under autocast, as peft keeps
adapters if one does not tell it otherwise. Layers are compiled in all; ``-selective`` and ``-full`` checkpoint each layer;
with ``-heads`` heads learn by adapters of their own; with ``-fp8`` products are in fp8; with ``-graphs`` both passes are
CUDA graphs. ``all-full`` trains all of the model,
``-8bit`` and ``-paged`` with bitsandbytes' optimizer. ``--limit`` lets torch have no more
memory than that many GiB.

Needs peft and liger-kernel, and bitsandbytes for the rows of 4 bits.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import step_ours
import step_peers
import torch
from step_shape import Shape
from torch import nn
from transformers import LlamaForCausalLM

from wmtp.config.schema import Fp8Config, HeadsConfig, LoraConfig
from wmtp.models.adapters import quantize_base
from wmtp.models.base import LoadedModel
from wmtp.models.build import build_model
from wmtp.models.mtp import MTPModel
from wmtp.optim.config import AdamW, AdamW8bit

RANK = 16


def _adapted(
    shape: Shape, horizon: int, *, quantize: Literal["nf4"] | None, heads: Literal["full", "adapters"] = "full"
) -> MTPModel:
    torch.set_default_dtype(torch.bfloat16)
    try:
        with step_ours.DEVICE:
            base = LlamaForCausalLM(shape.config()).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    lora = LoraConfig(rank=RANK, heads=heads)
    model = build_model(LoadedModel(model=base), HeadsConfig(horizon=horizon), 0, lora=lora, quantize=quantize)
    fixed = {id(parameter) for parameter in model.fixed_parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) not in fixed)
    quantize_base(model)
    return model


def ours(
    shape: Shape,
    warmup: int,
    steps: int,
    *,
    quantize: Literal["nf4"] | None = None,
    mode: Literal["none", "selective", "full"] = "none",
    heads: Literal["full", "adapters"] = "full",
    fp8: Fp8Config | None = None,
    optimize: AdamW | None = None,
    graphs: bool = False,
) -> float:
    """Real loop, in ``bf16-params`` or ``fp8``."""
    make = partial(_adapted, quantize=quantize, heads=heads)
    settings = {"checkpointing": mode, "fp8": fp8, "optimize": optimize, "cuda_graphs": graphs}
    return step_ours.run(shape, warmup, steps, make=make, **settings)


def whole(shape: Shape, warmup: int, steps: int, *, optimize: AdamW | None = None) -> float:
    """All of the model learns, checkpointed."""
    return step_ours.run(shape, warmup, steps, checkpointing="full", optimize=optimize)


def loop(
    shape: Shape, warmup: int, steps: int, *, quantize: bool = False, checkpointed: bool = False, exact: bool = False
) -> float:
    """Training loop as one writes it by hand with PEFT and Liger.

    ``exact``: what learns is kept in fp32.
    """
    import peft

    with step_ours.DEVICE:
        torch.set_default_dtype(torch.bfloat16)
        model = step_peers.PlainMTP(shape, step_peers.liger, compiled=True, checkpointed=checkpointed)
        torch.set_default_dtype(torch.float32)
    if quantize:
        _quantize(model.base)
    settings = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    peft.inject_adapter_in_model(settings, model.base)
    for name, parameter in model.base.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
        else:
            parameter.requires_grad_(False)
    if exact:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        model.forward = torch.autocast("cuda", torch.bfloat16)(model.forward)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return step_peers.loop(shape, warmup, steps, model)


def _quantize(base: nn.Module) -> None:
    """Put bitsandbytes' layers in, as transformers does for 4 bits."""
    import bitsandbytes as bnb

    for layer in base.model.layers:  # type: ignore[union-attr]
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                made = bnb.nn.Linear4bit(
                    module.in_features,
                    module.out_features,
                    bias=False,
                    compute_dtype=torch.bfloat16,
                    quant_type="nf4",
                    device="meta",
                )
                weight: Any = bnb.nn.Params4bit(module.weight.data.cpu(), requires_grad=False, quant_type="nf4")  # type: ignore[call-arg]
                made.weight = weight.to(step_ours.DEVICE)
                parent, _, leaf = name.rpartition(".")
                setattr(layer.get_submodule(parent), leaf, made)
    base.is_loaded_in_4bit = True  # type: ignore[assignment]


ROWS: dict[str, Callable[[Shape, int, int], float]] = {
    "loop-lora": loop,
    "loop-lora-full": partial(loop, checkpointed=True),
    "loop-qlora": partial(loop, quantize=True),
    "loop-qlora-full": partial(loop, quantize=True, checkpointed=True),
    "loop-fp32-lora": partial(loop, exact=True),
    "loop-fp32-qlora": partial(loop, quantize=True, exact=True),
    "lora": ours,
    "lora-selective": partial(ours, mode="selective"),
    "lora-full": partial(ours, mode="full"),
    "lora-fp8": partial(ours, fp8=Fp8Config()),
    "lora-fp8-selective": partial(ours, fp8=Fp8Config(), mode="selective"),
    "lora-fp8-full": partial(ours, fp8=Fp8Config(), mode="full"),
    "lora-selective-graphs": partial(ours, mode="selective", graphs=True),
    "lora-fp8-graphs": partial(ours, fp8=Fp8Config(), graphs=True),
    "qlora-selective-graphs": partial(ours, quantize="nf4", mode="selective", graphs=True),
    "lora-fp8-rows": partial(ours, fp8=Fp8Config(recipe="rowwise")),
    "lora-heads": partial(ours, heads="adapters"),
    "qlora": partial(ours, quantize="nf4"),
    "qlora-selective": partial(ours, quantize="nf4", mode="selective"),
    "qlora-full": partial(ours, quantize="nf4", mode="full"),
    "qlora-heads": partial(ours, quantize="nf4", heads="adapters"),
    "lora-8bit": partial(ours, optimize=AdamW8bit(lr=1e-5)),
    "loop-all-full": step_peers.loop_liger_full,
    "all-full": whole,
    "all-full-8bit": partial(whole, optimize=AdamW8bit(lr=1e-5)),
    "all-full-paged": partial(whole, optimize=AdamW8bit(lr=1e-5, paged=True)),
}


def main() -> None:
    """Run the rows that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[row for row in ROWS if "all-full" not in row])
    for name, value in (("vocab", 32_000), ("hidden", 4096), ("layers", 32), ("ffn", 11_008), ("attention-heads", 32)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--kv-heads", type=int, default=32)
    parser.add_argument("--horizon", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--limit", type=float, help="GiB that torch may take of the GPU")
    parser.add_argument("--kernels", action="store_true", help="tell the kernels that take longest in a row")
    parser.add_argument("--json", type=Path)
    given = vars(parser.parse_args())
    rows, warmup, steps, limit, kernels, file = (
        given.pop(name) for name in ("rows", "warmup", "steps", "limit", "kernels", "json")
    )
    shape = Shape(**given)
    if limit is not None:
        torch.cuda.set_per_process_memory_fraction(limit * 2**30 / torch.cuda.mem_get_info()[1])
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, B = {shape.batch}, S = {shape.length}, H = {shape.horizon}"
    )
    print(f"{'row':<24}{'tokens/s':>10}{'ms':>9}{'peak GiB':>10}{'reserved':>10}{'vs loop':>9}{'start s':>9}", flush=True)
    results: dict[str, dict[str, Any]] = {}
    for row in rows:
        began = time.monotonic()
        with _kernels_of(row) if kernels else nullcontext():
            result = results[row] = measure(row, shape, warmup, steps)
        if "failed" in result:
            print(f"{row:<24}{result['failed']:>10}", flush=True)
        else:
            kind = row.partition("-")[0]
            names = (f"loop-{row}", "loop-all-full" if kind == "all" else f"loop-{kind}")
            peer = next((results[name] for name in names if name in results), {}).get("tokens_per_second")
            ratio = "-" if peer is None else f"{result['tokens_per_second'] / peer:.3f}"
            start = time.monotonic() - began - steps * result["seconds"]
            print(
                f"{row:<24}{result['tokens_per_second']:>10,.0f}{1e3 * result['seconds']:>9.1f}{result['peak_gib']:>10.1f}"
                f"{result['reserved_gib']:>10.1f}{ratio:>9}{start:>9.0f}",
                flush=True,
            )
        if file:
            about = {
                "device": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "batch": shape.batch,
                "limit_gib": limit,
            }
            file.write_text(json.dumps({"about": about, "rows": results}, indent=1) + "\n")


def measure(row: str, shape: Shape, warmup: int, steps: int) -> dict[str, Any]:
    """Measure one row: seconds a step, tokens a second, peak memory."""
    torch.cuda.synchronize()
    gc.collect()
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    try:
        seconds = ROWS[row](shape, warmup, steps)
    except torch.OutOfMemoryError:
        return {"failed": "no memory"}
    except Exception as error:
        traceback.print_exc(limit=-6)
        return {"failed": f"{type(error).__name__}"}
    return {
        "seconds": seconds,
        "tokens_per_second": shape.tokens / seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
    }


@contextmanager
def _kernels_of(row: str) -> Iterator[None]:
    """Print the longest kernels and their share of all.

    The row is slower for it.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        yield
    events = sorted(seen.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events) or 1
    print(f"kernels of {row}, of all steps:", flush=True)
    for event in events[:40]:
        share = event.self_device_time_total / total
        print(f"  {share:6.1%} {event.self_device_time_total / 1e3:10.1f} ms {event.count:>7} x {event.key[:110]}", flush=True)


if __name__ == "__main__":
    main()
