"""A server on 127.0.0.1 that plays VESSL's API, with faults on demand, and a recipe that would be launched on it."""

import json
import socket
import sys
import threading
import time
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from small_server import Answers

DIGEST = "sha256:" + "0123456789abcdef" * 4

RECIPE = """
[run]
name = "first"
tags = ["test"]
[models.base]
type = "hf"
uri = "s3://wmtp/models/llama"
[datasets.code]
type = "jsonl"
uri = "s3://wmtp/datasets/code.jsonl"
[trainer]
type = "baseline-mtp"
[checkpoints]
uri = "s3://wmtp/checkpoints"
"""

LAUNCHER = f"""
[launcher]
type = "vessl"
cluster = "seoul"
preset = "a100-4"
gpus = 4
image = "registry.example/wmtp@{DIGEST}"
poll_interval = 0.02
[launcher.env]
NCCL_DEBUG = "WARN"
TOKENIZERS_PARALLELISM = false
[launcher.secrets]
AWS_ACCESS_KEY_ID = "aws-id"
AWS_SECRET_ACCESS_KEY = "aws-key"
"""


class Api:
    """The state of the service.

    Attributes:
        runs: id → what a GET gives.
        logs: id → lines, as (timestamp, message).
        faults: (method, end of the path, what happens), each used once: a status with headers and body; ``"cut"``: half an
            answer; ``"slow"``: none; ``"lost"``: done, but the answer is lost.
        newest: whether a full page of a log has the newest lines or the oldest.
    """

    token = "vessl-token-4711"

    def __init__(self):
        self.runs, self.logs, self.bodies, self.requests, self.faults = {}, {}, [], [], []
        self.newest = True
        self.page = 1000
        self.validator = {"validated": True, "form_errors": {}}
        self.on_log = lambda run: None
        self.lock = threading.Lock()

    def fault(self, method, end, what, times=1):
        self.faults += [(method, end, what)] * times

    def answer(self, method, path, query, body):
        parts = [unquote(part) for part in path.removeprefix("/api/v1/").split("/")]
        match method, parts:
            case "GET", ["accounts", "me"]:
                return 200, {"username": "me", "organizations": [{"name": "lab"}, {"name": "other"}]}
            case _, ["organizations", organization, *_] if organization not in ("lab", "other"):
                return 404, {"code": "NotFound", "message": f"Organization {organization} not found."}
            case "GET", ["organizations", organization]:
                return 200, {"id": 1, "name": organization}
            case "GET", ["organizations", _, "projects", "mtp"]:
                return 200, {"id": 2, "name": "mtp"}
            case "GET", ["organizations", _, "projects"]:
                return 200, {"results": [{"name": "mtp"}]}
            case "GET", ["organizations", _, "clusters"]:
                return 200, {"clusters": [{"name": "seoul", "id": 7}, {"name": "oregon", "id": 8}]}
            case "GET", ["organizations", _, "clusters", _, "resource_specs"]:
                specs = [("a100-1", 1), ("a100-4", 4), ("cpu", 0)]
                return 200, {"results": [{"name": n, "gpu_limit": g, "gpu_type": "A100" if g else ""} for n, g in specs]}
            case "POST", ["organizations", _, "run", "spec", "sync_yaml"]:
                return 200, self.validator
            case "POST", ["organizations", _, "projects", "mtp", "run", "spec", "create_from_yaml"]:
                spec = yaml.safe_load(body["yaml_spec"])
                number = 1000 + len(self.runs)
                tags = [{"id": 1, "name": tag} for tag in spec.get("tags", [])]
                self.runs[number] = {"id": number, "status": "queued", "tags": tags}
                self.bodies.append(body)
                return 200, {"run_execution": self.runs[number], "run_spec": {"title": spec["name"]}}
            case "GET", ["organizations", _, "projects", "mtp", "run_executions"]:
                wanted = query.get("statuses", [""])[0].split(",")
                return 200, {"results": [run for run in self.runs.values() if run["status"] in wanted]}
            case _, ["organizations", _, "projects", "mtp", "run_executions", run, *rest] if run in map(str, self.runs):
                return self.answer_run(method, int(run), rest, query)
        return 404, {"code": "NotFound", "message": f"Nothing is at {path}."}

    def answer_run(self, method, run, rest, query):
        match method, rest:
            case "GET", []:
                return 200, self.runs[run]
            case "POST", ["terminate"]:
                self.runs[run]["status"] = "terminated"
                return 200, self.runs[run]
            case "GET", ["logs"]:
                self.on_log(run)
                start, limit = float(query["log_start"][0]), int(query["log_limit"][0])
                end = float(query["log_end"][0]) if "log_end" in query else float("inf")
                limit = min(limit, self.page)
                lines = sorted((line for line in self.logs.get(run, []) if start <= line[0] <= end), key=lambda line: line[0])
                lines = lines[max(0, len(lines) - limit) :] if self.newest else lines[:limit]
                return 200, {"logs": [{"timestamp": t, "message": m, "stream": "stdout"} for t, m in lines]}
            case "GET", ["system_metrics"]:
                series = [{"timestamp": 10, "value": 3.0}, {"timestamp": 20, "value": 87.5}]
                return 200, {"metrics": {"gpu_util": {"label": "GPU 0 utilization", "unit": "%", "series": series}}}
        return 404, {"code": "NotFound", "message": "no such thing"}

    def take_fault(self, method, path):
        with self.lock:
            for index, (wanted, end, what) in enumerate(self.faults):
                if wanted == method and path.endswith(end):
                    del self.faults[index]
                    return what
        return None


