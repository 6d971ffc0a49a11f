"""HTTP client of VESSL Runs, as far as a launcher needs it.

Not VESSL's own package: that one sends the token without verifying TLS, answers 0 for a refused run, and has 77 packages.
"""

from __future__ import annotations

import email.utils
import json
import logging
import random
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, Final
from urllib.parse import quote

import httpx

from wmtp.errors import AuthenticationError, ConfigError, PlatformError
from wmtp_vessl.credentials import Credentials
from wmtp_vessl.errors import NotFoundError, UnansweredError

__all__ = ["Client"]

logger = logging.getLogger("wmtp")

_RETRIED: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_LONGEST_WAIT: Final = 60.0
_SHOWN: Final = 300


class Client:
    """HTTP client that repeats a GET, and never a POST.

    Args:
        credentials: whose runs.
        timeout: seconds without a byte after which an answer counts as lost.
        attempts: of a GET.
        backoff: seconds before the second attempt; doubled each time. A ``Retry-After`` goes before.
    """

    def __init__(self, credentials: Credentials, *, timeout: float = 30.0, attempts: int = 6, backoff: float = 0.5) -> None:
        self.credentials = credentials
        self._attempts = attempts
        self._backoff = backoff
        self._http = httpx.Client(
            base_url=f"{credentials.host}/api/v1",
            headers={
                "Authorization": f"Token {credentials.token}",
                "Accept": "application/json",
                "User-Agent": f"wmtp-vessl/{version('wmtp-vessl')}",
            },
            timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0)),
            follow_redirects=False,  # the token is sent to no other host
        )

    @property
    def _project(self) -> str:
        return f"{self._organization}/projects/{quote(self.credentials.project, safe='')}"

    @property
    def _organization(self) -> str:
        return f"/organizations/{quote(self.credentials.organization, safe='')}"

    def organizations(self) -> list[str]:
        """Names of the user's organizations."""
        return _names(self._get("/accounts/me").get("organizations"))

    def projects(self) -> list[str]:
        """Names of the organization's projects."""
        answer = self._get(f"{self._organization}/projects")
        return _names(answer.get("results", answer.get("projects")))

    def clusters(self) -> list[Mapping[str, Any]]:
        """List the organization's clusters."""
        return _tables(self._get(f"{self._organization}/clusters").get("clusters"))

    def presets(self, cluster: int) -> list[Mapping[str, Any]]:
        """List the machine types that a cluster has."""
        return _tables(self._get(f"{self._organization}/clusters/{cluster}/resource_specs").get("results"))

    def form_errors(self, text: str) -> tuple[bool, Mapping[str, Any]]:
        """Ask the service's validator for the errors of a run YAML.

        Returns whether it is valid, and its errors.
        """
        answer = self._post(f"{self._organization}/run/spec/sync_yaml", {"yaml_spec": text})
        errors = answer.get("form_errors")
        return answer.get("validated") is not False, errors if isinstance(errors, Mapping) else {}

    def create(self, text: str) -> Mapping[str, Any]:
        """Start a run: once."""
        answer = self._post(f"{self._project}/run/spec/create_from_yaml", {"yaml_spec": text})
        execution = answer.get("run_execution")
        if not isinstance(execution, Mapping) or not isinstance(execution.get("id"), int | str):
            raise UnansweredError(f"VESSL's answer to the new run has no id: {json.dumps(answer)[:_SHOWN]}")
        return execution

    def runs(self, statuses: Sequence[str]) -> list[Mapping[str, Any]]:
        """List the project's newest runs with one of these statuses.

        Raises:
            UnansweredError: the answer is no list of runs; it does not show that none is alive.
        """
        query = {"statuses": ",".join(statuses), "limit": 100}
        answer = self._get(f"{self._project}/run_executions", query)
        if not isinstance(answer.get("results", ()), list | None):
            raise UnansweredError(f"VESSL's answer to the question for runs is no list of them: {json.dumps(answer)[:_SHOWN]}")
        return _tables(answer["results"])

    def run(self, run: str) -> Mapping[str, Any]:
        """Return what the service says of a run."""
        return self._get(f"{self._project}/run_executions/{quote(run, safe='')}")

    def terminate(self, run: str) -> None:
        """Ask for a run's end."""
        self._post(f"{self._project}/run_executions/{quote(run, safe='')}/terminate", {})

    def logs(self, run: str, start: float, end: float | None, limit: int) -> list[Mapping[str, Any]]:
        """List lines of a run's log between two times.

        From ``start`` to ``end`` (seconds since 1970), at most ``limit``.
        """
        query: dict[str, Any] = {"log_start": start, "log_limit": limit}
        if end is not None:
            query["log_end"] = end
        try:
            return _tables(self._get(f"{self._project}/run_executions/{quote(run, safe='')}/logs", query).get("logs"))
        except NotFoundError:  # a run that has not started has no log yet
            return []

    def system_metrics(self, run: str, after: float, before: float) -> Mapping[str, Any]:
        """Time series of a run's machine."""
        path = f"{self._project}/run_executions/{quote(run, safe='')}/system_metrics"
        found = self._get(path, {"after": after, "before": before}).get("metrics")
        return found if isinstance(found, Mapping) else {}

    def _get(self, path: str, query: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
        for attempt in range(1, self._attempts + 1):
            try:
                response = self._http.get(path, params=query)
                if response.status_code not in _RETRIED:
                    return self._answer("GET", path, response)
                failure = PlatformError(self._said("GET", path, response))
                wait = _retry_after(response.headers.get("Retry-After"))
            except (httpx.TransportError, UnansweredError) as error:
                failure, wait = self._unanswered("GET", path, error), None
            if attempt == self._attempts:
                raise failure
            pause = self._backoff * 2 ** (attempt - 1) * random.uniform(0.8, 1.2) if wait is None else wait
            logger.debug("%s; again in %.1f s", failure, pause)
            time.sleep(min(pause, _LONGEST_WAIT))
        raise AssertionError("the last attempt has raised")

    def _post(self, path: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            response = self._http.post(path, json=body)
        except httpx.TransportError as error:
            raise self._unanswered("POST", path, error) from None
        return self._answer("POST", path, response)

    def _unanswered(self, method: str, path: str, error: Exception) -> UnansweredError:
        if isinstance(error, UnansweredError):
            return error
        what = "answers too slowly" if isinstance(error, httpx.TimeoutException) else "cannot be reached, or hung up"
        reason = str(error) or type(error).__name__
        return UnansweredError(self._clean(f"VESSL at {self.credentials.host} {what}: {reason} ({method} {path})"))

    def _answer(self, method: str, path: str, response: httpx.Response) -> Mapping[str, Any]:
        code = response.status_code
        if code == 401:
            raise AuthenticationError(
                f"VESSL does not accept the token ({self._said(method, path, response)}); set VESSL_ACCESS_TOKEN anew, or run"
                " 'vessl configure'"
            )
        if code == 403:
            raise AuthenticationError(f"VESSL does not allow this to the token's owner ({self._said(method, path, response)})")
        if code == 404:
            raise NotFoundError(self._said(method, path, response))
        if code in (400, 409, 422):
            raise ConfigError(f"VESSL refuses it: {self._said(method, path, response)}")
        if not 200 <= code < 300:
            raise PlatformError(self._said(method, path, response))
        try:
            answer = response.json() if response.content else {}
        except ValueError:
            raise UnansweredError(f"VESSL's answer to {method} {path} is no JSON: {response.text[:_SHOWN]!r}") from None
        if not isinstance(answer, Mapping):
            raise UnansweredError(f"VESSL's answer to {method} {path} is no object: {response.text[:_SHOWN]!r}")
        return answer

    def _said(self, method: str, path: str, response: httpx.Response) -> str:
        """Return the service's own words on one line."""
        try:
            body = response.json()
        except ValueError:
            body = None
        words = [str(response.status_code)]
        if isinstance(body, Mapping):
            words += [str(body[key]) for key in ("code", "message") if body.get(key)]
            words += [f"{item.get('name')}: {item.get('message') or item.get('value')}" for item in _tables(body.get("fields"))]
        elif response.reason_phrase:
            words.append(response.reason_phrase)
        return self._clean(f"{' '.join(' '.join(words).split())[:_SHOWN]} ({method} {path})")

    def _clean(self, text: str) -> str:
        return text.replace(self.credentials.token, "***")


def _tables(value: Any) -> list[Mapping[str, Any]]:
    return [element for element in value if isinstance(element, Mapping)] if isinstance(value, list) else []


def _names(value: Any) -> list[str]:
    return sorted(str(table["name"]) for table in _tables(value) if "name" in table)


def _retry_after(value: str | None) -> float | None:
    """``Retry-After``: seconds, or a date (RFC 9110)."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
