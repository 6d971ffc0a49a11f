"""Speed of `wmtp fetch` beside other tools, on one S3 server.

A real server, all in one run, one after the other, medians.

    uv run python bench/fetch.py [--size MB] [--repeats N] [--cases NAME…] [--peers PYTHON…]

PYTHON names environments whose ``bin`` has peers: s5cmd, rclone, boto3 with the CRT, s3fs, hf_transfer. Those that are not
there are left out. A tool counts as failed where it ends with an error, or a file differs. The store knows the CRC-64/NVME of
each object, as Amazon's does of all that was uploaded since the end of 2024, or where a case says so only MD5s.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import trustme

from wmtp_storage.testing import S3Server, start_s3_server

MB = 2**20
LATENCY = 0.025  # seconds before an answer
CASES = {
    "plain": ("big", None, False),
    "plain, only MD5 known": ("md5", None, False),
    "plain, capped": ("big", 16 * MB, False),
    "plain, capped, one file": ("one", 16 * MB, False),
    "plain, capped, small files": ("small", 16 * MB, False),
    "TLS": ("big", None, True),
    "TLS, capped, one file": ("one", 16 * MB, True),
}

BOTO = """
import boto3, sys, os
from concurrent.futures import ThreadPoolExecutor
from boto3.s3.transfer import TransferConfig
endpoint, bucket, prefix, target, kind = sys.argv[1:]
s3 = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
config = TransferConfig(preferred_transfer_client=kind)
pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix + "/")
keys = [item["Key"] for page in pages for item in page["Contents"]]
def one(key):
    s3.download_file(bucket, key, os.path.join(target, key.removeprefix(prefix + "/")), Config=config)
with ThreadPoolExecutor(4 if kind == "classic" else 16) as pool:
    list(pool.map(one, keys))
"""
S3FS = """
import s3fs, sys
endpoint, bucket, prefix, target = sys.argv[1:]
files = s3fs.S3FileSystem(client_kwargs={"endpoint_url": endpoint, "region_name": "us-east-1"})
files.get(f"{bucket}/{prefix}/", target + "/", recursive=True)
"""
HF = """
import boto3, hf_transfer, os, sys
endpoint, bucket, prefix, target = sys.argv[1:]
s3 = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix + "/"):
    for item in page["Contents"]:
        url = s3.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": item["Key"]})
        hf_transfer.download(url, os.path.join(target, item["Key"].removeprefix(prefix + "/")), 16, 8 << 20, 3, 3)
"""
OBSTORE = """
import obstore, os, sys
from concurrent.futures import ThreadPoolExecutor
from obstore.store import S3Store
endpoint, bucket, prefix, target, ca = sys.argv[1:]
options = {"allow_http": True, "timeout": "1h"} | ({"root_certificate": open(ca, "rb").read()} if ca else {})
store = S3Store(bucket, endpoint=endpoint, region="us-east-1", client_options=options)
def one(key):
    with open(os.path.join(target, key.removeprefix(prefix + "/")), "wb") as file:
        for piece in obstore.get(store, key):
            file.write(piece)
with ThreadPoolExecutor(16) as pool:
    list(pool.map(one, [o["path"] for page in obstore.list(store, prefix=prefix) for o in page]))
