"""A server on 127.0.0.1 that speaks as much of the Hugging Face hub's API as huggingface_hub needs here, and its faults."""

import base64
import contextlib
import hashlib
import json
import threading
from urllib.parse import unquote, urlsplit

from small_server import Answers, Server

__all__ = ["FakeHub"]

TOKEN = "hf_" + "write" * 8


class FakeHub:
    """Repositories in memory. ``repos["models/org/name"][commit] = {path: content}``; ``refs`` has the branches' commits.

    ``fault(handler)`` may answer a request in place of the server, and then returns true. ``requests`` has what was asked.
    """

    def __init__(self):
        self.repos, self.refs, self.gated, self.renamed, self.private = {}, {}, set(), {}, {}
        self.denied = set()  # gated, and the token's user is not on the list
        self.fault = lambda handler: False
        self.requests, self.large = [], {}
        self.needs_token = set()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = Server(Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True, kwargs={"poll_interval": 0.02}).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def put(self, repo, files, branch="main"):
        """Commit the whole content of a branch; returns the commit."""
        content = json.dumps({name: hashlib.sha1(data).hexdigest() for name, data in sorted(files.items())})
        commit = hashlib.sha1(f"{repo}{content}{len(self.repos.get(repo, {}))}".encode()).hexdigest()
        self.repos.setdefault(repo, {})[commit] = dict(files)
        self.refs.setdefault(repo, {})[branch] = commit
        return commit

    def files(self, repo, branch="main"):
        return self.repos[repo][self.refs[repo][branch]]

    def asked(self, part=""):
        return [line for line in self.requests if part in line]

    def environment(self, home):
        """Variables for a process that uses this hub, with a cache of its own."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


class _Handler(Answers):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def answer(self, status, content=b"", headers=()):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        if "Content-Length" not in dict(headers):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def error(self, status, code, text):
        self.answer(status, {"error": text}, {"X-Error-Code": code, "X-Error-Message": text})

    def _any(self):
        self.parts = urlsplit(self.path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {self.path}")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if not self.hub.fault(self):
                self._serve([unquote(word) for word in self.parts.path.strip("/").split("/")])

    do_GET = do_HEAD = do_POST = do_PUT = _any

    @property
    def has_token(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _serve(self, words):
        if words[:2] == ["api", "whoami-v2"]:
            if not self.has_token:
                return self.error(401, "", "Invalid username or password.")
            return self.answer(200, {"name": "ada", "auth": {"accessToken": {"role": "write"}}})
        if words[:2] == ["api", "validate-yaml"]:  # of a README.md
            return self.answer(200, {"errors": [], "warnings": []})
        if words[:3] == ["api", "repos", "create"]:
            return self._create(json.loads(self.body))
        if words[0] == "lfs":
            self.hub.large[words[1]] = self.body
            return self.answer(200)
        if words[0] == "api":
            return self._api(words[1], words[2:])
        kind = "models"
        if words[0] == "datasets":
            kind, words = "datasets", words[1:]
        if words[2:4] == ["info", "lfs"]:
            return self._lfs(json.loads(self.body))
        at = words.index("resolve")
        return self._file(f"{kind}/{'/'.join(words[:at])}", words[at + 1], "/".join(words[at + 2 :]))

    def _create(self, wanted):
        repo = f"{wanted.get('type', 'model')}s/{wanted.get('organization') or 'ada'}/{wanted['name']}"
        if not self.has_token:
            return self.error(401, "", "Invalid username or password.")
        if repo in self.hub.repos:
            return self.answer(409, {"error": "You already created this repo", "url": f"{self.hub.endpoint}/{repo}"})
        self.hub.private[repo] = wanted.get("private", wanted.get("visibility") == "private")
        self.hub.put(repo, {".gitattributes": b""})
        return self.answer(200, {"url": f"{self.hub.endpoint}/{repo.removeprefix('models/')}"})

    def _api(self, kind, words):
        verbs = ("revision", "tree", "preupload", "commit", "branch")
        at = next((i for i, word in enumerate(words) if i and word in verbs), len(words))
        repo, rest = f"{kind}/{'/'.join(words[:at])}", words[at:]
        if (new := self.hub.renamed.get(repo)) is not None:
            behind = "/".join(rest)
            query = f"?{self.parts.query}" if self.parts.query else ""
            return self.answer(307, b"", {"Location": f"/api/{new}{'/' if behind else ''}{behind}{query}"})
        if repo not in self.hub.repos or (repo in self.hub.needs_token and not self.has_token):
            return self.error(404 if self.has_token else 401, "RepoNotFound" if self.has_token else "", "Repository not found")
        revision = rest[1] if len(rest) > 1 else "main"
        commit = self.hub.refs[repo].get(revision, revision)
        if rest[:1] == ["branch"]:
            self.hub.refs[repo].setdefault(revision, self.hub.refs[repo]["main"])
            return self.answer(200, {})
        if commit not in self.hub.repos[repo]:
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = self.hub.repos[repo][commit]
        if rest[:1] == ["tree"]:
            return self.answer(200, [{"type": "file", "path": n, "size": len(d), "oid": _oid(d)} for n, d in files.items()])
        if rest[:1] == ["preupload"]:
            names = [file["path"] for file in json.loads(self.body)["files"]]
            mode = lambda name: "lfs" if name.endswith(".safetensors") else "regular"
            return self.answer(200, {"files": [{"path": n, "uploadMode": mode(n), "shouldIgnore": False} for n in names]})
        if rest[:1] == ["commit"]:
            return self._commit(repo, revision, dict(files))
        siblings = [{"rfilename": n, "size": len(d), "blobId": _oid(d)} for n, d in files.items()]
        facts = {
            "id": repo.partition("/")[2],
            "sha": commit,
            "siblings": siblings,
            "private": False,
            "tags": [],
            "downloads": 0,
        }
        return self.answer(200, facts)

    def _commit(self, repo, branch, files):
        if not self.has_token:
            return self.error(403, "", "You have no right to write")
        for line in self.body.decode().splitlines():
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.large[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        commit = self.hub.put(repo, files, branch)
        return self.answer(
            200, {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{commit}"}
        )

    def _lfs(self, wanted):
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{each['oid']}"}}} for each in wanted["objects"]
        ]
        content_type = {"Content-Type": "application/vnd.git-lfs+json"}
        return self.answer(200, {"transfer": "basic", "objects": objects}, content_type)

    def _file(self, repo, revision, name):
        repo = self.hub.renamed.get(repo, repo)
        if repo in self.hub.gated and not self.has_token:
            return self.error(401, "GatedRepo", "Access to this repository is restricted")
        if repo in self.hub.denied:
            return self.error(403, "GatedRepo", "Your request to access this repository awaits a review")
        content = self.hub.repos[repo][self.hub.refs[repo].get(revision, revision)].get(name)
        if content is None:
            return self.error(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": revision, "ETag": f'"{_oid(content)}"', "Accept-Ranges": "bytes"}
        begin = int(self.headers.get("Range", "bytes=0-")[6:].partition("-")[0])
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        return self.answer(206 if begin else 200, content[begin:], headers | {"Content-Length": str(len(content) - begin)})


def _oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
