"""Validation of what plugins build and return: errors where it is made, which name the plugin."""

import re
from types import SimpleNamespace

import attrs
import numpy as np
import pytest
import torch
from tiny_recipe import TINY_MODEL, tiny_recipe
from torch import nn

import wmtp
from wmtp.errors import PluginError
from wmtp.evaluation.measure import measure
from wmtp.models.base import load_model, make_loader, model_info
from wmtp.models.config import ScratchModel
from wmtp.optim.build import build_optimizer
from wmtp.plugins.built import built
from wmtp.plugins.contract import ComponentConfig
from wmtp.storage.base import Storage
from wmtp.storage.uris import check_answer, localize, stored_files
from wmtp.tokenizers.bytes import BytesTokenizer
from wmtp.tokenizers.checks import check_tokenizer
from wmtp.tracking import Tracker

BASES = {
    "model_loaders": ("model loader", wmtp.ModelLoaderConfig, "a ModelLoader"),
    "tokenizers": ("tokenizer", wmtp.TokenizerConfig, "a Tokenizer"),
    "data_loaders": ("data loader", wmtp.DataLoaderConfig, "an ExampleLoader"),
    "storages": ("storage backend", wmtp.StorageBackendConfig, "a Storage"),
    "optimizers": ("optimizer", wmtp.OptimizerConfig, "an Optimizer"),
    "trackers": ("tracker", wmtp.TrackerConfig, "a Tracker"),
    "evaluators": ("evaluator", wmtp.EvaluatorConfig, "an Evaluator"),
    "launchers": ("launcher", wmtp.LauncherConfig, "a Launcher"),
}


def make(base: type[ComponentConfig], build, **attributes):
    return attrs.frozen(kw_only=True)(type("Mine", (base,), {"type": "mine", "build": build, **attributes}))


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize(("value", "found"), [(None, "None"), ({}, "a dict")])
def test_what_is_built_must_be_of_its_kind(kind, value, found):
    name, base, wanted = BASES[kind]
    config = make(base, lambda self, *_: value, **({"schemes": ("mine",)} if kind == "storages" else {}))()
    with pytest.raises(PluginError, match=rf"^{name} 'mine' \({__name__}.*\): build returned {found}, not {wanted}$"):
        built(config, kind)


def config_with(tmp_path, **tables):
    (tmp_path / "code.jsonl").write_text('{"prompt": "a", "completion": "bc"}\n' * 4)
    return tiny_recipe(str(tmp_path / "code.jsonl"), run={"output_dir": str(tmp_path), "name": "a"}, **tables)


def in_python(tmp_path, section, component, **tables):
    config = wmtp.load_config(config_with(tmp_path, **tables))
    return attrs.evolve(config, **{section: component})


@pytest.mark.parametrize(
    ("choose", "said"),
    [
        (lambda own: own[:-1], "build left out 1 of 2 parameters, which would never learn: bias; give"),
        (lambda own: [*own, torch.nn.Parameter(torch.zeros(2))], "build gave it 1 parameters that are not among those"),
    ],
)
def test_an_optimizer_has_all_parameters_and_no_others(tmp_path, choose, said):
    def build(self, parameters):
        return torch.optim.SGD(choose([parameter for _, parameter in parameters]), lr=self.lr)

    sgd = make(wmtp.OptimizerConfig, build, lr=0.1, __annotations__={"lr": float})()
    model = SimpleNamespace(extra_heads=nn.Linear(2, 2), heads=SimpleNamespace(lr_factor=1.0))
    parameters = list(model.extra_heads.named_parameters())
    with pytest.raises(PluginError, match=rf"^optimizer 'mine' \({__name__}.*\): {said}"):
        build_optimizer(in_python(tmp_path, "optimizer", sgd), model, parameters, {}, {}, None)


