import pytest

from wmtp_storage.testing import s3_server

__all__ = ["s3_server"]


@pytest.fixture
def s3(s3_server, monkeypatch):
    """The S3 server, found by what the environment says; no proxy and no profile of the user gets in between."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server
