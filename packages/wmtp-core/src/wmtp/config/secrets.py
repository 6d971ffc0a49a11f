"""Values in a config that look like secrets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

from wmtp.config.problems import KeyPath, Problem
from wmtp.redaction import holds_credentials

__all__ = ["is_secret", "secret_problems"]

_SECRET_KEY: Final = re.compile(
    r"(^|[._-])(password|passwd|secret|secret_key|api_?key|access_key|private_key|access_token|auth_token|hf_token)$",
    re.IGNORECASE,
)
#: outside addresses, which are judged by their form
_SECRET_VALUE: Final = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{30,})", re.IGNORECASE
)


def is_secret(key: str, value: str) -> bool:
    """Recognize passwords, tokens, and addresses with a query or user info."""
    return bool(_SECRET_KEY.search(key) or _SECRET_VALUE.search(value)) or holds_credentials(value)


def secret_problems(value: Any, path: KeyPath) -> Iterator[Problem]:
    """Report values that look like secrets.

    A table named ``secrets`` holds the names that secrets have on a service, not their values.
    """
    if isinstance(value, dict):
        for key, element in value.items():
            yield from secret_problems(element, (*path, key))
    elif isinstance(value, list):
        for index, element in enumerate(value):
            yield from secret_problems(element, (*path, index))
    elif isinstance(value, str) and value and is_secret("" if "secrets" in path[:-1] else str(path[-1]), value):
        yield Problem(
            path,
            "looks like a secret, which would be saved with the run; remove it, and set the environment variable that the"
            " service reads (AWS_*, MLFLOW_TRACKING_*, HF_TOKEN …); what needs a signed address, fetch by wmtp fetch first",
        )
