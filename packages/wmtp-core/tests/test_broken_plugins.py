"""Broken plugins of every kind: an error with the right name, where they are loaded or run and in their suite."""

import subprocess
import sys
import textwrap

import pytest

import wmtp
from wmtp.config.load import load
from wmtp.errors import ConfigError, PluginError
from wmtp.plugins.components import KINDS
from wmtp.plugins.loader import load_plugins
from wmtp.plugins.names import nearest_name
from wmtp.testing import (
    ComponentTests,
    DataLoaderTests,
    EvaluatorTests,
    LauncherTests,
    ModelLoaderTests,
    StorageTests,
    TrackerTests,
    TrainerTests,
)
from wmtp.testing.steps import random_step
from wmtp.training.setup import build_trainer

SUITES = {
    "trainers": TrainerTests,
    "model_loaders": ModelLoaderTests,
    "tokenizers": ComponentTests,
    "data_loaders": DataLoaderTests,
    "storages": StorageTests,
    "optimizers": ComponentTests,
    "trackers": TrackerTests,
    "evaluators": EvaluatorTests,
    "launchers": LauncherTests,
}
#: kind → base of config classes, what every such class has besides its type, how the component is made
BASES = {
    "trainers": ("TrainerConfig", "", "build(self)"),
    "model_loaders": ("ModelLoaderConfig", "", "build(self)"),
    "tokenizers": ("TokenizerConfig", "", "build(self, path)"),
    "data_loaders": ("DataLoaderConfig", "", "build(self)"),
    "storages": ("StorageBackendConfig", "schemes = ('mine',)", "build(self)"),
    "optimizers": ("OptimizerConfig", "lr: float = 1e-3", "build(self, parameters)"),
    "trackers": ("TrackerConfig", "", "build(self)"),
    "evaluators": ("EvaluatorConfig", "", "build(self)"),
    "launchers": ("LauncherConfig", "", "build(self)"),
}

#: kind, a line in its config class, what is said
CONFIGS = [
    (
        "trainers",
        "require_models = ('ref',)",
        "Mine has 'require_models', which WMTP does not read; did you mean 'required_models'?",
    ),
    ("trainers", "reward_model = ('rm',)", "did you mean 'reward_models'?"),
    ("trainers", "uri_key = ('head',)", "did you mean 'uri_keys'?"),
    ("trainers", "required_models = 'ref'", "Mine ('mine'): required_models is a text; write ('ref',)"),
    (
        "trainers",
        "def checks(self): return ['x: is wrong']",
        "Mine has 'checks', which WMTP does not read; did you mean 'check'?",
    ),
    ("trainers", "def get_checks(self): pass\n    def chek(self): pass", "did you mean 'check'?"),
    ("model_loaders", "attn_implementaton = 'eager'", "did you mean 'attn_implementation'?"),
    ("model_loaders", "URI: str = 'x'", "did you mean 'uri'?"),
    ("tokenizers", "eos_tokn: str = '</s>'", "did you mean 'eos_token'?"),
    ("data_loaders", "allow_trainng: bool = True", "did you mean 'allow_training'?"),
    ("data_loaders", "def chek(self): return ()", "did you mean 'check'?"),
    ("storages", "scheme = ('mine',)", "did you mean 'schemes'?"),
    ("storages", "def check_urI(uri): pass", "did you mean 'check_uri'?"),
    ("storages", "schemes = 'mine'", "Mine ('mine'): schemes is a text; write ('mine',)"),
    ("storages", "schemes = ()", "Mine ('mine') has no `schemes`"),
    ("optimizers", "LR: float = 1e-3", "did you mean 'lr'?"),
    ("trackers", "tracking_url: str = 'x'", "did you mean 'tracking_uri'?"),
    (
        "evaluators",
        "need_eval_data = True",
        "Mine has 'need_eval_data', which WMTP does not read; did you mean 'needs_eval_data'?",
    ),
    ("evaluators", "needs_extra_head = True", "did you mean 'needs_extra_heads'?"),
    ("evaluators", "needed_position = 5", "did you mean 'needed_positions'?"),
    ("evaluators", "needed_positions = '5'", "Mine ('mine'): needed_positions is '5'; write a whole number"),
    ("evaluators", "one_proces = True", "did you mean 'one_process'?"),
    ("evaluators", "execute_code = True", "did you mean 'executes_code'?"),
    ("evaluators", "executes_code = 'yes'", "Mine ('mine'): executes_code is 'yes'; write True or False"),
    ("evaluators", "executes_code: bool = True", "Mine ('mine'): executes_code is a field, which TOML could set"),
    ("launchers", "remot = True", "Mine has 'remot', which WMTP does not read; did you mean 'remote'?"),
    ("launchers", "process = 2", "did you mean 'processes'?"),
    ("launchers", "procseses = 2", "did you mean 'processes'?"),
    ("launchers", "is_remote = True", "did you mean 'remote'?"),
    ("evaluators", "needs__eval_data = True", "did you mean 'needs_eval_data'?"),
    ("model_loaders", "uir: str = 'x'", "did you mean 'uri'?"),
    ("optimizers", "def get_check(self): return ()", "did you mean 'check'?"),
    ("launchers", "remote = 1", "Mine ('mine'): remote is 1; write True or False"),
    *[(kind, "tyype = 'x'", "Mine has no name: write `type = ") for kind in KINDS],
]

