"""The section [storage]: every table in it belongs to the backend of that name."""

import tomllib

import attrs
import pytest
from attrs import evolve

from wmtp.config.converter import make_converter
from wmtp.config.load import load_config
from wmtp.config.places import build_backends
from wmtp.config.problems import Problems
from wmtp.config.rules import check
from wmtp.config.schema import Config, ModelConfig, StorageConfig
from wmtp.config.tree import components, dump_config, flatten
from wmtp.data.config import TextFiles
from wmtp.errors import ConfigError
from wmtp.models.config import ScratchModel
from wmtp.plugins import load_plugins
from wmtp.plugins.contract import StorageBackendConfig
from wmtp.storage import Storage
from wmtp.storage.config import FileStorage
from wmtp.tokenizers.config import Bytes


@attrs.frozen(kw_only=True)
class Archive(StorageBackendConfig):
    type = "archive"
    schemes = ("archive", "tar")
    level: int = 1
    name: str | None = None

    def check(self):
        return ["level: too high"] if self.level > 9 else []

    def build(self):
        return ArchiveStorage(self.level)


class ArchiveStorage(Storage):
    def __init__(self, level):
        self.level = level

    def exists(self, uri):
        return False

    def localize(self, uri, cache_dir):
        raise NotImplementedError

    def push(self, path, uri):
        raise NotImplementedError


REGISTRY = load_plugins().with_classes([("storages", Archive)])


def read(table):
    return make_converter(REGISTRY).structure(table, StorageConfig)


def problems(table):
    with pytest.raises(Problems) as raised:
        read(table)
    return {".".join(map(str, problem.path)): problem.message for problem in raised.value.problems}


def test_a_table_is_read_by_its_backends_class():
    config = read({"cache_dir": "/c", "archive": {"level": 3}})
    assert config == StorageConfig(cache_dir="/c", backends=(Archive(level=3),))
    assert read({"archive": {"type": "archive", "level": 3}}) == read({"archive": {"level": 3}})
    assert read({}) == StorageConfig()


def test_what_is_wrong_is_said_at_its_key():
    assert problems({"cache_dir": 3, "archive": {"levl": 3, "name": 1}, "archiv": {}}).keys() == {
        *("cache_dir", "archive.levl", "archive.name", "archiv"),
    }
    assert "did you mean 'archive'" in problems({"archiv": {}})["archiv"]
    assert "remove this line" in problems({"archive": {"type": "file"}})["archive.type"]
    assert problems({"archive": 3}) == {"archive": "must be a table, not 3"}


def test_two_configs_of_one_backend_are_refused():
    with pytest.raises(ValueError, match="archive"):
        StorageConfig(backends=(Archive(), Archive(level=2)))


@pytest.fixture
def config(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    return Config(
        models={"base": ModelConfig(loader=ScratchModel(vocab_size=258))},
        tokenizer=Bytes(),
        datasets={"text": TextFiles(uri=str(tmp_path / "a.txt"))},
        trainer=load_plugins().find("trainers", "baseline-mtp").cls(),
        storage=StorageConfig(backends=(Archive(level=4, name="${x}"), FileStorage())),
    )


def test_a_dumped_config_reads_back(config):
    text = dump_config(config)
    assert "[storage.archive]\nlevel = 4" in text
    assert flatten(config)["storage.archive.level"] == "4"
    read_back = make_converter(REGISTRY).structure(tomllib.loads(text.replace("$$", "$")), Config)
    assert read_back.storage == config.storage


def test_backends_are_components_with_their_own_rules(config):
    placed = {placed.path: placed.kind for placed in components(config)}
    assert placed["storage", "archive"] == "storages"
    wrong = evolve(config, storage=StorageConfig(backends=(Archive(level=10),)))
    with pytest.raises(ConfigError, match=r"storage\.archive\.level: too high"):
        check(wrong)


def test_backends_are_built_with_their_options():
    backends = build_backends(StorageConfig(backends=(Archive(level=7),)), REGISTRY)
    assert backends["archive"].level == 7
    assert backends["tar"] is backends["archive"]
    assert build_backends(StorageConfig(), REGISTRY)["tar"].level == 1
    assert {"file", "package"} <= build_backends(StorageConfig()).keys()


def test_a_missing_backend_names_its_package(tmp_path, monkeypatch):
    monkeypatch.setenv("WMTP_PLUGINS", "")
    path = tmp_path / "c.toml"
    path.write_text("[storage.s3]\nacceleration = true\n")
    with pytest.raises(ConfigError, match=r"c\.toml:1: storage\.s3: unknown key.*wmtp-storage|WMTP_PLUGINS leaves out"):
        load_config(path)
