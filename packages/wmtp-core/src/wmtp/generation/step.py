"""Decoding step, with or without speculation, on tensors in fixed places.

A step reads, in each row, the last known token and K drafts for what follows it (K = 0 without speculation, else up to H−1), in
one forward pass. Head 1's own choice after each of these tokens then decides how many drafts were right:

- greedy: a draft is accepted if it is the token that head 1 would take. What comes out is what comes out without drafts;
- sampling: draft d of head k, drawn from q, is accepted with probability min(1, p(d) / q(d)), where p is head 1's distribution;
  after a rejection the token is drawn from max(p − q, 0) (arXiv 2211.17192, algorithm 1). So every token is distributed as p.

Either way a step gives one token more than it accepts. The heads then draft again, from what was read.

Ties. A forward pass over several tokens rounds differently from one over a single token, and so does one over another number of
rows. Where head 1's two best logits lie within `TIE` of their largest, either could win by rounding alone; for fp32 and fp64
such a token is chosen by reading that row's tokens once more, alone and without a cache. The choice then depends on the tokens
only, so that the text is the same at every batch size, with and without speculation, as long as rounding changes no logit by
more than half of `TIE`. In bf16 and fp16, rounding is so coarse that this would be done for too many tokens: it is left out,
and the text may differ in such places.

On a CUDA device a whole step, reading and drafting, is replayed as one CUDA graph (`Replay`): launching the kernels of a small
model one by one takes much longer than running them. The CPU reads one small tensor a step, behind it; where a tie is decided
otherwise than the graph did, which is rare, it drafts once more. Where the model's layers are compiled, the graph holds their
compiled form, which has fewer kernels. Prompts of a second request of the same kind, and rows that are read alone for a tie,
are graphs of their own, of uncompiled layers: each length would be compiled for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from attrs import evolve, frozen
from torch import Tensor

from wmtp.generation.alone import RowAlone
from wmtp.generation.base import Sampling
from wmtp.generation.cache import check_memory
from wmtp.generation.choosing import TIE, accept, choose_best, judge, next_tokens, taken, write_tokens
from wmtp.generation.decoder import Read, open_decoder
from wmtp.generation.drafters import Drafter, make_drafter
from wmtp.generation.kernel_step import KernelStep, Letter, kernel_step
from wmtp.generation.products import fast_unembedding
from wmtp.generation.replay import CannotReplayError, Replay, can_replay, refuse_replay
from wmtp.generation.sampling import Draws, draw, probabilities
from wmtp.loss import Unembedding
from wmtp.models.step_cache import compiled_steps, plain_layers, steps_are_compiled

if TYPE_CHECKING:
    from wmtp.models.mtp import MTPModel

__all__ = ["TIE", "Step"]

#: on a GPU, slots come in multiples of this many
_WIDTHS: Final = 64

#: slots that a graph's attention looks at first; twice as many, in a new graph, whenever a row needs more
_FIRST_WIDTH: Final = 1024

#: tokens that another graph must be good for: recording one takes as long as some 50 steps
_WORTH_RECORDING: Final = 64

#: most tokens of prompts, padding included, that a graph reads; for more, launching kernels is not what takes the time
_PROMPT_TOKENS: Final = 2048

#: lengths of prompts with a graph of their own, those that came last
_MOST_PROMPT_GRAPHS: Final = 8


@frozen(eq=False)
class _Seen:
    """Results of the first half of a step.

    Args:
        read: of the decoder; None: nothing drafts from it.
        drafts: ``[B, K]``, those that were read.
        accepted, following: ``[B]``, how many drafts are accepted, and the token after them.
        best: ``[B, 1 + K]``, head 1's choices, for greedy decoding.
        result: ``[B, K + 2]``, what the CPU needs: drafts, ``following``, ``accepted``; and for exact greedy decoding
            ``[B, 1 + K]`` more: which places are tied. A letter comes before the step has ended.
    """

    read: Read | None
    drafts: Tensor
    accepted: Tensor
    following: Tensor
    best: Tensor | None
    result: Tensor | Letter


class Step:
    """Rows on the device, and the two halves of a step.

    Args:
        model: in eval mode.
        rows: their number.
        most: the most tokens that a row will have.
        kind: of requests that it can serve.
        drafts: K.
        sampling: how tokens are chosen.
    """

    def __init__(
        self, model: MTPModel, rows: int, most: int, kind: tuple[Any, ...], *, drafts: int, sampling: Sampling
    ) -> None:
        self.kind = kind
        self.draws: Draws
        self._model, self._sampling = model, sampling
        weight = model.anatomy.output.weight
        self._device = weight.device
        coarse = torch.is_autocast_enabled(weight.device.type) or weight.dtype not in (torch.float32, torch.float64)
        self._exact = sampling.greedy and not coarse
        self._extra = drafts
        # drafts go beyond the end, and the window of a chain goes beyond a short row
        beyond = 3 * model.horizon
        if self._device.type == "cuda":  # kernels want widths that can be divided
            most = -(-(most + beyond) // _WIDTHS) * _WIDTHS - beyond
        self.most, self._capacity = most, most + beyond
        # with a copy while prompts are put in; a model that keeps states alone has no other limit
        check_memory("table of ids", 16 * rows * self._capacity, rows, self._capacity, self._device)
        self._decoder = open_decoder(model, most, self._capacity)
        self._drafter: Drafter | None = make_drafter(model, self._decoder, drafts) if drafts else None
        self._tokens = torch.zeros(rows, self._capacity + model.horizon, dtype=torch.int64, device=self._device)
        self._rows = torch.arange(rows, device=self._device)
        self._lengths = [0] * rows
        self._known = torch.zeros(rows, dtype=torch.int64, device=self._device)  # the same, on the device
        self._still = [True] * rows  # False: a row that is finished and not dropped yet
        self._going = torch.ones_like(self._known)  # the same, on the device
        self._drafts = self._tokens[:, :0]  # none yet; then that place of them which stays
        self._drafts_kept: Tensor | None = None
        self._draft_probs: Tensor | None = None
        numbers = torch.float64 if self._device.type == "cpu" else torch.float32
        # random numbers of this step: for accepting 1 + K, for drafting K
        self._uniform = torch.zeros(rows, 1 + 2 * self._extra, dtype=numbers, device=self._device)

        self._unembedding: Unembedding
        self._seen: _Seen
        self._width = 0
        self.replays = False
        self._graphs: dict[int, Replay[_Seen]] = {}  # by width
        self._prompt_graphs: dict[int, Replay[_Seen]] = {}  # by length
        self._replays_prompts = True
        self._alone: RowAlone | None = None
        self._kernels: KernelStep | None = None
        self._asked_kernels = False

    def begin(self, prompts: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[int]]:
        """Read the prompts. Returns as `follow`; no draft was there to accept."""
        tokens = torch.zeros(self._tokens.shape, dtype=torch.int64)
        for row, given in enumerate(prompts):
            tokens[row, : len(given)] = torch.as_tensor(given, dtype=torch.int64)
        self._tokens.copy_(tokens)
        self._lengths = [len(given) for given in prompts]
        self._known.copy_(torch.tensor(self._lengths))
        self._still = [True] * len(prompts)
        self._going.fill_(1)
        self._unembedding = fast_unembedding(self._model, 1)
        self._decoder.cache.clear()
        if self._drafter is not None:
            self._drafter.clear()
        self._drafts = self._tokens[:, :0]
        self._draw()
        decided = self._replay_prompts() if self.replays else None
        if decided is None:
            self._seen = self._look_at_prompts(max(self._lengths))
            decided = self._decide(self._seen, committed=False)
            self._commit()
        self._advance(decided[1])
        self.replays = can_replay(self._model, self._device) and self._decoder.cache.holds_only_slots
        self._width = min(self._capacity, _FIRST_WIDTH)
        return decided

    def follow(self) -> tuple[list[list[int]], list[int]]:
        """Run one step.

        Returns:
            of each row the drafts, with head 1's own token in the place after the accepted ones, and how many are accepted.
        """
        self._draw()
        needed = max(self._lengths) + self._drafts.shape[1]
        while self._width < needed:
            self._width = min(self._capacity, 2 * self._width)
        decided = self._replay() if self.replays else None
        if decided is None:
            self._seen = self._look_at()
            decided = self._decide(self._seen, committed=False)
            self._commit()
        self._advance(decided[1])
        return decided

    def finish(self) -> None:
        """Wait for drafts that the last step may still make."""
        if self._kernels is not None and self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def with_rows(self, places: list[int], left: int) -> tuple[Step, list[int]]:
        """Drop all rows but these, or fewer.

        Args:
            places: rows that go on.
            left: the most tokens that one of them will get.

        Returns:
            what goes on with the rows that stay, and which these are: a graph is made for one number of rows, so it keeps
            finished ones until half are and another is worth recording, or for good where layers would be compiled for it.
        """
        records = 2 * len(places) <= len(self._lengths) and left >= _WORTH_RECORDING and not self._model.compiled_layers
        if self.replays and not records:
            staying = set(places)
            self._still = [place in staying for place in range(len(self._lengths))]
            self._going.copy_(torch.tensor(self._still))
            # a finished row reads its first tokens again and again
            self._known.copy_(torch.where(self._going.bool(), self._known, 2))
            self._lengths = [length if still else 2 for length, still in zip(self._lengths, self._still, strict=True)]
            return self, list(range(len(self._lengths)))
        rows = torch.tensor(places, device=self._device)
        fewer = copy(self)
        fewer._tokens, fewer._known, fewer._uniform = self._tokens[rows], self._known[rows], self._uniform[rows]
        fewer._still, fewer._going = [True] * len(places), torch.ones_like(fewer._known)
        fewer._lengths, fewer._rows = [self._lengths[place] for place in places], self._rows[: len(places)]
        fewer._drafts = self._drafts[rows]
        fewer._drafts_kept = None if self._drafts_kept is None else fewer._drafts
        fewer._draft_probs = None if self._draft_probs is None else self._draft_probs[rows]
        fewer.draws = self.draws.with_rows(places)
        fewer._decoder = self._decoder.with_rows(rows)
        fewer._drafter = None if self._drafter is None else self._drafter.with_rows(rows, fewer._decoder)
        fewer._graphs, fewer._prompt_graphs = {}, {}
        fewer._kernels, fewer._asked_kernels = None, False
        return fewer, places

    @property
    def _compiled(self) -> bool:
        return self._model.compiled_layers and steps_are_compiled()

    def _replay_prompts(self) -> tuple[list[list[int]], list[int]] | None:
        """Read the prompts by a graph; None where it cannot be.

        There is one for each padded length.
        """
        prompt = min(-(-max(self._lengths) // _WIDTHS) * _WIDTHS, self._capacity)
        if not self._replays_prompts or len(self._lengths) * prompt > _PROMPT_TOKENS:
            return None
        graph = self._prompt_graphs.pop(prompt, None) or Replay(partial(self._whole_prompts, prompt))
        self._prompt_graphs[prompt] = graph
        while len(self._prompt_graphs) > _MOST_PROMPT_GRAPHS:  # each holds memory for its prompts' hidden states
            self._prompt_graphs.pop(next(iter(self._prompt_graphs)))
        try:
            self._seen = graph()
        except CannotReplayError:  # steps may be replayed nevertheless
            self._replays_prompts = False
            return None
        if self._drafts_kept is not None:
            self._drafts = self._drafts_kept
        return self._decide(self._seen, committed=True)

    def _whole_prompts(self, length: int) -> _Seen:
        self._seen = self._look_at_prompts(length)
        self._commit()
        return self._seen

    def _look_at_prompts(self, length: int) -> _Seen:
        """Read the first ``length`` tokens of each row.

        Padding is among them. The token after each prompt is chosen.
        """
        slots = torch.arange(length, device=self._device).expand(len(self._lengths), -1)
        read = self._decoder.read(self._tokens[:, :length], slots, 0, length, self._lengths)
        return self._verify(read, read.hidden[self._rows, self._known - 1][:, None])

    def _replay(self) -> tuple[list[list[int]], list[int]] | None:
        """Run a whole step as a graph; None: it cannot be one."""
        graph = self._graphs.setdefault(self._width, Replay(self._whole))
        if self._kernels is not None:
            self._kernels.letter.clear()
        with compiled_steps():
            try:
                self._seen = graph()
            except CannotReplayError as error:
                self.replays = False
                refuse_replay(self._model, error)
                return None
            return self._decide(self._seen, committed=True)

    def _whole(self) -> _Seen:
        kernels = self._open_kernels()
        if kernels is None:
            self._seen = self._look_at()
            self._commit()
            return self._seen
        read, best = kernels.read()
        judged = kernels.judged
        self._seen = _Seen(read, judged.before, judged.accepted, judged.following, best, kernels.letter)
        if kernels.drafts_too:
            kernels.draft()
        else:
            self._draft(judged.last)
        return self._seen

    def _open_kernels(self) -> KernelStep | None:
        if not self._asked_kernels and self._compiled and self._exact:
            text = self._tokens, self._known, self._going
            given = self._model, self._decoder, self._drafter, self._unembedding, text, self._drafts, self._width
            self._kernels = kernel_step(*given)
        self._asked_kernels = True
        return self._kernels

    def _draw(self) -> None:
        """Put this step's random numbers into place."""
        if not self._sampling.greedy:
            count = 1 + self._drafts.shape[1] + self._extra
            self._uniform[:, :count] = self.draws(count, self._device)

    def _look_at(self) -> _Seen:
        """Read each row's last known token and drafts, and verify these."""
        drafts = self._drafts.shape[1]
        slots, ids = next_tokens(self._tokens, self._known, self._drafts, compiled=self._compiled)
        if self.replays:
            start, width = None, self._width
        else:
            start = self._lengths[0] - 1 if len(set(self._lengths)) == 1 else None
            width = max(self._lengths) + drafts
        read = self._decoder.read(ids, slots, start, width)
        return self._verify(read, read.hidden)

    def _verify(self, read: Read, hidden: Tensor) -> _Seen:
        """Decide how many drafts were right, and the token after them.

        Args:
            read: results of this pass.
            hidden: ``[B, 1 + K, D]``, head 1's hidden states at the last known token and the drafts.
        """
        unembedding, drafts, best = self._unembedding, self._drafts, None
        if self._sampling.greedy:
            best, accepted, following, result = judge(unembedding, hidden, drafts, exact=self._exact, compiled=self._compiled)
        else:
            accepted, following = self._verify_sampled(unembedding.logits(hidden))
            result = torch.cat([drafts, following[:, None], accepted[:, None]], dim=1)
        # in a graph the drafts themselves change before the CPU decides
        return _Seen(read, result[:, : drafts.shape[1]], accepted, following, best, result)

    def _decide(self, seen: _Seen, *, committed: bool) -> tuple[list[list[int]], list[int]]:
        """Wait for the device, and decide ties that matter.

        Args:
            seen: of this step.
            committed: whether `_commit` has been run already; where a tie is decided otherwise it is run once more.
        """
        width = seen.drafts.shape[1] + 2
        found = seen.result.tolist()
        tied = [row[width:] for row in found]
        if seen.best is not None and any(map(any, tied)) and self._untie(seen.best, seen.drafts, tied):
            accepted, following = accept(seen.best, seen.drafts)
            seen.accepted.copy_(accepted)
            seen.following.copy_(following)
            found = torch.cat([seen.drafts, following[:, None], accepted[:, None]], dim=1).tolist()
            if committed:
                self._known.copy_(torch.tensor(self._lengths))
                self._drafts = seen.drafts
                self._seen = seen if seen.read is None else evolve(seen, read=evolve(seen.read, again=True))
                with plain_layers():  # rare, and of another shape
                    self._commit()
        accepted = [row[width - 1] for row in found]
        new = [row[: width - 1] for row in found]
        for row, count in zip(new, accepted, strict=True):
            row[count] = row[-1]
        return new, accepted

    def _untie(self, best: Tensor, drafts: Tensor, tied: list[list[int]]) -> bool:
        """Decide ties that matter by reading their row alone.

        ``best`` ``[B, T]`` is changed. Returns whether it was.
        """
        self._alone = self._alone or RowAlone(self._model, self._decoder, self._device)
        changed = False
        for row, (places, going) in enumerate(zip(tied, self._still, strict=True)):
            for place, is_tied in enumerate(places if going else ()):
                if is_tied:
                    before = torch.cat([self._tokens[row, : self._lengths[row]], drafts[row, :place]])
                    chosen = self._alone.choose(before)
                    changed |= bool(chosen != best[row, place])
                    best[row, place] = chosen
                if place < drafts.shape[1] and bool(best[row, place] != drafts[row, place]):
                    break
        return changed

    def _verify_sampled(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Count each row's accepted drafts, and draw the next token.

        Returns:
            both ``[B]``.
        """
        probs, count = probabilities(logits, self._sampling), self._drafts.shape[1]
        uniform = self._uniform[:, : count + 1]
        if self._draft_probs is None or count == 0:
            return torch.zeros_like(self._known), draw(probs[:, 0], uniform[:, 0])
        chosen = self._drafts[..., None]
        wanted, drafted = probs[:, :-1].gather(-1, chosen)[..., 0], self._draft_probs.gather(-1, chosen)[..., 0]
        accepted = (uniform[:, :-1] * drafted < wanted).cumprod(dim=1).sum(dim=1)
        rest = probs[self._rows, accepted]
        subtracted = self._draft_probs[self._rows, accepted.clamp(max=count - 1)]
        left = torch.where((accepted < count)[:, None], (rest - subtracted).clamp(min=0), rest)
        # equal distributions leave nothing, and only rounding can have rejected then
        left = torch.where(left.sum(-1, keepdim=True) > 0, left, rest)
        return accepted, draw(left, uniform[:, -1])

    def _commit(self) -> None:
        """Write the new tokens into the rows, and draft again."""
        accepted, following = self._seen.accepted, self._seen.following
        last = write_tokens(self._tokens, self._known, self._going, self._drafts, accepted, following, compiled=self._compiled)
        self._draft(last)

    def _draft(self, last: Tensor) -> None:
        """Draft again; see `Drafter.draft`."""
        if self._drafter is None or self._seen.read is None:
            return
        kept: list[Tensor] = []
        uniform = self._uniform[:, self._drafts.shape[1] + 1 :]

        def choose(head: int, unembedding: Unembedding, ids: Tensor | None, hidden: Tensor, at: Tensor | None) -> Tensor:
            if self._sampling.greedy:
                return choose_best(unembedding, ids, hidden, at, compiled=self._compiled)
            hidden = hidden if at is None else taken(hidden, at)
            logits = unembedding.logits(hidden)
            if ids is not None:
                everything = logits.new_full((*logits.shape[:-1], self._model.vocab_size), -torch.inf)
                logits = everything.index_copy(-1, ids, logits)
            kept.append(probabilities(logits, self._sampling))
            return draw(kept[-1], uniform[:, head - 2 : head - 2 + hidden.shape[1]])

        drafts = self._drafter.draft(self._seen.read, last, self._tokens, choose)
        probs = torch.cat(kept, dim=1) if kept else None
        if self._drafts_kept is None or not self.replays:
            self._drafts_kept, self._draft_probs = drafts, probs
        else:
            self._drafts_kept.copy_(drafts)
            if self._draft_probs is not None and probs is not None:
                self._draft_probs.copy_(probs)
        self._drafts = self._drafts_kept

    def _advance(self, accepted: list[int]) -> None:
        """Keep the CPU's lengths of the rows."""
        self._lengths = [
            length + count + 1 if still else length
            for length, count, still in zip(self._lengths, accepted, self._still, strict=True)
        ]
