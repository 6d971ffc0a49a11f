"""Runs that were launched: status, logs, cancel, metrics, and a service that fails now and then."""

import json
import subprocess
import sys
import time
from email.utils import formatdate

import pytest
from small_server import Answers, serving

from wmtp.errors import AuthenticationError, PlatformError
from wmtp_vessl import client as clients
from wmtp_vessl.client import Client
from wmtp_vessl.credentials import Credentials


@pytest.fixture
def run(wmtp, files, api):
    """A run that was launched."""
    assert wmtp("launch", *files)[0] == 0
    api.requests.clear()
    return 1000


@pytest.mark.parametrize(
    ("word", "state"),
    [("queued", "waiting"), ("initializing", "waiting"), ("running", "running"), ("idle", "running"),
     ("waitToBeKilled", "running"), ("completed", "succeeded"), ("failed", "failed"), ("terminated", "cancelled")],
)  # fmt: skip
def test_status(wmtp, api, run, word, state):
    api.runs[run] |= {"status": word, "status_reason": "because"}
    code, out, _ = wmtp("status", "1000", "--json")
    answer = json.loads(out)
    assert code == 0
    assert (answer["state"], answer["word"], answer["reason"], answer["name"]) == (state, word, "because", "first")
    assert wmtp("status", "first")[1].splitlines()[0] == "run           1000"


def test_a_status_that_is_new_counts_as_running(wmtp, api, run):
    api.runs[run]["status"] = "hibernating"
    code, out, err = wmtp("status", "1000")
    assert code == 0
    assert "running (hibernating)" in out
    assert "not known here" in err


def test_a_run_that_nobody_knows(wmtp, files, api, run):
    code, _, err = wmtp("status", "77")
    assert code == 2
    assert "no run '77' was launched from this machine; the last one was 1000" in err
    code, _, err = wmtp("status", "77", "--config", files.folder / "cluster.toml")
    assert code == 2
    assert "VESSL has no run 77 in lab/mtp" in err
    assert wmtp("status", "1000", "--config", files.folder / "cluster.toml")[0] == 0


def test_logs(wmtp, api, run):
    api.logs[run] = [(float(i), f"line {i}") for i in range(2500)]
    assert wmtp("logs", "1000")[1].splitlines() == [f"line {i}" for i in range(2500)]
    assert wmtp("logs", "1000", "--tail", "3")[1].splitlines() == ["line 2497", "line 2498", "line 2499"]
    assert json.loads(wmtp("logs", "1000", "--tail", "1", "--json")[1]) == {"run": "1000", "lines": ["line 2499"]}
    assert wmtp("logs", "1000", "--tail", "-1")[0] == 2


FAULTS = [
    "cut", (503, {"Retry-After": "0"}, {}), (429, {"Retry-After": "0"}, {"message": "slow down"}), (500, {}, b"<html>"),
    (200, {}, b"not json"), "lost", (502, {}, {}),
]  # fmt: skip


@pytest.mark.parametrize("newest", [True, False])
def test_following_a_log_through_every_fault(wmtp, api, run, newest):
    """Lines appear while pages are cut, repeated and refused; some come late, some share time and text."""
    api.newest, api.page = newest, 7
    script = [[(float(i), f"line {i}"), (float(i), "same"), (float(i), "same")] for i in range(40)]
    script[20].append((15.0, "late"))
    faults = iter(FAULTS * 3)
    api.runs[run]["status"] = "queued"

    def on_log(_):
        if script:
            api.runs[run]["status"] = "running"
            api.logs.setdefault(run, []).extend(script.pop(0))
            if (fault := next(faults, None)) is not None:
                api.fault("GET", "/logs" if len(script) % 2 else "/1000", fault)
        else:
            api.runs[run]["status"] = "completed"

    api.on_log = on_log
    code, out, err = wmtp("logs", "1000", "--follow")
    assert code == 0, err
    expected = sorted([line for i in range(40) for line in (f"line {i}", "same", "same")] + ["late"])
    assert sorted(out.splitlines()) == expected
    numbers = [line for line in out.splitlines() if line.startswith("line")]
    assert numbers == [f"line {i}" for i in range(40)]


def test_a_service_that_is_gone_longer_than_a_request_is_repeated(wmtp, api, run):
    api.logs[run] = [(1.0, "before")]
    calls = []

    def on_log(_):
        calls.append(1)
        if len(calls) == 4:
            api.fault("GET", "/1000", (503, {"Retry-After": "0"}, {}), times=8)  # more than one request's attempts
            api.logs[run].append((2.0, "after"))
            api.runs[run]["status"] = "completed"

    api.on_log = on_log
    code, out, err = wmtp("logs", "1000", "--follow", "--tail", "1")
    assert code == 0
    assert out.splitlines() == ["before", "after"]
    assert "trying again" in err


def test_a_log_that_is_not_there_yet(wmtp, api, run):
    api.fault("GET", "/logs", (404, {}, {"message": "no log"}))
    assert wmtp("logs", "1000")[:2] == (0, "")


@pytest.mark.parametrize(("ends", "code"), [("completed", 0), ("failed", 1), ("terminated", 1)])
def test_watching_a_run(wmtp, files, api, ends, code):
    def on_log(run):
        api.runs[run]["status"] = ends
        api.logs[run] = [(1.0, "hello")]

    api.on_log = on_log
    done, out, err = wmtp("launch", *files, "--watch", "--json")
    assert done == code
    assert json.loads(out)["run"] == "1000"
    assert f"run 1000: {ends}" in err


