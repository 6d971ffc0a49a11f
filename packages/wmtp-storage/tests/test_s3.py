"""Host, region and identity of a request, proven by what arrives."""

import os
import select
import socket
import ssl
import threading

import pytest
import trustme

from wmtp.errors import ConfigError, WMTPError
from wmtp_storage import S3Storage, s3_credentials
from wmtp_storage.uris import parse


class Tunnel:
    """An HTTP proxy for TLS: it plays every host, notes what is asked, and passes it to the S3 server with the host's name."""

    def __init__(self, server, folder, *, regions=None):
        self.requests = []
        self._server = ("127.0.0.1", int(server.endpoint.rpartition(":")[2]))
        self._regions = regions or {}
        authority = trustme.CA()
        self.ca = folder / "ca.pem"
        authority.cert_pem.write_to_path(str(self.ca))
        names = ("*.s3-accelerate.amazonaws.com", "*.s3.eu-west-1.amazonaws.com", "s3.eu-west-1.amazonaws.com")
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(*names, "s3.us-east-1.amazonaws.com", "*.s3.us-east-1.amazonaws.com").configure_cert(self._context)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        try:
            first = client.recv(2**16).split(b"\r\n")[0].decode()
            assert first.startswith("CONNECT "), first
            client.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
            with self._context.wrap_socket(client, server_side=True) as outer, socket.create_connection(self._server) as inner:
                self._pass(outer, inner)
        except OSError:
            pass

    def _pass(self, outer, inner):
        outer.settimeout(10)
        while True:
            data = outer.recv(2**16)
            if not data:
                return
            if data.split(b" ")[0] in (b"GET", b"HEAD", b"PUT", b"POST", b"DELETE"):
                head = data.split(b"\r\n\r\n")[0].decode().split("\r\n")
                headers = dict(line.split(": ", 1) for line in head[1:])
                headers = {name.lower(): value for name, value in headers.items()}
                self.requests.append((head[0].split(" ")[0], headers["host"], head[0].split(" ")[1], headers))
                bucket = head[0].split(" ")[1].strip("/")
                if bucket in self._regions and "authorization" not in headers:
                    region = self._regions[bucket].encode()
                    outer.sendall(b"HTTP/1.1 301 Moved\r\nx-amz-bucket-region: " + region + b"\r\nContent-Length: 0\r\n\r\n")
                    continue
            inner.sendall(data)
            while select.select([inner], [], [], 0.3)[0]:
                answer = inner.recv(2**16)
                if not answer:
                    return
                outer.sendall(answer)

    def close(self):
        self._listener.close()


