"""The storage backend for the Hugging Face hub, against a server of its own."""

import logging
import shutil
import struct
import time

import huggingface_hub
import pytest
from hub_server import TOKEN, FakeHub
from huggingface_hub import constants
from tiny_recipe import tiny_recipe

import wmtp
from wmtp.errors import ConfigError, WMTPError
from wmtp.storage.config import HubStorage
from wmtp.storage.hub import failures
from wmtp.storage.hub.choose import chosen_files
from wmtp.storage.hub.names import HubName, cached_snapshot, parse_hub_uri, plain_name
from wmtp.testing import StorageTests

MODEL = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "model.safetensors": b"s" * 300_000,
    "pytorch_model.bin": b"b" * 300_000,
    "model.fp16.safetensors": b"h" * 1000,
    "tokenizer.json": b"{}",
    "README.md": b"# words",
    "modeling_own.py": b"raise SystemExit",
    "onnx/model.onnx": b"o" * 1000,
    ".gitattributes": b"",
}
CHOSEN = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub, found by huggingface_hub in this process; no token, an empty cache, and no long waits."""
    with_hub = FakeHub()
    monkeypatch.setattr(constants, "ENDPOINT", with_hub.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", with_hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf/hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf/token"))
    monkeypatch.setattr(failures, "_WAITS", (0.01, 0.01, 0.01))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield with_hub
    huggingface_hub.close_session()
    with_hub.close()


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def storage(hub):
    return HubStorage().build()


class TestHubSuite(StorageTests):
    config = HubStorage()

    @pytest.fixture
    def storage(self, hub, token):
        return HubStorage().build()

    @pytest.fixture
    def root(self):
        return "hf://ada/place"


# --- names


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("hf://org/name", HubName(repo="org/name")),
        ("hf://models/org/name", HubName(repo="org/name")),
        ("hf://gpt2", HubName(repo="gpt2")),
        ("hf://gpt2@v1/sub/a", HubName(repo="gpt2", revision="v1", path="sub/a")),
        ("hf://datasets/org/name", HubName(kind="datasets", repo="org/name")),
        ("hf://datasets/squad", HubName(kind="datasets", repo="squad")),
        ("hf://org/name@v1.0/a/b.gguf", HubName(repo="org/name", revision="v1.0", path="a/b.gguf")),
        ("hf://org/name@refs/pr/3/a", HubName(repo="org/name", revision="refs/pr/3", path="a")),
        ("hf://org/name@feature%2Fx", HubName(repo="org/name", revision="feature/x")),
        ("hf://org/name/model/", HubName(repo="org/name", path="model")),
    ],
)
def test_uris(uri, name):
    assert parse_hub_uri(uri) == name
    assert parse_hub_uri(name.uri) == name


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("hf://", "no name of the Hugging Face hub"),
        ("hf://org/na me", "no name of the Hugging Face hub"),
        ("hf://org/-x", "no name of the Hugging Face hub"),
        ("hf://org/a--b", "no name of the Hugging Face hub"),
        ("hf://org/name@", "names no revision"),
        ("hf://org/name/a@v1", "write hf://org/name@v1/a"),
        ("hf://org/name/../other", "leaves the repository"),
        ("hf://spaces/org/name", "spaces of the hub hold no model"),
    ],
)
def test_bad_uris(uri, says):
    with pytest.raises(ConfigError, match=says):
        parse_hub_uri(uri)


@pytest.mark.parametrize("text", ["Qwen/Qwen2.5-0.5B", "org/name@main", "meta-llama/Llama-3.1-8B", "models/x"])
def test_plain_names(text):
    assert plain_name(text).uri == f"hf://{text}"


@pytest.mark.parametrize(
    "text", ["./org/name", "/org/name", "~/x", "org", "a/b/c", "data/x.jsonl", "m/x.GGUF", "a b/c", "../a"]
)
def test_paths_are_no_names(text):
    assert plain_name(text) is None


# --- which files


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (MODEL, CHOSEN),
        (
            "config.json model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.safetensors.index.json "
            "consolidated.safetensors pytorch_model-00001-of-00001.bin pytorch_model.bin.index.json mtp_heads.safetensors",
            "config.json model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.safetensors.index.json "
            "mtp_heads.safetensors",
        ),
        (
            "config.json pytorch_model.bin training_args.bin tf_model.h5 flax_model.msgpack",
            "config.json pytorch_model.bin",
        ),
        ("params.json consolidated.00.pth tokenizer.model", "params.json consolidated.00.pth tokenizer.model"),
        (
            "config.json model.safetensors original/consolidated.00.pth chat_template.jinja additional_chat_templates/a.jinja",
            "config.json model.safetensors chat_template.jinja additional_chat_templates/a.jinja",
        ),
        ("README.md tiny-Q8_0.gguf", "tiny-Q8_0.gguf"),
        ("config.json model.safetensors model-Q8_0.gguf", "config.json model.safetensors"),
    ],
)
def test_a_model_comes_once(names, wanted):
    names, wanted = (words.split() if isinstance(words, str) else words for words in (names, wanted))
    assert set(chosen_files(HubName(repo="a/b"), list(names))) == set(wanted)


def test_one_of_several_gguf_files_is_to_be_named():
    with pytest.raises(ConfigError, match=r"holds 2 GGUF files.*hf://a/b@v1/m-Q4\.gguf"):
        chosen_files(HubName(repo="a/b", revision="v1"), ["m-Q4.gguf", "m-Q8.gguf", "config.json"])
    assert chosen_files(HubName(repo="a/b", path="m-Q8.gguf"), ["m-Q4.gguf", "m-Q8.gguf"]) == ["m-Q8.gguf"]


def test_a_data_set_comes_without_its_page_and_its_code():
    names = ["README.md", "squad.py", "data/train-00000-of-00001.parquet", "a.jsonl.gz", ".gitattributes", "figure.png"]
    assert chosen_files(HubName(kind="datasets", repo="a/b"), names) == ["a.jsonl.gz", "data/train-00000-of-00001.parquet"]


# --- fetching


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_model_is_fetched_into_the_hubs_own_cache_and_not_again(hub, storage, tmp_path):
    commit = hub.put("models/org/name", MODEL)
    path = storage.localize("hf://org/name", tmp_path / "cache")
    assert path == tmp_path / f"hf/hub/models--org--name/snapshots/{commit}"
    assert files_of(path) == CHOSEN
    assert (path / "model.safetensors").read_bytes() == MODEL["model.safetensors"]
    hub.requests.clear()
    again = HubStorage().build().localize(f"hf://org/name@{commit}", tmp_path / "cache")
    assert again == path
    assert hub.requests == []


def test_a_revision_is_pinned(hub, storage, tmp_path):
    old = hub.put("models/org/name", MODEL)
    new = hub.put("models/org/name", MODEL | {"config.json": b"{}"}, branch="v2")
    assert storage.pinned("hf://org/name") == f"hf://org/name@{old}"
    assert storage.pinned("hf://org/name@v2/config.json") == f"hf://org/name@{new}/config.json"
    hub.requests.clear()
    assert storage.pinned(f"hf://org/name@{old}") == f"hf://org/name@{old}"
    assert hub.requests == []
    assert (storage.localize(f"hf://org/name@{new}", tmp_path) / "config.json").read_bytes() == b"{}"
    assert (storage.localize(f"hf://org/name@{old}", tmp_path) / "config.json").read_bytes() == MODEL["config.json"]


def test_a_folder_and_a_file_inside(hub, storage, tmp_path):
    hub.put("datasets/org/data", {"main/train.jsonl": b"{}\n", "main/test.jsonl": b"{}\n", "other/x.jsonl": b""})
    assert files_of(storage.localize("hf://datasets/org/data/main", tmp_path)) == {"train.jsonl", "test.jsonl"}
    assert storage.localize("hf://datasets/org/data/main/test.jsonl", tmp_path).read_bytes() == b"{}\n"
    with pytest.raises(ConfigError, match=r"no 'mian'; at the top are main, other"):
        storage.localize("hf://datasets/org/data/mian", tmp_path)


def test_a_renamed_model_is_named_and_fetched(hub, storage, tmp_path, caplog):
    hub.put("models/org/new", MODEL)
    hub.renamed["models/org/old"] = "models/org/new"
    with caplog.at_level(logging.WARNING, "wmtp"):
        assert "models--org--new" in str(storage.localize("hf://org/old", tmp_path))
    assert "the hub has it as org/new now" in caplog.text
    assert storage.pinned("hf://org/old").startswith("hf://org/new@")


# --- faults


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("hf://org/none", r"no such model on http://127.*hf auth login, or set HF_TOKEN"),
        ("hf://datasets/org/none", "no such data set"),
        ("hf://org/name@v9", r"no revision 'v9'; see http://127.*/org/name/tree/main"),
        ("hf://org/gated", r"gated: ask for access on http://127.*/org/gated; then log in: hf auth login"),
    ],
)
def test_what_is_not_there_or_not_allowed_is_the_users_to_put_right(hub, storage, tmp_path, uri, says):
    hub.put("models/org/name", MODEL)
    hub.put("models/org/gated", MODEL)
    hub.gated.add("models/org/gated")
    with pytest.raises(ConfigError, match=says):
        storage.localize(uri, tmp_path)


def test_a_private_model_is_told_apart_by_the_token(hub, storage, tmp_path, monkeypatch):
    hub.put("models/org/mine", MODEL)
    hub.needs_token.add("models/org/mine")
    with pytest.raises(ConfigError, match="if it is private, or gated, log in"):
        storage.localize("hf://org/mine", tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert files_of(storage.localize("hf://org/mine", tmp_path)) == CHOSEN


def test_a_gated_model_that_the_token_may_not_read_is_told_by_its_403(hub, storage, tmp_path, monkeypatch):
    hub.put("models/org/gated", MODEL)
    hub.gated.add("models/org/gated")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert files_of(storage.localize("hf://org/gated", tmp_path)) == CHOSEN
    hub.put("models/org/gated", {**MODEL, "config.json": b'{"a": 2}'})
    hub.denied.add("models/org/gated")
    with pytest.raises(ConfigError) as caught:
        storage.localize("hf://org/gated", tmp_path)
    assert "this model is gated: ask for access on http://127" in str(caught.value)
    assert "your token is not on its list; if you have access, let the token read gated repositories" in str(caught.value)


def test_a_busy_hub_is_waited_for_and_then_told(hub, storage, tmp_path, caplog):
    hub.put("models/org/name", MODEL)
    times = iter(range(3))

    def busy(handler):
        if "/api/" in handler.path and next(times, None) is not None:
            handler.answer(429, {"error": "slow down"}, {"Retry-After": "3"})
            return True
        return False

    hub.fault = busy
    with caplog.at_level(logging.INFO, "wmtp"):
        storage.localize("hf://org/name", tmp_path)
    assert caplog.text.count("the hub limits the rate of requests (429); trying again in 3 s") == 3
    hub.fault = lambda handler: handler.answer(429, {"error": "slow down"}) or True
    with pytest.raises(WMTPError, match=r"limits the rate of requests \(429\); wait some minutes, or log in"):
        HubStorage().build().pinned("hf://org/name")


def cut(handler, content, after):
    """Answer with less than was promised."""
    handler.send_response(200)
    for name, value in {
        "Content-Length": str(len(content)),
        "X-Repo-Commit": handler.path.split("/")[4],
        "ETag": '"e"',
    }.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(content[:after])
    handler.wfile.flush()
    handler.connection.setsockopt(1, 13, struct.pack("ii", 1, 0))  # SO_LINGER: reset
    handler.close_connection = True


def test_a_download_that_breaks_off_goes_on_where_it_was(hub, storage, tmp_path):
    hub.put("models/org/name", MODEL)
    done = []

    def breaks(handler):
        if handler.command == "GET" and handler.path.endswith("model.safetensors") and not done:
            done.append(handler.path)
            cut(handler, MODEL["model.safetensors"], 100_000)
            return True
        return False

    hub.fault = breaks
    path = storage.localize("hf://org/name", tmp_path)
    assert done
    assert (path / "model.safetensors").read_bytes() == MODEL["model.safetensors"]


def test_a_hub_that_goes_away_in_the_middle_is_told_and_whole_files_are_kept(hub, storage, tmp_path):
    commit = hub.put("models/org/name", MODEL)
    hub.fault = lambda handler: (
        "model.safetensors" in handler.path and handler.command == "GET" and (cut(handler, b"x" * 300_000, 5) or True)
    )
    with pytest.raises(WMTPError, match=r"hub at http://127.*run it again.*whole files are kept"):
        storage.localize("hf://org/name", tmp_path)
    hub.fault = lambda handler: False
    snapshot = tmp_path / f"hf/hub/models--org--name/snapshots/{commit}"
    kept = files_of(snapshot)
    assert "model.safetensors" not in kept
    hub.requests.clear()
    HubStorage().build().localize("hf://org/name", tmp_path)
    fetched = {line.rpartition("/")[2] for line in hub.asked("GET /org/name/resolve/")}
    assert fetched == CHOSEN - kept


def test_a_file_that_ends_early_is_never_taken_for_whole(hub, storage, tmp_path):
    hub.put("models/org/name", MODEL)

    def short(handler):
        if handler.command == "GET" and handler.path.endswith("model.safetensors"):
            handler.answer(200, b"s" * 1000, {"X-Repo-Commit": handler.path.split("/")[4], "ETag": '"e"'})
            return True
        return False

    hub.fault = short
    with pytest.raises(WMTPError, match=r"model.safetensors|size 300000"):
        storage.localize("hf://org/name", tmp_path)
    hub.fault = lambda handler: False
    path = storage.localize("hf://org/name", tmp_path)
    assert (path / "model.safetensors").stat().st_size == 300_000


def test_a_damaged_cache_is_named(hub, storage, tmp_path):
    hub.put("models/org/name", MODEL)
    path = storage.localize("hf://org/name", tmp_path)
    blob = (path / "config.json").resolve()
    blob.write_bytes(b"{")
    with pytest.raises(WMTPError, match=r"config.json has 1 bytes in place of 23: remove it"):
        HubStorage().build().localize("hf://org/name", tmp_path)


def test_without_a_hub_the_cache_serves_and_says_so(hub, storage, tmp_path, caplog):
    hub.put("models/org/name", MODEL)
    path = storage.localize("hf://org/name", tmp_path)
    hub.fault = lambda handler: handler.answer(503, b"") or True
    with caplog.at_level(logging.WARNING, "wmtp"):
        assert HubStorage().build().localize("hf://org/name", tmp_path) == path
    assert "the hub cannot be reached; taking the cached revision" in caplog.text
    with pytest.raises(WMTPError, match=r"hf://org/other: the hub at http://127.*answers with 503"):
        HubStorage().build().localize("hf://org/other", tmp_path)


def test_offline_mode_asks_nobody(hub, storage, tmp_path, caplog, monkeypatch):
    hub.put("models/org/name", MODEL)
    path = storage.localize("hf://org/name", tmp_path)
    shutil.rmtree(tmp_path / "hf/hub/models--org--name/wmtp")  # as other programs leave the cache
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    with caplog.at_level(logging.WARNING, "wmtp"):
        assert HubStorage().build().localize("hf://org/name", tmp_path / "another") == path
    assert "HF_HUB_OFFLINE is set; taking what its cache holds" in caplog.text
    with pytest.raises(WMTPError, match=r"HF_HUB_OFFLINE is set; unset it, or.*hf download org/other"):
        HubStorage().build().localize("hf://org/other", tmp_path)
    assert hub.requests == []


# --- folders of the cache


def test_a_folder_of_the_cache_is_its_main_revision(hub, storage, tmp_path):
    commit = hub.put("models/org/name", MODEL)
    path = storage.localize("hf://org/name", tmp_path)
    folder = tmp_path / "hf/hub/models--org--name"
    assert cached_snapshot(folder) == cached_snapshot(folder / "snapshots") == path
    assert cached_snapshot(path) == path
    assert cached_snapshot(tmp_path) == tmp_path
    (folder / "snapshots/other").mkdir()
    assert cached_snapshot(folder) == path
    (folder / "refs/main").unlink()
    with pytest.raises(ConfigError, match=f"several revisions.*snapshots/{commit}"):
        cached_snapshot(folder)


# --- pushing


def test_a_push_makes_a_private_repository_and_replaces_a_folder_in_one_commit(hub, storage, token, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"w" * 5000)
    (folder / "config.json").write_text("{}")
    (folder / ".hidden").write_text("x")
    (tmp_path / "far").mkdir()
    (tmp_path / "far/card").write_text("x")
    (folder / "linked").symlink_to(tmp_path / "far")
    storage.push(folder, "hf://ada/mine")
    assert hub.private["models/ada/mine"] is True
    assert hub.files("models/ada/mine").keys() == {".gitattributes", "config.json", "linked/card", "model.safetensors"}
    (folder / "linked").unlink()
    (folder / "config.json").rename(folder / "params.json")
    hub.requests.clear()
    storage.push(folder, "hf://ada/mine")
    assert hub.files("models/ada/mine").keys() == {".gitattributes", "params.json", "model.safetensors"}
    assert len(hub.asked("/commit/main")) == 1
    storage.push(folder, "hf://ada/mine@next/sub")
    assert "sub/params.json" in hub.files("models/ada/mine", "next")
    assert "sub/params.json" not in hub.files("models/ada/mine")


@pytest.mark.parametrize("target", ["ada/mine", "ada/mine@next"])
def test_a_push_to_a_name_that_may_be_the_hubs_or_a_folders_is_refused(tmp_path, monkeypatch, target):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/a").touch()
    with pytest.raises(ConfigError, match=f"^'{target}' may be .* write hf://{target} .*, ./{target} for the folder$"):
        wmtp.push("model", target)
    with pytest.raises(ConfigError, match=f"^run.push_to: '{target}' may be the hub's or a folder here"):
        wmtp.check(tiny_recipe(run={"push_to": target}, datasets={"code": {"type": "python-source"}}))
    wmtp.push("model", f"./{target}")
    wmtp.push("model", "ada/other")  # whose folder is there
    assert (tmp_path / target / "a").exists()
    assert (tmp_path / "ada/other/a").exists()


def test_a_push_without_a_right_to_write_is_refused_before_and_then(hub, storage, tmp_path, monkeypatch):
    (tmp_path / "a").write_text("1")
    with pytest.raises(ConfigError, match="log in with a token that may write"):
        storage.check_push("hf://ada/mine")
    with pytest.raises(ConfigError, match="hub wants a login"):
        storage.push(tmp_path / "a", "hf://ada/mine")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    storage.check_push("hf://ada/mine")
