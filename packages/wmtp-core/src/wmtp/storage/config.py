"""Config classes of the built-in storage backends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from wmtp.plugins.contract import StorageBackendConfig

if TYPE_CHECKING:
    from wmtp.storage.base import Storage

__all__ = ["FileStorage", "HubStorage", "PackageStorage"]


@frozen(kw_only=True)
class FileStorage(StorageBackendConfig):
    """Files and folders of this machine: plain paths, ``~`` and ``file:///…``."""

    type = "file"
    schemes = ("file",)

    def build(self) -> Storage:
        """Make the backend."""
        from wmtp.storage.file import File

        return File()


@frozen(kw_only=True)
class PackageStorage(StorageBackendConfig):
    """Files that an installed Python package brings along: ``package://MODULE/PATH``."""

    type = "package"
    schemes = ("package",)
    holds_checkpoints = False

    def build(self) -> Storage:
        """Make the backend."""
        from wmtp.storage.package import Package

        return Package()


@frozen(kw_only=True)
class HubStorage(StorageBackendConfig):
    """Hugging Face hub: ``hf://ORG/NAME``, ``hf://ORG/NAME@REVISION/PATH``, ``hf://datasets/ORG/NAME``.

    Endpoint, cache, offline mode and token are those of huggingface_hub: ``HF_ENDPOINT``, ``HF_HOME``, ``HF_HUB_OFFLINE``,
    ``hf auth login`` or ``HF_TOKEN``.

    Args:
        private: whether a repository that ``wmtp push`` makes is private. One that is there already stays as it is.
    """

    type = "hf"
    schemes = ("hf",)
    holds_checkpoints = False
    private: bool = True

    @staticmethod
    def check_uri(uri: str) -> None:
        """Refuse what cannot be a name of the hub."""
        from wmtp.storage.hub.names import parse_hub_uri

        parse_hub_uri(uri)

    def build(self) -> Storage:
        """Make the backend."""
        from wmtp.errors import WMTPError

        try:
            from wmtp.storage.hub.backend import Hub
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "huggingface_hub":
                raise
            raise WMTPError("hf:// needs huggingface_hub: pip install 'wmtp-core[train]'") from None

        return Hub(private=self.private)
