"""Decoding loop, the same with and without speculation.

A step reads, in each row, the last known token and K drafts of the tokens after it (K = 0 without speculation, else H−1), in
one forward pass. Head 1's own choice after each of these tokens then decides how many drafts were right:

- greedy: a draft is accepted if it is the token that head 1 would take. The result is that of decoding without drafts;
- sampling: draft d of head k, drawn from q, is accepted with probability min(1, p(d) / q(d)), where p is head 1's distribution;
  after a rejection the token is drawn from max(p − q, 0) (arXiv 2211.17192, algorithm 1). So every token is distributed as p.

Either way a step produces one token more than it accepts. Heads 2..H then draft again, from the hidden states of this pass.

Ties. A forward pass over several tokens rounds differently from one over a single token, and so does one over another number of
rows. Where head 1's two best logits lie within `TIE` of their largest, either could win by rounding alone; for fp32 and fp64
such a token is chosen by reading that row's tokens once more, alone and without a cache. The choice then depends on the tokens
only, so that the text is the same at every batch size, with and without speculation, as long as rounding changes no logit by
more than half of `TIE`. In bf16 and fp16, rounding is so coarse that this would be done for too many tokens: it is left out,
and the text may differ in such places.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Final, Literal

import torch
from attrs import define, field
from torch import Tensor

from wmtp.errors import ConfigError
from wmtp.generation.base import DraftCounts, Generation, Sampling
from wmtp.generation.decoder import Read, open_decoder
from wmtp.generation.drafters import Drafter, make_drafter
from wmtp.generation.sampling import Draws, draw, probabilities
from wmtp.models.anatomy import evaluating

if TYPE_CHECKING:
    from wmtp.models.mtp import MTPModel

__all__ = ["TIE", "Stop", "generate", "stream"]

#: logits closer than this share of the largest one count as tied; rounding was seen to move them by a hundredth of it (fp32)
TIE: Final = 2e-4

#: called with a row's new tokens after each one: whether they end here
Stop = Callable[[Sequence[int]], bool]

Finish = Literal["eos", "length", "context", "stop"]


def generate(
    model: MTPModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_id: int | Collection[int] | None,
    speculative: bool = False,
    sampling: Sampling | None = None,
    rows: Sequence[int] | None = None,
    stop: Stop | None = None,
) -> list[Generation]:
    """Go on after each prompt; all prompts together are one batch.

    Args:
        model: in eval mode, on any device.
        prompts: token ids; none empty.
        max_new_tokens: the most tokens that are added to a prompt.
        eos_id: the token that ends a text, or several; None: none does.
        speculative: whether heads 2..H draft.
        sampling: default greedy.
        rows: a number for each prompt, which its draws depend on. Default: 0, 1, 2 …
        stop: a further reason to end a row.

    Returns:
        one generation a prompt, in order, without text.

    Raises:
        ConfigError: a prompt is empty, longer than the model's context or has ids outside its vocabulary; speculation without
            extra heads; an architecture that cannot be decoded with a cache.
    """
    batch = _Batch(model, prompts, max_new_tokens, eos_id, speculative, sampling or Sampling(), rows, stop)
    with evaluating(model):
        for _ in batch.steps():
            pass
    return batch.generations()


def stream(
    model: MTPModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    eos_id: int | Collection[int] | None,
    speculative: bool = False,
    sampling: Sampling | None = None,
    stop: Stop | None = None,
) -> Iterator[list[int]]:
    """As `generate` for one prompt: yields the new tokens of each step as they come. Arguments and errors: see there."""
    batch = _Batch(model, [prompt], max_new_tokens, eos_id, speculative, sampling or Sampling(), None, stop)
    with evaluating(model):
        for new in batch.steps():
            yield new[0]


@define(eq=False)
class _Row:
    """Facts of a row that are known on the CPU."""

    tokens: list[int] = field(factory=list)
    finish: Finish | None = None
    steps: int = 0
    tested: list[int] = field(factory=list)
    accepted: list[int] = field(factory=list)


class _Batch:
    """Rows that are decoded together. A row leaves it when it is finished."""

    def __init__(
        self,
        model: MTPModel,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        eos_id: int | Collection[int] | None,
        speculative: bool,
        sampling: Sampling,
        numbers: Sequence[int] | None,
        stop: Stop | None,
    ) -> None:
        _check_request(model, prompts, max_new_tokens, speculative)
        self._model, self._sampling, self._stop = model, sampling, stop
        self._ends = frozenset([eos_id] if isinstance(eos_id, int) else eos_id or ())
        weight = model.anatomy.output.weight
        self._device = weight.device
        coarse = torch.is_autocast_enabled(weight.device.type) or weight.dtype not in (torch.float32, torch.float64)
        self._exact = sampling.greedy and not coarse
        self._extra = model.horizon - 1 if speculative else 0
        self._most_new = max_new_tokens
        longest = model.max_positions or 2**62
        self._limits = [min(max_new_tokens, longest - len(prompt)) for prompt in prompts]
        self.rows = [_Row(tested=[0] * self._extra, accepted=[0] * self._extra) for _ in prompts]

        ends = max(len(prompt) + limit for prompt, limit in zip(prompts, self._limits, strict=True))
        # drafts go beyond the end, and the window of a chain goes beyond a short row
        capacity = ends + 3 * model.horizon
        self._decoder = open_decoder(model, ends, capacity)
        self._drafter: Drafter | None = make_drafter(model, self._decoder) if self._extra else None
        tokens = torch.zeros(len(prompts), capacity + model.horizon, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.as_tensor(prompt, dtype=torch.int64)
        self._tokens = tokens.to(self._device)
        self._known = torch.tensor([len(prompt) for prompt in prompts], device=self._device)
        self._lengths = [len(prompt) for prompt in prompts]  # the same, on the CPU
        self._draws = Draws(sampling.seed, list(numbers) if numbers is not None else list(range(len(prompts))))
        self._active = list(range(len(prompts)))  # which row of the request each row of the batch is
        self._drafts = tokens[:, :0].to(self._device)
        self._draft_probs: Tensor | None = None

    def generations(self) -> list[Generation]:
        """Return the decoded tokens."""
        return [
            Generation(
                tokens=tuple(row.tokens),
                finish=row.finish or "length",
                drafts=DraftCounts(steps=row.steps, tested=tuple(row.tested), accepted=tuple(row.accepted)),
            )
            for row in self.rows
        ]

    def steps(self) -> Iterator[dict[int, list[int]]]:
        """Decode. Yields the new tokens of each step, by row of the request."""
        prompt = max(self._lengths)
        slots = torch.arange(prompt, device=self._device).expand(len(self._active), -1)
        read = self._decoder.read(self._tokens[:, :prompt], slots, 0, prompt, self._lengths)
        final = read.hidden[self._numbers, self._known - 1][:, None]
        yield self._finish_step(read, final, is_prompt=True)
        while self._active:
            known, same = self._known - 1, len(set(self._lengths)) == 1
            slots = known[:, None] + torch.arange(1 + self._drafts.shape[1], device=self._device)
            ids = torch.cat([self._tokens[self._numbers, known][:, None], self._drafts], dim=1)
            width = max(self._lengths) + self._drafts.shape[1]
            read = self._decoder.read(ids, slots, self._lengths[0] - 1 if same else None, width)
            yield self._finish_step(read, read.hidden, is_prompt=False)

    @property
    def _numbers(self) -> Tensor:
        return torch.arange(len(self._active), device=self._device)

    def _finish_step(self, read: Read, hidden: Tensor, *, is_prompt: bool) -> dict[int, list[int]]:
        """Decide which drafts were right, draft again, and let finished rows go."""
        logits = self._model.unembedding(1).logits(hidden)
        accepted, following = self._verify_greedy(logits) if self._sampling.greedy else self._verify_sampled(logits)
        rows, drafts = self._numbers[:, None], self._drafts
        new = torch.cat([drafts, following[:, None]], dim=1)
        new[rows[:, 0], accepted] = following
        # the places after the accepted ones hold rejected drafts until the next step writes them
        self._tokens[rows, self._known[:, None] + torch.arange(new.shape[1], device=self._device)] = new
        self._known = self._known + accepted + 1
        if self._drafter is not None:
            self._draft(self._drafter, read)
        return self._take(new.tolist(), accepted.tolist(), is_prompt=is_prompt)

    def _verify_greedy(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Count each row's drafts that equal head 1's choice, and choose the next token.

        Returns:
            both ``[B]``.
        """
        best = logits.argmax(-1)
        if self._exact:
            top = logits.topk(2, dim=-1).values
            tied = top[..., 0] - top[..., 1] <= TIE * logits.abs().amax(-1)
            if bool(tied.any()):
                self._untie(best, tied.tolist())
        right = (best[:, :-1] == self._drafts).cumprod(dim=1)
        accepted = right.sum(dim=1)
        return accepted, best[self._numbers, accepted]

    def _untie(self, best: Tensor, tied: list[list[bool]]) -> None:
        """Decide ties that matter by reading the row alone; ``best`` ``[B, T]`` is changed."""
        for row, places in enumerate(tied):
            for place, is_tied in enumerate(places):
                if is_tied:
                    before = torch.cat([self._tokens[row, : self._lengths[row]], self._drafts[row, :place]])
                    best[row, place] = self._decoder.last_logits_alone(before).argmax()
                if place < self._drafts.shape[1] and bool(best[row, place] != self._drafts[row, place]):
                    break

    def _verify_sampled(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Count each row's accepted drafts, and draw the next token.

        Returns:
            both ``[B]``.
        """
        probs, count = probabilities(logits, self._sampling), self._drafts.shape[1]
        uniform = self._draws(count + 1, self._device)
        if self._draft_probs is None:
            return torch.zeros_like(self._known), draw(probs[:, 0], uniform[:, 0])
        chosen = self._drafts[..., None]
        wanted, drafted = probs[:, :-1].gather(-1, chosen)[..., 0], self._draft_probs.gather(-1, chosen)[..., 0]
        accepted = (uniform[:, :-1] * drafted < wanted).cumprod(dim=1).sum(dim=1)
        rest = probs[self._numbers, accepted]
        subtracted = self._draft_probs[self._numbers, accepted.clamp(max=count - 1)]
        left = torch.where((accepted < count)[:, None], (rest - subtracted).clamp(min=0), rest)
        # equal distributions leave nothing, and only rounding can have rejected then
        left = torch.where(left.sum(-1, keepdim=True) > 0, left, rest)
        return accepted, draw(left, uniform[:, -1])

    def _draft(self, drafter: Drafter, read: Read) -> None:
        kept: list[Tensor] = []
        uniform = None if self._sampling.greedy else self._draws(self._extra, self._device)

        def choose(head: int, logits: Tensor) -> Tensor:
            if uniform is None:
                return logits.argmax(-1)
            kept.append(probabilities(logits, self._sampling))
            return draw(kept[-1], uniform[:, head - 2])

        self._drafts = drafter.draft(read, self._known - 2, self._tokens, choose)
        self._draft_probs = torch.stack(kept, dim=1) if kept else None

    def _take(self, new: list[list[int]], accepted: list[int], *, is_prompt: bool) -> dict[int, list[int]]:
        """Give each row its new tokens, up to its end, and drop the rows that ended."""
        taken: dict[int, list[int]] = {}
        going: list[int] = []
        for place, number in enumerate(self._active):
            row, before = self.rows[number], len(self.rows[number].tokens)
            for token in new[place][: accepted[place] + 1]:
                row.tokens.append(token)
                row.finish = self._end(row.tokens, self._limits[number])
                if row.finish is not None:
                    break
            taken[number] = row.tokens[before:]
            if not is_prompt:
                row.steps += 1
                for head in range(min(len(taken[number]), len(new[place]) - 1)):
                    row.tested[head] += 1
                    row.accepted[head] += head < accepted[place]
            self._lengths[place] += accepted[place] + 1
            if row.finish is None:
                going.append(place)
        if len(going) < len(self._active):
            self._keep(going)
        return taken

    def _end(self, tokens: list[int], limit: int) -> Finish | None:
        if tokens[-1] in self._ends:
            return "eos"
        if self._stop is not None and self._stop(tokens):
            return "stop"
        if len(tokens) == limit:
            return "length" if limit == self._most_new else "context"
        return None

    def _keep(self, places: list[int]) -> None:
        self._active = [self._active[place] for place in places]
        self._lengths = [self._lengths[place] for place in places]
        if not places:
            return
        rows = torch.tensor(places, device=self._device)
        self._tokens, self._known, self._drafts = self._tokens[rows], self._known[rows], self._drafts[rows]
        if self._draft_probs is not None:
            self._draft_probs = self._draft_probs[rows]
        self._draws.keep_rows(places)
        self._decoder.cache.keep_rows(rows)
        if self._drafter is not None:
            self._drafter.keep_rows(rows)


def _check_request(model: MTPModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, speculative: bool) -> None:
    if speculative and model.horizon == 1:
        raise ConfigError(
            "this model has no extra heads (H = 1), so nothing can draft: leave speculation out, or train heads with wmtp run"
        )
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if not prompts:
        raise ConfigError("there is no prompt")
    vocab_size = model.anatomy.embedding.num_embeddings
    for number, prompt in enumerate(prompts):
        name = "the prompt" if len(prompts) == 1 else f"prompt {number}"
        if not len(prompt):
            raise ConfigError(f"{name} is empty; give at least one token")
        longest = model.max_positions
        if longest is not None and len(prompt) >= longest:
            raise ConfigError(
                f"{name} has {len(prompt)} tokens, and the model's context is {longest}: shorten it to at most {longest - 1}"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ConfigError(
                f"{name} has token ids outside the model's vocabulary of {vocab_size}; use the model's own tokenizer"
            )
