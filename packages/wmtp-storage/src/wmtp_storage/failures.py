"""Interpretation of obstore's errors: whether to retry, and what to say."""

from __future__ import annotations

import re

from attrs import frozen
from obstore.exceptions import (
    GenericError,
    InvalidPathError,
    NotFoundError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from wmtp.errors import WMTPError
from wmtp.redaction import clean_chain, redact

__all__ = ["Failure", "WrongAnswerError", "explained", "understand"]

_STATUS = re.compile(r"non-2xx status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_MESSAGE = re.compile(r"<Message>([^<]*)</Message>")
_TITLE = re.compile(r"<title[^>]*>([^<]*)</title>", re.IGNORECASE)
#: what obstore says of an answer with status 200 that it cannot read
_UNREADABLE = re.compile(
    r"(?:Got invalid|Error decoding) (?:list|PROPFIND|multipart|DeleteObjects|bulk delete) response|\w[\w-]* Header missing"
)
#: of failures without an answer those that the next try has too
_STAYS = re.compile(
    r"External AWS credential provider: |certificate|builder error|metadata\.google|169\.254\.169\.254|invalid URL",
    re.IGNORECASE,
)
_PERHAPS = "a proxy or a login page may have answered in the store's place"
_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired")
_CREDENTIALS = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "AuthFailure", "InvalidClientTokenId")
_CLOCK = ("RequestTimeTooSkewed",)
_MOVED = "Received redirect without LOCATION"
_REGION = ("PermanentRedirect", "AuthorizationHeaderMalformed", "TemporaryRedirect", "IllegalLocationConstraintException")


class WrongAnswerError(WMTPError):
    """Answer that does not belong to the request.

    Nothing follows from it, least of all that something does not exist.
    """


@frozen
class Failure:
    """An error of a store, understood.

    Args:
        status: of the HTTP answer; None where there was none.
        code: what the store calls it (``NoSuchKey``); empty where it does not say.
        message: what the store says of it.
        is_transient: whether the same request may succeed when it is sent again.
    """

    status: int | None
    code: str
    message: str
    is_transient: bool


def understand(error: BaseException) -> Failure:
    """Take an error apart."""
    text = str(error)
    status = int(match[1]) if (match := _STATUS.search(text)) else None
    code = match[1] if (match := _CODE.search(text)) else ""
    said = match[1] if (match := _MESSAGE.search(text) or _TITLE.search(text)) else ""
    if status is None and _MOVED in text:  # obstore keeps what the server said of it to itself
        status = 301
    if status is not None:
        transient = status >= 500 or status in (408, 425, 429) or code in ("RequestTimeout", "SlowDown")
        return Failure(status, code, said, transient)
    if isinstance(error, PreconditionError):
        return Failure(412, code, said, False)
    # without an answer it is the connection that failed, or what came is no answer to the request
    is_transient = isinstance(error, GenericError) and not (_UNREADABLE.search(text) or _STAYS.search(text))
    return Failure(None, code, said or _first_line(text), is_transient)


def explained(error: BaseException, uri: object, what: str = "read") -> WMTPError:
    """Explain an error to the user.

    Args:
        error: the exception, most likely obstore's.
        uri: its subject.
        what: ``read``, ``written``, …: the operation that failed.

    Messages of libraries may contain an address with a signature: it is removed from the error too, since a traceback shows it.
    """
    clean_chain(error)
    if isinstance(error, WrongAnswerError) and _PERHAPS not in str(error):
        return WrongAnswerError(f"{uri} could not be {what}: {error}; {_PERHAPS}")
    if isinstance(error, WMTPError):
        return error
    if (provider := "External AWS credential provider: ") in (text := str(error)):
        reason = re.sub(r"^\w+: ", "", text.partition("\n")[0].partition(provider)[2])
        return WMTPError(f"{uri} could not be {what}: {reason}")
    failure = understand(error)
    if failure.status is None and _UNREADABLE.search(str(error)):
        return WrongAnswerError(f"{uri} could not be {what}: {_first_line(str(error))}; {_PERHAPS}")
    said = ": ".join(filter(None, (failure.code, failure.message)))
    could_not = f"{uri} could not be {what}"
    if failure.code == "NoSuchBucket":
        return WMTPError(f"{could_not}: there is no such bucket")
    if failure.code in _EXPIRED:
        return WMTPError(f"{could_not}: the credentials have expired ({said}); renew them, and run it again: it continues")
    if failure.code in _CREDENTIALS:
        return WMTPError(f"{could_not}: the credentials are wrong ({said})")
    if failure.code in _CLOCK:
        return WMTPError(f"{could_not}: this machine's clock is wrong ({said})")
    if failure.code in _REGION or failure.status in (301, 307):
        where = f" ({said})" if said else ""
        return WMTPError(f"{could_not}: the bucket is in another region{where}; remove storage.s3.region, or correct it")
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) or failure.status in (401, 403):
        return WMTPError(f"{could_not}: permission denied{f' ({said})' if said else ''}")
    if isinstance(error, NotFoundError | FileNotFoundError) or failure.status == 404:
        return WMTPError(f"{could_not}: it does not exist")
    if failure.status == 412:
        return WMTPError(f"{could_not}: it was changed in the meantime")
    if isinstance(error, InvalidPathError | ValueError):
        return WMTPError(f"{could_not}: a name in it cannot be that of a file: {_first_line(str(error))}")
    status = f"HTTP status {failure.status}" if failure.status is not None else ""
    return WMTPError(f"{could_not}: {': '.join(filter(None, (status, said)))}")


def _first_line(text: str) -> str:
    """Shorten obstore's message to one line, without queries.

    Of its tree of causes the last one stays; a query may be a signature.
    """
    line = text.partition("\n")[0].strip()
    cause = re.findall(r'(?:error: |message: |source: )"([^"]+)"', text)
    line = f"{line} ({cause[-1]})" if cause and cause[-1] not in line else line
    return redact(line)