"""


class SlowProxy:
    """Proxy that is slow by connection and answers late.

    S3 over a long line is like that.
    """

    def __init__(self, endpoint: str, rate: int) -> None:
        parts = urlsplit(endpoint)
        self._server = (parts.hostname, parts.port)
        self._rate = rate
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.endpoint = f"{parts.scheme}://127.0.0.1:{self._listener.getsockname()[1]}"

    def serve(self) -> None:
        while True:
            client, _ = self._listener.accept()
            server = socket.create_connection(self._server)
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._pass, args=(client, server, None), daemon=True).start()
            threading.Thread(target=self._pass, args=(server, client, self._rate), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, rate: int | None) -> None:
        due = time.monotonic()
        try:
            while data := source.recv(2**17):
                if rate is None:
                    time.sleep(LATENCY)  # a question: its answer begins so much later
                else:
                    due = max(due, time.monotonic() - 0.02) + len(data) / rate
                    time.sleep(max(0.0, due - time.monotonic()))
                target.sendall(data)
        except OSError:
            pass
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def commands(endpoint: str, bucket: str, prefix: str, target: str, ca: str, pythons: list[Path]) -> dict[str, list[str]]:
    """Command lines of the tools that are installed."""
    sets = [f"storage.s3.endpoint={endpoint}", *([f"storage.s3.ca_bundle={ca}"] if ca else [])]
    ours = [sys.executable, "-m", "wmtp", "fetch", f"s3://{bucket}/{prefix}", target]
    found = {"wmtp fetch": [*ours, *(word for each in sets for word in ("--set", each))]}
    for python in pythons:
        folder = python.parent
        if (folder / "s5cmd").exists():
            tool = [str(folder / "s5cmd"), "--endpoint-url", endpoint]
            found["s5cmd"] = [*tool, "cp", f"s3://{bucket}/{prefix}/*", target + "/"]
            found["s5cmd -c 16 -p 16"] = [*tool, "cp", "-c", "16", "-p", "16", f"s3://{bucket}/{prefix}/*", target + "/"]
        if (folder / "rclone").exists():
            remote = f":s3,provider=Other,env_auth=true,region=us-east-1,endpoint='{endpoint}':{bucket}/{prefix}"
            found["rclone"] = [str(folder / "rclone"), "copy", remote, target, *(["--ca-cert", ca] if ca else [])]
        scripts = {"boto3": (BOTO, "classic"), "boto3 with CRT": (BOTO, "crt"), "s3fs": (S3FS,), "hf_transfer": (HF,)}
        modules = {"boto3": "boto3", "boto3 with CRT": "awscrt", "s3fs": "s3fs", "hf_transfer": "hf_transfer"}
        for name, (script, *more) in scripts.items():
            if ca and name in ("boto3 with CRT", "hf_transfer"):
                continue  # they cannot be given a certificate
            if has(python, modules[name]):
                found[name] = [str(python), "-c", script, endpoint, bucket, prefix, target, *more]
    found["obstore, one stream a file"] = [sys.executable, "-c", OBSTORE, endpoint, bucket, prefix, target, ca]
    return found


def has(python: Path, module: str) -> bool:
    return subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode == 0


#: a process counts the memory of the one that started it: this one is small
RUNNER = """
import json, os, sys, time
began = time.monotonic()
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(pid, 0)
print(json.dumps([time.monotonic() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024,
                  os.waitstatus_to_exitcode(status)]), file=open(3, "w"))
