"""A changed key that others leave without effect is refused, and named; the same key where it acts is not."""

import pytest

from wmtp.config.load import load
from wmtp.config.rules import check_loaded
from wmtp.config.schema import HeadsConfig
from wmtp.data.config import Mbpp, TextFiles
from wmtp.errors import ConfigError, WMTPError
from wmtp.launchers.local import Local
from wmtp.models.build import resolve_heads
from wmtp.models.loaders.hf import HfLoader

GOOD = {
    "models": {"base": {"type": "scratch", "vocab_size": 300}},
    "datasets": {"py": {"type": "python-source"}},
    "data": {"eval": {"holdout": 0.1}},
    "trainer": {"type": "baseline-mtp"},
    "tracker": {"type": "jsonl"},
}

HEADS = "models.base.heads"
RHO, CRITIC = "trainer.type=rho1-wmtp", "trainer.type=critic-wmtp"
MODELS = ["models.ref.type=scratch", "models.ref.vocab_size=300", "models.rm.type=scratch", "models.rm.vocab_size=300"]

#: the key and a value, what leaves it without effect, and where it acts
IDLE = [
    (f"{HEADS}.kind=linear", [f"{HEADS}.horizon=1"], [f"{HEADS}.horizon=2"]),
    (f"{HEADS}.init=random", [f"{HEADS}.horizon=1"], [f"{HEADS}.horizon=2"]),
    (f"{HEADS}.trunk_gradient=detach", [f"{HEADS}.horizon=1"], [f"{HEADS}.horizon=2"]),
    (f"{HEADS}.lr_factor=2.0", [f"{HEADS}.horizon=1"], [f"{HEADS}.horizon=2"]),
    (f"{HEADS}.decay=0.5", [f"{HEADS}.horizon=1"], [f"{HEADS}.horizon=2"]),
    (f"{HEADS}.objective=kl", [f"{HEADS}.horizon=1"], [f"{HEADS}.horizon=2"]),
    (f"{HEADS}.draft_vocabulary=9", [f"{HEADS}.horizon=1"], [f"{HEADS}.horizon=2"]),
    (f"{HEADS}.layout=plain", [f"{HEADS}.kind=block"], [f"{HEADS}.kind=shared"]),
    (f"{HEADS}.lk_eta=1.0", [f"{HEADS}.objective=kl"], [f"{HEADS}.objective=lk"]),
    ("schedule.min_ratio=0.1", ["schedule.type=constant"], ["schedule.type=linear"]),
    ("devices.fsdp.reduce_every_micro_batch=true", ["devices.fsdp.strategy=none"], ["devices.fsdp.strategy=full"]),
    ("report.sample_interval=5", ["report.samples=0"], []),
    ("report.sample_tokens=5", ["report.samples=0"], []),
    ("trainer.keep=0.5", [RHO, "trainer.mode=weighted"], [RHO, "trainer.mode=token-skip"]),
    ("trainer.temperature=0.5", [RHO], [RHO, "trainer.mode=weighted"]),
    ("trainer.min_excess=0.5", [RHO, "trainer.mode=weighted", "trainer.score=reference"], [RHO, "trainer.mode=weighted"]),
    ("trainer.max_weight=2.0", [RHO, "trainer.mode=token-skip"], [RHO, "trainer.mode=weighted"]),
    ("trainer.reward_batch_size=2", [CRITIC], [CRITIC, "trainer.reward=model"]),
    ("trainer.pair_length_ratio=2.0", [CRITIC], [CRITIC, "trainer.value_loss=pairwise"]),
    ("trainer.gae_lambda=0.5", [CRITIC, "trainer.value_loss=pairwise", "trainer.delta=td"], [CRITIC, "trainer.delta=td"]),
    ("trainer.value_min_delta=0.5", [CRITIC], [CRITIC, "trainer.value_patience=3"]),
    ("trainer.value_loss_coef=0.5", [CRITIC], [CRITIC, "trainer.value_learns=true"]),
    ("trainer.ema_decay=0.5", [CRITIC, "trainer.whitening=batch"], [CRITIC]),
    ("eval.0.top_p=0.5", ["eval.0.type=speculative"], ["eval.0.type=speculative", "eval.0.temperature=0.5"]),
    ("eval.0.top_p=0.5", ["eval.0.type=pass-at-k"], ["eval.0.type=pass-at-k", "eval.0.temperatures=[0.5]"]),
    ("eval.0.shots=0", ["eval.0.type=pass-at-k"], ["eval.0.type=pass-at-k", "eval.0.dataset=mbpp", "eval.0.uri=."]),
    (
        "eval.0.max_tests=3",
        ["eval.0.type=pass-at-k"],
        ["eval.0.type=pass-at-k", "eval.0.dataset=code-contests", "eval.0.uri=."],
    ),
]


def problems(*overrides):
    try:
        check_loaded(load(GOOD, overrides))
    except ConfigError as error:
        return error.problems
    return ()


@pytest.mark.parametrize(("key", "idle", "acts"), IDLE, ids=[f"{key} {' '.join(idle)}" for key, idle, _ in IDLE])
def test_a_key_without_effect_is_refused(key, idle, acts):
    found = [line for line in problems(*MODELS, *idle, key) if "has no effect" in line]
    assert len(found) == 1
    assert f"{key.partition('=')[0]}: has no effect: " in found[0]
    assert not any("has no effect" in line for line in problems(*MODELS, *acts, key))
    assert not any("has no effect" in line for line in problems(*MODELS, *idle)), "the default is no setting"


def test_an_overlay_can_undo_the_decay_of_a_recipe():
    assert not problems(f"{HEADS}.horizon=1", f"{HEADS}.decay=1.0")


def test_how_new_heads_start_says_nothing_of_heads_that_are_there():
    brought = HeadsConfig(horizon=3)
    assert resolve_heads(HeadsConfig(horizon=3), brought).horizon == 3
    with pytest.raises(ConfigError, match=r"models\.base\.heads\.init: 'random' has no effect"):
        resolve_heads(HeadsConfig(horizon=3, init="random"), brought)


def test_what_chooses_a_file_of_a_folder_is_refused_beside_one_file(tmp_path):
    (tmp_path / "train.jsonl").write_text("")
    (tmp_path / "notes.md").write_text("")
    with pytest.raises(WMTPError, match="split = 'test' chooses nothing"):
        Mbpp(uri="x", split="test").build().files(tmp_path / "train.jsonl")
    assert Mbpp(uri="x", split="train").build().files(tmp_path / "train.jsonl")
    with pytest.raises(WMTPError, match=r"pattern = '\*\.rst' does not match"):
        TextFiles(uri="x", pattern="*.rst").build().files(tmp_path / "notes.md")
    assert TextFiles(uri="x").build().files(tmp_path / "notes.md")
    (tmp_path / "m.gguf").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"models\.base\.gguf_file: has no effect"):
        HfLoader(gguf_file="other.gguf").info(tmp_path / "m.gguf")


@pytest.mark.parametrize(("processes", "started"), [(4, "2"), (1, "2")])
def test_processes_that_were_started_already_must_be_as_many_as_the_config_says(processes, started):
    with pytest.raises(ConfigError, match=rf"launcher\.processes: {processes}, but {started} were started"):
        Local(processes).check_started({"LOCAL_WORLD_SIZE": started})
    Local("auto").check_started({"LOCAL_WORLD_SIZE": started})
    Local(processes).check_started({"LOCAL_WORLD_SIZE": str(processes)})
    Local(processes).check_started({})
