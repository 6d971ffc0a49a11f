"""Contract of loop and trainer: what is given, what is taken back, and how anything else is refused."""

import math
import re

import attrs
import pytest
import torch
from one_step import Valued, gradients, make_batch, make_model, step_loss

from wmtp.errors import PluginError
from wmtp.trainers import Stage, Trainer


@pytest.mark.parametrize(("auxiliary", "calls"), [(False, [2, 2, 1]), (True, [2, 2, 1, 2, 2, 1])])
def test_a_trainer_observes_again_only_for_a_gradient(auxiliary, calls):
    rows = []

    class Watching(Valued):
        def observe(self, view):
            rows.append(len(view.trunk))
            assert view.packed
            return super().observe(view)

        def auxiliary_losses(self, view):
            return super().auxiliary_losses(view) if auxiliary else {}

    gradients(make_model(), Watching(), make_batch(packed=True), micro=2)
    assert rows == calls


@pytest.mark.parametrize("micro", [1, 8])
def test_what_is_observed_need_not_be_of_floating_point(micro):
    class Counting(Trainer):
        def observe(self, view):
            return {"count": view.batch.input_ids * 2, "even": view.batch.input_ids % 2 == 0}

        def token_weights(self, view):
            assert view.observations["count"].dtype == torch.int64
            return torch.where(view.observations["even"], 1.0, 0.5)

    class Plain(Trainer):
        def token_weights(self, view):
            return torch.where(view.batch.input_ids % 2 == 0, 1.0, 0.5)

    found, expected = (gradients(make_model(), t, make_batch(packed=False), micro=micro) for t in (Counting(), Plain()))
    assert str(found) == str(expected)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (lambda v: v.batch.input_ids[:, :3].float(), "shape [5, 3]; it must be [B, S] = [5, 14]"),
        (lambda v: torch.ones(v.batch.input_ids.shape, requires_grad=True), "carry a gradient"),
        (lambda v: v.batch.input_ids, "torch.int64; weights are floating-point"),
        (lambda v: 1.0, "returned a float"),
        (lambda v: v.uniform().to_sparse(), "returned a torch.sparse_coo tensor; weights are dense"),
        (lambda v: v.uniform().to("meta"), "returned a tensor on the meta device"),
    ],
)
def test_weights_of_the_wrong_form_are_an_error_that_names_the_trainer(returned, words):
    class Bad(Trainer):
        def token_weights(self, view):
            return returned(view)

    with pytest.raises(PluginError) as error:
        gradients(make_model(), Bad(), make_batch(packed=False))
    assert words in str(error.value)
    assert "trainer 'mine' (mine 1.0)" in str(error.value)


@pytest.mark.parametrize(
    ("method", "returned", "words"),
    [
        ("observe", None, "observe returned a NoneType, not tensors by name"),
        ("observe", {"value": [1.0]}, "observe returned a list as 'value', not a tensor"),
        ("observe", {"value": torch.zeros(3)}, "observe returned 'value' of shape [3]"),
        ("auxiliary_losses", {"value": 1.0}, "auxiliary_losses returned a float as 'value', not a tensor"),
        ("auxiliary_losses", {"value": torch.zeros(2)}, "auxiliary loss 'value' has shape [2]; it must be a scalar"),
        (
            "auxiliary_losses",
            {"value": torch.tensor(2.0)},
            "auxiliary loss 'value' carries no gradient, so nothing would learn",
        ),
        ("metrics", [1.0], "metrics returned a list, not numbers by name"),
        ("metrics", {"loss": 5.0}, "metrics returned 'loss', which is the loop's own metric"),
        ("metrics", {"loss/head_1": 5.0}, "metrics returned 'loss/head_1', which is the loop's own metric"),
        ("metrics", {"step": 5.0}, "metrics returned 'step', which is the loop's own metric"),
        ("metrics", {"lr": 5.0}, "metrics returned 'lr', which is the loop's own metric"),
        ("metrics", {"eval/loss": 5.0}, "metrics returned 'eval/loss', which is the loop's own metric"),
        ("metrics", {3: 5.0}, "metrics returned a number named 3; a name is text"),
    ],
)
def test_other_returns_of_the_wrong_form_name_the_trainer_too(method, returned, words):
    bad = type("Bad", (Trainer,), {method: lambda self, *view: returned})
    with pytest.raises(PluginError) as error:
        gradients(make_model(), bad(), make_batch(packed=False))
    assert words in str(error.value)
    assert "trainer 'mine' (mine 1.0)" in str(error.value)


class Detached(Valued):
    """Its value head would never learn: what it observes carries no gradient."""

    def observe(self, view):
        other = {"reward": view.targets.ids[..., 0].double()}  # as another model's numbers, which need none
        return {name: value.detach() for name, value in super().observe(view).items()} | other

    def auxiliary_losses(self, view):
        return {"value": (view.observations["value"] - view.observations["reward"]).square().mean()}


@pytest.mark.parametrize("micro", [2, 4])
def test_an_auxiliary_loss_of_detached_observations_is_refused(micro):
    batch = make_batch(packed=False)
    said = r"^trainer 'mine' \(mine 1\.0\): observe gave 'reward', 'value' without gradient, so nothing would"
    with pytest.raises(PluginError, match=said):
        gradients(make_model(), Detached(), batch, micro=micro)

    class Attached(Detached):
        def observe(self, view):
            return super().observe(view) | {"value": self.head(view.trunk.detach()).squeeze(-1)}

    assert gradients(make_model(), Attached(), batch, micro=micro)[1]["value.weight"].abs().max() > 0
    frozen = Stage(frozen=frozenset({"value"}))  # what a stage freezes needs no gradient
    step_loss(make_model(), Detached())(batch, 0, frozen)


