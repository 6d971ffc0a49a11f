"""Every setting acts or is refused: what ``wmtp eval`` and the commands without a config do with each key."""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping

import attrs
import pytest
import torch
from conftest import write_recipe

import wmtp as library
from wmtp.cli import main
from wmtp.config.schema import Config, ModelConfig
from wmtp.errors import ConfigError
from wmtp.evaluation import command
from wmtp.evaluation.unread import READ

PERPLEXITY = 'eval=[{type="perplexity"}]'


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run in bf16-params, beside its data."""
    changes = ["train.max_steps=1", "models.base.heads.warmup_steps=0", "schedule.warmup_steps=0"]
    changes += ["devices.precision=bf16-params", "report.samples=0"]
    return library.run(write_recipe(tmp_path_factory.mktemp("trained")), overrides=changes, run_name="one").run_dir


def data_of(run_dir):
    return run_dir.parent.parent / "code.jsonl"


def details(run_dir):
    return json.loads((run_dir / "evaluation-details.json").read_text())["perplexity"]


def test_a_measurement_computes_in_the_precision_it_is_told(trained):
    command.evaluate_model(str(trained), overrides=[PERPLEXITY])
    saved = details(trained)
    command.evaluate_model(str(trained), overrides=[PERPLEXITY, "devices.precision=fp32"])
    exact = details(trained)
    assert (saved["dtype"], exact["dtype"]) == ("bfloat16", "float32")
    assert saved["results"] != exact["results"]


def test_a_model_that_stands_alone_is_measured_as_it_was_saved(trained, tmp_path):
    data = tmp_path / "data.toml"
    data.write_text(f'[datasets.code]\ntype="jsonl"\nuri="{data_of(trained)}"\n[data.eval]\nsources=["code"]\n')
    for precision, dtype in ((None, "bfloat16"), ("fp32", "float32")):
        own = [] if precision is None else [f"devices.precision={precision}"]
        found = command.evaluate_model(
            str(trained / "model"), [str(data)], overrides=[PERPLEXITY, *own], output=str(tmp_path / "found")
        )
        assert details(found.folder)["dtype"] == dtype


def test_one_config_stands_for_a_list_of_it(trained, tmp_path):
    place = tmp_path / "place.toml"
    place.write_text("[devices]\ndevice = 'cpu'\n")
    for config in (str(place), place, {"devices": {"device": "cpu"}}):
        with pytest.raises(ConfigError, match="nothing to measure"):
            command.evaluate_model(str(trained / "model"), config)


def leaves(cls=Config, path=()):
    """Every key of the core's sections; a component's table is one."""
    for attribute in attrs.fields(attrs.resolve_types(cls)):
        inner = [t for t in (attribute.type, *getattr(attribute.type, "__args__", ())) if attrs.has(t)]
        here = (*path, attribute.alias)
        if attribute.metadata or not inner:
            yield here
        elif inner[0] is ModelConfig:
            yield from leaves(ModelConfig, (*here, "base"))
        else:
            yield from leaves(inner[0], here)


def is_read(path):
    return any(".".join(path[:length]) in READ for length in range(1, len(path) + 1))


def test_what_is_read_is_in_the_schema():
    keys = {".".join(path[:length]) for path in leaves() for length in range(1, len(path) + 1)}
    assert keys >= READ


def test_a_key_that_a_measurement_does_not_read_is_refused(trained):
    """A new key of the schema is among these, until it is read."""
    unread = [path for path in leaves() if not is_read(path)]
    assert ("optimizer",) in unread
    config = (trained / "config.toml").read_text()
    values = {"int": "1", "float": "0.5", "bool": "true", "str": "x"}
    refused = 0
    for path in unread:
        key = ".".join(path)
        tried = [f"{key}={value}" for value in values.values()] + [f"{key}.type=x"]
        found = []
        for text in tried:
            with pytest.raises(ConfigError) as error:
                command.evaluate_model(str(trained), overrides=[PERPLEXITY, text])
            found.append(str(error.value))
        refused += any("wmtp eval does not read this key" in text for text in found)
        assert all(key in text or path[0] in text for text in found)
    assert refused >= 20
    assert (trained / "config.toml").read_text() == config


@pytest.fixture
def measured(monkeypatch):
    """Record what a measurement depends on, by name, in place of measuring."""
    seen: dict[str, object] = {}

    def look(evaluators, measured, folder):
        digest = hashlib.sha256()
        for batch in measured.batches:
            digest.update(
                batch.input_ids.numpy().tobytes() + batch.loss_mask.numpy().tobytes() + str(batch.loss_mask.shape).encode()
            )
        with measured.autocast():
            autocast = torch.is_autocast_enabled("cpu")
        seen.update(
            evaluators=evaluators,
            batches=digest.hexdigest(),
            dtype=measured.model.anatomy.output.weight.dtype,
            autocast=autocast,
            compiled="forward" in vars(measured.model.anatomy.layers[0]),
            threads=torch.get_num_threads(),
            seed=measured.seed,
            tokenizer=measured.tokenizer.eos_id,
        )
        return {"perplexity/head_1": 1.0}

    monkeypatch.setattr(command, "measure", look)
    return seen


#: a value for each key that is read, other than the run's
CHANGES: Mapping[str, str] = {
    "run.seed": "3",
    "data.eval.sources": '["more"]',
    "data.eval.holdout": "0.5",
    "data.eval.batch_size": "1",
    "data.eval.max_batches": "1",
    "data.train.sources": '["more"]',
    "data.train.max_length": "16",
    "data.train.batch_size": "2",
    "data.train.micro_batch_size": "2",
    "data.train.packing": "false",
    "data.train.learn": "all",
    "data.train.learn_prompt": "true",
    "data.train.prompt_weights": "{code=0.5}",
    "data.train.overlong": "skip",
    "data.train.on_bad_example": "skip",
    "devices.device": "cuda",
    "devices.precision": "bf16",
    "devices.compile": "true",
    "devices.threads": "1",
    "datasets": "",
    "eval": "",
}
#: where it shows elsewhere: on a GPU, in files, in the tracker, by its own tests
ELSEWHERE = {
    "data.train.boundary",
    "data.train.chat_template",
    "devices.attention",
    "run.output_dir",
    "data.cache_dir",
    "tokenizer",
    "tracker",
    "storage.cache_dir",
    "storage.backends",
}


def test_every_key_that_is_read_has_its_proof_here():
    read = {".".join(path) for path in leaves() if is_read(path)}
    assert read == CHANGES.keys() | ELSEWHERE


@pytest.mark.parametrize("key", [key for key, value in CHANGES.items() if value])
def test_a_key_that_is_read_acts(trained, measured, tmp_path, key):
    if key == "devices.device" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    threads = torch.get_num_threads()
    (tmp_path / "more.jsonl").write_text('{"prompt": "a", "completion": "bcd"}\n{"prompt": "b", "completion": "cd"}\n')
    base = [PERPLEXITY, "datasets.more.type=jsonl", f"datasets.more.uri={tmp_path}/more.jsonl", 'data.train.sources=["code"]']
    base += [f"data.train.max_length={100 if key == 'data.train.packing' else 40}", "devices.threads=2"]
    data = data_of(trained)
    content = data.read_text()
    if key == "data.train.on_bad_example":
        data.write_text(content + "no json\n")
    changed = [f"{key}={CHANGES[key]}"]
    outcomes = []
    try:
        for overrides in (base, [*base, *changed]):
            measured.clear()
            try:
                command.evaluate_model(str(trained), overrides=overrides)
                outcomes.append(dict(measured))
            except library.WMTPError as error:
                outcomes.append(str(error))
    finally:
        data.write_text(content)
        torch.set_num_threads(threads)
    assert outcomes[0] != outcomes[1]


#: a key that is read, what leaves it without effect, and the reason
IDLE = [
    ('data.train.sources=["code"]', "[data.eval]\nsources = ['code']", "without data.eval.holdout"),
    ("data.train.batch_size=2", "[data.eval]\nsources = ['code']\nbatch_size = 1", "data.eval.batch_size says how many rows"),
    ("data.train.micro_batch_size=2", "[data.eval]\nsources = ['code']\nbatch_size = 1", "data.eval.batch_size says how many"),
    ("run.output_dir=x", "[data]\ncache_dir = 'tokens'\n[data.eval]\nsources = ['code']", "data.cache_dir says where"),
    ("run.output_dir=x", "", "without [data.eval]"),
    ("data.cache_dir=x", "", "without [data.eval]"),
    ("data.train.max_length=16", "", "without [data.eval]"),
    ("datasets.code.uri=x", "", "without [data.eval]"),
]


@pytest.mark.parametrize(("given", "tables", "reason"), IDLE)
def test_a_key_that_others_leave_without_effect_is_refused(trained, measured, tmp_path, given, tables, reason):
    place = tmp_path / "place.toml"
    place.write_text(f"[[eval]]\ntype = 'speculative'\n[datasets.code]\ntype='jsonl'\nuri='{data_of(trained)}'\n{tables}\n")
    with pytest.raises(ConfigError, match="wmtp eval does not read this key") as refused:
        command.evaluate_model(str(trained / "model"), [str(place)], overrides=[given], output=str(tmp_path / "found"))
    assert reason in str(refused.value)
    assert given.partition("=")[0] in str(refused.value)


def test_the_tokenizer_of_a_run_acts_where_none_of_the_cores_lies_beside_its_model(trained, measured, tmp_path):
    """A plugin's tokenizer is read from the config, so there it can be changed."""
    with pytest.raises(ConfigError, match=r"tokenizer.*does not read this key: the run's model has its tokenizer beside it"):
        command.evaluate_model(str(trained), overrides=[PERPLEXITY, "tokenizer.type=bytes"])
    run = tmp_path / "other"
    shutil.copytree(trained, run)
    saved = run / "model" / "wmtp_tokenizer.json"
    saved.write_text('{"type": "of-a-plugin"}')
    command.evaluate_model(str(run), overrides=[PERPLEXITY, "tokenizer.type=bytes"])
    assert measured["tokenizer"] == 256


def test_keys_of_a_file_that_are_not_read_are_named(trained, measured, tmp_path, caplog):
    (tmp_path / "place.toml").write_text("[optimizer]\nlr = 1e-5\n[devices]\nthreads = 1\n")
    threads = torch.get_num_threads()
    with caplog.at_level(logging.INFO, "wmtp"):
        command.evaluate_model(str(trained), [str(tmp_path / "place.toml")], overrides=[PERPLEXITY])
    torch.set_num_threads(threads)
    assert [r.message for r in caplog.records if "not read" in r.message] == ["not read by wmtp eval: optimizer.lr"]


@pytest.mark.parametrize("words", [("generate", "m", "--prompt", "x"), ("export", "m", "d", "--format", "hf"), ("report", "r")])
def test_a_command_without_a_config_takes_keys_of_storage_alone(words, capsys):
    assert main([*words, "--set", "devices.precision=fp32"]) == 2
    assert "--set devices.precision: " in capsys.readouterr().err


def test_top_p_without_a_temperature_is_refused(capsys):
    assert main(["generate", "m", "--prompt", "x", "--top-p", "0.5"]) == 2
    assert "--top-p: has no effect" in capsys.readouterr().err
