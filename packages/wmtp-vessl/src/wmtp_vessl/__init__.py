"""VESSL launcher of WMTP."""

from wmtp_vessl.config import Cache, Port, VesslLauncher

__all__ = ["Cache", "Port", "VesslLauncher"]
