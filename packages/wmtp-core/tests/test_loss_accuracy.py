"""Token accuracy and entropy against loops in float64, and in a run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import wmtp
from wmtp.loss import Unembedding, accuracy
from wmtp.loss.accuracy import PredictionSums


def problem(rows=3, length=5, horizon=3, vocab=11):
    torch.manual_seed(4)
    hidden = [torch.randn(rows, length, 7, dtype=torch.float64) for _ in range(horizon)]
    shared = Unembedding(weight=torch.randn(vocab, 7, dtype=torch.float64), softcap=3.0)
    own = Unembedding(weight=torch.randn(vocab, 7, dtype=torch.float64), bias=torch.randn(vocab, dtype=torch.float64))
    valid = torch.rand(rows, length, horizon) > 0.4
    ids = torch.randint(0, 3, (rows, length, horizon))
    for head in range(horizon):  # some are right
        best = (own if head == 2 else shared).logits(hidden[head]).argmax(-1)
        ids[..., head] = torch.where(torch.rand(rows, length) > 0.5, best, ids[..., head])
    return hidden, [shared, shared, own], ids, valid


def plain(hidden, unembeddings, ids, valid):
    right, count, entropy = [0] * 3, [0] * 3, 0.0
    for row in range(ids.shape[0]):
        for place in range(ids.shape[1]):
            for head in range(3):
                if not valid[row, place, head]:
                    continue
                logits = unembeddings[head].logits(hidden[head][row, place]).tolist()
                count[head] += 1
                right[head] += max(range(len(logits)), key=logits.__getitem__) == int(ids[row, place, head])
                if head == 0:
                    total = sum(map(math.exp, logits))
                    entropy -= sum(math.exp(x) / total * math.log(math.exp(x) / total) for x in logits)
    return {f"accuracy/head_{k + 1}": right[k] / count[k] for k in range(3)} | {"entropy/head_1": entropy / count[0]}


@pytest.mark.parametrize("logits", [11, 40, 10**6])
def test_means_are_those_of_loops_whatever_the_chunks(logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(accuracy._LOGITS, "cpu", logits)
    given = problem()
    sums = PredictionSums(3, torch.device("cpu"))
    sums.add(*given)
    assert {name: float(value) for name, value in sums.means().items()} == pytest.approx(plain(*given), abs=1e-6)
    # micro-batches, and padding without a valid prediction
    hidden, unembeddings, ids, valid = given
    parts = PredictionSums(3, torch.device("cpu"))
    for row in range(3):
        parts.add([h[row : row + 1] for h in hidden], unembeddings, ids[row : row + 1], valid[row : row + 1])
    parts.add([torch.full_like(h, torch.nan) for h in hidden], unembeddings, ids, torch.zeros_like(valid))
    assert torch.allclose(parts.sums, sums.sums)


@pytest.mark.parametrize(("log", "every", "steps"), [(1, 3, [3, 6, 7]), (2, 3, [4, 6, 7]), (1, 0, [])])
def test_a_run_logs_them_in_some_of_its_logged_steps(log: int, every: int, steps: list[int], tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "bcbcbc"}\n' * 40)
    result = wmtp.run(
        {
            "run": {"output_dir": str(tmp_path)},
            "models": {"base": {"type": "scratch", "vocab_size": 320, "hidden_size": 16, "layers": 1, "attention_heads": 2,
                                "max_positions": 32, "heads": {"horizon": 2}}},
            "tokenizer": {"type": "bytes"},
            "datasets": {"d": {"type": "jsonl", "uri": str(tmp_path / "data.jsonl")}},
            "data": {"train": {"max_length": 16, "batch_size": 4, "micro_batch_size": 2}},
            "trainer": {"type": "baseline-mtp"},
            "train": {"max_steps": 7, "epochs": 9.0, "log_interval": log, "accuracy_interval": every},
            "devices": {"device": "cpu"},
            "checkpoints": {"save_final": False},
            "tracker": {"type": "jsonl"},
        }
    )  # fmt: skip
    rows = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    names = {"accuracy/head_1", "accuracy/head_2", "entropy/head_1"}
    assert [row["step"] for row in rows if names <= set(row)] == steps
    assert not any(names & set(row) for row in rows if row["step"] not in steps)
    assert all(0 <= row["accuracy/head_2"] <= 1 and row["entropy/head_1"] > 0 for row in rows if row["step"] in steps)