"""


def measure(command: list[str], environment: dict[str, str], work: Path) -> tuple[float, float, float, int]:
    """Seconds, CPU seconds, peak MB, exit code."""
    words = ["bash", "-c", 'exec 3>"$0"; exec "$@"', str(work / "taken"), sys.executable, "-S", "-c", RUNNER, *command]
    done = subprocess.run(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    taken = json.loads((work / "taken").read_text())
    if taken[3]:
        print(done.stderr[-1000:], file=sys.stderr)
    return tuple(taken)


def digest(folder: Path) -> str:
    names = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".wmtp"))
    whole = hashlib.sha256()
    for path in names:
        with path.open("rb") as file:
            whole.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def put(client: Any, bucket: str, key: str, data: bytes, checksum: dict[str, str]) -> None:
    """Upload an object as usual tools do, a large one in parts."""
    names = {"Bucket": bucket, "Key": key}
    if len(data) <= 16 * MB:
        client.put_object(**names, Body=data, **checksum)
        return
    kind = {"ChecksumType": "FULL_OBJECT"} if checksum else {}
    names["UploadId"] = client.create_multipart_upload(**names, **checksum, **kind)["UploadId"]
    parts = []
    for number, start in enumerate(range(0, len(data), 16 * MB), 1):
        part = client.upload_part(**names, PartNumber=number, Body=data[start : start + 16 * MB], **checksum)
        parts.append({"PartNumber": number} | {name: part[name] for name in ("ETag", "ChecksumCRC64NVME") if name in part})
    client.complete_multipart_upload(**names, MultipartUpload={"Parts": parts}, **kind)


def upload(server: S3Server, bucket: str, folder: Path, size: int) -> dict[str, str]:
    """Four folders of files; prefix → digest of its content."""
    generator = random.Random(0)
    data = b"".join(generator.randbytes(MB) for _ in range(size))
    big = {f"model-{i}": data for i in range(3)} | {f"config-{i}": data[i : i + 3000] for i in range(20)}
    content = {
        "big": big,
        "md5": big,
        "one": {"model": data},
        "small": {f"sample-{i:04}": data[i : i + 16000] for i in range(1000)},
    }
    client = server.client()
    digests = {}
    for prefix, files in content.items():
        for name, each in files.items():
            (folder / prefix).mkdir(exist_ok=True)
            (folder / prefix / name).write_bytes(each)
            put(client, bucket, f"{prefix}/{name}", each, {} if prefix == "md5" else {"ChecksumAlgorithm": "CRC64NVME"})
        digests[prefix] = digest(folder / prefix)
        shutil.rmtree(folder / prefix)
    return digests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="MB of a large file")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--tools", nargs="*", help="only these")
    parser.add_argument("--peers", nargs="*", type=Path, default=[Path(sys.executable)])
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="wmtp-bench-"))
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(work / "ca.pem"))
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(work / "cert.pem"))
    kinds = {CASES[case][2] for case in options.cases}
    servers = {tls: start_s3_server(work / "cert.pem" if tls else None) for tls in kinds}
    bucket, digests = {}, {}
    os.environ["AWS_CA_BUNDLE"] = os.environ["SSL_CERT_FILE"] = str(work / "ca.pem")
    os.environ["AWS_REQUEST_CHECKSUM_CALCULATION"] = "when_required"  # so that an object's MD5 may be all that is known of it
    for tls, server in servers.items():
        bucket[tls] = server.bucket()
        digests[tls] = upload(server, bucket[tls], work, options.size)
    results: dict[str, dict[str, list[tuple[float, float, float, int]]]] = {}
    for case in options.cases:
        prefix, rate, tls = CASES[case]
        endpoint = servers[tls].endpoint
        proxy = None
        if rate is not None:
            slow = SlowProxy(endpoint, rate)
            endpoint = slow.endpoint
            if (proxy := os.fork()) == 0:
                slow.serve()
        environment = os.environ | servers[tls].environment | {"AWS_ENDPOINT_URL_S3": endpoint}
        environment |= {"AWS_CA_BUNDLE": str(work / "ca.pem")} if tls else {}
        for name in ("PYTHONDONTWRITEBYTECODE", *([] if tls else ["AWS_CA_BUNDLE"])):
            environment.pop(name, None)
        target = work / "target"
        tools = commands(endpoint, bucket[tls], prefix, str(target), str(work / "ca.pem") if tls else "", options.peers)
        tools = {name: command for name, command in tools.items() if not options.tools or name in options.tools}
        for number in range(1 if results else 0, options.repeats + 1):
            for name, command in tools.items():
                target.mkdir()
                taken = measure(command, environment, work)
                is_right = taken[3] == 0 and digest(target) == digests[tls][prefix]
                shutil.rmtree(target)
                if number == 0:  # the first is to have everything compiled and in memory
                    continue
                results.setdefault(case, {}).setdefault(name, []).append(taken if is_right else (float("inf"), 0, 0, 1))
                load = os.getloadavg()[0]
                print(json.dumps({"case": case, "tool": name, "seconds": round(taken[0], 2), "cpu": round(taken[1], 2),
                                  "peak_mb": round(taken[2]), "right": is_right, "load": load}), flush=True)  # fmt: skip
        if proxy is not None:
            os.kill(proxy, 9)
            os.waitpid(proxy, 0)
    table(results, options.size)
    shutil.rmtree(work, ignore_errors=True)


def table(results: dict[str, dict[str, list[tuple[float, float, float, int]]]], size: int) -> None:
    """Medians, as Markdown."""
    for case, tools in results.items():
        ours = statistics.median(taken[0] for taken in tools["wmtp fetch"])
        print(f"\n{case}\n\n| tool | seconds | × wmtp fetch | CPU seconds | peak MB |\n|---|---|---|---|---|")
        for name, takes in sorted(tools.items(), key=lambda item: statistics.median(t[0] for t in item[1])):
            wall, cpu, peak = (statistics.median(taken[i] for taken in takes) for i in range(3))
            print(f"| {name} | {wall:.2f} | {wall / ours:.2f} | {cpu:.1f} | {peak:.0f} |")


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    main()
