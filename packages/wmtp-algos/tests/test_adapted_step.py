"""A step of asft with an adapter on a mixture of experts, against two models of transformers that read each document alone."""

import contextlib
import math
from itertools import product

import pytest
import torch
from adapted import make
from attrs import evolve
from crossings import sampled
from one_step import SMALL, make_batch
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from wmtp.config.schema import LoraConfig
from wmtp.data.batch import PADDING
from wmtp.models.start_model import StartModel
from wmtp.trainers import Stage, TrainerSetup
from wmtp.training.stages import apply_stage
from wmtp.training.step import StepLoss
from wmtp_algos import ASFT, DFT

pytest.importorskip("peft")

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.3, "output_router_logits": True}
KINDS = {"lora": {}, "dora": {"dora": True}, "rslora-heads": {"rslora": True, "heads": "adapters"}}
STAGES = {"all": frozenset(), "warm-up": frozenset({"model"}), "trunk": frozenset({"heads"})}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = evolve(SMALL, architecture="mixtral", options=EXPERTS).build().load(None, dtype=torch.float32, seed=1).model
    with torch.no_grad():  # away from routers that choose all alike
        generator = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    path = tmp_path_factory.mktemp("models") / "experts"
    model.save_pretrained(path)
    return path


def by_transformers(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    model.set_experts_implementation("eager")  # the others have no float64
    return model


def with_adapter(folder, model, lora):
    """The model of the files with W + s·B·A in each adapted place, and the leaves by their names in ``model``."""
    plain, named = by_transformers(folder), dict(model.named_parameters())
    scale = lora.resolved_alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)
    leaves = {}
    for name, module in list(plain.named_modules()):
        places = [f"base.{name}.{part}.default.weight" for part in ("lora_A", "lora_B", "lora_magnitude_vector")]
        if places[0] not in named:
            continue
        leaves |= {place: named[place].detach().clone().requires_grad_() for place in places if place in named}
        a, b, length = (leaves.get(place) for place in places)
        weight = module.weight.detach() + scale * b @ a
        if length is not None:
            weight = weight * (length / weight.norm(dim=1).detach())[:, None]
        del module._parameters["weight"]
        module.weight = weight
    assert leaves
    return plain, leaves


def learn(config, model, batch, stage, micro):
    start = StartModel(model)
    trainer = config.build()
    trainer.setup(
        TrainerSetup(
            hidden_size=model.hidden_size, vocab_size=model.vocab_size, horizon=model.horizon, device=torch.device("cpu"),
            seed=0, tokenizer=None, model=lambda name, *, dtype, device: start, token_numbers=None,
        )
    )  # fmt: skip
    model.zero_grad(set_to_none=True)
    step = StepLoss(
        model=model, trainer=trainer, trainer_name="it", micro_batch_size=micro, normalizer="valid",
        device=torch.device("cpu"), autocast=contextlib.nullcontext, seed=0,
    )  # fmt: skip
    metrics = step(batch, 3, stage).metrics
    return metrics, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("kind", "frozen", "packed", "micro"), sampled(product(KINDS, STAGES, (False, True), (1, 2, 99)), 13))
def test_anchor_and_balance_are_those_of_two_models_in_every_stage(folder, kind, frozen, packed, micro):
    lora, stage, batch = LoraConfig(rank=2, **KINDS[kind]), Stage(frozen=STAGES[frozen]), make_batch(packed=packed)
    model = make(folder, lora=lora, dtype=torch.float64, init="copy", horizon=2)
    model.base.set_experts_implementation("eager")
    apply_stage(stage, model, {}, "it")
    metrics, gradients = learn(ASFT(kl_weight=0.3), model, batch, stage, micro)

    before, (now, leaves) = by_transformers(folder), with_adapter(folder, model, lora)
    divergences, routed = [], []
    for row, documents in enumerate(batch.document):
        for number in documents[documents != PADDING].unique():
            places = (documents == number).nonzero()[:, 0]
            ids = batch.input_ids[row, places][None]
            read = now(ids, output_router_logits=True)
            routed.append(read.router_logits)
            q, p = read.logits[0].log_softmax(-1), before(ids).logits[0].detach().log_softmax(-1)
            learned = [t for t, place in enumerate(places[1:]) if batch.loss_mask[row, place]]
            divergences += [(p[t].exp() * (p[t] - q[t])).sum() for t in learned]
    anchor = 0.3 * sum(divergences) / len(divergences)
    balance = load_balancing_loss_func(tuple(map(torch.cat, zip(*routed, strict=True))), 4, 2)
    assert float(metrics["auxiliary/anchor"]) == pytest.approx(anchor.item(), rel=1e-5)
    assert float(metrics["router/balance"]) == pytest.approx(balance.item(), rel=1e-5)
    assert float(metrics["auxiliary/router"]) == pytest.approx(0.3 * balance.item(), rel=1e-5)
    assert all(name.startswith("extra_heads.") for name in gradients) == (frozen == "warm-up")
    if frozen == "warm-up":
        return
    (anchor + 0.3 * balance).backward()
    model.base.config.output_router_logits = False
    _, without = learn(DFT(), model, batch, stage, 99)
    for name, leaf in leaves.items():
        torch.testing.assert_close(gradients[name] - without[name], leaf.grad, rtol=1e-5, atol=1e-8, msg=name)
    assert any(leaf.grad.abs().max() > 1e-3 for leaf in leaves.values())
