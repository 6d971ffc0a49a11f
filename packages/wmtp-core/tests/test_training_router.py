"""Balance of a mixture of experts: what transformers adds to the loss, over the whole step."""

import pytest
import torch
from attrs import evolve
from one_step import SMALL, Baseline, ByToken, gradients, make_batch, reference
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from wmtp.config.schema import HeadsConfig
from wmtp.data.batch import PADDING
from wmtp.errors import ConfigError
from wmtp.models.build import build_model
from wmtp.trainers import Stage
from wmtp.training.router import RouterLoss

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.3}


def make(**options):
    shape = evolve(SMALL, architecture="mixtral", options=EXPERTS | {"output_router_logits": True} | options)
    loaded = shape.build().load(None, dtype=torch.float64, seed=1)
    loaded.model.set_experts_implementation("eager")  # the others have no float64
    with torch.no_grad():  # away from routers that choose all alike
        generator = torch.Generator().manual_seed(3)
        for parameter in loaded.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
    return build_model(loaded, HeadsConfig(horizon=2), 5).eval()


@pytest.mark.parametrize("trainer", [Baseline, ByToken])
@pytest.mark.parametrize("micro", [99, 2])
def test_value_and_gradient_are_those_of_transformers_whatever_the_micro_batch(trainer, micro):
    model, batch = make(), make_batch(packed=False)
    output, found = gradients(model, trainer(), batch, micro=micro)
    real = batch.document != PADDING
    theirs = model.base(input_ids=batch.input_ids, attention_mask=real.long(), output_router_logits=True)
    torch.testing.assert_close(output.metrics["router/balance"].double(), theirs.aux_loss.double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(output.metrics["auxiliary/router"], 0.3 * output.metrics["router/balance"])
    load = [float(output.metrics[f"router/load_{which}"]) for which in ("min", "max")]
    assert 0 <= load[0] < 1 < load[1] <= 2

    model.zero_grad(set_to_none=True)
    weight = (lambda b, t, k, id: 1.0) if trainer is Baseline else (lambda b, t, k, id: float(id % 5))
    logits = model(batch.input_ids, router_logits=True).router_logits
    balance = load_balancing_loss_func(logits, 4, 2, real)
    (reference(model, batch, weight, [1.0, 1.0]) + 0.3 * balance).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    model.zero_grad(set_to_none=True)
    reference(model, batch, weight, [1.0, 1.0]).backward()
    gate = next(name for name in expected if name.endswith("gate.weight"))
    assert (dict(model.named_parameters())[gate].grad - expected[gate]).abs().max() > 1e-3


def test_packed_documents_count_as_those_of_transformers_each_alone():
    model, batch = make(), make_batch(packed=True)
    output, _ = gradients(model, Baseline(), batch, micro=2)
    alone = []
    for row, documents in zip(batch.input_ids, batch.document, strict=True):
        for number in documents[documents != PADDING].unique():
            alone.append(model.base(input_ids=row[documents == number][None], output_router_logits=True).router_logits)
    assert len(alone) > len(batch.input_ids)
    balance = load_balancing_loss_func(tuple(map(torch.cat, zip(*alone, strict=True))), 4, 2)
    torch.testing.assert_close(output.metrics["router/balance"].double(), balance.double(), rtol=1e-5, atol=0)


def test_it_is_no_part_of_a_stage_without_the_models_loss_or_where_the_config_does_not_ask():
    batch = make_batch(packed=False)
    quiet, _ = gradients(make(output_router_logits=False), Baseline(), batch)
    assert not [name for name in quiet.metrics if "router" in name]
    model = make()
    assert RouterLoss.of(model) == RouterLoss(weight=0.3, top_k=2)
    output, _ = gradients(model, Baseline(), batch, stage=Stage(model_loss=False))
    assert not [name for name in output.metrics if "router" in name]


def test_a_config_that_asks_for_what_the_model_has_not_is_refused():
    loaded = SMALL.build().load(None, dtype=torch.float64, seed=1)
    loaded.model.config.output_router_logits = True
    model = build_model(loaded, None, 0).eval()
    with pytest.raises(
        ConfigError, match="asks for the balance of its router, and router_aux_loss_coef or num_experts_per_tok"
    ):
        gradients(model, Baseline(), make_batch(packed=False))
