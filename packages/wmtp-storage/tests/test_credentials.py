"""Credentials from every place that is claimed, each played by a small server that speaks its protocol; and how each fails."""

import contextlib
import hashlib
import json
import time
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs, urlsplit

import pytest
from small_server import Answers, serving

from wmtp.errors import ConfigError, WMTPError
from wmtp_storage import S3Storage
from wmtp_storage.s3_credentials import Credentials


class Service:
    """An HTTP server: ``answers(method, path, headers, body)`` gives a status and a body. It notes what is asked."""

    def __init__(self, answers):
        self.asked = asked = []

        class Handler(Answers):
            def do_GET(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
                asked.append((self.command, self.path))
                status, answer = answers(self.command, self.path, self.headers, body)
                self.send_response(status)
                self.send_header("Content-Length", str(len(answer.encode())))
                self.end_headers()
                self.wfile.write(answer.encode())

            do_PUT = do_POST = do_GET

        self.handler = Handler


@pytest.fixture
def service():
    with contextlib.ExitStack() as stack:

        def start(answers):
            made = Service(answers)
            made.url = f"http://127.0.0.1:{stack.enter_context(serving(made.handler)).server_port}"
            return made

        yield start


@pytest.fixture
def uri(s3, tmp_path, monkeypatch):
    """An object, and an environment in which nothing says who asks for it."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED"):
        monkeypatch.delenv(name)
    # no metadata service: nobody listens there
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_METADATA_SERVICE_NUM_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path))
    bucket = s3.bucket()
    s3.store(bucket).put("x", b"1")
    return f"s3://{bucket}/x"


def later(**time_left):
    return (datetime.now(UTC) + timedelta(**time_left)).strftime("%Y-%m-%dT%H:%M:%SZ")


def finds(uri):
    return S3Storage().build().exists(uri)


def test_a_program(uri, s3, tmp_path):
    answer = {"Version": 1, "AccessKeyId": s3.access_key_id, "SecretAccessKey": s3.secret_access_key}
    (tmp_path / "answer").write_text(json.dumps(answer))
    (tmp_path / "config").write_text(f"[default]\ncredential_process = cat {tmp_path}/answer\n")
    assert finds(uri)
    (tmp_path / "answer").write_text("no JSON")
    with pytest.raises(WMTPError, match="no credentials for S3: "):
        finds(uri)
    (tmp_path / "answer").unlink()
    with pytest.raises(WMTPError, match=r"no credentials for S3: .*custom-process.*No such file"):
        finds(uri)


def test_an_instance_with_tokens(uri, s3, service, monkeypatch):
    """IMDSv2: a token is asked for, and goes along."""

    def answers(method, path, headers, body):
        if path == "/latest/api/token":
            return (200, "the-token") if method == "PUT" and headers["x-aws-ec2-metadata-token-ttl-seconds"] else (405, "")
        if headers["x-aws-ec2-metadata-token"] != "the-token":
            return 401, ""
        if path == "/latest/meta-data/iam/security-credentials/":
            return 200, "the-role"
        keys = {"AccessKeyId": s3.access_key_id, "SecretAccessKey": s3.secret_access_key, "Token": ""}
        return 200, json.dumps({"Code": "Success", "Expiration": later(hours=6), **keys})

    instance = service(answers)
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", instance.url)
    assert finds(uri)
    assert ("GET", "/latest/meta-data/iam/security-credentials/the-role") in instance.asked


def test_a_container_with_a_token(uri, s3, service, monkeypatch, tmp_path):
    """Credentials that soon expire are asked for again."""
    monkeypatch.setattr("botocore.utils.ContainerMetadataFetcher.SLEEP_TIME", 0.01)
    ends = [later(minutes=1), later(hours=6)]

    def answers(method, path, headers, body):
        if headers["Authorization"] != "Bearer of-the-pod":
            return 403, json.dumps({"message": "who are you?"})
        keys = {"AccessKeyId": s3.access_key_id, "SecretAccessKey": s3.secret_access_key, "Token": ""}
        return 200, json.dumps(keys | {"Expiration": ends.pop(0) if ends[1:] else ends[0]})

    (tmp_path / "token").write_text("Bearer of-the-pod")
    pod = service(answers)
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{pod.url}/creds")
    monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", str(tmp_path / "token"))
    assert finds(uri)
    assert len(pod.asked) == 2, "asked again until they last"
    ends[:] = [later(minutes=1)]
    found = Credentials(S3Storage())
    assert found()["expires_at"] < datetime.now(UTC) + timedelta(minutes=1), "no longer than they last"
    (tmp_path / "token").write_text("something else")
    with pytest.raises(WMTPError, match=r"no credentials for S3: .*container-role.*403"):
        finds(uri)


_ROLE = """<{0}Response xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><{0}Result><Credentials><AccessKeyId>{1}</AccessKeyId>
<SecretAccessKey>{2}</SecretAccessKey><SessionToken></SessionToken><Expiration>{3}</Expiration></Credentials>
<AssumedRoleUser><Arn>a</Arn><AssumedRoleId>i</AssumedRoleId></AssumedRoleUser></{0}Result></{0}Response>"""
_REFUSED = """<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Type>Sender</Type>
<Code>ExpiredTokenException</Code><Message>Token expired: current date/time must be before the expiration date</Message></Error>
</ErrorResponse>"""


def test_web_identity(uri, s3, service, monkeypatch, tmp_path):
    def answers(method, path, headers, body):
        asked = parse_qs(body)
        if asked["WebIdentityToken"] != ["good"]:
            return 400, _REFUSED
        assert (asked["Action"], asked["RoleArn"]) == (["AssumeRoleWithWebIdentity"], ["arn:aws:iam::1:role/r"])
        assert "Authorization" not in headers
        return 200, _ROLE.format("AssumeRoleWithWebIdentity", s3.access_key_id, s3.secret_access_key, later(hours=1))

    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", service(answers).url)
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::1:role/r")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    (tmp_path / "token").write_text("good")
    assert finds(uri)
    (tmp_path / "token").write_text("expired")
    with pytest.raises(WMTPError, match=r"no credentials for S3: .*ExpiredTokenException.*Token expired"):
        finds(uri)
    (tmp_path / "token").unlink()
    with pytest.raises(WMTPError, match=r"no credentials for S3: .*No such file.*token"):
        finds(uri)


def test_a_role_of_a_profile(uri, s3, service, monkeypatch, tmp_path):
    def answers(method, path, headers, body):
        assert "Credential=user/" in headers["Authorization"]
        return 200, _ROLE.format("AssumeRole", s3.access_key_id, s3.secret_access_key, later(hours=1))

    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", service(answers).url)
    (tmp_path / "config").write_text(
        "[profile user]\naws_access_key_id = user\naws_secret_access_key = k\n"
        "[profile role]\nrole_arn = arn:aws:iam::1:role/r\nsource_profile = user\nregion = us-east-1\n"
    )
    assert S3Storage(profile="role").build().exists(uri)


def test_single_sign_on(uri, s3, service, monkeypatch, tmp_path):
    def answers(method, path, headers, body):
        assert parse_qs(urlsplit(path).query) == {"role_name": ["r"], "account_id": ["1"]}
        if headers["x-amz-sso_bearer_token"] != "good":
            return 401, json.dumps({"__type": "UnauthorizedException", "message": "Session token not found or invalid"})
        keys = {"accessKeyId": s3.access_key_id, "secretAccessKey": s3.secret_access_key, "sessionToken": ""}
        return 200, json.dumps({"roleCredentials": keys | {"expiration": int(1000 * (time.time() + 3600))}})

    monkeypatch.setenv("AWS_ENDPOINT_URL_SSO", service(answers).url)
    (tmp_path / "config").write_text(
        "[default]\nsso_start_url = https://x.awsapps.com/start\nsso_region = us-east-1\n"
        "sso_account_id = 1\nsso_role_name = r\n"
    )
    # botocore has looked up the home when it was imported
    monkeypatch.setattr("botocore.credentials.SSOProvider._SSO_TOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(WMTPError, match=r"no credentials for S3: .*does not exist; log in with: aws sso login"):
        finds(uri)
    name = hashlib.sha1(b"https://x.awsapps.com/start").hexdigest()
    (tmp_path / f"{name}.json").write_text(json.dumps({"accessToken": "good", "expiresAt": later(hours=1)}))
    assert finds(uri)
    (tmp_path / f"{name}.json").write_text(json.dumps({"accessToken": "taken back", "expiresAt": later(hours=1)}))
    with pytest.raises(WMTPError, match=r"no credentials for S3: .*expired or is otherwise invalid.*aws sso login"):
        finds(uri)


def test_variables_that_have_expired(uri, s3, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.access_key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret_access_key)
    monkeypatch.setenv("AWS_CREDENTIAL_EXPIRATION", later(minutes=-1))
    with pytest.raises(WMTPError, match=r"no credentials for S3: .*expired"):
        finds(uri)


def test_files_that_are_damaged(uri, tmp_path):
    (tmp_path / "config").write_text("no section\n")
    with pytest.raises(ConfigError, match=r"the shared AWS files cannot be read: .*config"):
        finds(uri)


def test_nothing_at_all(uri):
    with pytest.raises(WMTPError, match=r"no credentials for S3: neither the environment.*anonymous = true"):
        finds(uri)
