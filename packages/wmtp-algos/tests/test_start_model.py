"""asft and sstoken, which look back at the model of the start, and distill, against plain computations."""

import contextlib
import json

import pytest
import torch
from attrs import evolve

import wmtp
from wmtp.config.schema import HeadsConfig
from wmtp.data.batch import PADDING
from wmtp.errors import ConfigError
from wmtp.models.mtp import MTPModel
from wmtp.testing.steps import HIDDEN_SIZE, HORIZON, VOCAB_SIZE, make_view, random_step, tiny_model
from wmtp.tokenizers.bytes import BytesTokenizer
from wmtp.trainers import Stage, TrainerSetup
from wmtp.training.recording import Place, document_record
from wmtp.training.step import StepLoss
from wmtp_algos import ASFT, DFT, BaselineMTP, Distill, SSToken


def model(seed=3, horizon=1):
    return MTPModel(tiny_model(seed=seed), HeadsConfig(horizon=horizon), seed=0).double().eval()


def set_up(config, start):
    trainer = config.build()
    trainer.setup(
        TrainerSetup(
            hidden_size=HIDDEN_SIZE, vocab_size=VOCAB_SIZE, horizon=HORIZON, device=torch.device("cpu"), seed=0, tokenizer=None,
            model=lambda name, *, dtype, device: {"base": start, "ref": start}[name], token_numbers=None,
        )
    )  # fmt: skip
    return trainer


