"""Training steps in fp8 beside the same steps in bf16.

Tokens per second, MFU, peak memory and loss, in one run on one GPU.

    python bench/fp8.py                                  # three shapes, all rows
    python bench/fp8.py --shapes 1b-32k --rows bf16 tensorwise --json fp8.json
    python bench/fp8.py --rows bf16 tensorwise --kernels 2   # where the time goes

Model, data and loop are those of ``bench/step.py``. MFU is against the GPU's bf16 rate, in every row. ``loss`` is that of the
last step from random weights on random tokens: it shows that a row learns, not how well. The rows ``rowwise`` and ``gw-hp``
need torchao.
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
from kernels import by_group
from step import PEAKS
from step_shape import Shape

from wmtp.config.schema import Fp8Config

_BASE = {"attention_heads": 32, "kv_heads": 8, "horizon": 4}
SHAPES: dict[str, dict[str, int]] = {
    "1b-32k": {**_BASE, "vocab": 32_000, "hidden": 2048, "layers": 16, "ffn": 8192},
    "1b-128k": {**_BASE, "vocab": 128_256, "hidden": 2048, "layers": 16, "ffn": 8192},
    "d4096": {**_BASE, "vocab": 32_000, "hidden": 4096, "layers": 8, "ffn": 11_008, "kv_heads": 32},
    "tiny": {"vocab": 256, "hidden": 32, "layers": 2, "ffn": 64, "attention_heads": 2, "kv_heads": 2, "horizon": 2},
}
ROWS: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "tensorwise": {},
    "tensorwise-slow": {"fast_accumulation": "forward"},  # torchao's own choice
    "wide": {"min_features": 1040},  # k and v of grouped queries in bf16
    "spared": {"first_layers": 1, "last_layers": 1},
    "rowwise": {"recipe": "rowwise"},
    "gw-hp": {"recipe": "rowwise-gw-hp"},
    "logits": {"logits": "forward"},
    "logits-both": {"logits": "hidden-gradient"},
}


def main() -> None:
    """Run the rows that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[name for name in SHAPES if name != "tiny"])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--checkpointing", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--emulate", action="store_true", help="round to fp8 and multiply in fp32: to try this out on a CPU")
    parser.add_argument("--kernels", type=int, default=0, help="profile so many steps more")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    peak = next((rate for chip, rate in PEAKS.items() if chip in name), float("nan"))
    print(f"{name}, torch {torch.__version__}, B = {given.batch}, S = {given.length}, checkpointing {given.checkpointing}")
    results = []
    for shape_name in given.shapes:
        shape = Shape(**SHAPES[shape_name], length=given.length, batch=given.batch)
        print(f"\n{shape_name}: {shape.operations / 1e9:.2f} GFLOP a token")
        print(
            f"{'row':<17}{'tokens/s':>10}{'ms':>8}{'x bf16':>8}{'MFU %':>7}{'peak GiB':>10}{'estimate':>10}{'loss':>8}"
            f"{'all s':>7}"
        )
        plain: float | None = None
        for row in given.rows:
            began = time.monotonic()
            result = measure(row, shape, given)
            if "failed" in result:
                print(f"{row:<17}{result['failed']:>10}", flush=True)
            else:
                speed = shape.tokens / result["seconds"]
                plain = speed if row == "bf16" else plain
                ratio = "-" if plain is None else f"{speed / plain:.3f}"
                result |= {"tokens_per_second": speed, "mfu": speed * shape.operations / peak}
                print(
                    f"{row:<17}{speed:>10,.0f}{1e3 * result['seconds']:>8.1f}{ratio:>8}{100 * result['mfu']:>7.1f}"
                    f"{result['peak_gib']:>10.1f}{result['estimate_gib']:>10.1f}{result['loss']:>8.3f}"
                    f"{time.monotonic() - began:>7.0f}",
                    flush=True,
                )
                if given.kernels:
                    print("   ", "; ".join(f"{group} {ms:.1f} ms" for group, ms in by_group(result["kernels"]).items()))
            results.append({"shape": shape_name, "row": row, "device": name, "batch": given.batch} | result)
            if given.json:
                given.json.write_text(json.dumps(results, indent=1) + "\n")


def measure(row: str, shape: Shape, given: argparse.Namespace) -> dict[str, Any]:
    """Measure one row: seconds a step, peak memory, the last loss."""
    on_gpu = torch.cuda.is_available()
    gc.collect()
    torch._dynamo.reset()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    options: dict[str, Any] | None = ROWS[row]
    if options is not None and given.emulate:
        options = {"min_features": 16, **options, "emulate": True}
    fp8 = None if options is None else Fp8Config(**options)
    try:
        seconds = step_ours.run(
            shape, given.warmup, given.steps, checkpointing=given.checkpointing, fp8=fp8, profiled=given.kernels
        )
    except torch.OutOfMemoryError:
        return {"failed": "no memory"}
    except Exception as error:
        traceback.print_exc(limit=-6)
        return {"failed": type(error).__name__}
    devices = {"activation_checkpointing": given.checkpointing} | (
        {} if options is None else {"precision": "fp8", "fp8": options}
    )
    return {
        "seconds": seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else float("nan"),
        "estimate_gib": step_ours.estimate(shape, devices).total / 2**30,
        "loss": step_ours.LOSSES[given.warmup + given.steps],
        "kernels": dict(step_ours.KERNELS),
    }


if __name__ == "__main__":
    main()
