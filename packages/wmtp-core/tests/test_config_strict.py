"""Exact messages of a wrong config, for each kind of mistake."""

import dataclasses
import enum
from pathlib import Path
from typing import Any, Literal

import attrs
import pytest

from wmtp.config.load import load_config
from wmtp.config.schema import Config
from wmtp.errors import ConfigError, PluginError
from wmtp.plugins import Provided, Registry, load_plugins
from wmtp.plugins.components import component
from wmtp.plugins.contract import TrainerConfig
from wmtp.tokenizers.config import OwnTokenizer


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@attrs.frozen(kw_only=True)
class Inner:
    depth: int
    names: tuple[str, ...] = ()


@attrs.frozen(kw_only=True)
class Rich(TrainerConfig):
    """A trainer with every sort of field."""

    type = "rich"
    gamma: float = 0.5
    steps: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    flag: bool = False
    mode: Literal["a", "b", 3] = "a"
    colour: Colour = Colour.RED
    inner: Inner | None = None
    inners: list[Inner] = attrs.field(factory=list)
    table: dict[str, int] = attrs.field(factory=dict)
    pair: tuple[int, str] = (1, "x")
    either: int | str = 1
    words: frozenset[str] = frozenset()
    low: float = 0.0
    high: float = attrs.field(default=1.0)
    of: Any = component("trainers", default=None)

    @high.validator
    def _above_low(self, _: Any, value: float) -> None:
        if value < self.low:
            raise ValueError(f"{value} is below low = {self.low}")

    def __attrs_post_init__(self) -> None:
        if self.flag and self.gamma == 0:
            raise ValueError("flag needs a gamma")

    def build(self) -> None:
        """Nothing to build."""


@attrs.frozen(kw_only=True)
class Needy(TrainerConfig):
    type = "needy"
    must: str

    def build(self) -> None:
        """Nothing to build."""


def registry() -> Registry:
    return load_plugins().with_classes([("trainers", Rich), ("trainers", Needy)])


BASE = {"models": {"base": {"type": "scratch", "vocab_size": 300}}, "datasets": {"py": {"type": "python-source"}}}


def problems(*sources: Any, sets: tuple[str, ...] = ()) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config([BASE, {"trainer": {"type": "rich"}}, *sources], sets, registry=registry())
    return caught.value.problems


