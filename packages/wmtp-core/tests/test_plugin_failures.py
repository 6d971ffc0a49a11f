"""Exceptions out of plugins: one line with the plugin, its method, file and line, and the exception as the cause."""

import functools
import signal
import sys
from pathlib import Path

import attrs
import pytest
import torch

import wmtp
from wmtp import make_view, random_step
from wmtp.cli import main
from wmtp.plugins.failures import names_plugins, plugin_failure


def line_of(function, text):
    """Find ``file:line`` of the line with ``text`` in a function."""
    code = function.__code__
    lines = Path(code.co_filename).read_text().splitlines()
    return f"{code.co_filename}:{next(n for n in range(code.co_firstlineno, len(lines)) if text in lines[n - 1])}"


@attrs.frozen(kw_only=True)
class Failing(wmtp.Trainer):
    type = "failing"
    at: str = "token_weights"
    wrong: str = "raise"

    def fail(self, at):
        if at == self.at:
            if self.wrong == "exit":
                sys.exit(0)
            raise KeyError("no\nsuch")

    def setup(self, setup):
        self.fail("setup")

    def stages(self):
        self.fail("stages")
        return [wmtp.Stage()]

    def observe(self, view):
        def number(chunk):
            self.fail("number")
            return chunk.logits[:, 0]

        return {"x": view.each_prediction(number)}

    def token_weights(self, view):
        self.fail("token_weights")
        return view.uniform()

    def metrics(self):
        self.fail("metrics")
        return {}

    def state_dict(self):
        self.fail("state_dict")
        return {}


class Measure(wmtp.Evaluator):
    def evaluate(self, measured):
        return self.halves(0)

    @staticmethod
    def halves(number):
        return {"half": 1 / number}


@attrs.frozen(kw_only=True)
class Halves(wmtp.EvaluatorConfig):
    type = "halves"

    def build(self):
        return Measure()


class Numbers(wmtp.ExampleLoader):
    def examples(self, path):
        yield wmtp.Example(id="0", prompt="a", completion="b")
        raise OSError(5, "the tape is torn", "/dev/tape")


@attrs.frozen(kw_only=True)
class Numbered(wmtp.DataLoaderConfig):
    type = "numbered"
    broken: bool = False

    def build(self):
        if self.broken:
            return {}["loader"]
        return Numbers()


@pytest.fixture
def config(tmp_path):
    (tmp_path / "code.jsonl").write_text('{"id": "a", "prompt": "one two ", "completion": "three four five six"}\n' * 4)
    model = {"type": "scratch", "vocab_size": 320, "hidden_size": 8, "layers": 1, "attention_heads": 2, "max_positions": 64}
    return wmtp.load_config({
        "run": {"output_dir": str(tmp_path / "runs")},
        "models": {"base": model},
        "tokenizer": {"type": "bytes"},
        "datasets": {"code": {"type": "jsonl", "uri": str(tmp_path / "code.jsonl")}},
        "data": {"train": {"max_length": 32, "batch_size": 2}, "cache_dir": str(tmp_path / "cache")},
        "trainer": {"type": "baseline-mtp"},
        "train": {"max_steps": 2},
        "checkpoints": {"save_interval": 1},
        "devices": {"device": "cpu"},
        "tracker": {"type": "jsonl"},
    })  # fmt: skip


def failure_of(config, **options):
    with pytest.raises(wmtp.PluginError) as raised:
        wmtp.run(config, **options)
    return raised.value


@pytest.mark.parametrize("at", ["setup", "stages", "number", "token_weights", "metrics", "state_dict"])
def test_a_trainer(config, at):
    error = failure_of(attrs.evolve(config, trainer=Failing(at=at)))
    assert type(error.__cause__) is KeyError
    name = "Failing.observe" if at == "number" else f"Failing.{at}"
    place = line_of(Failing.fail, "raise KeyError")
    assert str(error) == f"trainer 'failing' ({__name__}): {name} raised KeyError: 'no\\nsuch' ({place})"