def test_cancel(wmtp, api, run):
    assert wmtp("cancel", "1000")[:2] == (0, "run 1000: terminated\n")
    code, out, err = wmtp("cancel", "1000")
    assert (code, out) == (0, "")
    assert "over already" in err
    assert [r for r in api.requests if r[0] == "POST"] == [
        ("POST", "/api/v1/organizations/lab/projects/mtp/run_executions/1000/terminate")]  # fmt: skip


def test_metrics_of_the_service_and_of_the_run(wmtp, api, run):
    api.logs[run] = [
        (1.0, 'wmtp-sample {"gpu/0/utilization (%)": 12}'), (2.0, 'x wmtp-sample {"gpu/0/utilization (%)": 93.5}'),
        (3.0, "step 3"), (4.0, 'wmtp-sample {"gpu/0/uti')]  # fmt: skip
    code, out, _ = wmtp("metrics", "1000", "--json")
    assert code == 0
    assert json.loads(out) == {
        "run": "1000", "service": {"GPU 0 utilization (%)": 87.5}, "own": {"gpu/0/utilization (%)": 93.5}}  # fmt: skip
    assert "GPU 0 utilization (%)  87.5" in wmtp("metrics", "1000")[1]


def test_ctrl_c_ends_following_quietly(files, api, run):
    import os
    import signal

    process = subprocess.Popen(
        [sys.executable, "-m", "wmtp", "logs", "1000", "--follow"], env=os.environ, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True)  # fmt: skip
    api.logs[run] = [(1.0, "hello")]
    assert process.stdout.readline() == "hello\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err == "error: interrupted\n"
    assert api.runs[run]["status"] == "queued"  # only the watching ended


# the client alone


@pytest.fixture
def fault():
    """Faults of the server: none, unless a test names some."""


@pytest.fixture
def client(api, fault):
    """Gives up waiting for an answer soon only where none will come: a busy machine is late now and then."""
    return Client(Credentials.find(None, None), timeout=0.5 if fault == "slow" else 60, attempts=4, backoff=0.01)


@pytest.mark.parametrize(
    "fault", ["cut", "slow", "lost", (500, {}, {}), (503, {}, {}), (429, {}, {}), (200, {}, b"{"), (200, {}, b"[]")]
)
def test_a_get_is_repeated(api, client, fault):
    if fault in ((200, {}, b"{"), (200, {}, b"[]")):
        api.fault("GET", "/me", fault, times=3)
    else:
        api.fault("GET", "/me", fault, times=2)
    assert client.organizations() == ["lab", "other"]


@pytest.mark.parametrize("fault", ["cut", "slow", "lost", (500, {}, {"message": "oh"}), (200, {}, b"{")])
def test_and_in_the_end_given_up(api, client, fault):
    api.fault("GET", "/me", fault, times=4)
    with pytest.raises(PlatformError) as error:
        client.organizations()
    assert "\n" not in str(error.value)
    assert len(api.requests) == 4


@pytest.mark.parametrize("code", [400, 401, 403, 404, 409, 422, 418])
def test_an_answer_that_is_final_is_not_asked_for_again(api, client, code):
    api.fault("GET", "/me", (code, {}, {"code": "Nope", "message": "no"}))
    with pytest.raises(Exception, match="Nope"):
        client.organizations()
    assert len(api.requests) == 1


@pytest.mark.parametrize("fault", ["cut", "slow", "lost", (500, {}, {}), (429, {"Retry-After": "0"}, {}), (200, {}, b"{")])
def test_a_post_never_is(api, client, fault):
    api.runs[5] = {"id": 5, "status": "running"}
    api.fault("POST", "/terminate", fault)
    with pytest.raises(PlatformError):
        client.terminate("5")
    assert len(api.requests) == 1


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_waited_for(api, client, monkeypatch, form):
    waits = []
    monkeypatch.setattr(clients.time, "sleep", waits.append)
    value = "50" if form == "seconds" else formatdate(time.time() + 50, usegmt=True)
    api.fault("GET", "/me", (429, {"Retry-After": value}, {}))
    api.fault("GET", "/me", (503, {"Retry-After": "100000"}, {}))
    api.fault("GET", "/me", (503, {"Retry-After": "soon"}, {}))
    client.organizations()
    assert 5 < waits[0] <= 50
    assert waits[1] == 60
    assert waits[2] < 1


def test_a_redirect_is_not_followed(api, client):
    """The token would go to whoever is named there."""
    api.fault("GET", "/me", (302, {"Location": "http://127.0.0.1:9/"}, {}))
    with pytest.raises(PlatformError, match="302"):
        client.organizations()


def test_403_is_about_who_the_user_is(api, client):
    api.fault("GET", "/me", (403, {}, {"message": "read only"}))
    with pytest.raises(AuthenticationError, match="read only"):
        client.organizations()


def test_tls_is_verified(monkeypatch, tmp_path):
    """A server whose certificate nobody vouches for gets no token."""
    import ssl

    trustme = pytest.importorskip("trustme")
    heard = []

    class Handler(Answers):
        def do_GET(self):
            heard.append(self.headers.get("Authorization"))
            self.send_response(200)
            self.end_headers()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    monkeypatch.setenv("VESSL_ACCESS_TOKEN", "t")
    with serving(Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        monkeypatch.setenv("VESSL_API_HOST", f"https://127.0.0.1:{server.server_port}")
        client = Client(Credentials.find("lab", "mtp"), attempts=1)
        with pytest.raises(PlatformError, match="CERTIFICATE_VERIFY_FAILED"):
            client.organizations()
    assert heard == []
