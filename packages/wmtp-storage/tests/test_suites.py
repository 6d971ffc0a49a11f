"""The backends pass the suite that plugins inherit, against real servers."""

import pytest

from wmtp.testing import StorageTests
from wmtp_storage import S3Storage


class TestS3Storage(StorageTests):
    config = S3Storage()

    @pytest.fixture
    def root(self, s3):
        return f"s3://{s3.bucket()}/root"
