"""Weighted loss of H heads, forward and backward, beside its floor.

Ours and what else is installed, in one run.

    python bench/loss.py                        # on a GPU: the two shapes of docs/performance.md
    python bench/loss.py --device cpu           # small shapes
    python bench/loss.py --shape 8192x4x4096x32000 --only floor wmtp

A shape is N x H x D x V: positions, heads, width, vocabulary. The floor is what the three matrix products take that no exact
method can leave out (logits, gradient of the hidden states, gradient of the unembedding), on the whole batch, one head after
the other; of an objective of heads 2..H also head 1's logits once more. Memory is the peak beyond what was there before,
gradients included, and beyond the gradients. Errors are ‖g − r‖ / ‖r‖ against autograd in fp32.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from wmtp.loss import HeadObjective, Unembedding, token_pass, weighted_cross_entropy, weighted_head_loss

GIB = 2**30


@frozen(kw_only=True, eq=False)
class Case:
    """Random inputs of the loss.

    Hidden states [N, D] a head, an unembedding [V, D], targets [N, H] and coefficients [N, H].
    """

    hidden: list[Tensor]
    weight: Tensor
    ids: Tensor
    coefficients: Tensor

    @classmethod
    def random(cls, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> Case:
        n, h, d, v = shape
        g = torch.Generator(device).manual_seed(0)
        weights = torch.rand(n, h, generator=g, device=device) + 0.1
        return cls(
            hidden=[torch.randn(n, d, generator=g, device=device).to(dtype).requires_grad_() for _ in range(h)],
            weight=(torch.randn(v, d, generator=g, device=device) / d**0.5).to(dtype).requires_grad_(),
            ids=torch.randint(v, (n, h), generator=g, device=device),
            coefficients=weights / weights.sum(),
        )

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.hidden, self.weight]

    @property
    def heads(self) -> list[Unembedding]:
        return [Unembedding(weight=self.weight)] * len(self.hidden)


Row = Callable[[Case], Tensor]
"""A loss with gradient of a case."""


def floor(case: Case) -> None:
    for hidden in case.hidden:
        logits = hidden.detach() @ case.weight.detach().T
        torch.mm(logits, case.weight.detach())
        torch.mm(logits.T, hidden.detach())


def naive(case: Case) -> Tensor:
    logits = [hidden @ case.weight.T for hidden in case.hidden]
    return sum((_weighted(z, case, k) for k, z in enumerate(logits)), start=torch.zeros((), device=case.ids.device))


def naive_recomputed(case: Case) -> Tensor:
    def one(hidden: Tensor, k: int) -> Tensor:
        return _weighted(hidden @ case.weight.T, case, k)

    terms = [checkpoint(one, hidden, k, use_reentrant=False) for k, hidden in enumerate(case.hidden)]
    return torch.stack(terms).sum()


def _weighted(logits: Tensor, case: Case, k: int) -> Tensor:
    return (F.cross_entropy(logits.float(), case.ids[:, k], reduction="none") * case.coefficients[:, k]).sum()


def known(case: Case) -> Tensor:
    """Weights known before: how many predictions count is known on the host."""
    n = len(case.ids)
    valid = torch.ones_like(case.ids, dtype=torch.bool)
    counts = [n] * len(case.hidden)
    return weighted_cross_entropy(
        case.hidden, case.heads, case.ids, case.coefficients, valid, at_most=sum(counts), valid_counts=counts
    )[0]


def unsaid(case: Case) -> Tensor:
    """As above; the host learns late how many count."""
    return weighted_cross_entropy(case.hidden, case.heads, case.ids, case.coefficients, torch.ones_like(case.ids).bool())[0]


def two_phase(keep: float, told: bool = True) -> Row:
    """Token losses first; the share ``keep`` with the highest loss counts."""

    def run(case: Case) -> Tensor:
        n, h = case.ids.shape
        kept = round(keep * n * h)
        valid = torch.ones_like(case.ids, dtype=torch.bool)
        first = token_pass(case.hidden, case.heads, case.ids, valid, valid_counts=[n] * h)
        coefficients = torch.zeros(n * h, device=valid.device)
        coefficients[first.losses.flatten().topk(kept).indices] = 1.0 / kept
        return weighted_cross_entropy(
            case.hidden,
            case.heads,
            case.ids,
            coefficients.view(n, h),
            valid,
            precomputed=first,
            at_most=kept if told else None,
            valid_counts=[n] * h,
        )[0]

    return run


def dropped(share: float) -> Row:
    """Known weights, a share of them 0, without token losses."""

    def run(case: Case) -> Tensor:
        n, h = case.ids.shape
        keep = torch.arange(n * h).view(n, h) % 10 >= 10 * share  # on the CPU, where a batch comes from
        counts = keep.sum(0).tolist()
        keep = keep.to(case.ids.device)
        return weighted_cross_entropy(
            case.hidden, case.heads, case.ids, case.coefficients * keep, keep, at_most=sum(counts), valid_counts=counts
        )[0]

    return run


def objective(name: Literal["kl", "tv", "lk"]) -> Row:
    """Heads 2..H learn to agree with head 1, on one text."""

    def run(case: Case) -> Tensor:
        n, h = case.ids.shape
        valid = torch.arange(n)[:, None] + torch.arange(h) < n  # on the CPU, where a batch comes from
        counts = valid.sum(0).tolist()
        valid = valid.to(case.ids.device)[None]
        hidden = [states[None] for states in case.hidden]
        given = case.ids[None], case.coefficients[None] * valid, valid, HeadObjective(name)
        return weighted_head_loss(hidden, case.heads, *given, at_most=sum(counts), valid_counts=counts).loss

    return run


def naive_kl(case: Case) -> Tensor:
    """As above, by whole logits."""
    logits = [(states @ case.weight.T).float() for states in case.hidden]
    target, total = logits[0].detach().log_softmax(1), _weighted(logits[0], case, 0)
    for k, z in enumerate(logits[1:], start=1):
        kl = F.kl_div(z[: len(z) - k].log_softmax(1), target[k:], reduction="none", log_target=True).sum(1)
        total = total + (kl * case.coefficients[: len(z) - k, k]).sum()
    return total


def peers() -> Iterator[tuple[str, Row]]:
    """Rows of the peers that are installed."""
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger  # pyright: ignore[reportMissingImports]
    except ImportError:
        print("liger-kernel is not installed", flush=True)
    else:

        def liger_none(case: Case, **options: object) -> Tensor:
            terms = [
                (liger(x, case.weight, case.ids[:, k], reduction="none", **options) * case.coefficients[:, k]).sum()
                for k, x in enumerate(case.hidden)
            ]
            return torch.stack(terms).sum()

        def liger_mean(case: Case) -> Tensor:
            return torch.stack([liger(x, case.weight, case.ids[:, k]) for k, x in enumerate(case.hidden)]).mean()

        yield "Liger, weighted (reduction none)", liger_none
        yield "Liger, weighted, fp32 accumulator", lambda case: liger_none(case, accum_dtype=torch.float32)
        yield "Liger, plain mean (cannot weigh)", liger_mean
    try:
        from cut_cross_entropy import linear_cross_entropy as cce  # pyright: ignore[reportMissingImports]
    except ImportError:
        print("cut-cross-entropy is not installed", flush=True)
    else:

        def cut(case: Case) -> Tensor:
            terms = [
                (cce(x, case.weight, case.ids[:, k], reduction="none") * case.coefficients[:, k]).sum()
                for k, x in enumerate(case.hidden)
            ]
            return torch.stack(terms).sum()

        yield "cut-cross-entropy, weighted", cut
    builtin = getattr(F, "linear_cross_entropy", None)
    if builtin is None:
        print(f"torch {torch.__version__} has no linear_cross_entropy", flush=True)
    else:

        def from_torch(case: Case) -> Tensor:
            terms = [
                (builtin(x, case.weight, case.ids[:, k], reduction="none") * case.coefficients[:, k]).sum()
                for k, x in enumerate(case.hidden)
            ]
            return torch.stack(terms).sum()

        yield "torch linear_cross_entropy, weighted", from_torch


def rows() -> list[tuple[str, Row]]:
    return [
        ("naive, all heads", naive),
        ("naive, a head at a time, recomputed", naive_recomputed),
        ("wmtp, known weights", known),
        ("wmtp, known weights, counts not said", unsaid),
        ("wmtp, known weights, 30 % are 0", dropped(0.3)),
        ("wmtp, two-phase, all kept", two_phase(1.0)),
        ("wmtp, two-phase, 70 % kept", two_phase(0.7)),
        ("wmtp, two-phase, 70 % kept, count not said", two_phase(0.7, told=False)),
        ("wmtp, two-phase, 40 % kept", two_phase(0.4)),
        ("naive, objective kl, all heads", naive_kl),
        ("wmtp, objective kl", objective("kl")),
        ("wmtp, objective tv", objective("tv")),
        ("wmtp, objective lk", objective("lk")),
        *peers(),
    ]


def reference(case: Case) -> list[Tensor]:
    """Gradients of the weighted loss by autograd in fp32, in slices."""
    weight = case.weight.detach().float().requires_grad_()
    hidden = [x.detach().float().requires_grad_() for x in case.hidden]
    for k, states in enumerate(hidden):
        for at in range(0, len(states), 1024):
            part = slice(at, at + 1024)
            losses = F.cross_entropy(states[part] @ weight.T, case.ids[part, k], reduction="none")
            (losses * case.coefficients[part, k]).sum().backward()
    return [x.grad for x in (*hidden, weight)]  # type: ignore[misc]


def errors(case: Case, exact: list[Tensor]) -> tuple[float, float]:
    """Of the hidden states' gradients (the largest), and of the unembedding's."""
    found = [float((x.grad.float() - r).norm() / r.norm()) for x, r in zip(case.leaves, exact, strict=True)]  # type: ignore[union-attr]
    return max(found[:-1]), found[-1]


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most that torch allocates beyond what was there at the start."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    recorded: Any = profile.profiler
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    sizes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(sizes), default=0)


def milliseconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of some runs, after two to warm up.

    Of the device on a GPU, of the process (all its threads) on a CPU.
    """
    if device.type == "cpu":
        times = []
        for _ in range(repeats + 2):
            started = time.process_time()  # others may use the machine
            run()
            times.append(1000 * (time.process_time() - started))
        return statistics.median(times[2:])
    # as in training, the host runs ahead of the device
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 3)]
    for mark in marks[:-1]:
        mark.record()
        run()
    marks[-1].record()
    torch.cuda.synchronize()
    times = [one.elapsed_time(other) for one, other in itertools.pairwise(marks)]
    return statistics.median(times[2:])