class Plain(wmtp.Trainer):
    """A trainer without a type, which another class builds."""

    def token_weights(self, view):
        raise KeyError("no")


@attrs.frozen(kw_only=True)
class Builds(wmtp.TrainerConfig):
    type = "builds"

    def build(self):
        return Plain()


def test_a_trainer_that_another_class_builds(config):
    error = failure_of(attrs.evolve(config, trainer=Builds()))
    place = line_of(Plain.token_weights, "raise KeyError")
    assert str(error) == f"{__name__}: Plain.token_weights raised KeyError: 'no' ({place})"


def test_an_evaluator(config):
    place = line_of(Measure.halves, "1 / number")
    error = failure_of(attrs.evolve(config, eval=[Halves()]))
    assert str(error) == f"{__name__}: Measure.evaluate raised ZeroDivisionError: division by zero ({place})"
    assert type(error.__cause__) is ZeroDivisionError


@pytest.mark.parametrize("broken", [False, True])
def test_a_loader(config, broken):
    error = failure_of(attrs.evolve(config, datasets={"mine": Numbered(broken=broken)}))
    if broken:
        place = line_of(Numbered.build, 'return {}["loader"]')
        assert str(error) == f"data loader 'numbered' ({__name__}): Numbered.build raised KeyError: 'loader' ({place})"
    else:
        place = line_of(Numbers.examples, "raise OSError")
        said = f"{__name__}: Numbers.examples raised OSError: [Errno 5] the tape is torn: '/dev/tape' ({place})"
        assert str(error) == said


@pytest.mark.parametrize("method", ["setup", "observe", "token_weights", "metrics"])
def test_gradients_that_a_trainer_switches_off_are_its_mistake(config, method):
    def off(self, *given):
        torch.set_grad_enabled(False)
        return {} if method != "token_weights" else given[0].uniform()

    made = attrs.frozen(type("Off", (wmtp.Trainer,), {"type": "off", method: off}))()
    error = failure_of(attrs.evolve(config, trainer=made))
    assert f"Off.{method} leaves gradients switched off for the whole process" in str(error)
    assert torch.is_grad_enabled()


def test_an_exception_without_a_message_is_told_by_its_line(config):
    @attrs.frozen
    class Silent(wmtp.Trainer):
        type = "silent"

        def token_weights(self, view):
            raise LookupError

    error = failure_of(attrs.evolve(config, trainer=Silent()))
    place = line_of(Silent.token_weights, "raise LookupError")
    assert str(error).endswith(f"Silent.token_weights raised LookupError: raise LookupError ({place})")


def test_sys_exit_does_not_end_the_caller(config):
    error = failure_of(attrs.evolve(config, trainer=Failing(wrong="exit")))
    assert f"Failing.token_weights called sys.exit(0) ({line_of(Failing.fail, 'sys.exit')})" in str(error)


class Handler:
    """A signal's handler, in each of its forms."""

    def __init__(self, error):
        self.error = error

    def __call__(self, number, frame):
        raise self.error

    def method(self, number, frame):
        raise self.error


@pytest.mark.parametrize("form", ["function", "method", "object", "partial"])
@pytest.mark.parametrize("kind", [SystemExit, TimeoutError])
def test_what_a_handler_of_the_user_raises_within_a_plugin_is_not_its_fault(config, form, kind):
    error = kind(3)

    @attrs.frozen
    class Interrupted(wmtp.Trainer):
        type = "interrupted"

        def token_weights(self, view):
            signal.raise_signal(signal.SIGUSR1)
            return view.uniform()

    def function(number, frame):
        raise error

    def given(raised, number, frame):
        raise raised

    handler = Handler(error)
    handlers = {"function": function, "method": handler.method, "object": handler, "partial": functools.partial(given, error)}
    before = signal.signal(signal.SIGUSR1, handlers[form])
    try:
        with pytest.raises(kind) as raised:
            wmtp.run(attrs.evolve(config, trainer=Interrupted()))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert raised.value is error


