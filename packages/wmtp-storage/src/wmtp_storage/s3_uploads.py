"""Unfinished uploads to S3.

Their parts are invisible, and are paid for until somebody aborts them. obstore has no call for that.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from datetime import datetime
from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode

from botocore.exceptions import BotoCoreError
from obstore.exceptions import GenericError

from wmtp.errors import WMTPError
from wmtp_storage.failures import WrongAnswerError, explained, understand
from wmtp_storage.leftovers import Unfinished
from wmtp_storage.s3_responses import text_of

if TYPE_CHECKING:
    from wmtp_storage.s3_requests import S3Requests

__all__ = ["abort_uploads", "unfinished_uploads"]

logger = logging.getLogger("wmtp.storage")

#: more pages than uploads, after which no end is expected any more
_MOST_EMPTY = 1000


def abort_uploads(requests: S3Requests, uploads: Iterable[Unfinished]) -> None:
    """Abort unfinished uploads.

    Raises:
        WMTPError: the store could not be reached, or did not abort one.
    """
    for each in uploads:
        url = f"{requests.address}/{quote(each.key)}?{urlencode({'uploadId': each.upload})}"
        try:
            answer = requests.send("DELETE", url)
        except BotoCoreError as error:
            raise WMTPError(f"{each.key}: an unfinished upload could not be aborted: {error}") from error
        if answer.status_code not in (200, 204, 404):
            raise WMTPError(f"{each.key}: an unfinished upload could not be aborted: HTTP status {answer.status_code}")
        logger.info("%s: an upload that never ended was aborted", each.key)


def unfinished_uploads(requests: S3Requests, prefix: str) -> list[Unfinished]:
    """List the unfinished uploads of objects.

    Who may write objects may not be allowed to ask for unfinished uploads, and not every store knows the request: one line
    says so then.

    Args:
        requests: of the bucket.
        prefix: the keys begin with it.

    Raises:
        WMTPError: the store could not be reached, or answered what is no list of uploads.
    """
    try:
        return _listed(requests, prefix)
    except BotoCoreError as error:
        raise WMTPError(f"{prefix}: unfinished uploads could not be asked for: {error}") from error
    except WrongAnswerError as error:
        raise explained(error, f"unfinished uploads to {prefix or 'the bucket'}", "listed") from error


def _listed(requests: S3Requests, prefix: str) -> list[Unfinished]:
    found: list[Unfinished] = []
    after: dict[str, str] = {}
    markers = set[tuple[str, ...]]()
    while True:
        words = urlencode({"uploads": "", "prefix": prefix, **after}, quote_via=quote, safe="")
        try:
            page = requests.ask("GET", f"{requests.address}?{words}", "ListMultipartUploadsResult")
        except GenericError as error:
            status = understand(error).status
            logger.warning(
                "unfinished uploads of killed runs, if there are any, stay: the store does not tell them (HTTP status %s)",
                status,
            )
            return []
        for upload in page.findall("{*}Upload"):
            if text_of(upload, "Key").startswith(prefix):
                try:
                    began = datetime.fromisoformat(text_of(upload, "Initiated"))
                except ValueError:
                    raise WrongAnswerError("an unfinished upload came without the time of its beginning") from None
                found.append(Unfinished(text_of(upload, "Key"), text_of(upload, "UploadId"), began))
        if text_of(page, "IsTruncated") != "true":
            return found
        key = after.get("key-marker", "")
        after = {"key-marker": text_of(page, "NextKeyMarker"), "upload-id-marker": text_of(page, "NextUploadIdMarker")}
        if tuple(after.values()) in markers or after["key-marker"] < key:
            raise WrongAnswerError("a page says that more follows, and names one that came before")
        markers.add(tuple(after.values()))
        if len(markers) - len(found) == _MOST_EMPTY:
            raise WrongAnswerError(f"{len(markers)} pages came with {len(found)} uploads, and more are to follow")
