"""Extension of griffe: attrs classes get the signature of attrs.

Without importing them.
"""

from __future__ import annotations

from typing import Any

from griffe import Attribute, Class, Extension, Function, Parameter, ParameterKind, Parameters

_DECORATORS = ("frozen", "define", "attrs.frozen", "attrs.define")


class AttrsSignatures(Extension):
    """Add ``__init__`` to attrs classes, from their annotated fields."""

    def on_class(self, *, cls: Class, **_: Any) -> None:
        """Add the method."""
        decorators = [str(decorator.value) for decorator in cls.decorators]
        attrs = [text for text in decorators if text.partition("(")[0] in _DECORATORS]
        if not attrs or "__init__" in cls.members:
            return
        kind = ParameterKind.keyword_only if "kw_only=True" in attrs[0] else ParameterKind.positional_or_keyword
        fields = [member for member in cls.members.values() if isinstance(member, Attribute) and _is_field(member)]
        parameters = [Parameter(f.name, annotation=f.annotation, kind=kind, default=_default(f)) for f in fields]
        cls.set_member("__init__", Function("__init__", parameters=Parameters(Parameter("self"), *parameters), parent=cls))


def _is_field(member: Attribute) -> bool:
    return member.annotation is not None and not str(member.annotation).startswith("ClassVar")


def _default(field: Attribute) -> str | None:
    """Read a field's default; ``...`` where each instance makes its own."""
    value = None if field.value is None else str(field.value)
    if value is None or not value.startswith(("field(", "Factory(", "component(")):
        return value
    for part in value.partition("(")[2].split(", "):
        if part.startswith("default="):
            return part.removeprefix("default=").rstrip(")")
    return "..." if value.startswith("Factory(") or "factory=" in value else None
