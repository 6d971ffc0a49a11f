"""Storage backend for files inside installed Python packages."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from wmtp.errors import WMTPError
from wmtp.storage.base import Storage

__all__ = ["Package"]


class Package(Storage):
    """Files inside an installed Python package: ``package://MODULE/PATH``.

    They are used in place.
    """

    def exists(self, uri: str) -> bool:
        """Return True if the package is installed and holds the path."""
        try:
            self._path(uri)
        except WMTPError:
            return False
        return True

    def localize(self, uri: str, cache_dir: Path) -> Path:
        """Return the path inside the package; see `Storage.localize`.

        ``cache_dir`` is not used.
        """
        return self._path(uri)

    def push(self, path: Path, uri: str) -> None:
        """Refused: what a package installed is not changed."""
        raise WMTPError(f"{path} cannot be copied to {uri}: the files of an installed package are not changed")

    def _path(self, uri: str) -> Path:
        parts = urlsplit(uri)
        module, inside = parts.netloc, PurePosixPath(unquote(parts.path).lstrip("/"))
        if not module.isidentifier() or ".." in inside.parts:
            raise WMTPError(f"{uri}: write package://MODULE/PATH, with the name by which Python imports the package")
        # a top-level module is found without running any of its code
        spec = find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            raise WMTPError(
                f"{uri}: no Python package {module!r} is installed here; install it, for instance: pip install {module}"
            )
        for location in spec.submodule_search_locations:
            path = Path(location, inside)
            if path.exists():
                return path
        raise WMTPError(f"{uri}: the installed package {module!r} holds no {str(inside)!r}")
