"""Base suite of every config class."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from typing import Any, ClassVar

import attrs
import pytest
import tomli_w

from wmtp.config.converter import make_converter
from wmtp.config.tree import plain_value
from wmtp.plugins.checks import contract_problem
from wmtp.plugins.components import Component, component
from wmtp.plugins.loader import load_plugins

__all__ = ["ComponentTests"]

_HEAVY = ("torch", "transformers", "mlflow")


class ComponentTests:
    """Part of every suite that tests the config class.

    Args:
        config: an instance of the config class under test.
        kind: a key of `wmtp.plugins.components.KINDS`.
        registered: whether an installed plugin must provide the class; False for one that is used from Python only.
    """

    __test__ = False
    kind: ClassVar[str]
    config: ClassVar[Any]
    registered: ClassVar[bool] = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__test__" not in cls.__dict__:
            cls.__test__ = True

    def test_config_is_a_frozen_attrs_class(self) -> None:
        """A config is a value: nothing may change it."""
        fields = attrs.fields_dict(type(self.config))
        assert "type" not in fields, "'type' must be a class variable, not a field"
        assert isinstance(type(self.config).type, str)
        for name in fields:
            with pytest.raises(attrs.exceptions.FrozenInstanceError):
                setattr(self.config, name, getattr(self.config, name))

    def test_config_class_keeps_the_contract(self) -> None:
        """Base, flags and names are those of `wmtp.plugins.contract`.

        The same is checked where a plugin is loaded.
        """
        problem = contract_problem(self.kind, type(self.config))
        assert problem is None, problem

    def test_config_survives_toml(self) -> None:
        """A snapshot of a run must read back as the same config."""
        holder = attrs.make_class("Holder", {"component": component(self.kind, type=Component)}, frozen=True)
        text = tomli_w.dumps(plain_value(holder(self.config)))
        registry = load_plugins().with_classes([(self.kind, type(self.config))])
        read = make_converter(registry).structure(tomllib.loads(text), holder)
        assert read.component == self.config, f"read back from this TOML it differs:\n{text}"

    def test_config_class_imports_nothing_heavy(self) -> None:
        """``wmtp check`` runs where there is no torch, and answers at once."""
        if not self.registered:
            pytest.skip("registered = False")
        module = type(self.config).__module__
        code = (
            f"import importlib, sys; sys.path[:] = {sys.path!r}; importlib.import_module({module!r}); "
            f"print(*({set(_HEAVY)!r} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "", f"importing {module} imports {done.stdout.strip()}; import it in build() instead"

    def test_config_class_is_registered(self) -> None:
        """TOML finds the class by the entry point of its package."""
        if not self.registered:
            pytest.skip("registered = False")
        registry = load_plugins()
        cls = type(self.config)
        broken = "; ".join(f"{plugin} is broken: {plugin.reason}" for plugin in registry.broken)
        found = registry.find(self.kind, cls.type)
        assert found is not None, f"no installed plugin provides the {self.kind} '{cls.type}'. {broken}"
        assert found.cls is cls, f"'{cls.type}' is {found.cls} of {found.plugin}"