def test_a_value_that_a_plugins_enum_lacks_is_the_plugins_fault(config):
    """Handlers that the system has are members of an enum, so code of all enums would pass for a handler's."""

    @attrs.frozen
    class Wrong(wmtp.Trainer):
        type = "wrong"

        def token_weights(self, view):
            return signal.Signals(10_000)

    error = failure_of(attrs.evolve(config, trainer=Wrong()))
    place = line_of(Wrong.token_weights, "signal.Signals(10_000)")
    assert str(error).endswith(f"Wrong.token_weights raised ValueError: 10000 is not a valid Signals ({place})")


def test_what_is_no_plugins_fault_stays_as_it_is():
    @names_plugins
    def raises(error):
        raise error

    for error in (ValueError("ours"), wmtp.WMTPError("said"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as raised:
            raises(error)
        assert raised.value is error


def test_lack_of_memory_is_told_as_it_is(config):
    for lack in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):

        @attrs.frozen
        class Large(wmtp.Trainer):
            type = "large"

            def setup(self, setup, lack=lack):
                raise lack

        with pytest.raises(Exception, match=str(lack)) as raised:
            wmtp.run(attrs.evolve(config, trainer=Large()))
        assert not isinstance(raised.value, wmtp.PluginError)


def test_an_exception_is_told_where_the_plugins_cannot_be_loaded(monkeypatch):
    monkeypatch.setenv("WMTP_PLUGINS", "nonesuch")
    with pytest.raises(KeyError) as raised:
        Plain().token_weights(None)
    assert plugin_failure(raised.value) is None


def test_the_innermost_of_two_plugins_is_named():
    """A control that asks another trainer is not to blame."""

    @attrs.frozen(kw_only=True)
    class Asks(wmtp.Trainer):
        type = "asks"

        def token_weights(self, view):
            return Failing().token_weights(view)

    with pytest.raises(KeyError) as raised:
        Asks().token_weights(make_view(Asks(), random_step(0, packed=True)))
    assert "trainer 'failing'" in str(plugin_failure(raised.value))


PLUGIN = """
import attrs, wmtp

@attrs.frozen(kw_only=True)
class Late(wmtp.Trainer):
    type = "late"
    early: bool = False

    def setup(self, setup):
        if self.early:
            scale()

    def token_weights(self, view):
        return view.uniform() * scale()

def scale():
    return None + 1

@wmtp.hookimpl
def wmtp_trainers():
    return [Late]
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install a distribution with a trainer that fails."""
    site = tmp_path / "site"
    (site / "late_trainer-2.1.dist-info").mkdir(parents=True)
    (site / "late_trainer-2.1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: late-trainer\nVersion: 2.1\n")
    (site / "late_trainer-2.1.dist-info/entry_points.txt").write_text("[wmtp]\nlate-trainer = late_trainer\n")
    (site / "late_trainer.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", str(site))
    yield site / "late_trainer.py"
    sys.modules.pop("late_trainer", None)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_command_line_says_one_line(config, installed, capsys, tmp_path, processes):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(wmtp.dump_config(config))
    more = ["--set", "trainer.type=late", "--set", f"launcher.processes={processes}"]
    assert main(["run", str(recipe), *more]) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    said = "error: trainer 'late' (late-trainer 2.1): Late.token_weights raised TypeError: unsupported operand type(s) for +: "
    assert said + f"'NoneType' and 'int' ({installed}:17)" in err
    if processes == 1:
        assert main(["run", str(recipe), *more, "--debug"]) == 1
        err = capsys.readouterr().err
        assert "return view.uniform() * scale()" in err


@pytest.mark.slow
def test_two_processes_say_it_while_a_tracker_starts(config, installed, capsys, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(wmtp.dump_config(config))
    settings = ("trainer.type=late", "trainer.early=true", "launcher.processes=2", "tracker.type=mlflow")
    assert main(["run", str(recipe), *(word for setting in settings for word in ("--set", setting))]) == 1
    assert "trainer 'late' (late-trainer 2.1): Late.setup raised TypeError: " in capsys.readouterr().err
