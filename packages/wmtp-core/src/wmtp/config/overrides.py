"""``--set KEY=VALUE``."""

from __future__ import annotations

import datetime
import re
from typing import Any

import tomli
from attrs import define

from wmtp.config.problems import KeyPath, dotted
from wmtp.errors import ConfigError
from wmtp.spelling import is_text, odd_character

__all__ = ["Override", "parse_override"]


@define
class Override:
    """One ``--set KEY=VALUE``.

    Args:
        path: the key.
        value: as TOML, or the text itself.
    """

    path: KeyPath
    value: Any

    def where(self, _: KeyPath) -> str:
        """Name the source in a message, in place of a file."""
        return f"--set {dotted(self.path)}"


def parse_override(text: str) -> Override:
    """Read ``KEY=VALUE``.

    The key is dotted TOML, the value is TOML or a bare word, which is a string.

    Raises:
        ConfigError: it has no ``=``, or a key or value that cannot be read.
    """
    if not is_text(text):
        raise ConfigError(f"--set {text!r}: is not UTF-8 text, which a config is; set the terminal to UTF-8")
    for match in re.finditer("=", text):
        path = _override_key(text[: match.start()].strip())
        if path is not None:
            return Override(path, _override_value(text, text[match.end() :].strip()))
    if "=" not in text:
        raise ConfigError(f"--set {text}: has no value; write --set {text or 'KEY'}=VALUE")
    key = text.partition("=")[0]
    raise ConfigError(f"--set {text}: '{key}' is no key; write it with dots, as in trainer.type=NAME{odd_character(key)}")


def _override_key(text: str) -> KeyPath | None:
    try:
        table: Any = tomli.loads(f"{text} = 0") if "\n" not in text else {}
    except tomli.TOMLDecodeError:
        return None
    path: list[str] = []
    while isinstance(table, dict) and len(table) == 1:
        [(key, table)] = table.items()
        path.append(key)
    return tuple(path) if path and table == 0 else None


def _override_value(whole: str, text: str) -> Any:
    try:
        # inside an array a comment cannot hide part of the text, and a line break starts no new key
        values = tomli.loads(f"value = [{text}]")["value"]
    except tomli.TOMLDecodeError as error:
        if text[:1] in ("[", "{", '"', "'"):
            raise ConfigError(f"--set {whole}: the value is not TOML: {error.msg}") from None
        return text
    if len(values) != 1 or text.endswith(",") or isinstance(values[0], datetime.date | datetime.time):
        return text
    return values[0]