#: kind, the class that `build` makes, what is said
COMPONENTS = [
    ("trainers", "Trainer", "def token_weight(self, view): return view.uniform()", "token_weight", "token_weights"),
    ("trainers", "Trainer", "needs_tokenloss = True", "needs_tokenloss", "needs_token_loss"),
    ("trainers", "Trainer", "needs_entrophy = True", "needs_entrophy", "needs_entropy"),
    ("trainers", "Trainer", "def auxiliary_loss(self, view): return {}", "auxiliary_loss", "auxiliary_losses"),
    ("model_loaders", "models.ModelLoader", "def infos(self, path): pass", "infos", "info"),
    ("tokenizers", "tokenizers.Tokenizer", "bos_ids = property(lambda self: 1)", "bos_ids", "bos_id"),
    ("data_loaders", "data.ExampleLoader", "evaluation_onli = True", "evaluation_onli", "evaluation_only"),
    ("data_loaders", "data.ExampleLoader", "def file(self, path): return []", "file", "files"),
    ("storages", "storage.Storage", "def fetched(self, uri, target, **more): pass", "fetched", "fetch"),
    ("storages", "storage.Storage", "def removes(self, uri): pass", "removes", "remove"),
    ("storages", "storage.Storage", "def get_files(self, uri): pass", "get_files", "files"),
    ("storages", "storage.Storage", "def psuh(self, source, uri, **more): pass", "psuh", "push"),
    ("trackers", "tracking.Tracker", "def log_artifacts(self, file): pass", "log_artifacts", "log_artifact"),
    ("evaluators", "evaluation.Evaluator", "def evalute(self, measured): return {}", "evalute", "evaluate"),
    ("launchers", "launchers.Launcher", "def lanch(self, *given, **more): pass", "lanch", "launch"),
    ("launchers", "launchers.RemoteLauncher", "def validat(self, config, plan): return ()", "validat", "validate"),
]

#: kind, the class that `build` makes, a method, how it is called, what it takes
CALLS = [
    ("trainers", "Trainer", "def token_weights(self): return 1", "token_weights(self, view)", "(self)"),
    ("trainers", "Trainer", "def observe(self, view, more): return {}", "observe(self, view)", "(self, view, more)"),
    ("trainers", "Trainer", "def load_state_dict(self): pass", "load_state_dict(self, state)", "(self)"),
    ("trainers", "Trainer", "def metrics(self, step): return {}", "metrics(self)", "(self, step)"),
    ("trainers", "Trainer", "def eligible(view): return None", "eligible(self, view)", "(view)"),
    ("trainers", "Trainer", "def setup(self, *, setup): pass", "setup(self, setup)", "(self, *, setup)"),
    ("model_loaders", "models.ModelLoader", "def info(self): pass", "info(self, path)", "(self)"),
    ("model_loaders", "models.ModelLoader", "def load(self, path): pass", "load(self, path, *, dtype, seed)", "(self, path)"),
    ("tokenizers", "tokenizers.Tokenizer", "def decode(self): pass", "decode(self, ids)", "(self)"),
    ("data_loaders", "data.ExampleLoader", "def examples(self): return []", "examples(self, path)", "(self)"),
    ("storages", "storage.Storage", "def push(self, uri): pass", "push(self, path, uri)", "(self, uri)"),
    ("trackers", "tracking.Tracker", "def log(self, metrics): pass", "log(self, step, metrics)", "(self, metrics)"),
    ("trackers", "tracking.Tracker", "def finish(self): pass", "finish(self, status, model)", "(self)"),
    ("evaluators", "evaluation.Evaluator", "def evaluate(self): return {}", "evaluate(self, measured)", "(self)"),
    ("launchers", "launchers.Launcher", "def launch(self, config, run_dir): pass", "launch(self, config, run_dir, *, resume)",
     "(self, config, run_dir)"),
]  # fmt: skip

