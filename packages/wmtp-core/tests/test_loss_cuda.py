"""The loss on a GPU: skipped where there is none. Run it on one before a change to the kernels or their driver goes in."""

import math

import pytest
import torch
from attrs import evolve
from torch.utils.checkpoint import checkpoint

from wmtp.loss import HeadObjective, Unembedding, token_pass, weighted_cross_entropy, weighted_head_loss
from wmtp.loss import cross_entropy as solve
from wmtp.loss.cross_entropy import Problem, flatten
from wmtp.loss.torch_backend import plain

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def case(n=300, h=3, d=64, v=1000, *, seed=0, bias=False, scale=1.0, softcap=None, own=(), dtype=torch.float32, **kwargs):
    g = torch.Generator("cuda").manual_seed(seed)
    new = lambda *shape: torch.randn(*shape, generator=g, device="cuda").to(dtype)
    shared = Unembedding(weight=new(v, d) / d**0.5, bias=new(v) if bias else None, scale=scale, softcap=softcap)
    unembeddings = [Unembedding(weight=new(v, d) / d**0.5) if k in own else shared for k in range(h)]
    valid = torch.rand(n, h, generator=g, device="cuda") > 0.2
    coefficients = torch.rand(n, h, generator=g, device="cuda") * valid * (torch.rand(n, h, generator=g, device="cuda") > 0.3)
    hidden = [torch.where(valid[:, k : k + 1], new(n, d), math.nan) for k in range(h)]
    heads, tensors = flatten(hidden, unembeddings)
    return Problem(
        tensors=tensors,
        heads=heads,
        ids=torch.randint(v, (n, h), generator=g, device="cuda"),
        valid=valid,
        compute=dtype,
        coefficients=coefficients / coefficients.sum() if dtype != torch.float16 else 256 * coefficients,  # see its unit
        wanted=[True] * len(tensors),
        **kwargs,
    )


def exactly(problem):
    """In fp64, by the plain implementation."""
    double = [tensor.double() for tensor in problem.tensors]
    lse = None if problem.lse is None else problem.lse.double()
    return plain.compute(evolve(problem, tensors=double, compute=torch.float64, coefficients=problem.coefficients, lse=lse))


def off(found, reference):
    """‖found − reference‖ / ‖reference‖; NaN never passes."""
    return float((found.double() - reference).norm() / reference.norm())


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_loss_on_another_gpu_than_the_current_one():
    problem = case()
    there = {"tensors": [t.to("cuda:1") for t in problem.tensors]}
    there |= {name: getattr(problem, name).to("cuda:1") for name in ("ids", "valid", "coefficients")}
    here, found = solve.solve(problem), solve.solve(evolve(problem, **there))
    assert found.losses.device.index == 1
    assert torch.equal(found.losses.cpu(), here.losses.cpu())
    factor = torch.ones((), device="cuda:1")
    for one, other in zip(here.gradients, found.gradients, strict=True):
        assert off(solve.scaled(other, factor, torch.float32, True).cpu(), one.cpu().double()) < 1e-5


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"n": 1, "h": 1},
        {"v": 50257, "d": 768, "n": 500},
        {"v": 70001, "d": 128},
        {"v": 17, "d": 24},
        {"v": 3, "d": 5},
        {"bias": True, "scale": 3.0, "softcap": 1.5},
        {"own": (0, 1, 2)},
        {"own": (1,), "bias": True},
    ],
    ids=str,
)
def test_equals_fp64(kwargs, dtype):
    problem = case(dtype=dtype, **kwargs)
    counts = problem.valid.sum(0).tolist()
    reference = exactly(problem)
    told = {"at_most": int((problem.coefficients != 0).sum()), "valid_counts": counts}
    for extra in ({}, told, {**told, "lse": reference.lse.float()}):
        torch.empty(2**28, dtype=torch.uint8, device="cuda").fill_(255)  # what is not written is NaN
        found = solve.solve(evolve(problem, **extra))
        if "lse" not in extra:
            assert off(found.losses, reference.losses) < TOLERANCE[dtype]
            assert off(found.lse, reference.lse) < TOLERANCE[dtype]
        assert found.broken is None or not found.broken
        for ours, exact in zip(found.gradients, reference.gradients, strict=True):
            assert off(ours, exact) < TOLERANCE[dtype] or exact.norm() == 0


