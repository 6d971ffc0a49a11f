"""A dumped config reads back as the same config, whatever is in it."""

import enum
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import attrs
import pytest
import tomli
from hypothesis import example, given, settings
from hypothesis import strategies as st

from wmtp.config.load import load_config
from wmtp.config.schema import Config, EvalDataConfig, HeadsConfig, ModelConfig, RunConfig, TrainConfig
from wmtp.config.tree import components, dump_config, flatten, to_mapping
from wmtp.data.config import Jsonl
from wmtp.errors import ConfigError
from wmtp.models.config import HfModel
from wmtp.plugins import load_plugins
from wmtp.plugins.components import component
from wmtp.plugins.contract import TrainerConfig


class Size(enum.Enum):
    SMALL = 1
    LARGE = "large"


@attrs.frozen(kw_only=True)
class Part:
    size: Size = Size.SMALL
    share: float | None = None


@attrs.frozen(kw_only=True)
class Wrapper(TrainerConfig):
    type = "wrapper"
    of: Any = component("trainers", default=None)
    others: tuple[Any, ...] = component("trainers", default=())
    by_name: Mapping[str, Any] = component("trainers", factory=dict)
    part: Part | None = None
    parts: tuple[Part, ...] = ()
    words: dict[str, str] = attrs.field(factory=dict)
    pair: tuple[int, str] = (0, "")
    mode: Literal["x", 2] = "x"
    where: Path = Path("here")
    chosen: frozenset[str] = frozenset()
    either: int | str | None = None

    def build(self) -> None:
        """Nothing to build."""


@attrs.frozen(kw_only=True)
class Stubborn(TrainerConfig):
    type = "stubborn"
    value: float | None = 0.5

    def build(self) -> None:
        """Nothing to build."""


REGISTRY = load_plugins().with_classes([("trainers", Wrapper)])
text = st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(["${env:HOME}", "$${env:", "a.b", "$", "'''", "\\"])
numbers = st.floats(allow_nan=False) | st.integers(-(2**63), 2**63 - 1).map(float)
parts = st.builds(Part, size=st.sampled_from(Size), share=st.none() | numbers)
plain = st.builds(
    Wrapper,
    part=st.none() | parts,
    parts=st.lists(parts, max_size=2).map(tuple),
    words=st.dictionaries(text, text, max_size=2),
    pair=st.tuples(st.integers(-(2**63), 2**63 - 1), text),
    mode=st.sampled_from(["x", 2]),
    where=st.sampled_from([Path("a/b"), Path("/x")]),
    chosen=st.frozensets(text, max_size=3),
    either=st.none() | text | st.integers(0, 9),
)
wrappers = st.recursive(
    plain,
    lambda inner: st.builds(
        Wrapper,
        of=st.none() | inner,
        others=st.lists(inner, max_size=2).map(tuple),
        by_name=st.dictionaries(text, inner, max_size=2),
    ),
    max_leaves=4,
)
heads = st.builds(
    HeadsConfig,
    horizon=st.integers(1, 9),
    head_weights=st.none() | st.lists(st.floats(0, 9), max_size=3).map(tuple),
    decay=st.none() | st.floats(0.1, 1),
)
configs = st.builds(
    Config,
    run=st.builds(RunConfig, name=st.none() | text, tags=st.lists(text, max_size=2).map(tuple)),
    models=st.dictionaries(
        text, st.builds(ModelConfig, loader=st.builds(HfModel, uri=text), heads=st.none() | heads), min_size=1, max_size=2
    ),
    datasets=st.dictionaries(text, st.builds(Jsonl, uri=text), min_size=1, max_size=2),
    trainer=wrappers,
    train=st.builds(TrainConfig, max_steps=st.none() | st.integers(1, 9), epochs=st.none() | st.floats(0.1, 9)),
)


@settings(max_examples=25, deadline=None)
@given(configs)
@example(
    Config(
        models={"base": ModelConfig(loader=HfModel(uri="m"))},
        datasets={"d": Jsonl(uri="d")},
        trainer=Wrapper(pair=(-(2**63), "")),
    )
)
def test_reading_a_dump_gives_the_same_config(config):
    dumped = dump_config(config)
    again = load_config(tomli.loads(dumped), registry=REGISTRY)
    assert again == config
    assert dump_config(again) == dumped
    assert load_config(config, registry=REGISTRY) == config


def small(**changes) -> Config:
    defaults: dict[str, Any] = {
        "models": {"base": ModelConfig(loader=HfModel(uri="m"))},
        "datasets": {"d": Jsonl(uri="d")},
        "trainer": Wrapper(),
    }
    return Config(**{**defaults, **changes})


def test_an_empty_optional_table_is_not_lost():
    config = small()
    config = attrs.evolve(config, data=attrs.evolve(config.data, eval=EvalDataConfig()))
    assert load_config(tomli.loads(dump_config(config)), registry=REGISTRY).data.eval == EvalDataConfig()


def test_none_that_toml_cannot_say_is_an_error():
    with pytest.raises(ConfigError, match=r"trainer\.value: None cannot be written to TOML"):
        dump_config(small(trainer=Stubborn(value=None)))


def test_none_that_would_be_a_value_is_an_error_and_elsewhere_the_default():
    base = {"type": "scratch", "vocab_size": 64, "options": {"sliding_window": None}, "kv_heads": None}
    given = to_mapping(small()) | {"models": {"base": base, "other": None}}
    with pytest.raises(ConfigError) as caught:
        load_config(given, registry=REGISTRY)
    [problem] = caught.value.problems
    assert "models.base.options.sliding_window: None is no value in a config, because TOML has no null" in problem
    earlier = {"models": {"base": base | {"options": {"sliding_window": 7}}}}
    later = {"models": {"base": {"options": {"sliding_window": 8}}}}
    for sources, options in (([earlier, given], {}), ([given, later], later["models"]["base"]["options"])):
        assert load_config(sources, registry=REGISTRY).models["base"].loader.options == options


def test_a_value_that_toml_cannot_hold_is_an_error():
    with pytest.raises(ConfigError, match=r"trainer\.words\.a: <object object.*cannot be written to TOML"):
        dump_config(small(trainer=Wrapper(words={"a": object()})))  # type: ignore[dict-item]


def test_flat_parameters():
    params = flatten(small(trainer=Wrapper(of=Wrapper(pair=(3, "x")), parts=(Part(),))))
    assert params["trainer.of.type"] == "wrapper"
    assert params["trainer.of.pair"] == "[3, x]"
    assert params["trainer.parts.0.size"] == "1"
    assert params["optimizer.lr"] == "2e-05"
    assert params["checkpoints.save_final"] == "true"
    assert "run.name" not in params


def test_components_inside_components_are_found():
    config = small(trainer=Wrapper(of=Wrapper(), by_name={"a": Wrapper()}, others=(Wrapper(),)))
    assert [placed.path for placed in components(config) if placed.kind == "trainers"] == [
        ("trainer",),
        ("trainer", "of"),
        ("trainer", "others", 0),
        ("trainer", "by_name", "a"),
    ]
    assert ("models", "base") in [placed.path for placed in components(config)]