def test_an_optimizer_that_computes_the_loss_itself_is_refused(tmp_path):
    def build(self, parameters):
        return torch.optim.LBFGS([parameter for _, parameter in parameters], lr=self.lr)

    lbfgs = make(wmtp.OptimizerConfig, build, lr=0.1, __annotations__={"lr": float})()
    model = SimpleNamespace(extra_heads=nn.Linear(2, 2), heads=SimpleNamespace(lr_factor=1.0))
    parameters = list(model.extra_heads.named_parameters())
    with pytest.raises(PluginError, match=rf"^optimizer 'mine' \({__name__}.*\): its step\(\) needs an argument, as a closure"):
        build_optimizer(in_python(tmp_path, "optimizer", lbfgs), model, parameters, {}, {}, None)


def test_a_launcher_returns_a_result(tmp_path):
    class Lazy(wmtp.launchers.Launcher):
        def launch(self, config, run_dir, *, resume):
            return None

    lazy = make(wmtp.LauncherConfig, lambda self: Lazy())()
    with pytest.raises(PluginError, match=r"^launcher 'mine' \(.*\): launch returned None, not a Result$"):
        wmtp.run(in_python(tmp_path, "launcher", lazy))


@pytest.mark.parametrize("method", ["info", "load"])
def test_a_model_loader_returns_what_it_promises(method):
    inner = ScratchModel(**{key: value for key, value in TINY_MODEL.items() if key != "type"}).build()

    class Bare(wmtp.models.ModelLoader):
        def info(self, path):
            return inner.info(path) if method != "info" else {}

        def load(self, path, *, dtype, seed):
            return inner.load(path, dtype=dtype, seed=seed).model

    config = make(wmtp.ModelLoaderConfig, lambda self: Bare())()
    storage = wmtp.load_config(tiny_recipe(datasets={"py": {"type": "python-source"}})).storage
    wanted = {"info": "info returned a dict, not a ModelInfo", "load": "load returned a LlamaForCausalLM, not a LoadedModel"}
    read = {
        "info": lambda: model_info(config, storage, None),
        "load": lambda: load_model(config, make_loader(config, storage), None, dtype=torch.float32, seed=0),
    }
    with pytest.raises(PluginError, match=rf"^model loader 'mine' \(.*\): {wanted[method]}$"):
        read[method]()


def test_a_tracker_that_fails_is_named_and_the_run_goes_on(tmp_path, caplog):
    def fail(*_):
        raise KeyError("boom")

    class Broken(Tracker):
        def start(self, run):
            pass

        def finish(self, status, model):
            pass

        log = log_artifact = saved = location = fail

    tracker = make(wmtp.TrackerConfig, lambda self: Broken())()
    result = wmtp.run(in_python(tmp_path, "tracker", tracker, checkpoints={"save_interval": 1}))
    assert result.status == "finished"
    said = [record.getMessage() for record in caplog.records if "Broken" in record.getMessage()]
    failed = f"the tracker {__name__}.{Broken.__qualname__} failed: KeyError: 'boom'; "
    assert said == [
        f"step 1: {failed}metrics.jsonl has everything",
        f"{failed}it has not got the report, {tmp_path / 'a/report.html'}",
        f"at the end {failed}metrics.jsonl has everything",
    ]


@pytest.mark.parametrize("value", ["1", torch.zeros(2), None, 1j])
def test_a_measurement_is_one_number(value):
    class Odd(wmtp.evaluation.Evaluator):
        def evaluate(self, measured):
            return {"a": value}

    measured = SimpleNamespace(ranks=None, model=nn.Linear(1, 1).eval())
    with pytest.raises(
        PluginError, match=rf"^evaluator 'mine' \(.*\): evaluate returned {re.escape(repr(value))} as 'a', not a"
    ):
        measure([make(wmtp.EvaluatorConfig, lambda self: Odd())()], measured, None)


