"""The backends pass the suite that plugins inherit, against real servers."""

import itertools

import pytest

from wmtp.testing import StorageTests
from wmtp_storage import HTTPStorage, S3Storage

_numbers = itertools.count()


class TestS3Storage(StorageTests):
    config = S3Storage()

    @pytest.fixture
    def root(self, s3):
        return f"s3://{s3.bucket()}/root"


class TestHTTPStorage(StorageTests):
    """On a server that speaks WebDAV."""

    config = HTTPStorage()

    @pytest.fixture
    def root(self, s3):
        return f"{s3.webdav}/test-{next(_numbers)}/root"
