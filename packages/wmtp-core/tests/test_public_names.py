"""One import line: the names of ``wmtp``, and the functions that do what the commands do."""

import inspect
import json
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tiny_recipe import TINY_MODEL, tiny_recipe

import wmtp
from wmtp.cli import main, make_parser

#: commands whose function has another name: a builtin's, a package's, or a word more on the command line
FUNCTIONS = {"distill-data": "distill_data", "eval": "evaluate", "plugins": "load_plugins", "runs": "pull_runs"}

#: option → parameter, where their names differ
PARAMETERS = {"files": "config", "compile": "compiled"}  # `compile` is a builtin of Python
COMMON = {"help", "json", "verbose", "debug"}  # how a command prints
#: options that only the command line needs, or that another function or a method has
ELSEWHERE = {
    "cache": {"action", "max_size"},  # the methods of `Cache`
    "distill-data": {"drafts"},  # `speculative=N`
    "fetch": {"words", "verify"},  # `uri` and `folder`; `wmtp.verify`
    "generate": {"prompt_file", "drafts"},
    "launch": {"watch"},  # `wmtp.logs(run, follow=True)`
    "runs": {"action"},
}
COMMANDS = sorted(make_parser()[1])


def function(command):
    return getattr(wmtp, FUNCTIONS.get(command, command))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_a_function_with_the_same_arguments(command):
    found = inspect.signature(function(command)).parameters
    options = {action.dest for action in make_parser()[1][command]._actions} - COMMON - ELSEWHERE.get(command, set())
    wanted = {"model" if command == "eval" and o == "files" else PARAMETERS.get(o, o) for o in options}
    assert wanted <= set(found), wanted - set(found)


def test_the_exceptions_are_still_needed():
    assert set(FUNCTIONS) | set(ELSEWHERE) <= set(COMMANDS)
    for command, options in ELSEWHERE.items():
        assert options <= {action.dest for action in make_parser()[1][command]._actions}, command


def test_no_public_name_is_hidden_by_a_module():
    """Importing ``wmtp.report.page`` would put the module ``report`` in the place of the function."""
    modules = {module.name for module in pkgutil.iter_modules(wmtp.__path__)}
    assert not modules & set(wmtp.__all__)


@pytest.mark.parametrize("name", sorted(wmtp.__all__))
def test_every_public_name_is_there(name):
    found = getattr(wmtp, name)
    assert found is not None
    home = getattr(found, "__module__", None)
    assert home is None or not home.startswith("wmtp.") or wmtp._HOMES[name] == home, "the stub names the defining module"


def test_names_that_need_no_torch_load_none():
    """A plugin module, a notebook that only checks configs, and the command line start fast."""
    names = [
        "run check evaluate export report fetch push load_model load_tokenizer generate start launch status logs cancel",
        "metrics show cache pull_runs verify load_plugins Config DataConfig load_config dump_config hookimpl component",
        "Trainer TrainerConfig EvaluatorConfig AdamW Bytes ScratchModel Perplexity JsonlTracker Storage Tracker Launcher",
    ]
    code = f"import sys\nfrom wmtp import {', '.join(' '.join(names).split())}\nprint([m for m in sys.modules if m in "
    code += "('torch', 'transformers', 'mlflow', 'numpy', 'pytest')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'wmtp' has no attribute 'runn'"):
        _ = wmtp.runn


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run directory, and beside it what its ``checkpoints.uri`` would hold, as a package's files."""
    folder = tmp_path_factory.mktemp("trained")
    lines = [json.dumps({"id": str(i), "prompt": "ab", "completion": "cd" * 8}) for i in range(8)]
    (folder / "code.jsonl").write_text("\n".join(lines))

    models = {"base": TINY_MODEL | {"heads": {"horizon": 2}}}
    recipe = tiny_recipe(str(folder / "code.jsonl"), run={"output_dir": str(folder / "runs")}, models=models)
    result = wmtp.run(recipe, run_name="first")
    package = folder / "site" / "some_models"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "first").symlink_to(result.run_dir)
    return result.run_dir


def forms(run_dir):
    return {
        "a path": run_dir / "model",
        "a text": str(run_dir / "model"),
        "a run directory": run_dir,
        "a run directory as a text": str(run_dir),
        "a file URI": (run_dir / "model").as_uri(),
        "a file URI of a run": run_dir.as_uri(),
        "a package": "package://some_models/first/model",
        "a run in a package": "package://some_models/first",
    }


@pytest.mark.parametrize("form", sorted(forms(Path("/x"))))
def test_a_model_is_taken_in_every_form(form, trained, monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(trained.parent.parent / "site"))
    monkeypatch.chdir(tmp_path)
    name = forms(trained)[form]
    model = wmtp.load_model(name)
    assert model.horizon == 2
    assert not model.training
    assert wmtp.load_tokenizer(name).encode("ab") == [*b"ab"]
    text = wmtp.generate(name, "ab", max_new_tokens=3, device="cpu")
    assert text.tokens == list(model.generate("ab", max_new_tokens=3).tokens)
    assert (wmtp.export(name, "exported", format="hf").folder / "config.json").is_file()
    tables = {
        "eval": [{"type": "perplexity"}],
        "datasets": {"code": {"type": "jsonl", "uri": str(trained.parent.parent / "code.jsonl")}},
        "data": {"train": {"max_length": 32}, "eval": {"sources": ["code"]}},
    }
    assert "perplexity/head_1" in str(wmtp.evaluate(name, [tables], output="measured").numbers)
    assert main(["generate", str(name), "--prompt", "ab", "--max-new-tokens", "3", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == text.text


@pytest.mark.parametrize("form", sorted(forms(Path("/x"))))
def test_a_config_takes_a_model_in_every_form(form, trained, monkeypatch):
    monkeypatch.syspath_prepend(str(trained.parent.parent / "site"))
    tables = tomllib.loads((trained / "config.toml").read_text())
    expected = wmtp.check(tables).summary["memory"]
    tables["models"] = {"base": {"type": "hf", "uri": str(forms(trained)[form])} | {"heads": {"horizon": 2}}}
    assert wmtp.check(tables).summary["memory"] == expected, "estimated from the files of the model"


def test_models_base_takes_a_run_directory(trained):
    tables = tomllib.loads((trained / "config.toml").read_text())
    tables["models"] = {"base": {"type": "hf", "uri": str(trained)}}
    assert wmtp.run(tables, run_name="second").model is not None


def test_a_run_is_reported_in_every_form(trained, tmp_path):
    for number, name in enumerate((trained, str(trained), trained.as_uri(), [trained])):
        assert wmtp.report(name, tmp_path / f"{number}.html").is_file()


def test_a_function_returns_what_its_command_prints(trained, capsys):
    found = wmtp.check(trained / "config.toml")
    assert main(["check", str(trained / "config.toml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["summary"] == dict(found.summary)
    assert main(["show", "perplexity", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["components"] == wmtp.show("perplexity")


def test_files_are_fetched_pushed_and_verified(tmp_path):
    source = tmp_path / "a.txt"
    source.write_text("abc")
    fetched = wmtp.fetch(source, tmp_path / "here")
    assert (fetched.files, fetched.size) == (1, 3)
    assert wmtp.verify(tmp_path / "here").problems == []
    (tmp_path / "here" / "a.txt").write_text("abd")
    assert len(wmtp.verify(tmp_path / "here").problems) == 1
    assert wmtp.push(source, tmp_path / "there.txt").path == source
    assert (tmp_path / "there.txt").read_text() == "abc"
    assert wmtp.cache(tmp_path / "cache").list() == []