#: methods of a trainer, what is said before anything is loaded
TRAINERS = [
    (
        "def token_weights(self, view): view.uniform() * 2",
        "Made.token_weights returns nothing; write return before its result; for uniform weights write: return view.uniform()",
    ),
    ("def observe(self, view): {'x': view.trunk}", "Made.observe returns nothing; write return before its result"),
    (
        "def token_weights(self, view): return view.token_loss",
        "Made.token_weights reads view.token_loss, which is not computed; write needs_token_loss = True in Made",
    ),
    (
        "def token_weights(self, view): return view.entropy * 2",
        "Made.token_weights reads view.entropy, which is not computed; write needs_entropy = True in Made",
    ),
    (
        "def weights(self, view): return view.uniform()",
        "Made has weights(), and neither token_weights nor auxiliary_losses, which the loop calls; to weight tokens, write "
        "token_weights(self, view)",
    ),
    ("needs_token_loss = 'yes'", "needs_token_loss is 'yes'; write True or False"),
]


def made_by_build(base, line):
    """Write the body of a ``build`` that makes a component with one line in its class."""
    return f"\n        class Made(wmtp.{base}):\n            {line}\n        return Made()"


def config_code(kind, line, base=None, made="pass"):
    """A plugin's module with one config class."""
    name, more, build = BASES[kind]
    own = ("type = 'mine'", more)
    own = [given for given in own if not nearest_name(line.split(" ")[0], [given.split(" ")[0].rstrip(":") or "-"])]
    return "\n".join([
        "import attrs, wmtp, wmtp.models, wmtp.tokenizers, wmtp.data, wmtp.storage, wmtp.tracking, wmtp.evaluation",
        "import wmtp.launchers",
        "@attrs.frozen(kw_only=True)",
        f"class Mine({base or 'wmtp.' + name}):",
        *(f"    {given}" for given in own),
        f"    {line}",
        f"    def {build}: {made}",
        "@wmtp.hookimpl",
        f"def wmtp_{kind}(): return [Mine]",
        "",
    ])  # fmt: skip


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a distribution with one module for this test."""

    def install(code):
        info = tmp_path / "broken-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[wmtp]\nbroken = broken_plugin\n")
        (tmp_path / "broken_plugin.py").write_text(textwrap.dedent(code))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("WMTP_PLUGINS", "broken,wmtp-algos")
        monkeypatch.delitem(sys.modules, "broken_plugin", raising=False)
        registry = load_plugins()
        monkeypatch.delitem(sys.modules, "broken_plugin", raising=False)
        return registry

    return install


def suite_says(kind, code):
    """Ask the suite of a kind: a plugin's test file cannot even be imported, or a test fails."""
    found = {}
    try:
        exec(code, found)
    except PluginError as error:
        return str(error)
    suite = type("Suite", (SUITES[kind],), {"config": object.__new__(found["Mine"]), "kind": kind})()
    with pytest.raises(AssertionError) as failed:
        suite.test_config_class_keeps_the_contract()
    return str(failed.value)


@pytest.mark.parametrize(("kind", "line", "said"), CONFIGS)
def test_a_broken_config_class(install, kind, line, said):
    code = config_code(kind, line)
    (broken,) = install(code).broken
    assert said in broken.reason
    assert said in suite_says(kind, code)


def test_a_config_that_needs_a_broken_plugin_says_why(install):
    registry = install(config_code("trainers", "require_models = ('ref',)"))
    table = {"models": {"base": {"type": "scratch", "vocab_size": 9}}, "datasets": {"d": {"type": "python-source"}}}
    with pytest.raises(ConfigError, match=r"trainer: no plugin provides 'mine'.* broken 1.0 is broken: .*'required_models'"):
        load({**table, "trainer": {"type": "mine"}}, registry=registry)


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_without_the_base_of_its_kind_says_which(install, kind):
    code = config_code(kind, "", base="object")
    said = f"write class Mine(wmtp.{BASES[kind][0]})"
    assert said in install(code).broken[0].reason
    assert said in suite_says(kind, code)


@pytest.mark.parametrize(("kind", "base", "line", "name", "meant"), COMPONENTS)
def test_a_broken_component(kind, base, line, name, meant):
    """Runs and suites call ``build`` before anything else."""
    made = made_by_build(base, line)
    found = {}
    exec(config_code(kind, "", made=made), found)
    config = found["Mine"]()
    with pytest.raises(PluginError) as at_run:
        config.build(*[None] * (kind == "tokenizers"))
    assert f"Made has {name!r}, which WMTP does not read; did you mean {meant!r}?" in str(at_run.value)


