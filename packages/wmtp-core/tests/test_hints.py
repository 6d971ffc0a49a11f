"""Hints for people who come from other tools, and for slips: commands, flags, keys and values."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
from tiny_recipe import SHORTEST_TOML

from wmtp.cli import main
from wmtp.config.neighbours import NEIGHBOURS
from wmtp.config.problems import unknown_key
from wmtp.config.schema import Config, LoraConfig
from wmtp.optim.config import AdamW
from wmtp.plugins.components import COMPONENT_KIND

ROOT = Path(__file__).parents[3]


def test_a_word_of_other_tools_that_is_a_name_here_means_itself():
    assert unknown_key("traim", ["run", "models", "train"]) == "unknown key; did you mean 'train'?"
    assert unknown_key("trian", ["run", "check"]) == "unknown key; did you mean 'run'?"
    assert unknown_key("DFT", ["dft", "eaft"]) == "unknown key; did you mean 'dft'?"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["runn"], "invalid choice: 'runn'; did you mean 'run'?"),
        (["train", "a.toml"], "invalid choice: 'train'; did you mean 'run'?"),
        (["evaluate"], "invalid choice: 'evaluate'; did you mean 'eval'?"),
        (["trian"], "error: argument COMMAND: invalid choice: 'trian'; did you mean 'run'?"),
        (["zzz"], "invalid choice: 'zzz' (choose from"),
        (["run", "a.toml", "--resum", "auto"], "unrecognized argument: --resum; did you mean '--resume'?"),
        (["run", "a.toml", "--dryrun"], "unrecognized argument: --dryrun; did you mean '--dry-run'?"),
        (
            ["run", "a.toml", "--learning_rate=1"],
            "--learning_rate=1; a key of other tools; here it is optimizer.lr; in the recipe,",
        ),
        (["run", "a.toml", "--model", "m"], "--model; a key of other tools; here it is models.base.uri; in the recipe,"),
        (["run", "a.toml", "--epochs=3"], "--epochs=3; it is a key of the recipe: --set train.epochs=VALUE"),
        (["run", "a.toml", "--resume-from-checkpoint=x"], "here there is no key: wmtp run --resume RUN_DIR\n"),
        (["run", "--config", "a.toml"], "--config; recipes are named without a flag"),
        (["run", "a.toml", "--name", "x"], "--name; did you mean '--run-name'?"),
        (["run", "a.toml", "train.epochs=3"], "a setting is given by --set train.epochs=3"),
        (["run", "sub"], "sub: is a directory; name a TOML file, as sub/recipe.toml"),
        (["check", "study.toml"], "study.toml: is a study; train it by wmtp study study.toml"),
        (["study", "alone.toml"], "alone.toml: is a recipe; a study names it as study.recipe"),
        (["run", "model"], 'this model folder goes into one, as models.base = { type = "hf", uri = "model" }'),
        (["run", "first"], "first: is a directory; name a TOML file; to resume this run: --resume first"),
        (
            ["run", "data.jsonl"],
            "data.jsonl:1: this is not TOML: Invalid statement (column 1); a recipe is a TOML file that names",
        ),
        (["generate", "m", "--device", "gpu"], "invalid choice: 'gpu'; did you mean 'cuda'?"),
        (["export", "m", "d", "--format", "medus"], "invalid choice: 'medus'; did you mean 'medusa'?"),
        (["export", "m", "d", "--format", "gguf"], "invalid choice: 'gguf'; did you mean 'hf'?"),
        (["cache", "prun"], "invalid choice: 'prun'; did you mean 'prune'?"),
    ],
)
def test_slips_on_the_command_line(words, hint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "sub/recipe.toml": "",
        "study.toml": "[study]\nname = 'a'\n[arms.b]\n",
        "alone.toml": "[trainer]\ntype = 'baseline-mtp'\n",
        "data.jsonl": '{"text": "a"}\n',
        "model/config.json": "{}",
        "first/run.json": "{}",
        "first/config.toml": "",
    }.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    assert main(words) == 2
    said = capsys.readouterr().err
    assert hint in said
    assert said.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["devices.device=gpu"],
            "devices.device: must be one of 'auto', 'cpu', 'cuda', 'mps', not 'gpu'; did you mean 'cuda'?",
        ),
        (["devices.precision=bfloat16"], "did you mean 'bf16'?"),
        (["train.num_train_epochs=3"], "train.num_train_epochs: unknown key; a key of other tools; here it is train.epochs"),
        (["optimizer.learning_rate=1"], "optimizer.learning_rate: unknown key; a key of other tools; here it is optimizer.lr"),
        (["report_to=wandb"], "report_to: unknown key; a key of other tools; here it is tracker.type"),
        (["train.gradient_accumulation_steps=4"], "here it is data.train.batch_size, the rows of a whole step"),
        (["data.train.per_device_train_batch_size=4"], "and data.train.micro_batch_size, those that a device computes at once"),
        (["data.train.max_lenght=4"], "data.train.max_lenght: unknown key; did you mean 'max_length'?"),
        (["data.train.max-length=4"], "data.train.max-length: unknown key; did you mean 'max_length'?"),
        (["heads.horizon=4"], "heads: unknown key in this table; there is models.base.heads"),
        (["train.batch_size=4"], "unknown key in this table; there is data.train.batch_size and data.eval.batch_size"),
        (["models.base.heads=4"], "models.base.heads: must be a table, not 4; its keys: horizon, kind,"),
        (["models.base.heads.kind=medusa"], "did you mean 'residual'?"),
        (["trainer=focal"], "trainer: must be a table, not 'focal'; write { type = \"focal\" }"),
        (["trainer.type=sft"], "did you mean 'baseline-mtp'?"),
        (["datasets.py.type=csv"], "did you mean 'jsonl'?"),
        (["datasets.py.type=alpaca"], "did you mean 'chat'?"),
        (["tracker.type=none"], "did you mean 'jsonl'?"),
        (["data.train.packing=True"], "data.train.packing: must be true or false, not 'True'; write true"),
        (["train.max_steps=1e3"], "train.max_steps: must be a whole number, not 1000.0; write 1000"),
        (["schedule.max_steps=4"], "schedule.max_steps: unknown key; a key of other tools; here it is train.max_steps"),
    ],
)
def test_words_of_other_tools_in_a_config(overrides, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.toml").write_text(SHORTEST_TOML)
    assert main(["check", "a.toml", *(word for override in overrides for word in ("--set", override))]) == 2
    assert said in capsys.readouterr().err


def sections(cls, path=""):
    for field in attrs.fields(cls):
        yield f"{path}{field.alias}"
        match = re.search(r"\w+Config\b", str(field.type))
        if match and COMPONENT_KIND not in field.metadata:
            inner = getattr(sys.modules["wmtp.config.schema"], match[0], None)
            yield from sections(inner, f"{path}{field.alias}.") if inner is not None else ()


def test_every_key_that_a_hint_names_is_one():
    known = {*sections(Config), "models.base.uri", "models.base.attn_implementation", "optimizer.type", "tracker.type"}
    known |= {f"optimizer.{field.alias}" for field in attrs.fields(AdamW)} | {"tracker.project"}
    known |= {
        "models.base.quantize",
        "models.base.lora",
        *(f"models.base.lora.{field.alias}" for field in attrs.fields(LoraConfig)),
    }
    named = {key for here in NEIGHBOURS.values() for key in re.findall(r"\b[a-z]+(?:\.[a-z_]+)+", here)}
    assert len(named) > 25
    assert named <= known, named - known


def test_the_page_for_newcomers_has_every_name():
    page = (ROOT / "docs" / "coming-from.md").read_text()
    assert [name for name in NEIGHBOURS if f"`{name}`" not in page] == []


def test_a_name_that_is_nearly_one_of_the_table_is_a_slip():
    assert unknown_key("learning_rates", ["learning_rate"]) == "unknown key; did you mean 'learning_rate'?"


def command(*words, shell_tail, cwd):
    line = " ".join([sys.executable, "-m", "wmtp", *words, shell_tail])
    return subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], cwd=cwd, capture_output=True, text=True)


def test_a_reader_that_has_had_enough_is_no_failure_and_hides_none(tmp_path):
    """One process for each: what is closed before the command writes into it is closed for sure."""
    (tmp_path / "a.toml").write_text(SHORTEST_TOML)
    (tmp_path / "b.toml").write_text(SHORTEST_TOML + "x = 1\n")
    # a pipe whose reader has gone, as standard output
    for words, expected in (
        (["plugins"], 0),
        (["check", "a.toml"], 0),
        (["check", "b.toml"], 2),
        (["check", "b.toml", "--json"], 2),
    ):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [sys.executable, "-m", "wmtp", *words], cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True
        )
        os.close(writer)
        assert done.returncode == expected, (words, done.stderr)
        assert "BrokenPipe" not in done.stderr


def test_ctrl_c_while_the_command_is_imported_shows_no_traceback(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'wmtp.cli': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "wmtp", "plugins"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_a_pipe_of_the_work_that_breaks_is_a_failure(monkeypatch, capsys):
    """A server that hangs up raises the same error as a closed standard output."""

    def fail(*_, **__):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("wmtp.actions.files.push", fail)
    assert main(["push", "x", "y"]) == 1
    assert "error: BrokenPipeError" in capsys.readouterr().err
