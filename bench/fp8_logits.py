"""Error of logits in fp8 against fp32.

Of token losses and gradients, with the unembedding's mean row taken out and left in.

    python bench/fp8_logits.py
    python bench/fp8_logits.py --shapes 501x64 --tokens 96

Random bf16 numbers. ``shared`` is the size of a row that all rows of the unembedding have in common, beside their own of 0.02.
It can be left in on a GPU alone.
"""

from __future__ import annotations

import argparse
from unittest.mock import patch

import torch
from torch import Tensor

from wmtp.loss import Unembedding, weighted_cross_entropy
from wmtp.loss import fp8 as rounding
from wmtp.loss.triton import fused

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS = {
    "bf16": None,
    "forward": rounding.Fp8Logits(),
    "hidden-gradient": rounding.Fp8Logits(gradient=True),
    "hidden-gradient, emulated": rounding.Fp8Logits(gradient=True, emulate=True),
}


def main() -> None:
    """Print a line for each shape, shared row and kind of products."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["32000x4096", "128256x2048"], help="V x D")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--horizon", type=int, default=2)
    given = parser.parse_args()
    print(
        f"{'V x D':<14}{'shared':>7} {'products':<27}{'mean row':<10}{'token losses':>13}{'d hidden':>10}{'d unembedding':>15}"
    )
    for shape in given.shapes:
        vocabulary, width = map(int, shape.split("x"))
        for shared in (0.0, 0.02):
            draw = torch.Generator(DEVICE).manual_seed(0)
            weight = 0.02 * _normal(draw, vocabulary, width) + shared * _normal(draw, 1, width)
            hidden = [_normal(draw, given.tokens, width).bfloat16() for _ in range(given.horizon)]
            ids = torch.randint(vocabulary, (given.tokens, given.horizon), generator=draw, device=DEVICE)
            exact = solve(None, weight.bfloat16().float(), [states.float() for states in hidden], ids)
            for name, fp8 in ROWS.items():
                for centered in (True, False) if fp8 is not None else (True,):
                    with patch.object(fused, "round_table", fused.round_table if centered else _as_it_is):
                        found = solve(fp8, weight.bfloat16(), hidden, ids)
                    errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
                    row = "" if fp8 is None else "out" if centered else "in"
                    shown = "".join(f"{error:>{width}.2e}" for error, width in zip(errors, (13, 10, 15), strict=True))
                    print(f"{shape:<14}{shared:>7} {name:<27}{row:<10}{shown}", flush=True)


def solve(fp8: rounding.Fp8Logits | None, weight: Tensor, hidden: list[Tensor], ids: Tensor) -> list[Tensor]:
    """Compute token losses and the gradients of hidden states and unembedding."""
    weight, *hidden = (tensor.clone().requires_grad_() for tensor in (weight, *hidden))
    table = Unembedding(weight=weight, bias=None, scale=1.0, softcap=None)
    valid = torch.ones_like(ids, dtype=torch.bool)
    coefficients = torch.full(ids.shape, 1 / ids.numel(), device=ids.device)
    loss, losses = weighted_cross_entropy(hidden, [table] * len(hidden), ids, coefficients, valid, fp8=fp8)
    loss.backward()
    gradients = [torch.stack([states.grad for states in hidden]), weight.grad]  # type: ignore[list-item]
    return [found.float() for found in (losses, *gradients)]


def _normal(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=draw, device=DEVICE)


_round_table = rounding.round_table


def _as_it_is(weight: Tensor, rows: int, *, centered: bool) -> rounding.Rounded:
    return _round_table(weight, rows, centered=False)


if __name__ == "__main__":
    main()
