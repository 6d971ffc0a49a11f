"""Greedy steps of one text by our own kernels, in Triton's interpreter, which runs without a GPU; and where they fit."""

from __future__ import annotations

import importlib.util
import os
from functools import partial
from threading import Timer
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

if os.environ.get("TRITON_INTERPRET") != "1":

    def test_the_steps_in_the_interpreter(assert_passes_interpreted):
        assert_passes_interpreted()

    @pytest.mark.slow
    def test_the_steps_in_the_interpreter_in_every_case(assert_passes_interpreted):
        assert_passes_interpreted("slow")

else:
    from torch import Tensor, nn
    from transformers import LlamaConfig, LlamaForCausalLM

    from wmtp.config.schema import HeadsConfig
    from wmtp.generation import Generation, Sampling, choosing, generate, kernel_step, replay, step, stream
    from wmtp.generation.chain_drafters import ChainDrafter
    from wmtp.generation.choosing import accept, write_tokens
    from wmtp.generation.kernel_step import KernelStep, Letter
    from wmtp.models import layer_steps
    from wmtp.models.acceleration import compile_layers
    from wmtp.models.mtp import MTPModel
    from wmtp.models.step_kernels import Judged, Rows, Tables, begin, settle

    SHAPE = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
        "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 256, "initializer_range": 0.3,
    }  # fmt: skip

    def _tables(positions: int = 40, width: int = 48) -> Tables:
        return Tables(torch.randn(positions, 64), torch.randn(positions, 64), torch.randn(positions, width))

    def _judged(drafts: int) -> Judged:
        accepted, following, last = (torch.full((1,), -7) for _ in range(3))
        return Judged(torch.full((1, drafts), -7), accepted, following, last, torch.full((3 + 2 * drafts,), -1))

    def _assert_rows(rows: Rows, tables: Tables, slots: Tensor) -> None:
        assert torch.equal(rows.slots, slots)
        for found, table in ((rows.cos, tables.cos), (rows.sin, tables.sin), (rows.mask[:, 0], tables.mask)):
            assert torch.equal(found[0], table[slots[0]])

    @pytest.mark.parametrize("drafts", range(6))
    @pytest.mark.parametrize("known", [1, 7, 34])
    def test_what_a_step_reads(drafts: int, known: int) -> None:
        torch.manual_seed(drafts)
        tokens, guesses, tables = torch.randint(0, 64, (1, 50)), torch.randint(0, 64, (1, drafts)), _tables()
        embedding, rows, count = torch.randn(64, 64), Rows.like(tables, 1 + drafts), torch.tensor([known])
        found = begin(tokens, count, guesses, embedding, tables, rows)
        slots, ids = choosing.next_tokens(tokens, count, guesses, compiled=False)
        assert torch.equal(found, embedding[ids])
        _assert_rows(rows, tables, slots)

    @pytest.mark.parametrize("drafts", range(6))
    @pytest.mark.parametrize("known", [1, 2, 5, 34])
    def test_what_a_step_leaves(drafts: int, known: int) -> None:
        """All counts of accepted drafts, with wrong drafts before right ones, ties, and rows shorter than a chain's window."""
        tables, hidden = _tables(), torch.randn(1, 1 + drafts, 64)
        for case in range(2 * (1 + drafts)):
            torch.manual_seed(case)
            best, going = torch.randint(0, 64, (1, 1 + drafts)), torch.tensor([int(case % 5 > 0)])
            guesses = best[:, :-1].clone()
            if case // 2 < drafts:
                guesses[0, case // 2] = (guesses[0, case // 2] + 1) % 64
            first, size = torch.rand(1, 1 + drafts), 1 + torch.rand(1, 1 + drafts)
            second = first - torch.rand(1, 1 + drafts) * 4e-4
            tokens, count = torch.randint(0, 64, (1, 50)), torch.tensor([known])
            other, other_count = tokens.clone(), count.clone()
            slots, kept, into = known - 1 + torch.arange(1 + drafts)[None], torch.zeros(1, 50, 64), _judged(drafts)
            window = Rows.like(tables, 1 + drafts) if case % 2 else None
            given = (tokens, count, going), guesses, into, tables, (hidden, kept) if case % 2 else None, window
            settle((best, first, second, size), 2e-4, slots, *given)

            accepted, following = accept(best, guesses)
            last = write_tokens(other, other_count, going, guesses, accepted, following, compiled=False)
            assert accepted.item() == min(case // 2, drafts)
            assert torch.equal(tokens, other)
            assert torch.equal(count, other_count)
            assert torch.equal(into.accepted, accepted)
            assert torch.equal(into.following, following)
            assert torch.equal(into.before, guesses)
            told = [*guesses[0].tolist(), int(following), int(accepted), *(first - second <= 2e-4 * size)[0].long().tolist()]
            assert into.told.tolist() == told
            if going:
                assert torch.equal(into.last, last)
            if window is not None:
                assert torch.equal(kept[:, slots[0]], hidden)
                assert not kept[:, : known - 1].any()
                assert not kept[:, known + drafts :].any()
                _assert_rows(window, tables, (into.last - drafts + torch.arange(1 + drafts)).clamp(min=0)[None])

    def _model(kind: str, horizon: int, layout: Any = None, **options: Any) -> MTPModel:
        torch.manual_seed(0)
        base = LlamaForCausalLM(LlamaConfig(**SHAPE | options))  # type: ignore[arg-type]
        heads = HeadsConfig(horizon=horizon, kind=kind, layout=layout, init="copy")  # type: ignore[arg-type]
        model = MTPModel(base.eval(), heads, seed=1).eval()
        with torch.no_grad():
            for parameter in model.extra_heads.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.02)
        return model

    def _ask(model: MTPModel, prompt: list[int], new: int, *, speculative: bool = True, **options: Any) -> Generation:
        [done] = generate(model, [prompt], max_new_tokens=new, eos_id=None, speculative=speculative, **options)
        return done

    def _plain_layer(layer: nn.Module, x: Tensor, given: dict[str, Any], *, last: bool = False) -> Tensor:
        """The layer's own code: the interpreter takes seconds for a layer of kernels, which are tested elsewhere."""
        result = type(layer).forward(layer, x, **{name: value for name, value in given.items() if name != "hidden_states"})
        return result[:, -1:] if last else result

    @pytest.fixture
    def opened(monkeypatch: pytest.MonkeyPatch, without_the_compiler: None) -> list[KernelStep | None]:
        """Steps as a GPU replays them, by kernels, but for the layers. Each time they are asked for, what came of it."""
        monkeypatch.setattr(layer_steps, "_on_hopper", lambda _: True)
        monkeypatch.setattr(layer_steps, "_layer", _plain_layer)
        monkeypatch.setattr(step, "can_replay", lambda *_: True)
        monkeypatch.setattr(step, "_WIDTHS", 8)
        monkeypatch.setattr(replay.Replay, "__call__", lambda self: self.function())
        found: list[KernelStep | None] = []

        def opening(*given: Any) -> KernelStep | None:
            found.append(kernel_step.kernel_step(*given))
            return found[-1]

        monkeypatch.setattr(step, "kernel_step", opening)
        return found

    class Drafts:
        """Right drafts in place of some: how many are accepted differs from step to step.

        Args:
            text: prompt and new tokens.
            extra: drafts of a step.
        """

        def __init__(self, monkeypatch: pytest.MonkeyPatch, text: list[int], extra: int) -> None:
            self.own: list[list[int]] = []
            self._table = torch.tensor([*text, *[1] * 3 * extra])
            self._right = torch.rand(len(text) + 3, extra, generator=torch.Generator().manual_seed(0)) < 0.7
            plain, kernels = ChainDrafter.draft, KernelStep.draft

            def by_kernels(step: KernelStep) -> None:
                kernels(step)
                step._drafts.copy_(self._replaced(step._drafts, int(step._text[1])))

            monkeypatch.setattr(KernelStep, "draft", by_kernels)
            monkeypatch.setattr(
                ChainDrafter, "draft", lambda drafter, *given: self._replaced(plain(drafter, *given), int(given[1]) + 2)
            )

        def _replaced(self, drafts: Tensor, known: int) -> Tensor:
            self.own.append(drafts[0].tolist())
            return torch.where(self._right[known], self._table[known : known + drafts.shape[1]], drafts)

    @pytest.mark.parametrize(
        ("horizon", "layout", "draft_ids", "prompt", "new"),
        [
            (4, "mimo", None, [1], 9),
            (3, "plain", tuple(range(60)), [9, 8, 7, 6, 5], 6),
            pytest.param(3, "exaone", None, [7, 9], 6, marks=pytest.mark.slow),
            (2, "plain", None, [3], 4),
            pytest.param(6, "mimo", None, [5] * 4, 5, marks=pytest.mark.slow),
        ],
    )
    def test_the_same_texts_and_drafts(
        horizon: int, layout: str, draft_ids: tuple[int, ...] | None, prompt: list[int], new: int,
        opened: list[KernelStep | None], monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        model = _model("chained", horizon, layout)
        model.draft_ids = draft_ids
        plain = _ask(model, prompt, new, speculative=False)
        drafts = Drafts(monkeypatch, [*prompt, *plain.tokens], horizon - 1)
        wanted = _ask(model, prompt, new)
        assert len(opened) == 0
        assert wanted.tokens == plain.tokens
        compile_layers(model)
        wanted_drafts, drafts.own = drafts.own, []
        assert _ask(model, prompt, new) == wanted
        assert drafts.own == wanted_drafts
        assert any(wanted.drafts.accepted)
        [kernels] = opened
        assert kernels is not None
        assert kernels.drafts_too
        assert _ask(model, prompt, new, speculative=False) == plain
        assert opened[1] is not None

    @pytest.mark.parametrize(
        "kind", [pytest.param("shared", marks=pytest.mark.slow), "linear", pytest.param("block", marks=pytest.mark.slow)]
    )
    def test_other_drafts_follow_a_step(kind: str, opened: list[KernelStep | None]) -> None:
        model = _model(kind, 3)
        wanted = _ask(model, [5, 6, 7], 6)
        compile_layers(model)
        assert _ask(model, [5, 6, 7], 6) == wanted
        [kernels] = opened
        assert kernels is not None
        assert not kernels.drafts_too

    def test_ties_are_decided_behind_a_step(opened: list[KernelStep | None], monkeypatch: pytest.MonkeyPatch) -> None:
        """All tokens tie, and the step chose another one each time: what it wrote and drafted is mended."""
        model = _model("chained", 4)
        wanted = _ask(model, [5, 6, 7], 5)
        compile_layers(model)
        from wmtp.models import head_kernels

        chosen = head_kernels.best_two
        monkeypatch.setattr(kernel_step, "TIE", 10.0)
        monkeypatch.setattr(head_kernels, "best_two", lambda x, *given: chosen(-x, *given))
        assert _ask(model, [5, 6, 7], 5).tokens == wanted.tokens
        assert _ask(model, [5, 6, 7], 5, speculative=False).tokens == wanted.tokens
        assert None not in opened

    def _watched(model: MTPModel) -> None:
        model.anatomy.embedding.register_forward_hook(lambda *_: None)

    def _replaced(model: MTPModel) -> None:
        model.anatomy.embedding.forward = partial(nn.Embedding.forward, model.anatomy.embedding)

    @pytest.mark.parametrize(
        "change", [{"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}, _watched, _replaced]
    )
    def test_models_that_are_left(change: Any, opened: list[KernelStep | None]) -> None:
        model = _model("chained", 3, **(change if isinstance(change, dict) else {}))
        compile_layers(model)
        if callable(change):
            change(model)
        _ask(model, [5, 6, 7], 6)
        assert opened == [None]

    def test_requests_that_are_left(opened: list[KernelStep | None]) -> None:
        model = _model("chained", 3, max_position_embeddings=1024)
        compile_layers(model)
        generate(model, [[5, 6], [7, 8]], max_new_tokens=3, eos_id=None, speculative=True)
        _ask(model, [5, 6, 7], 600, stop=lambda tokens: len(tokens) > 2)
        _ask(model, [5, 6, 7], 3, sampling=Sampling(temperature=1.0))
        assert opened == [None, None]

    def test_what_a_stream_that_is_left_still_drafts_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
        waits: list[step.Step] = []
        monkeypatch.setattr(step.Step, "finish", lambda left: waits.append(left))
        steps: Any = stream(_model("chained", 3), [5, 6], max_new_tokens=9, eos_id=None, speculative=True)
        assert next(steps)
        assert next(steps)
        assert not waits
        steps.close()
        assert len(waits) == 1

    def test_a_letter_is_waited_for() -> None:
        letter = Letter(3, torch.device("cpu"))
        letter.numbers.copy_(torch.tensor([4, 0, 5]))
        assert letter.tolist() == [[4, 0, 5]]
        letter.clear()
        assert letter.numbers.tolist() == [-1, -1, -1]
        writer = Timer(0.05, letter.numbers.copy_, [torch.tensor([1, 2, 3])])
        writer.start()
        assert letter.tolist() == [[1, 2, 3]]