@pytest.mark.parametrize(("kind", "base", "line", "call", "takes"), CALLS)
def test_a_method_that_cannot_be_called(kind, base, line, call, takes):
    """Those of a tracker's end or a resume would be called after hours."""
    found = {}
    exec(config_code(kind, "", made=made_by_build(base, line)), found)
    with pytest.raises(PluginError) as refused:
        found["Mine"]().build(*[None] * (kind == "tokenizers"))
    assert f"Made: {call.partition('(')[0]} is called as {call}, and takes {takes}" in str(refused.value)


def test_a_property_that_is_a_method():
    with pytest.raises(PluginError, match="Made: vocab_size is a method, which is not called; write @property above it"):
        exec("import wmtp.tokenizers\nclass Made(wmtp.tokenizers.Tokenizer):\n    def vocab_size(self): return 1", {})


@pytest.mark.parametrize(
    "lines",
    [
        "def token_weights(self, *views): return 1",
        "def token_weights(self, view, /, more=1, **others): return 1",
        "def token_weights(*all): return 1",
        "token_weights = classmethod(lambda cls, view: 1)",
        "token_weights = staticmethod(lambda view: 1)",
        "def state_dict(self, prefix=''): return {}",
    ],
)
def test_a_method_that_takes_more_is_no_mistake(lines):
    exec(f"import wmtp\nclass Made(wmtp.Trainer):\n    {lines}", {})


@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize(("lines", "said"), TRAINERS)
def test_a_broken_trainer(install, classes, lines, said):
    if classes == 1:
        code = f"import attrs, wmtp\n@attrs.frozen\nclass Made(wmtp.Trainer):\n    type = 'mine'\n    {lines}\nMine = Made\n"
        code += "@wmtp.hookimpl\ndef wmtp_trainers(): return [Mine]\n"
        assert said in install(code).broken[0].reason
        assert said in suite_says("trainers", code)
        return
    made = made_by_build("Trainer", lines)
    found = {"__name__": "mine"}
    exec(config_code("trainers", "", made=made), found)
    with pytest.raises(PluginError) as at_run:
        build_trainer(found["Mine"]())
    assert str(at_run.value).startswith("trainer 'mine' (mine): ")
    assert said in str(at_run.value)
    with pytest.raises(PluginError) as in_suite:
        type("Suite", (TrainerTests,), {"config": found["Mine"]()})().make_trainer()
    assert said in str(in_suite.value)


def test_a_flag_that_init_misspells():
    found = {"__name__": "mine"}
    made = made_by_build("Trainer", "def __init__(self): self.needs_tokens_loss = True")
    exec(config_code("trainers", "", made=made), found)
    with pytest.raises(PluginError, match=r"Made sets self.needs_tokens_loss, .* did you mean 'needs_token_loss'\?"):
        build_trainer(found["Mine"]())


def test_the_contract_imports_no_torch():
    """A one-class trainer is read whenever ``wmtp`` starts."""
    code = "import sys; from wmtp import StepView, Trainer, TrainerConfig; print({'torch', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize(("name", "arguments", "now"), [("units", "data, stage", "groups"), ("weighed", "view", "eligible")])
def test_a_trainer_of_an_earlier_contract_hears_the_new_name(name, arguments, now):
    with pytest.raises(PluginError, match=f"Old: the method '{name}' is called '{now}' now; rename it"):
        type("Old", (wmtp.Trainer,), {name: eval(f"lambda self, {arguments}: None")})
    type("Own", (wmtp.Trainer,), {name: lambda self: 3})  # the host could not call it, so it is the plugin's own


def test_an_earlier_name_of_the_batch_says_the_new_one():
    with pytest.raises(AttributeError, match="a Batch has no 'learn'; it is called loss_mask now"):
        _ = random_step(0, packed=False).batch.learn
    assert not hasattr(random_step(0, packed=False).batch, "anything")


def test_an_old_import_path_says_the_new_one():
    with pytest.raises(ImportError, match=r"write: from wmtp\.trainers import Trainer"):
        exec("from wmtp.training import Trainer", {})


def test_names_of_a_plugins_own_are_free():
    """Fields, helpers, private names: only near misses are refused."""
    code = config_code("evaluators", "metric: str = 'x'\n    _remote: int = 1\n    def resolved(self): return 1\n    limit = 3")
    exec(code, {})

    class Own(wmtp.Trainer):
        needs_token_loss = True
        scale = 2.0

        def token_weights(self, view):
            return self.powered(view) if view.step else view.uniform()

        def powered(self, view):
            return view.token_loss**self.scale

    assert list(Own.contract_problems()) == []