_SHARED = {
    "view.token_loss": lambda v: v.token_loss.masked_fill_(~v.targets.valid, -math.inf),
    "view.targets.valid": lambda v: v.targets.valid.zero_(),
    "view.batch.loss_mask": lambda v: v.batch.loss_mask.logical_not_(),
}
_SEEN = {"view.observations['seen']": lambda v: v.observations["seen"].add_(1)}  # for auxiliary losses they are copies


@pytest.mark.parametrize("micro", [5, 2])
@pytest.mark.parametrize(
    ("method", "name", "change"),
    [(method, *item) for method in ("token_weights", "auxiliary_losses") for item in _SHARED.items()]
    + [("token_weights", *item) for item in _SEEN.items()],
)
def test_a_trainer_cannot_change_what_the_loop_goes_on_to_use(method, name, change, micro):
    class Changing(Trainer):
        needs_token_loss = True

        def observe(self, view):
            return {"seen": view.trunk.detach().mean(dim=-1)}

    def changing(self, view):
        change(view)
        return {} if method == "auxiliary_losses" else view.uniform()

    setattr(Changing, method, changing)
    with pytest.raises(PluginError) as error:
        gradients(make_model(), Changing(), make_batch(packed=False), micro=micro)
    assert str(error.value).startswith(f"trainer 'mine' (mine 1.0): it changed {name} in place")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("view.batch.input_ids", lambda view: view.batch.input_ids.zero_()),
        ("view.targets.valid", lambda view: view.targets.valid.fill_(True)),
        ("view.trunk", lambda view: view.trunk.detach().mul_(2)),
        ("view.hidden[0]", lambda view: view.hidden[0].detach().zero_()),
    ],
)
def test_a_trainer_cannot_change_what_it_observes(name, change):
    class Changing(Trainer):
        def observe(self, view):
            change(view)
            return {}

    with pytest.raises(PluginError, match=re.escape(f"trainer 'mine' (mine 1.0): it changed {name} in place")):
        gradients(make_model(), Changing(), make_batch(packed=False), micro=2)


class Forgets(Trainer):
    def token_weights(self, view):
        return view.uniform() if view.step > 99 else None


class Unasked(Trainer):
    needs_token_loss = False

    def token_weights(self, view):
        return view.token_loss


class UnaskedDetails(Trainer):
    needs_entropy = False

    def auxiliary_losses(self, view):
        return {"entropy": view.entropy.sum()}


@attrs.frozen
class Keeps(Trainer):
    type = "keeps"

    def token_weights(self, view):
        self.mean = view.uniform()
        return self.mean


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        (
            Forgets(),
            "Forgets.token_weights returned None; write return before its result, or for a weight of 1 everywhere return",
        ),
        (
            Unasked(),
            "Unasked.token_weights reads view.token_loss, which is not computed; write needs_token_loss = True in Unasked",
        ),
        (
            UnaskedDetails(),
            "UnaskedDetails.auxiliary_losses reads view.entropy, which is not computed; write needs_entropy = True",
        ),
        (Keeps(), "Keeps.token_weights sets an attribute of a frozen object"),
    ],
)
def test_what_only_a_step_shows_stops_it_before_any_gradient(trainer, said):
    model = make_model()
    with pytest.raises(PluginError) as error:
        step_loss(model, trainer)(make_batch(packed=False), 0, Stage())
    assert str(error.value).startswith(f"trainer 'mine' (mine 1.0): {said}")
    assert all(parameter.grad is None for parameter in model.parameters())


def test_uniform_weights_are_known_to_be_so_until_they_are_changed():
    """The loss is then told how many predictions have a weight, without waiting for the device."""
    found = []

    class Uniform(Trainer):
        def token_weights(self, view):
            weights = view.uniform()
            found.append(view.is_uniform(weights))
            weights[0] = 0.5
            found.append(view.is_uniform(weights))
            found.append(view.is_uniform(view.uniform()))
            return weights

    gradients(make_model(), Uniform(), make_batch(packed=False))
    assert found == [True, False, True]


@pytest.mark.parametrize(("value", "code"), [(math.nan, 1), (math.inf, 1), (-1.0, 2), (0.0, 3), (1.0, 0)])
def test_weights_with_bad_values_are_found_without_reading_the_device(value, code):
    class Bad(Trainer):
        def token_weights(self, view):
            return torch.full(view.batch.input_ids.shape, value)

    output, _ = gradients(make_model(), Bad(), make_batch(packed=False))
    assert int(output.bad_weights) == code


def test_the_view_gives_every_algorithm_the_same_random_numbers_for_the_same_step():
    drawn = []

    class Draws(Trainer):
        def token_weights(self, view):
            drawn.append(torch.rand(3, generator=view.generator))
            return view.uniform()

    model, batch = make_model(), make_batch(packed=False)
    for micro in (99, 1):
        gradients(model, Draws(), batch, micro=micro)
    step_loss(model, Draws())(batch, 4, Stage())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda view: None, "token_details returned a NoneType, not tensors by name"),
        (lambda view: {"value": [1.0]}, "token_details returned a list as 'value', not a tensor"),
        (lambda view: {"value": torch.zeros(3)}, r"token_details returned 'value' of shape \[3\]; it must be \[b, S\] = "),
    ],
)
def test_wrong_details_name_the_trainer(returned, said):
    class Wrong(Trainer):
        def token_details(self, view):
            return returned(view)

    with pytest.raises(PluginError, match=rf"^trainer 'mine' \(mine 1.0\): {said}"):
        step_loss(make_model(), Wrong())(make_batch(packed=False), 0, Stage(), tokens=True)