def loaded(*sources: Any, sets: tuple[str, ...] = ()) -> Config:
    return load_config([BASE, {"trainer": {"type": "rich"}}, *sources], sets, registry=registry())


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"gama": 3}, "trainer.gama: unknown key; did you mean 'gamma'?"),
        ({"gamma": "3"}, "trainer.gamma: must be a number, not '3' (a string: leave the quotes out)"),
        ({"gamma": True}, "trainer.gamma: must be a number, not true"),
        ({"gamma": float("nan")}, "trainer.gamma: must be a number, not nan"),
        ({"gamma": 10**400}, "trainer.gamma: is too large for a number"),
        ({"steps": 3.7}, "trainer.steps: must be a whole number, not 3.7"),
        ({"steps": 3.0}, "trainer.steps: must be a whole number, not 3.0; write 3"),
        ({"steps": True}, "trainer.steps: must be a whole number, not true"),
        ({"steps": 0}, "trainer.steps: must be >= 1, not 0"),
        ({"flag": "false"}, "trainer.flag: must be true or false, not 'false' (a string: leave the quotes out)"),
        ({"flag": 0}, "trainer.flag: must be true or false, not 0"),
        ({"mode": "c"}, "trainer.mode: must be one of 'a', 'b', 3, not 'c'"),
        ({"mode": 3.0}, "trainer.mode: must be one of 'a', 'b', 3, not 3.0"),
        ({"colour": "rad"}, "trainer.colour: must be one of 'red', 'blue', not 'rad'; did you mean 'red'?"),
        ({"inner": {"depth": 1, "names": ["a", 2]}}, "trainer.inner.names.1: must be a string, not 2 (put it in quotes)"),
        ({"inner": {}}, "trainer.inner.depth: required, and missing"),
        ({"inner": 3}, "trainer.inner: must be a table, not 3; its keys: depth, names"),
        ({"inners": {"depth": 1}}, "trainer.inners: must be an array, not a table"),
        ({"inners": [{"depth": 1}, {"depht": 1, "depth": 1}]}, "trainer.inners.1.depht: unknown key; did you mean 'depth'?"),
        ({"table": {"a": 1, "b": "2"}}, "trainer.table.b: must be a whole number, not '2' (a string: leave the quotes out)"),
        ({"pair": [1]}, "trainer.pair: must have 2 elements, not 1"),
        ({"pair": ["x", 1]}, "trainer.pair.0: must be a whole number, not 'x'"),
        ({"words": "abc"}, "trainer.words: must be an array, not 'abc'"),
        ({"either": 1.5}, "trainer.either: must be a whole number or a string, not 1.5"),
        ({"low": 2, "high": 1}, "trainer.high: 1.0 is below low = 2.0"),
        ({"flag": True, "gamma": 0}, "trainer: flag needs a gamma"),
        ({"of": {"type": "rihc"}}, "trainer.of: no plugin provides 'rihc'; did you mean 'rich'? installed: {trainers}"),
        ({"of": {"type": "rich", "of": {"type": "needy"}}}, "trainer.of.of.must: required, and missing"),
        (
            {"of": {"gamma": 1}},
            "trainer.of.type: required, and missing: which trainer it is; one of: {trainers}",
        ),
        ({"type": 3}, "trainer.type: must be a string, not 3 (put it in quotes)"),
        (
            {"type": "jsonl"},
            "trainer: no plugin provides 'jsonl'; installed: {trainers};"
            " 'jsonl' is a data loader and a tracker, not a trainer",
        ),
    ],
)  # fmt: skip
def test_each_mistake_has_its_message(trainer, message):
    names = ", ".join(provided.type for provided in registry().of_kind("trainers"))
    assert message.replace("{trainers}", names) in problems({"trainer": trainer})


def test_what_must_not_be_empty():
    found = problems({"models": {"base": {"type": "hf", "uri": "x", "vocab_size": None, "lora": {"targets": []}}}})
    assert "models.base.lora.targets: must not be empty" in found


def test_the_dotted_key_of_a_heads_table_and_of_a_loader():
    assert problems({"models": {"base": {"heads": {"horizn": 3}, "layer": 1}}}) == (
        "models.base.layer: unknown key; did you mean 'layers'?",
        "models.base.heads.horizn: unknown key; did you mean 'horizon'?",
    )


def test_all_problems_are_reported_at_once_and_validators_too():
    found = problems({"trainer": {"gama": 1, "steps": 0, "flag": 1}, "optimizer": {"lr": 0}, "train": {"max_steps": 0}, "x": 1})
    assert len(found) == 6
    assert "optimizer.lr: must be > 0.0, not 0.0" in found
    assert any(line.startswith("x: unknown key; keys: run, models, tokenizer") for line in found)


def test_missing_sections():
    with pytest.raises(ConfigError) as caught:
        load_config({}, registry=registry())
    assert caught.value.problems == tuple(f"{name}: required, and missing" for name in ("models", "datasets", "trainer"))


def test_whole_numbers_become_numbers_and_nothing_else_changes():
    trainer = loaded({"trainer": {"gamma": 3, "inner": {"depth": 1, "names": ["a"]}, "either": "x", "mode": 3}}).trainer
    assert trainer == Rich(gamma=3.0, inner=Inner(depth=1, names=("a",)), either="x", mode=3)
    assert type(trainer.gamma) is float


