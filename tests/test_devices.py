"""Settings that the picked device cannot compute are refused before anything is read."""

import attrs
import pytest
import torch

import wmtp
from wmtp.actions.check import check
from wmtp.cli import main
from wmtp.devices import apart_from_the_caller
from wmtp.launchers.config import LocalLauncher
from wmtp.training.dry_run import dry_run

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason='device = "auto" is a GPU here')
PAGED = ('optimizer={type="adamw-8bit",paged=true}', "optimizer.paged: memory is paged between a GPU and its host")
FP8 = ('devices.precision="fp8"', "devices.precision: fp8 needs an NVIDIA GPU")
#: fp8 on the recipe's small model
WIDE_ENOUGH = (FP8[0], "devices.fp8.min_features=16")
OFFLOAD = ('devices.activation_checkpointing="offload"', "devices.activation_checkpointing: 'offload' moves activations")


@pytest.fixture
def said(recipe, capsys):
    """Gives what a command ends with, on a recipe with settings."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("torchao")

    def run(words, *sets):
        code = main([*words, str(recipe), *(word for each in sets for word in ("--set", each))])
        return code, [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]

    return run


@NO_GPU
@pytest.mark.parametrize("words", [("run", "--dry-run"), ("run",)], ids=" ".join)
def test_what_auto_picks_is_asked_for_everything_at_once(said, words, recipe):
    code, lines = said(words, PAGED[0], FP8[0], OFFLOAD[0])
    assert code == 2
    for _, message in (PAGED, FP8, OFFLOAD):
        (line,) = [line for line in lines if message in line]
        assert "the run computes on cpu; " in line
    assert not (recipe.parent / "runs").exists() or not list((recipe.parent / "runs").glob("*/metrics.jsonl"))


def test_a_device_that_is_named_is_asked_by_check(said):
    code, lines = said(("check",), PAGED[0], FP8[0], OFFLOAD[0], 'devices.device="cpu"')
    assert code == 2
    assert all(any(message in line for line in lines) for _, message in (PAGED, FP8, OFFLOAD)), lines
    code, (line,) = said(("check",), 'optimizer={type="adamw-8bit"}', 'devices.device="mps"')
    assert (code, "optimizer.type: 'adamw-8bit' computes on NVIDIA GPUs and on CPUs" in line) == (2, True)


def test_check_leaves_auto_to_the_machine_that_computes(recipe):
    for device in ("auto", "cuda"):
        check(recipe, overrides=[PAGED[0], *WIDE_ENOUGH, OFFLOAD[0], f'devices.device="{device}"'])


class Elsewhere(LocalLauncher):
    """A launcher of another machine."""

    remote = True


def test_a_run_that_is_launched_elsewhere_is_not_held_to_this_machine(recipe):
    config = check(recipe, overrides=[PAGED[0], *WIDE_ENOUGH, OFFLOAD[0]]).config
    assert dry_run(attrs.evolve(config, launcher=Elsewhere()))["training data"] == "48 documents"


def test_a_run_and_an_evaluation_are_the_same_in_any_mode_of_the_caller(recipe):
    def numbers(name):
        result = wmtp.run(recipe, run_name=name, overrides=["train.max_steps=5", "devices.device=cpu"])
        evaluated = wmtp.evaluate(result.run_dir, overrides=['eval=[{type="perplexity"}]'])
        return [row["loss"] for row in result.history if "loss" in row], dict(evaluated.numbers)

    expected = numbers("plain")
    with torch.inference_mode():
        assert numbers("inference") == expected
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert numbers("several") == expected


def test_what_a_run_changes_in_torch_is_given_back(recipe):
    threads = torch.get_num_threads()
    one_step = ["train.max_steps=1", "schedule.warmup_steps=0", "models.base.heads.warmup_steps=0", "devices.device=cpu"]
    result = wmtp.run(recipe, overrides=[*one_step, f"devices.threads={threads + 1}"])
    assert torch.get_num_threads() == threads
    wmtp.evaluate(result.run_dir, overrides=['eval=[{type="perplexity"}]', f"devices.threads={threads + 1}"])
    assert torch.get_num_threads() == threads
    with apart_from_the_caller():
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
    assert torch.zeros(1).dtype == torch.float32
    assert torch.zeros(1).device.type == "cpu"