def measure(name: str, row: Row, case: Case, device: torch.device, repeats: int) -> dict[str, Any]:
    def step() -> None:
        for leaf in case.leaves:
            leaf.grad = None
        row(case).backward()

    step()
    for leaf in case.leaves:
        leaf.grad = None
    extra = peak_bytes(step, device)
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in case.leaves)
    return {"row": name, "ms": milliseconds(step, device, repeats), "bytes": extra, "gradients": gradients}


def table(
    shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype, wanted: list[str], repeats: int
) -> list[dict]:
    n, h, d, v = shape
    case = Case.random(shape, device, dtype)
    exact = reference(case)
    least = milliseconds(lambda: floor(case), device, repeats)
    rate = 6 * n * h * d * v / least / 1e9
    print(f"\nN = {n}, H = {h}, D = {d}, V = {v}, {dtype}; floor {least:.1f} ms ({rate:.1f} TFLOP/s)\n")
    print("| loss and gradient | ms | × floor | extra GiB | beyond gradients | error d hidden | d unembedding |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    found = []
    for name, row in rows():
        if wanted and not any(word in name for word in wanted):
            continue
        try:
            one = measure(name, row, case, device, repeats)
        except Exception as error:
            print(f"| {name} | failed: {type(error).__name__}: {str(error)[:100]} | | | | | |", flush=True)
            continue
        weighted = not any(word in name for word in ("two-phase", "are 0", "cannot", "objective"))
        products = (3 * h + 1) / (3 * h) if "objective" in name else 1.0
        off = errors(case, exact) if weighted else (float("nan"), float("nan"))
        one |= {"shape": shape, "floor": products * least, "error_hidden": off[0], "error_unembedding": off[1]}
        found.append(one)
        shown = [f"{x:.1e}" if weighted else "" for x in off]
        print(
            f"| {name} | {one['ms']:.1f} | {one['ms'] / one['floor']:.2f} | {one['bytes'] / GIB:.2f} | "
            f"{(one['bytes'] - one['gradients']) / GIB:.2f} | {shown[0]} | {shown[1]} |",
            flush=True,
        )
    again = milliseconds(lambda: floor(case), device, repeats)
    print(f"\nfloor measured again at the end: {again:.1f} ms", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, choices=["bfloat16", "float32"])
    parser.add_argument("--shape", nargs="*", default=None, help="NxHxDxV")
    parser.add_argument("--only", nargs="*", default=[], help="rows whose name holds one of these")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=None, help="of a CPU")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    large = device.type == "cuda"
    shapes = arguments.shape or (
        ["8192x4x4096x32000", "8192x4x2048x128256"] if large else ["1024x4x256x8192", "512x4x576x49152"]
    )
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if large else "float32"))
    name = torch.cuda.get_device_name(device) if large else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {dtype}", flush=True)
    found = []
    for text in shapes:
        n, h, d, v = (int(part) for part in text.split("x"))
        found += table((n, h, d, v), device, dtype, arguments.only, arguments.repeats)
        gc.collect()
        if large:
            torch.cuda.empty_cache()
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