@pytest.mark.parametrize(("method", "wanted"), [("localize", "Path"), ("pinned", "str")])
def test_a_storage_backend_answers_with_what_it_promises(tmp_path, method, wanted):
    class Odd(Storage):
        def exists(self, uri):
            return True

        def localize(self, uri, cache_dir):
            return None

        def push(self, path, uri):
            pass

        def pinned(self, uri):
            return None

    backend = Odd()
    ask = {
        "localize": lambda: localize("mine://a", {"mine": backend}, tmp_path),
        "pinned": lambda: check_answer(backend, "pinned", str, backend.pinned("mine://a")),
    }
    with pytest.raises(PluginError, match=rf"^the storage backend {__name__}.*Odd: {method} returned None, not a {wanted}$"):
        ask[method]()


@pytest.mark.parametrize(
    ("method", "value", "said"),
    [
        ("encode", lambda *_: [1.5], "encode gave [1.5], not a list of whole numbers"),
        ("encode", lambda *_: ["1"], "encode gave ['1'], not a list of whole numbers"),
        ("encode", lambda *_: None, "encode gave None, not a list of whole numbers"),
        ("encode", lambda *_: [9999], "encode gave the id 9999, outside of its vocabulary, 0..257"),
        ("encode", lambda *_: [-1, 2], "encode gave the id -1, outside of its vocabulary, 0..257"),
        ("encode_many", lambda *_, **__: [[1]], "encode_many gave 1 lists of ids for 2 texts"),
        ("eos_id", property(lambda _: 258), "eos_id gave the id 258, outside of its vocabulary, 0..257"),
        ("bos_id", property(lambda _: 999), "bos_id gave the id 999, outside of its vocabulary, 0..257"),
        ("decode", lambda *_: None, "decode returned None, not a text"),
        ("fingerprint", lambda _: None, "fingerprint returned None, not a text"),
    ],
)
def test_a_tokenizer_gives_ids_of_its_vocabulary(method, value, said):
    broken = type("Broken", (BytesTokenizer,), {method: value})()
    with pytest.raises(PluginError, match=f"^mine: {re.escape(said)}$"):
        check_tokenizer(broken, "mine")


def test_a_tokenizer_of_a_small_alphabet_or_with_numbers_of_numpy_is_sound():
    def encode(self, text):
        if "(" in text:
            raise ValueError("( is not in the alphabet")
        return []

    check_tokenizer(type("Small", (BytesTokenizer,), {"encode": encode})(), "mine")
    numbers = type("Numbers", (BytesTokenizer,), {"encode": lambda self, text: np.frombuffer(text.encode(), np.uint8)})()
    check_tokenizer(numbers, "mine")


@pytest.mark.parametrize(
    ("value", "found"), [(None, "None, not an Iterable"), ("abc", "a str, not an Iterable"), (["a"], "a str, not a StoredFile")]
)
def test_what_a_storage_backend_lists_are_its_files(value, found):
    class Lists(Storage):
        exists = localize = push = lambda self, *_: None
        files = lambda self, uri: value

    with pytest.raises(PluginError, match=rf"Lists: files returned {found}$"):
        list(stored_files(Lists(), "mine://a"))


@pytest.mark.parametrize(
    ("method", "value", "found"),
    [
        ("files", None, "None, not a Sequence"),
        ("files", "abc", "a str, not a Sequence"),
        ("files", ["abc"], "a str, not a Path"),
        ("first_examples", None, "None, not an Iterable"),
        ("doubts", None, "None, not an Iterable"),
        ("doubts", "abc", "a str, not an Iterable"),
        ("unread_keys", ["a"], "a list, not a Mapping"),
    ],
)
def test_a_data_loader_answers_with_what_it_promises(tmp_path, method, value, found):
    examples = [wmtp.Example(id="0", prompt="ab", completion="cdef")] * 4
    loader = type("Loads", (wmtp.ExampleLoader,), {"examples": lambda self, path: examples, method: lambda self, path: value})
    uri = str(tmp_path / "code.jsonl")
    dataset = make(wmtp.DataLoaderConfig, lambda self: loader(), uri=uri)()
    config = in_python(tmp_path, "datasets", {"mine": dataset})
    with pytest.raises(wmtp.WMTPError, match=rf"data loader .*: {method} returned ({found})$"):
        wmtp.check(config) if method != "files" else wmtp.run(config, dry_run=True)
