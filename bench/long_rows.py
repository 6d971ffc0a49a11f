"""One long row a step, by kind of activation checkpointing.

Tokens per second, peak memory on the GPU and its estimate.

    python bench/long_rows.py
    python bench/long_rows.py --lengths 131072 --modes offload --documents 8

The model is the ~1B Llama of ``bench/step.py`` with block heads, in ``bf16-params`` or ``fp8``, compiled, with AdamW. One
document a row attends by cuDNN or flash attention, several by flex attention.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import traceback
from pathlib import Path
from typing import Any

import step_ours
import torch
from step_shape import Shape

from wmtp.config.schema import Fp8Config

_CUDA = torch.cuda.is_available()


def main() -> None:
    """Measure each length with each mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[32_768, 131_072])
    parser.add_argument("--modes", nargs="+", choices=["none", "selective", "full", "offload"], default=["full", "offload"])
    parser.add_argument("--precision", choices=["bf16-params", "fp8"], default="bf16-params")
    parser.add_argument("--documents", type=int, default=1, help="documents of a row")
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--ffn", type=int, default=8192)
    parser.add_argument("--attention-heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--horizon", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=1, help="1 or more: a step is timed from the end of the one before")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    name = torch.cuda.get_device_name() if _CUDA else "cpu"
    print(
        f"{name}, torch {torch.__version__}, {given.precision}, 1 row of {given.documents} documents, V = {given.vocab:,}, "
        f"H = {given.horizon}"
    )
    print(
        f"{'S':>8} {'checkpointing':<14}{'tokens/s':>10}{'s a step':>10}{'peak GiB':>10}{'estimate':>10}{'on host':>10}",
        flush=True,
    )
    results = []
    for length in given.lengths:
        shape = Shape(
            vocab=given.vocab,
            hidden=given.hidden,
            layers=given.layers,
            ffn=given.ffn,
            attention_heads=given.attention_heads,
            kv_heads=given.kv_heads,
            horizon=given.horizon,
            length=length,
            batch=1,
        )
        for mode in given.modes:
            found = measure(shape, mode, given.warmup, given.steps, given.documents, given.precision)
            estimate = step_ours.estimate(shape, {"activation_checkpointing": mode, "precision": given.precision})
            found |= {
                "precision": given.precision,
                "length": length,
                "mode": mode,
                "device": name,
                "estimate_gib": estimate.total / 2**30,
            }
            found["host_gib"] = estimate.host / 2**30
            results.append(found)
            speed = f"{found['tokens_per_second']:,.0f}" if "seconds" in found else found["failed"]
            seconds = f"{found['seconds']:.2f}" if "seconds" in found else "-"
            print(
                f"{length:>8} {mode:<14}{speed:>10}{seconds:>10}{found['peak_gib']:>10.1f}{found['estimate_gib']:>10.1f}"
                f"{found['host_gib']:>10.1f}   ({found['wall']:.0f} s in all)",
                flush=True,
            )
            if given.json:
                given.json.write_text(json.dumps(results, indent=1) + "\n")


def measure(shape: Shape, mode: Any, warmup: int, steps: int, documents: int, precision: str) -> dict[str, Any]:
    """Train a few steps; on a CPU the peak is 0."""
    gc.collect()
    if _CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    began = time.monotonic()
    found: dict[str, Any]
    try:
        layout = shape.batch * [documents * [shape.length // documents]]
        fp8 = None if precision == "bf16-params" else Fp8Config(emulate=not _CUDA)
        seconds = step_ours.run(shape, warmup, steps, checkpointing=mode, layouts=2 * [layout], fp8=fp8)
        found = {"seconds": seconds, "tokens_per_second": shape.tokens / seconds}
    except torch.OutOfMemoryError:
        found = {"failed": "no memory"}
    except Exception as error:
        traceback.print_exc(limit=-6)
        found = {"failed": type(error).__name__}
    peak = torch.cuda.max_memory_allocated() / 2**30 if _CUDA else 0.0
    return found | {"peak_gib": peak, "wall": time.monotonic() - began}


if __name__ == "__main__":
    main()