def test_a_table_without_type_is_what_the_default_is():
    assert loaded({"optimizer": {"lr": 0.5}}).optimizer.type == "adamw"
    assert loaded({"tokenizer": {"eos_token": "<end>"}}).tokenizer == OwnTokenizer(eos_token="<end>")
    assert loaded({}).tokenizer is None


def test_a_config_from_python_is_checked_as_strictly():
    config = attrs.evolve(loaded(), trainer=Rich(steps=2), train=attrs.evolve(loaded().train, log_interval=True))
    with pytest.raises(ConfigError, match=r"train\.log_interval: must be a whole number, not true"):
        load_config(config)


def test_a_component_that_no_plugin_provides_works_from_python():
    config = attrs.evolve(loaded(), trainer=Rich(of=Needy(must="x")))
    assert load_config(config, ["trainer.of.must=y"]).trainer == Rich(of=Needy(must="y"))


@dataclasses.dataclass
class NoAttrs:
    a: int = 1


@attrs.frozen(kw_only=True)
class Odd(TrainerConfig):
    type = "odd"
    _private: int = 1
    made: int = attrs.field(init=False, default=7)
    later: int = attrs.field(default=attrs.Factory(lambda self: self._private + 1, takes_self=True))
    other: NoAttrs | None = None
    nested: list[dict[str, tuple[int, ...]]] = attrs.field(factory=list)
    word: str = attrs.field(default="a", validator=attrs.validators.in_(["a", "b"]))
    limit: int = attrs.field(default=1)

    @limit.validator
    def _check(self, _: Any, value: int) -> None:
        assert value < 5, "less\nplease"

    def build(self) -> None:
        """Nothing to build."""


def test_unusual_fields():
    odd = load_plugins().with_classes([("trainers", Odd)])

    def read(**values):
        return load_config([BASE, {"trainer": {"type": "odd", **values}}], registry=odd).trainer

    assert read(private=3).later == 4
    for values, message in [
        ({"made": 1}, "trainer.made: unknown key"),
        ({"other": {"a": 1}}, "cannot be read from TOML; use plain types and attrs classes"),
        ({"nested": [{"a": [1, "x"]}]}, "trainer.nested.0.a.1: must be a whole number"),
        ({"word": "c"}, "trainer.word: must be in ['a', 'b'] (got 'c')"),
        ({"limit": 9}, "trainer.limit: less please"),
    ]:
        with pytest.raises(ConfigError) as caught:
            read(**values)
        assert message in str(caught.value)


@pytest.mark.parametrize("sources", [3, None, [[1]], [None]])
def test_what_is_no_source(sources):
    with pytest.raises(ConfigError, match=" is not a text, a path, a mapping, a Config or a list of them"):
        load_config(sources)


def test_what_python_alone_can_hold():
    endless: dict[str, object] = {}
    endless["run"] = endless
    with pytest.raises(ConfigError, match="a mapping holds itself, or is nested too deeply"):
        load_config(endless)
    with pytest.raises(ConfigError, match=r"run.output_dir: must be a string, not runs \(PosixPath\); write str\(path\)"):
        load_config([BASE, {"run": {"output_dir": Path("runs")}}])


def test_two_classes_of_one_name_are_not_taken_for_each_other():
    @attrs.frozen(kw_only=True)
    class Both(TrainerConfig):
        type = "both"
        first: TrainerConfig = component("trainers")
        second: TrainerConfig = component("trainers")

        def build(self):
            """Nothing to build."""

    def made():
        @attrs.frozen(kw_only=True)
        class Mine(TrainerConfig):
            type = "mine"

            def build(self):
                """Nothing to build."""

        return Mine

    one, other = made(), made()
    base = attrs.evolve(loaded(), trainer=one())
    assert type(load_config(base).trainer) is one
    assert type(load_config([base, attrs.evolve(base, trainer=other())]).trainer) is other
    with pytest.raises(PluginError, match=r"two classes are called the trainer 'mine', .*Mine and .*Mine; give one another"):
        load_config(attrs.evolve(base, trainer=Both(first=one(), second=other())))