def test_coefficients_below_the_range_of_fp16():
    found = case(dtype=torch.float16, v=50257)
    tensors = [tensor.nan_to_num().requires_grad_() for tensor in found.tensors]
    unembeddings = [Unembedding(weight=tensors[3])] * 3
    coefficients = found.coefficients * 1e-9
    loss, _ = weighted_cross_entropy(tensors[:3], unembeddings, found.ids, coefficients, found.valid)
    (loss * 2**24).backward()
    reference = exactly(evolve(found, coefficients=coefficients * 2**24))
    for tensor, exact in zip(tensors, reference.gradients, strict=True):
        assert off(tensor.grad, exact) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("top_k", [None, 20])
def test_entropy(top_k):
    problem = evolve(case(v=50257), coefficients=None, wanted=(), entropy=True, top_k=top_k)
    found = solve.solve(problem)
    assert off(found.entropy, plain.compute(evolve(problem, tensors=[t.double() for t in problem.tensors])).entropy) < 1e-5


def problem_of_a_step(n=2048, h=4, d=256, v=32000):
    hidden = [torch.randn(n, d, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(h)]
    weight = torch.randn(v, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ids = torch.randint(v, (n, h), device="cuda")
    return hidden, [Unembedding(weight=weight)] * h, ids, torch.ones(n, h, dtype=torch.bool, device="cuda")


@pytest.mark.parametrize("told", [True, False])
def test_the_host_waits_for_nothing(told):
    hidden, unembeddings, ids, valid = problem_of_a_step()
    counts = [len(ids)] * 4 if told else None

    def both():
        first = token_pass(hidden, unembeddings, ids, valid, valid_counts=counts)
        keep = first.losses > first.losses.mean()
        loss, _ = weighted_cross_entropy(
            hidden, unembeddings, ids, keep / keep.sum(), valid, precomputed=first, at_most=ids.numel() if told else None
        )
        loss.backward()
        weighted_cross_entropy(hidden, unembeddings, ids, keep / keep.sum(), valid, valid_counts=counts)[0].backward()

    both()  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_told_counts_are_never_awaited():
    """The device is kept busy; the host must be through long before it."""
    hidden, unembeddings, ids, valid = problem_of_a_step()
    counts = [len(ids)] * 4
    run = lambda: weighted_cross_entropy(
        hidden, unembeddings, ids, valid / valid.sum(), valid, at_most=ids.numel(), valid_counts=counts
    )[0].backward()
    run()
    torch.cuda.synchronize()
    busy = torch.cuda.Event()
    torch.cuda._sleep(2 * 10**9)  # about a second
    busy.record()
    run()
    assert not busy.query()
    torch.cuda.synchronize()


def test_a_count_that_was_too_small_is_nan():
    hidden, unembeddings, ids, valid = problem_of_a_step(n=64)
    run = lambda **told: weighted_cross_entropy(hidden, unembeddings, ids, valid / valid.sum(), valid, **told)[0]
    assert run(at_most=255, valid_counts=[64] * 4).isnan()
    assert run(at_most=256, valid_counts=[64, 63, 64, 64]).isnan()
    assert run(at_most=256, valid_counts=[64] * 4).isfinite()
    assert token_pass(hidden, unembeddings, ids, valid, valid_counts=[64, 63, 64, 64]).losses.isnan().all()


def test_memory_does_not_grow_with_heads():
    def peak(h):
        hidden, unembeddings, ids, valid = problem_of_a_step(n=4096, h=h, d=512, v=64000)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        weighted_cross_entropy(hidden, unembeddings, ids, valid / valid.sum(), valid)[0].backward()
        gradients = sum(x.numel() * 2 for x in (*hidden, unembeddings[0].weight))
        return torch.cuda.max_memory_allocated() - before - gradients

    one, eight = peak(1), peak(8)
    assert eight < one + 8 * 2**20
    assert eight < 400 * 2**20


class Model(torch.nn.Module):
    def __init__(self, v=1000, d=64):
        super().__init__()
        self.embed = torch.nn.Embedding(v, d)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(d, d) for _ in range(2))
        self.output = torch.nn.Linear(d, v, bias=False)
        self.output.weight = self.embed.weight

    def loss(self, x, ids, coefficients):
        hidden = [layer(x) for layer in self.layers]
        u = Unembedding(weight=self.output.weight)
        return weighted_cross_entropy(hidden, [u, u], ids, coefficients, coefficients != 0)[0]

    def forward(self, tokens, ids, coefficients, recomputed=False):
        x = self.embed(tokens)
        if recomputed:
            return checkpoint(self.loss, x, ids, coefficients, use_reentrant=False)
        return self.loss(x, ids, coefficients)


def test_in_a_compiled_and_in_a_checkpointed_model_with_tied_embeddings():
    torch.manual_seed(0)
    model = Model().cuda()
    tokens, ids = torch.randint(1000, (50,), device="cuda"), torch.randint(1000, (50, 2), device="cuda")
    coefficients = torch.rand(50, 2, device="cuda") * (torch.rand(50, 2, device="cuda") > 0.3)

    def gradients(call):
        model.zero_grad()
        loss = call(tokens, ids, coefficients)
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    expected = gradients(model)
    for call in (torch.compile(model, fullgraph=True), lambda *a: model(*a, recomputed=True)):
        torch.testing.assert_close(gradients(call), expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        half = gradients(model)
    assert half[1].dtype == torch.float32
    assert 0 < off(half[1], expected[1].double()) < 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["kl", "tv", "lk"])
def test_objectives_of_heads_equal_those_in_fp64_and_wait_for_nothing(name, dtype):
    g = torch.Generator().manual_seed(0)
    hidden = [torch.randn(2, 150, 64, generator=g) for _ in range(3)]
    weight = torch.randn(1000, 64, generator=g) / 4
    ids, valid = torch.randint(1000, (2, 150, 3), generator=g), torch.zeros(2, 150, 3, dtype=torch.bool)
    for k in range(3):
        valid[:, : 149 - k, k] = True
    coefficients = torch.rand(2, 150, 3, generator=g) * valid * (torch.rand(2, 150, 3, generator=g) > 0.3)
    coefficients /= coefficients.sum()
    counts = valid.sum((0, 1)).tolist()

    def run(device, kind):
        states = [h.to(device, kind).requires_grad_() for h in hidden]
        shared = weight.to(device, kind).requires_grad_()
        given = ids.to(device), coefficients.to(device), valid.to(device)
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
        try:
            found = weighted_head_loss(
                states, [Unembedding(weight=shared)] * 3, *given, HeadObjective(name), valid_counts=counts
            )
            found.loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return found, [tensor.grad for tensor in (*states, shared)]

    run("cuda", dtype)  # kernels are compiled
    (ours, mine), (exact, reference) = run("cuda", dtype), run("cpu", torch.float64)
    tolerance = TOLERANCE[dtype]
    assert off(ours.loss.cpu(), exact.loss) < tolerance
    assert off(ours.agreement.overlap.cpu(), exact.agreement.overlap) < tolerance
    for found, wanted in zip(mine, reference, strict=True):
        # a sign of q − p turns where rounding turns it
        assert off(found.cpu(), wanted) < (tolerance if name == "kl" else 20 * tolerance)