@pytest.fixture
def tunnel(s3, tmp_path, monkeypatch):
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_REGION"):
        monkeypatch.delenv(name)
    made = []

    def make(**options):
        made.append(Tunnel(s3, tmp_path, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_acceleration_asks_the_accelerated_host_once_named(s3, tunnel, tmp_path):
    """Signed for that host, with the bucket in its name and nowhere else: the server checks the signature."""
    bucket = s3.bucket()
    s3.store(bucket).put("models/weights", b"w" * 1000)
    proxy = tunnel(regions={bucket: "eu-west-1"})
    storage = S3Storage(acceleration=True, requester_pays=True, proxy=proxy.url, ca_bundle=str(proxy.ca)).build()
    storage.fetch(f"s3://{bucket}/models", tmp_path / "out")
    storage.push(tmp_path / "out/weights", f"s3://{bucket}/copy")
    assert (tmp_path / "out/weights").read_bytes() == b"w" * 1000
    question, *rest = proxy.requests
    assert question[:3] == ("HEAD", "s3.us-east-1.amazonaws.com", f"/{bucket}")
    assert {host for _, host, _, _ in rest} == {f"{bucket}.s3-accelerate.amazonaws.com"}
    assert not [path for _, _, path, _ in rest if bucket in path]
    assert ("GET", "/models/weights") in {(method, path) for method, _, path, _ in rest}
    assert ("PUT", "/copy") in {(method, path) for method, _, path, _ in rest}
    assert all("/eu-west-1/s3/" in headers["authorization"] for *_, headers in rest)
    assert all(headers["x-amz-request-payer"] == "requester" for *_, headers in rest)


def test_a_bucket_is_asked_where_it_is(s3, tunnel, tmp_path):
    bucket = s3.bucket()
    s3.store(bucket).put("x", b"1")
    proxy = tunnel(regions={bucket: "eu-west-1"})
    S3Storage(proxy=proxy.url, ca_bundle=str(proxy.ca)).build().fetch(f"s3://{bucket}/x", tmp_path / "out")
    assert {host for _, host, _, _ in proxy.requests[1:]} == {f"{bucket}.s3.eu-west-1.amazonaws.com"}


def test_environment_names_proxy_and_certificates(s3, tunnel, tmp_path, monkeypatch):
    bucket = s3.bucket()
    s3.store(bucket).put("x", b"1")
    proxy = tunnel()
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    with pytest.raises(WMTPError, match="could not be"):
        S3Storage(region="us-east-1", retry_timeout=0).build().fetch(f"s3://{bucket}/x", tmp_path / "out")
    monkeypatch.setenv("AWS_CA_BUNDLE", str(proxy.ca))
    S3Storage(region="us-east-1").build().fetch(f"s3://{bucket}/x", tmp_path / "out")
    assert proxy.requests[0][1] == f"{bucket}.s3.us-east-1.amazonaws.com"


@pytest.mark.parametrize(
    ("options", "bucket", "address"),
    [
        ({}, "b", "https://b.s3.us-west-2.amazonaws.com"),
        ({}, "dotted.b", "https://s3.us-west-2.amazonaws.com"),
        ({"addressing": "path"}, "b", "https://s3.us-west-2.amazonaws.com"),
        ({"region": "cn-north-1"}, "b", "https://b.s3.cn-north-1.amazonaws.com.cn"),
        ({"endpoint": "http://h:1/"}, "b", "http://h:1"),
        ({"endpoint": "https://h", "addressing": "virtual"}, "b", "https://b.h"),
        ({"endpoint": "https://b.h", "addressing": "virtual"}, "b", "https://b.h"),
        ({"acceleration": True}, "b", "https://b.s3-accelerate.amazonaws.com"),
    ],
)
def test_addresses(s3, monkeypatch, options, bucket, address):
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    opened = S3Storage(**{"region": "us-west-2"} | options).build().opened(parse(f"s3://{bucket}/x"))
    assert [value for value in opened.store.config.values() if str(value).startswith("http")] == [address]


def test_acceleration_where_it_cannot_be(s3, monkeypatch):
    with pytest.raises(ConfigError, match="the environment names the endpoint http://127"):
        S3Storage(acceleration=True).build().exists("s3://b/x")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    with pytest.raises(ConfigError, match="for the dot in its name"):
        S3Storage(acceleration=True, region="us-east-1").build().exists("s3://b.c/x")
    assert list(S3Storage(acceleration=True, endpoint="https://h", addressing="path").check()) == [
        "acceleration: uses a host of Amazon's; remove endpoint, or acceleration",
        "acceleration: has the bucket in the host's name; remove addressing, or acceleration",
    ]
    assert list(S3Storage(endpoint="h:1", proxy="ftp://h").check()) == [
        "endpoint: 'h:1' is no address; write https://HOST or http://HOST:PORT",
        "proxy: 'ftp://h' is no address; write https://HOST or http://HOST:PORT",
    ]


@pytest.fixture
def files(s3, tmp_path, monkeypatch):
    """The shared files of the AWS tools, in place of the variables."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    keys = f"aws_access_key_id = {s3.access_key_id}\naws_secret_access_key = {s3.secret_access_key}\n"
    (tmp_path / "credentials").write_text(f"[default]\naws_access_key_id = x\naws_secret_access_key = y\n[lab]\n{keys}")
    process = f'printf \'{{"Version":1,"AccessKeyId":"{s3.access_key_id}","SecretAccessKey":"{s3.secret_access_key}"}}\''
    (tmp_path / "config").write_text(
        f"[default]\nendpoint_url = {s3.endpoint}\n[profile lab]\nservices = local\nregion = us-east-1\n"
        f"[services local]\ns3 =\n  endpoint_url = {s3.endpoint}\n"
        f'[profile program]\nendpoint_url = {s3.endpoint}\ncredential_process = sh -c "{process}"\n'.replace('"{"', "{")
    )
    bucket = s3.bucket()
    s3.store(bucket).put("x", b"1")
    return f"s3://{bucket}/x"


def test_credentials_and_endpoint_of_a_profile(files, monkeypatch):
    with pytest.raises(WMTPError, match="the credentials are wrong"):
        S3Storage().build().exists(files)
    assert S3Storage(profile="lab").build().exists(files)
    monkeypatch.setenv("AWS_PROFILE", "lab")
    assert S3Storage().build().exists(files)
    with pytest.raises(ConfigError, match="profile: 'lap' is in none of the shared AWS files; profiles there: default, lab"):
        S3Storage(profile="lap").build().exists(files)


def test_credentials_of_a_container(files, s3, monkeypatch, tmp_path):
    """The metadata service of a container is asked; a real one is played by a plain web server."""
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    answer = (
        f'{{"AccessKeyId":"{s3.access_key_id}","SecretAccessKey":"{s3.secret_access_key}","Token":"",'
        '"Expiration":"2099-01-01T00:00:00Z"}'
    ).encode()
    listener = socket.create_server(("127.0.0.1", 0))
    asked = []

    def serve():
        client, _ = listener.accept()
        asked.append(client.recv(2**16))
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(answer)}\r\n\r\n".encode()
        client.sendall(head + answer)
        client.close()

    threading.Thread(target=serve, daemon=True).start()
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"http://127.0.0.1:{listener.getsockname()[1]}/creds")
    assert S3Storage().build().exists(files)
    assert asked[0].startswith(b"GET /creds ")
    listener.close()


def test_no_credentials_at_all(files, monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    with pytest.raises(WMTPError, match=r"no credentials for S3.*anonymous = true"):
        S3Storage().build().exists(files)


def test_anonymous_sends_no_signature(faulty, s3):
    proxy = faulty(())
    bucket = s3.bucket()
    with pytest.raises(WMTPError, match="permission denied"):
        S3Storage(endpoint=proxy.endpoint, anonymous=True).build().exists(f"s3://{bucket}/x")


def test_a_bundle_that_is_not_there(s3):
    with pytest.raises(ConfigError, match="ca_bundle: '/no/such' is no file"):
        S3Storage(ca_bundle="/no/such").build().exists("s3://b/x")


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"AWS_SESSION_TOKEN": "t"},
        {"AWS_SECURITY_TOKEN": "t", "AWS_DEFAULT_REGION": "eu-west-1"},
        {"AWS_ENDPOINT_URL": "http://a:1"},
        {"AWS_ENDPOINT_URL_S3": "http://b:2", "AWS_ENDPOINT_URL": "http://a:1", "AWS_REGION": "eu-north-1"},
        {"AWS_SESSION_TOKEN": "", "AWS_ENDPOINT_URL_S3": ""},
    ],
)
def test_where_the_environment_is_all_that_there_is_botocore_finds_the_same(monkeypatch, variables):
    """It need not be imported then: credentials, endpoint and region are those that it would find."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    nothing = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
    for name, value in (nothing | {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"} | variables).items():
        monkeypatch.setenv(name, value)
    config = S3Storage()
    assert s3_credentials.is_in_environment(config)
    found = s3_credentials.Credentials(config)(), s3_credentials.endpoint_and_region(config)
    monkeypatch.setattr(s3_credentials, "is_in_environment", lambda config: False)
    by_botocore = s3_credentials.Credentials(config)(), s3_credentials.endpoint_and_region(config)
    names = ("access_key_id", "secret_access_key", "token")
    assert [found[0].get(name) for name in names] == [by_botocore[0].get(name) for name in names]
    assert found[1] == by_botocore[1]


def test_a_profile_or_a_shared_file_is_looked_at(monkeypatch, tmp_path, s3):
    assert s3_credentials.is_in_environment(S3Storage())
    assert not s3_credentials.is_in_environment(S3Storage(profile="lab"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    assert s3_credentials.is_in_environment(S3Storage())
    (tmp_path / "config").write_text("[default]\nregion = eu-west-1\n")
    assert not s3_credentials.is_in_environment(S3Storage())
