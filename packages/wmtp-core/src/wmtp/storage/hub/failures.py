"""Explanation of errors between this machine and the hub, with advice."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from typing import Final, TypeVar

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from wmtp.errors import ConfigError, WMTPError
from wmtp.storage.hub.names import HubName

__all__ = ["explained", "is_offline", "is_unreachable", "patiently"]

logger = logging.getLogger("wmtp")

_Result = TypeVar("_Result")
#: seconds between attempts, where the hub does not say how long to wait
_WAITS: Final = (1.0, 2.0, 4.0)
_LONGEST_WAIT: Final = 60.0


def patiently(call: Callable[[], _Result]) -> _Result:
    """Ask the hub, retrying while it is busy or away.

    The last error is raised.
    """
    for wait in (*_WAITS, None):
        try:
            return call()
        except Exception as error:
            asked = _asked_to_wait(error)
            if wait is None or is_offline(error) or not (is_unreachable(error) or asked is not None):
                raise
            seconds = min(asked or wait, _LONGEST_WAIT)
            logger.info("the hub %s; trying again in %g s", _why(error), seconds)
            time.sleep(seconds)
    raise AssertionError("unreachable")


def _asked_to_wait(error: Exception) -> float | None:
    """Read the seconds to wait after a 429.

    0 where it names none; None for any other error.
    """
    if not isinstance(error, HfHubHTTPError) or error.response.status_code != 429:
        return None
    seconds = error.response.headers.get("Retry-After", "")
    return float(seconds) if seconds.isdecimal() else 0.0


def is_offline(error: BaseException | None) -> bool:
    """Tell whether the user has forbidden network access."""
    return isinstance(error, OfflineModeIsEnabled) or (error is not None and is_offline(error.__cause__))


def is_unreachable(error: BaseException | None) -> bool:
    """Tell whether no answer came, or only that the server fails."""
    if error is None:
        return False
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    if isinstance(error, LocalEntryNotFoundError):  # raised for all that kept the files of a revision from being listed
        return is_unreachable(error.__cause__)
    # of httpx, under the name that the installed huggingface_hub has for it
    is_transport = type(error).__module__.partition(".")[0] in ("httpx", "httpx2")
    return is_transport or isinstance(error, ConnectionError | TimeoutError)


def _why(error: BaseException) -> str:
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return "limits the rate of requests (429)" if status == 429 else f"answers with {status}"
    return f"cannot be reached ({_first_line(error) or type(error).__name__})"


def explained(error: Exception, name: HubName, *, writes: bool = False) -> WMTPError:
    """Make the error to raise: `ConfigError` for a user's mistake.

    Args:
        error: of huggingface_hub.
        name: what was asked for.
        writes: whether it was to be changed.
    """
    page = f"{constants.ENDPOINT}/{name.page}"
    what = "data set" if name.kind == "datasets" else "model"
    has_token = get_token() is not None
    if isinstance(error, GatedRepoError):
        then = (
            "your token is not on its list; if you have access, let the token read gated repositories"
            if has_token
            else "then log in: hf auth login, or set HF_TOKEN"
        )
        return ConfigError(f"{name.uri}: this {what} is gated: ask for access on {page}; {then}")
    # without a token the hub does not say whether a repository is private or not there
    is_hidden = isinstance(error, HfHubHTTPError) and error.response.status_code == 401 and not has_token and not writes
    if isinstance(error, RepositoryNotFoundError) or is_hidden:
        private = (
            "your token may not see it, if it is private"
            if has_token
            else "if it is private, or gated, log in: hf auth login, or set HF_TOKEN"
        )
        return ConfigError(f"{name.uri}: there is no such {what} on {constants.ENDPOINT}; look for its name there; {private}")
    if isinstance(error, RevisionNotFoundError):
        return ConfigError(f"{name.uri}: this {what} has no revision {name.revision!r}; see {page}/tree/main for those it has")
    if isinstance(error, DisabledRepoError):
        return WMTPError(f"{name.uri}: its authors or the hub have disabled it; see {page}")
    if is_offline(error):
        return WMTPError(
            f"{name.uri}: not whole in the hub's cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is set; unset it, or "
            f"fetch it on a machine with network: hf download {name.repo}"
        )
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return WMTPError(f"{name.uri}: a file that the hub lists is not there: {_first_line(error)}")
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        token = "the hub refuses your token" if has_token else "the hub wants a login: hf auth login, or set HF_TOKEN"
        return ConfigError(f"{name.uri}: {token} ({error.response.status_code}: {_server_says(error)})")
    if isinstance(error, HfHubHTTPError) and error.response.status_code == 429:
        then = "wait some minutes" if has_token else "wait some minutes, or log in (hf auth login) for a higher limit"
        return WMTPError(
            f"{name.uri}: the hub limits the rate of requests (429); {then}, and run it again: whole files are kept"
        )
    if is_unreachable(error):
        return WMTPError(
            f"{name.uri}: the hub at {constants.ENDPOINT} {_why(_cause(error))}; run it again when it can be: whole files are"
            " kept"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        cache = constants.HF_HUB_CACHE
        return WMTPError(f"{name.uri}: the disk with the hub's cache ({cache}) is full; set HF_HOME to a folder on another")
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
        return WMTPError(f"{name.uri}: the hub's cache cannot be written to: {error}; set HF_HOME to a folder of yours")
    return WMTPError(f"{name.uri}: {_first_line(error) or type(error).__name__}")


def _cause(error: BaseException) -> BaseException:
    """Find the error that a `LocalEntryNotFoundError` is about."""
    return error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None else error


def _server_says(error: HfHubHTTPError) -> str:
    return error.server_message or _first_line(error)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")
