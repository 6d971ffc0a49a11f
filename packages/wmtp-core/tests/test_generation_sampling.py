"""Sampled decoding has head 1's own distribution, whatever drafts."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from decoded_models import EOS, PROMPTS, decoding_model

from wmtp.generation import Sampling, generate
from wmtp.generation.sampling import draw, probabilities
from wmtp.generation.step import Step


@pytest.mark.parametrize("kind", ["block", "linear", "shared"])
def test_sampling_has_head_1s_distribution(kind: str) -> None:
    """The first three new tokens of many rows against their exact joint probabilities (chi-square)."""
    model = decoding_model("llama", kind, 4, vocab_size=5, initializer_range=0.5)
    sampling = Sampling(temperature=0.8, top_p=0.9, seed=5)
    prompt, rows = [1, 2, 4], 3000
    joint = {}
    with torch.no_grad():
        firsts = probabilities(model.base(torch.tensor([prompt])).logits[0, -1], sampling)
        for a in range(5):
            seconds = probabilities(model.base(torch.tensor([[*prompt, a]])).logits[0, -1], sampling)
            for b in range(5):
                thirds = probabilities(model.base(torch.tensor([[*prompt, a, b]])).logits[0, -1], sampling)
                joint |= {(a, b, c): float(firsts[a] * seconds[b] * thirds[c]) for c in range(5)}
    generated = generate(model, [prompt] * rows, max_new_tokens=3, eos_id=None, speculative=True, sampling=sampling)
    tested, accepted = (sum(getattr(row.drafts, name)[0] for row in generated) for name in ("tested", "accepted"))
    assert 0.02 < accepted / tested < 0.98  # both ways of going on are tried
    counts = dict.fromkeys(joint, 0)
    for row in generated:
        counts[row.tokens] += 1
    assert not [tokens for tokens, probability in joint.items() if probability == 0 and counts[tokens]]
    likely = [tokens for tokens, probability in joint.items() if probability * rows >= 5]
    rest = rows - sum(counts[tokens] for tokens in likely), rows * (1 - sum(joint[tokens] for tokens in likely))
    cells = [(counts[tokens], joint[tokens] * rows) for tokens in likely] + ([rest] if rest[1] >= 5 else [])
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    freedom = len(cells) - 1
    # Wilson-Hilferty: above this with a probability of 1e-4
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3, (statistic, freedom)


def test_every_random_number_together_gives_head_1s_distribution_exactly() -> None:
    """One step with two drafts, over all of them and a grid of uniform numbers where every probability is a whole count."""
    n, size = 12, 4
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])  # p / q is 1/4 or 2/3, and what is left of p after a rejection 1/4 and 3/4
    q = p.flip(0)
    first, second = torch.tensor([2, 0, 3, 1]), torch.stack([torch.arange(size).roll(row) for row in range(size)])
    p1, q1 = p[first], q[first]
    p2, q2 = p[second], q[second]  # [first token, V]
    p3 = torch.tensor([0.25, 0.5, 0.25, 0.0])[(second[:, None] + torch.arange(size)[:, None]) % size]  # [first, second, V]
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens = torch.arange(size, dtype=torch.float64)
    cases = torch.cartesian_prod(tokens, tokens, grid, grid, grid)
    a, b, rows = cases[:, 0].long(), cases[:, 1].long(), torch.arange(len(cases))
    step = SimpleNamespace(
        _sampling=Sampling(temperature=1.0),
        _drafts=torch.stack([a, b], 1),
        _draft_probs=torch.stack([q1.expand(len(a), -1), q2[a]], 1),
        _uniform=cases[:, 2:],
        _rows=rows,
        _known=rows,
    )
    logits = torch.stack([p1.expand(len(a), -1), p2[a], p3[a, b]], 1).log()
    accepted, following = Step._verify_sampled(step, logits)  # type: ignore[arg-type]
    weight = (q1[a] * q2[a, b]).double() / n**3

    def found(where: torch.Tensor, *tokens: torch.Tensor) -> torch.Tensor:
        place = sum(token[where] * size**power for power, token in enumerate(reversed(tokens)))
        counts = torch.zeros(size ** len(tokens), dtype=torch.float64).index_add(0, place, weight[where])
        return counts.view([size] * len(tokens)).float()

    torch.testing.assert_close(found(accepted >= 0, torch.where(accepted > 0, a, following)), p1)
    one = torch.minimum(p1, q1)
    torch.testing.assert_close(found(accepted > 0, a, torch.where(accepted > 1, b, following)), one[:, None] * p2)
    both = one[:, None] * torch.minimum(p2, q2)
    torch.testing.assert_close(found(accepted > 1, a, b, following), both[..., None] * p3)


def test_a_rows_draws_do_not_depend_on_its_batch() -> None:
    model = decoding_model("llama", "block")
    settings = {"max_new_tokens": 12, "eos_id": EOS, "sampling": Sampling(temperature=1.0, seed=3), "speculative": True}
    together = generate(model, PROMPTS, **settings)
    assert [generate(model, [p], rows=[n], **settings)[0] for n, p in enumerate(PROMPTS)] == together
    assert generate(model, [PROMPTS[0]], rows=[7], **settings)[0].tokens != together[0].tokens


def test_probabilities_and_draws() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    nucleus = probabilities(logits, Sampling(temperature=1.0, top_p=0.8))
    torch.testing.assert_close(nucleus, torch.tensor([0.625, 0.375, 0.0, 0.0]))
    torch.testing.assert_close(probabilities(logits, Sampling(temperature=0.5)), torch.softmax(2 * logits, -1))
    uniform = torch.from_numpy(np.linspace(0, 1, 1001)[:-1])
    drawn = draw(nucleus.expand(1000, -1), uniform)
    assert drawn.bincount(minlength=4).tolist() == [625, 375, 0, 0]
    assert draw(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([1.0 - 1e-17])).tolist() == [1]