@pytest.mark.parametrize("sources", [{"a.toml"}, (name for name in ["a.toml"])])
def test_sources_in_no_order_or_that_can_be_read_once(sources):
    with pytest.raises(ConfigError, match="a config is a TOML file, a mapping, a Config, or a list of them"):
        load_config(sources)


def test_two_components_of_one_name_are_an_error_that_names_both():
    plugins = load_plugins()
    [one, two] = [
        attrs.evolve(plugins.plugins[0], distribution=name, version=v) for name, v in (("one", "1.0"), ("two", "2.1"))
    ]
    both = Registry(
        [one, two], [Provided(kind="trainers", cls=Rich, plugin=one), Provided(kind="trainers", cls=Rich, plugin=two)]
    )
    with pytest.raises(Exception, match=r"the trainer 'rich' is provided by one 1\.0 and by two 2\.1"):
        load_config(BASE, registry=both)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (
            {"train": {"max_steps": 2**63}},
            "train.max_steps: is too large for a whole number, which has 64 bits: at most 9223372036",
        ),
        ({"train": {"log_interval": -(2**64)}}, "train.log_interval: is too large for a whole number, which has 64 bits"),
        ({"train": {"epochs": 1e308}}, "train.epochs: must be <= 1000000000.0, not 1e+308"),
        ({"devices": {"timeout": 1e300}}, "devices.timeout: must be <= 1000000000.0, not 1e+300"),
        (
            {"models": {"base": {"type": "hf", "uri": "hf://a/b", "lora": {"alpha": 1e39}}}},
            "models.base.lora.alpha: must be <= 1000000000.0, not 1e+39",
        ),
        ({"devices": {"memory_gib": float("inf")}}, "devices.memory_gib: must be <= 100000.0, not inf"),
        ({"devices": {"threads": 2**62}}, "devices.threads: must be <= 4096, not 4611686018427387904"),
        ({"optimizer": {"type": "adamw", "weight_decay": float("inf")}}, "optimizer.weight_decay: must be < inf, not inf"),
        ({"optimizer": {"type": "muon", "eps": float("inf")}}, "optimizer.eps: must be < inf, not inf"),
        ({"trainer": {"type": "focal", "gamma": float("inf")}}, "trainer.gamma: must be < inf, not inf"),
        ({"storage": {"s3": {"chunk_size": float("inf")}}}, "storage.s3.chunk_size: must be < inf, not inf"),
        ({"storage": {"s3": {"retry_timeout": float("inf")}}}, "storage.s3.retry_timeout: must be <= 1000000000.0, not inf"),
        ({"storage": {"gs": {"connect_timeout": 1e300}}}, "storage.gs.connect_timeout: must be <= 1000000000.0, not 1e+300"),
        ({"eval": [{"type": "pass-at-k", "timeout": float("inf")}]}, "eval.0.timeout: must be <= 1000000.0, not inf"),
        (
            {"launcher": {"type": "vessl", "preset": "p", "gpus": 1, "image": "i", "poll_interval": float("inf")}},
            "launcher.poll_interval: must be <= 1000000.0, not inf",
        ),
        ({"storage": {"az": {"read_timeout": float("inf")}}}, "storage.az.read_timeout: must be <= 1000000000.0, not inf"),
        (
            {"models": {"base": {"heads": {"horizon": 2, "head_weights": [1.0, float("inf")]}}}},
            "models.base.heads.head_weights: must be < inf, not inf",
        ),
        (
            {"models": {"base": {"heads": {"horizon": 2, "objective": "lk", "lk_eta": float("inf")}}}},
            "models.base.heads.lk_eta: must be < inf, not inf",
        ),
    ],
)
def test_numbers_that_no_run_can_use(table, said):
    found = problems({"trainer": {"type": "baseline-mtp"}}, table)
    assert len(found) == 1
    assert found[0].startswith(said)
