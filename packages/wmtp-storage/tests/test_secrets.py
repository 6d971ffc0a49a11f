"""Canaries in every place of an address where a secret may stand: none is ever shown, and none is saved."""

import logging
import random
import socket
import string
import sys
import traceback

import pytest
from crossings import sampled
from small_server import Answers, serving

from wmtp.cli import main
from wmtp.errors import WMTPError
from wmtp.redaction import holds_credentials, redact
from wmtp_storage import HTTPStorage

#: command lines a seed: more for a soak
CASES = 20
KEYS = ("X-Goog-Signature", "X-Amz-Signature", "X-Amz-Security-Token", "key", "auth", "password", "sig", "se", "q", "token", "")
COMMANDS = ("fetch", "push", "check", "run", "eval", "report", "start", "export", "pull", "argv")


class Server(Answers):
    """Answers as the path says: with a status, with garbage, with half an answer, or with a file."""

    protocol_version = "HTTP/1.1"

    def answer(self):
        kind = self.path.partition("?")[0].strip("/").partition("/")[0]
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if kind == "reset":
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(int(kind) if kind.isdecimal() else 200)
        body = f"<html><title>{self.path}</title></html>".encode() if kind in ("403", "500") else b"<html>12345"
        self.send_header("Content-Length", str(len(body) + (100 if kind == "short" else 0)))
        self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
        if kind == "301":
            self.send_header("Location", f"http://127.0.0.1:1{self.path}")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        if kind == "short":
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_DELETE = do_PROPFIND = do_POST = do_MKCOL = do_COPY = answer