def learn(trainer, learner, batch, normalizer="valid", micro=99, **wanted):
    learner.zero_grad(set_to_none=True)
    loss = StepLoss(
        model=learner, trainer=trainer, trainer_name="asft", micro_batch_size=micro, normalizer=normalizer,
        device=torch.device("cpu"), autocast=contextlib.nullcontext, seed=0,
    )  # fmt: skip
    output = loss(batch, 0, Stage(), **wanted)
    return output, {name: p.grad.clone() for name, p in learner.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("micro", [1, 99])
@pytest.mark.parametrize(
    ("config", "without", "name"),
    [(ASFT(kl_weight=0.3), DFT(), "anchor"), (Distill(kl_weight=0.3), BaselineMTP(), "distill")],
    ids=["asft", "distill"],
)
def test_the_divergence_from_another_model_is_added(packed, micro, config, without, name):
    start, learner = model().requires_grad_(False), model(seed=4, horizon=HORIZON)
    batch = random_step(1, packed=packed).batch
    found, gradients = learn(set_up(config, start), learner, batch, micro=micro)
    plain, expected = learn(without, learner, batch)

    learner.zero_grad(set_to_none=True)
    output, before = (m(batch.input_ids, batch.position, batch.packed) for m in (learner, start))
    p, q = start.logits(before, 1).softmax(-1), learner.logits(output, 1).softmax(-1)
    terms = []
    for b in range(len(batch.input_ids)):
        for t in range(batch.input_ids.shape[1] - 1):
            if batch.document[b, t] == batch.document[b, t + 1] and batch.loss_mask[b, t + 1]:
                terms.append((p[b, t] * (p[b, t] / q[b, t]).log()).sum())
    anchor = 0.3 * sum(terms) / len(terms)
    anchor.backward()
    torch.testing.assert_close(found.metrics[f"auxiliary/{name}"].double(), anchor.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.loss, plain.loss + anchor.detach(), rtol=1e-6, atol=0, check_dtype=False)
    for name, parameter in learner.named_parameters():
        whole = expected[name] + (0 if parameter.grad is None else parameter.grad)
        torch.testing.assert_close(gradients[name], whole, rtol=1e-5, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_asft_at_the_start_model_has_nothing_to_pull_back():
    learner, batch = model(horizon=HORIZON), random_step(1, packed=True).batch
    found, _ = learn(set_up(ASFT(), model().requires_grad_(False)), learner, batch)
    assert abs(float(found.metrics["auxiliary/anchor"])) < 1e-12
    without, _ = learn(set_up(ASFT(kl_weight=0.0), None), learner, batch)
    assert "auxiliary/anchor" not in without.metrics


@pytest.mark.parametrize("config", [ASFT(), Distill()], ids=["asft", "distill"])
def test_the_report_shows_the_divergence_at_the_token_that_was_predicted(config):
    start, learner, batch = model().requires_grad_(False), model(seed=4, horizon=HORIZON), random_step(1, packed=True).batch
    row, place = 0, int(batch.loss_mask[0, 1:].nonzero()[0]) + 1
    tokens = learn(set_up(config, start), learner, batch, tokens=True)[0].tokens
    place_in_batch = Place(number=int(batch.document[row, place]), row=row, start=0, stop=batch.input_ids.shape[1])
    ((_, shown),) = document_record(batch, place_in_batch, tokens, BytesTokenizer())["details"].items()
    p, q = (m.logits(m(batch.input_ids, batch.position, True), 1)[row, place - 1].softmax(-1) for m in (start, learner))
    assert len(shown) == HORIZON
    assert shown[0][place] == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-3)
    assert not any(number is not None for of_head in shown[1:] for number in of_head)


@pytest.mark.parametrize("scope", ["batch", "sequence", "head"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_sstoken_learns_what_has_got_better(scope, packed):
    start = model().requires_grad_(False)
    trainer, step = set_up(SSToken(keep=0.4, scope=scope), start), random_step(2, packed=packed, rows=5)
    batch = step.batch
    weights = trainer.token_weights(make_view(trainer, step))
    output = start(batch.input_ids, batch.position, batch.packed)
    log_p = start.logits(output, 1).log_softmax(-1)
    groups = {}
    for b, t, k in make_view(trainer, step).targets.valid.nonzero().tolist():
        j = t + k + 1
        rel = -float(log_p[b, j - 1, batch.input_ids[b, j]]) - float(step.token_loss[b, t, k])
        group = {"batch": 0, "sequence": int(batch.document[b, t]), "head": k}[scope]
        groups.setdefault(group, []).append((rel, b, t, k))
    for members in groups.values():
        members.sort(key=lambda member: -member[0])
        kept = max(1, round(0.4 * len(members)))
        assert [float(weights[member[1:]]) for member in members] == [1.0] * kept + [0.0] * (len(members) - kept)
    assert trainer.metrics()["sstoken/progress"] == pytest.approx(
        sum(rel for members in groups.values() for rel, *_ in members) / sum(map(len, groups.values())), rel=1e-5
    )
    broken = evolve(step, token_loss=torch.full_like(step.token_loss, torch.nan))
    assert trainer.token_weights(make_view(trainer, broken)).isnan().any()


@pytest.mark.parametrize("gamma", [0.0, 0.5])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_sstoken_adds_the_attention_that_a_token_gives_to_its_prompt(gamma, packed):
    start = model().requires_grad_(False)
    trainer, step = set_up(SSToken(keep=0.4, scope="sequence", gamma=gamma), start), random_step(2, packed=packed, rows=5)
    batch, view = step.batch, make_view(trainer, step)
    weights = trainer.token_weights(view)

    eager = model().requires_grad_(False)  # each document alone, with the whole matrix of attention
    eager.base.set_attn_implementation("eager")
    log_p, share = {}, {}
    for b in range(len(batch.input_ids)):
        for number in set(batch.document[b].tolist()) - {PADDING}:
            places = (batch.document[b] == number).nonzero()[:, 0]
            whole = eager.base(batch.input_ids[b, places][None], output_attentions=True)
            mean = whole.attentions[-1][0].mean(0)
            for place, row, logits in zip(places.tolist(), mean, whole.logits[0].log_softmax(-1), strict=True):
                share[b, place] = float(row[~batch.loss_mask[b, places]].sum())
                log_p[b, place] = logits
    documents = {}
    for b, t, k in view.targets.valid.nonzero().tolist():
        j = t + k + 1
        rel = -float(log_p[b, j - 1][batch.input_ids[b, j]]) - float(step.token_loss[b, t, k])
        documents.setdefault(int(batch.document[b, t]), []).append((rel, share[b, j], b, t, k))
    mixed = 0
    for members in documents.values():
        low, high = min(member[0] for member in members), max(member[0] for member in members)
        order = sorted(members, key=lambda m: -(gamma * (m[0] - low) / (high - low + 1e-8) + (1 - gamma) * m[1]))
        kept = max(1, round(0.4 * len(members)))
        assert [float(weights[member[2:]]) for member in order] == [1.0] * kept + [0.0] * (len(members) - kept)
        mixed += order != sorted(members, key=lambda m: -m[0])
    assert mixed


def test_attention_that_cannot_be_watched_and_a_missing_device_are_named():
    windows = model().requires_grad_(False)
    windows.base.config._attn_implementation = "eager"
    with pytest.raises(ConfigError, match=r"^sstoken: gamma: 0.5 takes part of the score from the model's attention"):
        set_up(SSToken(gamma=0.5), windows)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="asft: reference_device: this machine has no cuda that torch can use"):
            set_up(ASFT(reference_device="cuda"), None)


@pytest.mark.parametrize(
    "trainer", [{"type": "asft", "kl_weight": 0.5}, {"type": "sstoken", "gamma": 0.5, "reference_cache": True}]
)
def test_a_run_and_its_resume_look_back_at_the_start(tmp_path, trainer):
    """Not at a checkpoint: in the first step after the resume the model has moved already."""
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps({"prompt": "a", "completion": f"bcd{i}" * 4}) + "\n" for i in range(12)))
    config = {
        "run": {"output_dir": str(tmp_path / "runs"), "name": "x"},
        "models": {
            "base": {
                "type": "scratch", "vocab_size": 258, "hidden_size": 16, "layers": 2, "attention_heads": 2, "max_positions": 64,
                "heads": {"horizon": 2},
            }
        },
        "tokenizer": {"type": "bytes"},
        "datasets": {"d": {"type": "jsonl", "uri": str(data)}},
        "data": {"train": {"max_length": 32, "batch_size": 4}},
        "trainer": trainer,
        "optimizer": {"type": "adamw", "lr": 1e-2},
        "schedule": {"type": "constant"},
        "train": {"max_steps": 4, "normalizer": "valid"},
        "checkpoints": {"save_interval": 2},
        "devices": {"device": "cpu"},
        "tracker": {"type": "jsonl"},
    }  # fmt: skip
    whole = wmtp.run(config).history
    name = {"asft": "auxiliary/anchor", "sstoken": "sstoken/progress"}[trainer["type"]]
    if name == "auxiliary/anchor":
        assert abs(whole[0][name]) < 1e-6 < whole[3][name]
    else:
        assert whole[3][name] > whole[0][name]
    wmtp.run(config, overrides=["run.name=y", "train.max_steps=2"])
    resumed = wmtp.run(config, overrides=["run.name=y"], resume="auto").history
    assert [line[name] for line in resumed] == pytest.approx([line[name] for line in whole], rel=1e-5, abs=1e-7)
