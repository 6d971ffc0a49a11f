"""Registry of components, with the plugin that provides each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from attrs import field, frozen

from wmtp.errors import PluginError
from wmtp.plugins.checks import contract_problem
from wmtp.plugins.components import KINDS
from wmtp.spelling import did_you_mean

__all__ = ["Plugin", "Provided", "Registry"]

#: kind → the package of this project that has more of it, for those who have not installed it
_PACKAGES: Final = {"trainers": "wmtp-algos", "storages": "wmtp-storage", "launchers": "wmtp-vessl"}


@frozen(kw_only=True)
class Plugin:
    """One entry point of the group ``wmtp``.

    Args:
        name: the entry point's name.
        distribution: the package that it belongs to.
        version: of that package.
        components: kind → names; empty if the plugin is broken.
        reason: why it is broken; None if it is not.
    """

    name: str
    distribution: str
    version: str
    components: Mapping[str, tuple[str, ...]] = field(factory=dict)
    reason: str | None = None

    @property
    def status(self) -> str:
        """``ok`` or ``broken``."""
        return "ok" if self.reason is None else "broken"

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"


@frozen(kw_only=True)
class Provided:
    """One component: its config class and who provides it.

    Args:
        kind: a key of `wmtp.plugins.components.KINDS`.
        cls: the config class.
        plugin: None for a class that Python code uses without having registered it.
    """

    kind: str
    cls: type[Any]
    plugin: Plugin | None = None

    @property
    def type(self) -> str:
        """Name of the component in TOML."""
        return self.cls.type


def _providers(provided: Sequence[Provided]) -> list[str]:
    """Name who provides a component.

    Two of one package are told apart by entry point and class.
    """
    names = [str(one.plugin) for one in provided]
    if len(set(names)) == len(names):
        return names
    entries = [None if one.plugin is None else one.plugin.name for one in provided]
    return [
        f"{name} (entry point {entry}, {one.cls.__module__}.{one.cls.__qualname__})"
        for name, entry, one in zip(names, entries, provided, strict=True)
    ]


class Registry:
    """Components of all loaded plugins.

    Args:
        plugins: all of them, the broken ones too.
        components: those of the working plugins.
        left_out: entry names that ``WMTP_PLUGINS`` left out.
    """

    def __init__(self, plugins: Iterable[Plugin], components: Iterable[Provided], left_out: Iterable[str] = ()) -> None:
        self.plugins = tuple(plugins)
        self.components = tuple(components)
        self.left_out = tuple(left_out)
        self._by_name: dict[tuple[str, str], list[Provided]] = {}
        for provided in self.components:
            self._by_name.setdefault((provided.kind, provided.type), []).append(provided)

    @property
    def broken(self) -> tuple[Plugin, ...]:
        """Plugins that cannot be used."""
        return tuple(plugin for plugin in self.plugins if plugin.reason is not None)

    @property
    def conflicts(self) -> tuple[str, ...]:
        """List components and URI schemes that more than one plugin provides."""
        claims = {f"{KINDS[kind]} '{type_}'": provided for (kind, type_), provided in self._by_name.items()}
        for storage in self.of_kind("storages"):
            for scheme in storage.cls.schemes:
                claims.setdefault(f"storage of {scheme}:// URIs", []).append(storage)
        return tuple(
            f"the {what} is provided by {' and by '.join(_providers(provided))}; uninstall one of them, or name the"
            " entry points to load in the environment variable WMTP_PLUGINS"
            for what, provided in claims.items()
            if len(provided) > 1
        )

    def require_unambiguous(self) -> None:
        """Refuse a component that two plugins provide.

        That is one of the same kind and type, or a URI scheme.

        Raises:
            PluginError: naming both distributions and their versions.
        """
        if self.conflicts:
            raise PluginError("\n".join(self.conflicts))

    def find(self, kind: str, type_: str) -> Provided | None:
        """Find the component of this kind and TOML name, if any."""
        found = self._by_name.get((kind, type_))
        return found[0] if found else None

    def of_kind(self, kind: str) -> tuple[Provided, ...]:
        """List all components of a kind, by name."""
        return tuple(sorted((p for p in self.components if p.kind == kind), key=lambda p: p.type))

    def named(self, type_: str) -> tuple[Provided, ...]:
        """List all components with this TOML name, of whatever kind."""
        return tuple(provided for provided in self.components if provided.type == type_)

    def provider(self, cls: type[Any]) -> Plugin | None:
        """Find the plugin that registered a config class, if any."""
        return next((provided.plugin for provided in self.components if provided.cls is cls), None)

    def with_classes(self, classes: Iterable[tuple[str, type[Any]]]) -> Registry:
        """Return a registry that also knows unregistered classes.

        Those are (kind, class) pairs which Python code uses without a plugin; they hide namesakes.

        Raises:
            PluginError: a class breaks the contract of its kind, or two have one name.
        """
        extra = [Provided(kind=kind, cls=cls) for kind, cls in dict.fromkeys(classes) if self.provider(cls) is None]
        by_name: dict[tuple[str, str], Provided] = {}
        for new in extra:
            other = by_name.setdefault((new.kind, str(getattr(new.cls, "type", None))), new)
            if other is not new:
                names = " and ".join(f"{one.cls.__module__}.{one.cls.__qualname__}" for one in (other, new))
                raise PluginError(
                    f"two classes are called the {KINDS[new.kind]} '{new.type}', {names}; give one another type, or make the "
                    "config anew where a cell of a notebook has defined the class again"
                )
        if problems := [problem for new in extra if (problem := contract_problem(new.kind, new.cls))]:
            raise PluginError("\n".join(problems))
        if not extra:
            return self
        hidden = {(provided.kind, provided.type) for provided in extra}
        kept = (provided for provided in self.components if (provided.kind, provided.type) not in hidden)
        return Registry(self.plugins, [*kept, *extra], self.left_out)

    def missing(self, kind: str, type_: str) -> str:
        """Write the message for a component that no plugin provides."""
        names = [provided.type for provided in self.of_kind(kind)]
        text = f"no plugin provides '{type_}'"
        hint = did_you_mean(type_, names)
        text += f"; {hint} installed:" if hint else "; installed:"
        text += f" {', '.join(names) or 'none'}"
        if others := sorted({KINDS[provided.kind] for provided in self.named(type_)}):
            text += f"; '{type_}' is a {' and a '.join(others)}, not a {KINDS[kind]}"
        return text + self.remedy(kind, type_)

    def remedy(self, kind: str, type_: str) -> str:
        """Suggest a package to install, or a plugin to repair.

        For a message about a missing component.
        """
        text = ""
        package = _PACKAGES.get(kind)
        installed = {plugin.distribution for plugin in self.plugins} | set(self.left_out)
        if package is not None and package not in installed:
            text += f"; the package {package} has {KINDS[kind]}s: pip install {package}"
        for plugin in self.broken:
            text += f"; the plugin {plugin} is broken: {plugin.reason}"
        if self.left_out:
            text += f"; WMTP_PLUGINS leaves out {', '.join(self.left_out)}"
        return text
