"""Plugin of wmtp-vessl: one launcher."""

from __future__ import annotations

from typing import Any

from wmtp.plugins.hookspecs import hookimpl
from wmtp_vessl.config import VesslLauncher

__all__ = ["wmtp_launchers"]


@hookimpl
def wmtp_launchers() -> list[type[Any]]:
    """VESSL."""
    return [VesslLauncher]