class Handler(Answers):
    def handle_one(self):
        api, url = self.server.api, urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        api.requests.append((self.command, url.path))
        fault = api.take_fault(self.command, url.path)
        if fault == "slow":
            time.sleep(3)
            return None
        if fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"results": [')
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            return None
        if isinstance(fault, tuple):
            return self.send(*fault)
        if self.headers.get("Authorization") != f"Token {api.token}":
            return self.send(401, {}, {"code": "Unauthorized", "message": f"bad header {self.headers.get('Authorization')}"})
        status, answer = api.answer(self.command, url.path, parse_qs(url.query), body)
        if fault == "lost":
            return self.connection.shutdown(socket.SHUT_RDWR)
        return self.send(status, {}, answer)

    def send(self, status, headers, answer):
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = handle_one


VESSLCTL = f"""#!{sys.executable}
import json, os, pathlib, sys
state = pathlib.Path(os.environ["STUB_STATE"])
jobs = json.loads(state.read_text()) if state.exists() else []
with open(str(state) + ".calls", "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
words = sys.argv[1:]
if os.environ.get("STUB_FAILS"):
    sys.exit(os.environ["STUB_FAILS"])
if words[:2] == ["auth", "status"]:
    print("logged in")
elif words[:2] == ["resource-spec", "list"]:
    print(json.dumps([{{"slug": "a100x4"}}, {{"slug": "a100x1"}}]))
elif words[:2] == ["job", "create"]:
    name = words[words.index("--name") + 1]
    jobs.append({{"slug": f"job-{{len(jobs)}}", "name": name, "workloadState": "running", "argv": words, "log": []}})
    print("created")
elif words[:2] == ["job", "list"]:
    print(json.dumps(jobs))
elif words[:2] == ["job", "show"]:
    found = [job for job in jobs if job["slug"] == words[2]]
    print(json.dumps(found[0]) if found else sys.exit(f"Error: job {{words[2]}} not found"))
elif words[:2] == ["job", "logs"]:
    job = next(job for job in jobs if job["slug"] == words[-1])
    print("".join(line + "\\n" for line in job["log"]), end="")
    job["log"].append(f"line {{len(job['log'])}}")
    if len(job["log"]) > 5:
        job["log"].pop()
        job["workloadState"] = "succeeded" if job["workloadState"] == "running" else job["workloadState"]
elif words[:2] == ["job", "terminate"]:
    next(job for job in jobs if job["slug"] == words[2])["workloadState"] = "terminated"
state.write_text(json.dumps(jobs))
"""


class Files:
    """The two files of a launch."""

    def __init__(self, folder):
        self.folder = folder
        self.write()

    def write(self, launcher=LAUNCHER, recipe=RECIPE):
        Path(self.folder, "cluster.toml").write_text(launcher)
        Path(self.folder, "recipe.toml").write_text(recipe)

    def __iter__(self):
        return iter([str(self.folder / "cluster.toml"), str(self.folder / "recipe.toml")])