@pytest.fixture
def server(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    with serving(Server) as made:
        made.handle_error = lambda *_: None
        yield f"127.0.0.1:{made.server_port}"


def an_address(draw, host, canary):
    """An address with the canary in one of its places."""
    scheme = draw.choice(["http"] * 6 + ["https", "s3", "gs", "postgresql", "ftp"])
    authority = host if scheme in ("http", "https") and draw.random() < 0.8 else "bucket"
    kind = draw.choice(["404", "403", "500", "301", "garbage", "short", "reset", "200"])
    path = f"{kind}/{draw.choice(['m', 'a b', 'x.toml', 'model.safetensors'])}"
    place = draw.choice(["query", "query", "query", "later", "user", "password", "slash", "at", "fragment"])
    key = draw.choice(KEYS)
    before, after = {
        "query": ("", f"?{key}={canary}"),
        "later": ("", f"?version=3&{key}={canary}&x=1"),
        "user": (f"{canary}:x@", ""),
        "password": (f"me:{canary}@", ""),
        "slash": (f"me:pa/{canary}@", ""),
        "at": (f"me:p@{canary}@", ""),
        "fragment": ("", f"#{key or 'x'}={canary}"),
    }[place]
    return f"{scheme}://{before}{authority}/{path}{after}"


def words_for(draw, command, uri, folder):
    """A command line that is given the address, wherever it takes one."""
    recipe, target = folder / "recipe.toml", folder / "out"
    key = draw.choice(
        ["datasets.code.uri", "tracker.tracking_uri", "checkpoints.uri", "models.base.uri", "run.name", "run.tags"]
    )
    sets = ["--set", f"{key}={uri}" if key != "run.tags" else f"run.tags=['{uri}']", "--set", "storage.http.retry_timeout=0"]
    return {
        "fetch": ["fetch", uri, target, "--set", "storage.http.retry_timeout=0"],
        "push": ["push", folder / "recipe.toml", uri, "--set", "storage.http.retry_timeout=0"],
        "check": ["check", recipe, *sets],
        "run": ["run", recipe, *sets],
        "start": ["start", recipe, "--dry-run", *sets],
        "eval": ["eval", uri, "--set", "storage.http.retry_timeout=0"],
        "report": ["report", uri, "--set", "storage.http.retry_timeout=0"],
        "export": ["export", uri, target, "--format", "hf", "--set", "storage.http.retry_timeout=0"],
        "pull": ["runs", "pull", uri, "--set", "storage.http.retry_timeout=0"],
        "argv": ["run", recipe, "--tags", uri],
    }[command]


@pytest.fixture
def work(tmp_path, monkeypatch):
    (tmp_path / "code.jsonl").write_text('{"text": "x = 1"}\n' * 4)
    (tmp_path / "recipe.toml").write_text(
        f'[run]\noutput_dir = "{tmp_path}/runs"\n[models.base]\ntype = "scratch"\nvocab_size = 258\nhidden_size = 16\nlayers = '
        "1\nattention_heads = 2\nintermediate_size = 16\nmax_positions = 32\n[models.base.heads]\nhorizon = 2\n[tokenizer]\n"
        f'type = "bytes"\n[datasets.code]\ntype = "jsonl"\nuri = "{tmp_path}/code.jsonl"\n[data.train]\nmax_length = 16\n'
        'batch_size = 2\n[trainer]\ntype = "baseline-mtp"\n[optimizer]\ntype = "adamw"\nlr = 1e-3\n[train]\nmax_steps = 1\n'
        '[tracker]\ntype = "jsonl"\n'
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def leaks(canary, texts, folder):
    found = [text for text in texts if canary in text]
    return found + [
        str(path)
        for path in folder.rglob("*")
        if path.is_file() and path.name != "recipe.toml" and canary.encode() in path.read_bytes()
    ]


@pytest.mark.parametrize("seed", sampled(range(8), 8))
def test_no_command_shows_or_saves_a_canary(server, work, capfd, monkeypatch, seed):
    draw = random.Random(26 + seed)
    codes = []
    for number in range(CASES):
        canary = "".join(draw.choices(string.ascii_letters, k=14))
        uri = an_address(draw, server, canary)
        words = [str(word) for word in words_for(draw, COMMANDS[number % len(COMMANDS)], uri, work)]
        words += draw.choice([["--debug"], ["--debug", "--verbose"], ["--json", "--debug"], []])
        if "s3://" in uri or "gs://" in uri:  # nobody waits for Amazon here
            words = ["check", str(work / "recipe.toml"), "--set", f"datasets.code.uri={uri}", "--debug"]
        monkeypatch.setattr(sys, "argv", ["wmtp", *words])
        codes.append(main(words))
        out, err = capfd.readouterr()
        assert not leaks(canary, [out, err], work), f"{number}: {words}\n{out}\n{err}"
    assert len(set(codes)) > 1, "all of them ended alike"


def test_no_exception_of_the_library_holds_a_canary(server, tmp_path, caplog):
    """Who catches one may log it, with all that led to it."""
    caplog.set_level(logging.DEBUG, "wmtp")
    (tmp_path / "x").write_text("x")
    failed = 0
    for kind in ("404", "403", "500", "301", "garbage", "short", "reset"):
        for key in KEYS:
            canary = "".join(random.Random(f"{kind}{key}").choices(string.ascii_letters, k=14))
            uri = f"http://{server}/{kind}/m?{key}={canary}"
            back = HTTPStorage(retry_timeout=0).build()
            acts = {
                "fetch": (uri, tmp_path / "out"),
                "exists": (uri,),
                "files": (uri,),
                "push": (tmp_path / "x", uri),
                "remove": (uri,),
            }
            for name, arguments in acts.items():
                try:
                    found = getattr(back, name)(*arguments)
                    list(found if name == "files" else ())
                except WMTPError:
                    failed += 1
                    assert canary not in traceback.format_exc(), uri
            assert canary not in caplog.text
            caplog.clear()
    assert failed > 100


def test_what_is_redacted_holds_nothing():
    """Whatever the address: what is shown has no canary, what is shown of that is the same, and the config refuses it."""
    for seed in range(300):
        draw = random.Random(seed)
        canary = "".join(draw.choices(string.ascii_letters, k=14))
        uri = an_address(draw, "host:8080", canary)
        for text in (uri, f"could not read {uri}", f'url: "{uri}", again', f"({uri}); go on", f"<{uri}>"):
            shown = redact(text)
            assert canary not in shown, text
            assert redact(shown) == shown
        assert holds_credentials(uri), uri
