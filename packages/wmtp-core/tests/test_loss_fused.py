"""The kernels of the loss against the plain implementation, in Triton's interpreter, which runs without a GPU.

Triton decides when it is imported whether it interprets, so these tests run in a process of their own.
"""

import importlib.util
import os
from itertools import product

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

if not INTERPRETED:

    def test_the_kernels_in_the_interpreter(assert_passes_interpreted):
        assert_passes_interpreted()

    @pytest.mark.slow
    def test_the_kernels_in_the_interpreter_in_every_case(assert_passes_interpreted):
        assert_passes_interpreted("slow")

else:
    from attrs import evolve
    from crossings import sampled

    from wmtp.loss import Unembedding
    from wmtp.loss.cross_entropy import Problem, flatten
    from wmtp.loss.fp8 import Fp8Logits
    from wmtp.loss.torch_backend import lists, plain
    from wmtp.loss.triton import fused

    def problem(n=9, h=3, d=6, v=37, *, seed=0, bias=False, scale=1.0, softcap=None, own=(), dtype=torch.float32, **kwargs):
        """Random predictions, of which some have a coefficient, some are measured, and the rest hold NaN."""
        g = torch.Generator().manual_seed(seed)
        new = lambda *shape: torch.randn(*shape, generator=g).to(dtype)
        shared = Unembedding(weight=new(v, d), bias=new(v) if bias else None, scale=scale, softcap=softcap)
        unembeddings = [Unembedding(weight=new(v, d)) if k in own else shared for k in range(h)]
        hidden = [new(n, d) for _ in range(h)]
        valid = torch.rand(n, h, generator=g) > 0.3
        coefficients = torch.rand(n, h, generator=g) * valid * (torch.rand(n, h, generator=g) > 0.3)
        hidden = [torch.where(valid[:, k : k + 1], x, torch.nan) for k, x in enumerate(hidden)]
        heads, tensors = flatten(hidden, unembeddings)
        return Problem(
            tensors=tensors,
            heads=heads,
            ids=torch.randint(v, (n, h), generator=g),
            valid=valid,
            compute=dtype,
            coefficients=coefficients,
            wanted=[True] * len(tensors),
            **kwargs,
        )

    def same(case, rtol=2e-5, atol=2e-6):
        """Both implementations give the same; returns what the fused one gave."""
        mine, reference = fused.compute(case), plain.compute(case)
        for name in ("losses", "lse", "entropy"):
            ours, theirs = getattr(mine, name), getattr(reference, name)
            if theirs is not None:
                torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
        for place, (ours, theirs) in enumerate(zip(mine.gradients, reference.gradients, strict=True)):
            assert (ours is None) == (theirs is None)
            if ours is not None and theirs is not None:
                assert ours.dtype == theirs.dtype
                torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, msg=lambda text, i=place: f"tensor {i}: {text}")
        return mine

    CASES = [
        {},
        {"bias": True},
        {"scale": 0.5},
        {"softcap": 2.0},
        {"bias": True, "scale": 3.0, "softcap": 1.5},
        {"own": (0, 1, 2)},
        {"own": (1,)},
        {"n": 1},
        {"v": 2, "d": 1},
        {"v": 128, "d": 64},
        {"h": 1, "n": 5},
    ]

    @pytest.fixture(params=[3, 1000])
    def rows(request, monkeypatch):
        """Chunks of so many rows."""
        monkeypatch.setattr(fused, "chunk_rows", lambda vocabulary, width, itemsize: request.param)
        return request.param

    @pytest.fixture(params=[8192, 16])
    def reading(request, monkeypatch):
        """Set how much of a row is read at once: all, or blocks of which the last may be short."""
        monkeypatch.setattr(fused, "_blocks", lambda logits, largest=0: {"BLOCK": request.param, "num_warps": 1})

    @pytest.mark.parametrize(
        ("case", "rows", "reading"), sampled(product(CASES, [3, 1000], [8192, 16]), 5), ids=str, indirect=["rows", "reading"]
    )
    def test_equals_the_plain_implementation(case, rows, reading):
        same(problem(**case))

    @pytest.mark.parametrize(
        ("case", "entropy", "reading"),
        sampled(
            product(
                [{}, {"bias": True, "scale": 3.0, "softcap": 1.5}],
                [{"entropy": True}, {"entropy": True, "top_k": 4}],
                [8192, 16],
            ),
            3,
        ),
        ids=str,
        indirect=["reading"],
    )
    def test_statistics(case, entropy, reading, monkeypatch):
        monkeypatch.setattr(fused, "chunk_rows", lambda vocabulary, width, itemsize: 4)
        same(evolve(problem(**case, **entropy), coefficients=None, wanted=()))

    #: many blocks, one token a block, chunks
    COLUMNS = [(7, 16 * 7), (8192, 1), (5, 1000)]

    @pytest.fixture
    def columns(request, monkeypatch):
        """Rows and bytes of the logits that are made at once where the sums of exponentials are known."""
        known, size = request.param
        monkeypatch.setattr(fused, "_KNOWN_ROWS", known)
        monkeypatch.setattr(fused, "_CHUNK_BYTES", size)

    @pytest.mark.parametrize(
        ("case", "rows", "columns"),
        sampled(product([{"dtype": torch.float16, "v": 50, "d": 16}, *CASES], [3, 1000], COLUMNS), 13),
        ids=str,
        indirect=["rows", "columns"],
    )
    def test_a_second_pass_with_known_sums(case, rows, columns):
        first = problem(**case)
        loose = {"rtol": 2e-2, "atol": 2e-2} if "dtype" in case else {"atol": 2e-5}
        same(evolve(first, lse=plain.compute(first).lse), **loose)

    def test_a_second_pass_adds_up_in_fp32(monkeypatch):
        monkeypatch.setattr(fused, "_CHUNK_BYTES", 1)  # one token a block
        found = problem(n=6, h=1, d=16, v=150, scale=0.05, dtype=torch.bfloat16)
        found = evolve(found, lse=plain.compute(found).lse)
        for ours, true in zip(fused.compute(found).gradients, plain.compute(found).gradients, strict=True):
            assert (ours.float() - true.float()).norm() < 1e-2 * true.float().norm()  # added up in bf16: 1.4e-2

    @pytest.mark.parametrize(
        ("case", "few", "rows"), sampled(product([{}, {"own": (1,)}], [True, False], [3, 1000]), 3), ids=str, indirect=["rows"]
    )
    def test_what_the_host_was_told(case, few, rows):
        found = problem(**case)
        counts = found.valid.sum(0).tolist()
        learned = int((found.coefficients != 0).sum())
        extra = 0 if few else 5
        told = evolve(found, at_most=learned + extra, valid_counts=[count + extra for count in counts])
        assert not same(told).broken
        assert not same(evolve(told, lse=plain.compute(found).lse)).broken
        if few and not case:
            assert fused.compute(evolve(told, at_most=learned - 1)).broken
            assert fused.compute(evolve(told, valid_counts=[counts[0] - 1, *counts[1:]])).broken

    def test_products_are_as_long_as_they_must_be(monkeypatch):
        """With known sums, or where the host was told, nothing without a coefficient gets a product of the gradient."""
        chunks = []
        run = fused._State.run
        monkeypatch.setattr(fused._State, "run", lambda self, *args: chunks.append(args[1:]) or run(self, *args))
        monkeypatch.setattr(lists, "_AHEAD", 0)
        found = problem(n=20)
        counts, learned = found.valid.sum(0).tolist(), int((found.coefficients != 0).sum())
        for extra in ({}, {"at_most": learned, "valid_counts": counts}):
            for known in (False, True):
                chunks.clear()
                fused.compute(evolve(found, **extra, lse=plain.compute(found).lse if known else None))
                assert sum(stop - start for start, stop, gradient in chunks if gradient) == learned
                rest = sum(stop - start for start, stop, gradient in chunks if not gradient)
                assert rest == (0 if known else sum(counts) - learned)

    def test_nothing_to_do():
        found = problem()
        nothing = torch.zeros_like(found.valid)
        for counts in (None, [0, 0, 0]):
            answer = same(evolve(found, valid=nothing, coefficients=found.coefficients * 0, valid_counts=counts, at_most=0))
            assert all(gradient.count_nonzero() == 0 for gradient in answer.gradients)

    def test_only_what_is_wanted(rows):
        found = problem(bias=True)
        for place in range(5):
            same(evolve(found, wanted=[i == place for i in range(5)]))

    def test_logits_far_above_those_of_earlier_blocks(monkeypatch):
        monkeypatch.setattr(fused, "_blocks", lambda logits, largest=0: {"BLOCK": 4, "num_warps": 1})
        found = problem(n=4, v=37)
        found.tensors[3][9:] *= 30
        found.tensors[3][22:] *= 10
        found.tensors[3][35:] *= 30
        same(found, rtol=1e-4, atol=1e-3)
        found.tensors[3][35:] *= 30
        same(evolve(found, coefficients=None, wanted=(), entropy=True), rtol=1e-4, atol=1e-3)

    def test_bf16(reading):
        same(problem(n=12, d=16, v=50, dtype=torch.bfloat16), rtol=2e-2, atol=2e-2)

    @pytest.mark.parametrize(
        ("case", "known", "rows"),
        sampled(product([{}, {"bias": True, "scale": 3.0, "softcap": 1.5}], [False, True], [3, 1000]), 3),
        ids=str,
        indirect=["rows"],
    )
    def test_products_in_fp8(case, known, rows, monkeypatch):
        monkeypatch.setattr(fused, "_blocks", lambda logits, largest=0: {"BLOCK": 16, "num_warps": 1})
        found = evolve(problem(n=12, d=16, v=50, **case), fp8=Fp8Logits(emulate=True))
        found = evolve(found, lse=plain.compute(found).lse if known else None)
        same(found, atol=2e-5)
        # the interpreter forgets the carry where it rounds up to e5m2
        monkeypatch.setattr(fused, "SLOPE_FORMAT", torch.float32)
        monkeypatch.setattr(plain, "SLOPE_FORMAT", torch.float32)
        same(evolve(found, fp8=Fp8Logits(gradient=True, emulate=True)), atol=2e-5)

    @pytest.mark.parametrize("factor", [1.0, 0.0, -2.5])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("may_change", [True, False])
    def test_scaling(factor, dtype, may_change):
        gradient = torch.randn(83, 101)
        expected = (gradient * factor).to(dtype)
        kept = gradient.clone()
        scaled = fused.scaled(gradient, torch.tensor(factor), dtype, may_change)
        # the interpreter rounds to bf16 by cutting off
        torch.testing.assert_close(scaled, expected, rtol=0 if dtype == torch.float32 else 2**-7, atol=0)
        assert may_change or torch.equal(gradient, kept)

    def test_strided_hidden_states():
        found = problem()
        strided = [x.T.contiguous().T for x in found.tensors[:3]]
        same(evolve(found, tensors=[*strided, *found.tensors[3:]]))

    @pytest.mark.parametrize("wrong", [-1, 37, 10**6])
    def test_a_target_outside_the_vocabulary_is_nan(wrong, reading):
        found = problem()
        k = int(found.valid[0].nonzero()[0])
        found.ids[0, k] = wrong
        losses = fused.compute(found).losses
        assert losses[0, k].isnan()
        assert losses.isnan().sum() == 1

    def test_a_chunk_keeps_the_device_busy_within_its_memory():
        for vocabulary, width in ((32_000, 2048), (128_256, 2048), (49_152, 576), (262_144, 640), (258, 128)):
            rows = fused.chunk_rows(vocabulary, width, 2)
            assert 2 * rows * vocabulary <= 512 * 2**20
            at_most = 512 * 2**20 // (2 * vocabulary)
            assert rows >= min(2048, at_most) * 0.9
            assert rows * vocabulary * width > 1.3e11 or rows > 0.8 * at_most or 2 * rows * vocabulary > 150 * 2**20
        assert fused.chunk_rows(49_152, 576, 2) > 2 * fused.chunk_rows(49_152, 4096, 2)  # small products: more rows
