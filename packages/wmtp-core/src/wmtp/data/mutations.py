"""Small mistakes put into Python code.

The text of one place is changed, everything else stays as it was written.

Kinds of mistakes, after the operators of mutation testing (DeMillo, Lipton and Sayward, "Hints on Test Data Selection", 1978):

- ``comparison``: ``<`` becomes ``<=`` or ``>``, ``==`` becomes ``!=``, ``in`` becomes ``not in`` …
- ``constant``: a whole number is one too large or too small, ``True`` is ``False``;
- ``boolean``: ``and`` becomes ``or``;
- ``negation``: the condition of ``if``, ``while``, ``assert`` or a conditional expression is negated;
- ``arithmetic``: ``+`` becomes ``-``, ``*`` becomes ``+`` …, ``+=`` becomes ``-=``;
- ``arguments``: two neighbouring arguments of a call, or the operands of ``-``, ``/``, ``//``, ``%``, change places;
- ``statement``: an assignment or a call that stands alone is left out.
"""

from __future__ import annotations

import ast
import itertools
import random
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Final, Literal, get_args

from attrs import frozen

__all__ = ["KINDS", "Kind", "mutants"]

Kind = Literal["comparison", "constant", "boolean", "negation", "arithmetic", "arguments", "statement"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

_COMPARISONS: Final = {
    "<": ("<=", ">"),
    "<=": ("<", ">="),
    ">": (">=", "<"),
    ">=": (">", "<="),
    "==": ("!=",),
    "!=": ("==",),
    "is": ("is not",),
    "is not": ("is",),
    "in": ("not in",),
    "not in": ("in",),
}
_ARITHMETIC: Final = {"+": "-", "-": "+", "*": "+", "/": "*", "//": "*", "%": "*", "**": "*"}
_NOT_COMMUTATIVE: Final = (ast.Sub, ast.Div, ast.FloorDiv, ast.Mod)
#: calls whose result does not depend on the order of their arguments
_SYMMETRIC: Final = frozenset({"max", "min", "gcd", "lcm", "hypot", "isclose"})
#: what is inside has no effect, or no reliable place in the text (before Python 3.12 that of an f-string)
_LEFT_ALONE: Final = ("annotation", "returns", "type_params")


@frozen
class _Edit:
    """``source[start:stop]`` becomes ``text``; places are bytes of UTF-8."""

    kind: Kind
    start: int
    stop: int
    text: bytes


def mutants(prompt: str, code: str, *, count: int, kinds: tuple[Kind, ...], draw: random.Random) -> list[str] | None:
    """Make different versions of ``code``, each with one mistake.

    Each parses, and is another program than ``code``. Whether it also *does* something else cannot be decided for every
    program; mistakes that often do nothing are not made.

    Args:
        prompt: text before the code, for instance the signature; it is never changed.
        code: complete Python code, alone or with the prompt.
        count: how many at most.
        kinds: of mistakes. Each kind that is possible is as likely as any other.
        draw: decides which are taken.

    Returns:
        ``count`` versions, or fewer where there are no more; None if the code is no Python code.
    """
    for given in (prompt, ""):
        tree = _parsed(given + code)
        if tree is not None:
            break
    else:
        return None
    source = (given + code).encode()
    first = len(given.encode())
    edits: dict[Kind, list[_Edit]] = {kind: [] for kind in kinds}
    for edit in _Finder(source).edits(tree):
        if edit.start >= first and edit.kind in edits:
            edits[edit.kind].append(edit)
    found: list[str] = []
    seen = {ast.dump(tree)}
    while len(found) < count and any(edits.values()):
        possible: list[Kind] = [kind for kind, some in edits.items() if some]
        kind = draw.choice(possible)
        edit = edits[kind].pop(draw.randrange(len(edits[kind])))
        changed = (source[: edit.start] + edit.text + source[edit.stop :]).decode()
        other = _parsed(changed)
        if other is not None and (dumped := ast.dump(other)) not in seen:
            seen.add(dumped)
            found.append(changed[len(given) :])
    return found


def _parsed(source: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other people's code: invalid escapes, "is" with a literal
            # parsing alone lets pass what no compiler takes: a return outside of a function
            compile(source, "<code>", "exec", dont_inherit=True)
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


class _Finder:
    """Finds the places of a source where a mistake can be made."""

    def __init__(self, source: bytes) -> None:
        self._source = source
        self._lines = list(itertools.accumulate((len(line) + 1 for line in source.split(b"\n")), initial=0))

    def edits(self, node: ast.AST) -> Iterator[_Edit]:
        """All edits in ``node`` and below."""
        if isinstance(node, ast.JoinedStr):
            return
        rule: Callable[[ast.AST], Iterator[_Edit]] | None = getattr(self, f"_in_{type(node).__name__.lower()}", None)
        if rule is not None:
            yield from rule(node)
        for name, value in ast.iter_fields(node):
            if name in _LEFT_ALONE:
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from self.edits(child)
            if isinstance(value, list) and name in ("body", "orelse", "finalbody") and len(value) > 1:
                yield from self._statements(value)

    def _start(self, node: ast.AST) -> int:
        return self._lines[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]

    def _stop(self, node: ast.AST) -> int:
        return self._lines[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]

    def _text(self, node: ast.AST) -> bytes:
        return self._source[self._start(node) : self._stop(node)]

    def _operator(self, left: ast.AST, right: ast.AST) -> tuple[int, int, str] | None:
        """Find place and text of the operator between two operands.

        None if more is between them, such as a comment.
        """
        start, stop = self._stop(left), self._start(right)
        gap = re.fullmatch(rb"([\s\\()]*)([^\s\\()#]+(?:\s+(?:in|not))?)([\s\\()]*)", self._source[start:stop])
        if gap is None:
            return None
        return start + gap.start(2), start + gap.end(2), " ".join(gap[2].decode().split())

    def _in_compare(self, node: ast.Compare) -> Iterator[_Edit]:
        for left, right in itertools.pairwise([node.left, *node.comparators]):
            if place := self._operator(left, right):
                for text in _COMPARISONS.get(place[2], ()):
                    yield _Edit("comparison", *place[:2], text.encode())

    def _in_boolop(self, node: ast.BoolOp) -> Iterator[_Edit]:
        other = b"or" if isinstance(node.op, ast.And) else b"and"
        for left, right in itertools.pairwise(node.values):
            if place := self._operator(left, right):
                yield _Edit("boolean", *place[:2], other)

    def _in_binop(self, node: ast.BinOp) -> Iterator[_Edit]:
        if (place := self._operator(node.left, node.right)) and place[2] in _ARITHMETIC:
            yield _Edit("arithmetic", *place[:2], _ARITHMETIC[place[2]].encode())
        if isinstance(node.op, _NOT_COMMUTATIVE):
            yield from self._exchanged(node.left, node.right)

    def _in_augassign(self, node: ast.AugAssign) -> Iterator[_Edit]:
        if (place := self._operator(node.target, node.value)) and (other := _ARITHMETIC.get(place[2].removesuffix("="))):
            yield _Edit("arithmetic", *place[:2], f"{other}=".encode())

    def _in_constant(self, node: ast.Constant) -> Iterator[_Edit]:
        if isinstance(node.value, bool):
            yield _Edit("constant", self._start(node), self._stop(node), str(not node.value).encode())
        elif isinstance(node.value, int) and re.fullmatch(rb"[0-9]{1,18}", self._text(node)):
            for value in (node.value + 1, node.value - 1):
                if value >= 0:
                    yield _Edit("constant", self._start(node), self._stop(node), str(value).encode())

    def _in_call(self, node: ast.Call) -> Iterator[_Edit]:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in _SYMMETRIC or any(isinstance(argument, ast.Starred) for argument in node.args):
            return
        for left, right in itertools.pairwise(node.args):
            yield from self._exchanged(left, right)

    def _exchanged(self, left: ast.AST, right: ast.AST) -> Iterator[_Edit]:
        start, between, then, stop = self._start(left), self._stop(left), self._start(right), self._stop(right)
        source = self._source
        # a parenthesis between them could belong to either
        if not re.search(rb"[()]", source[between:then]):
            text = source[then:stop] + source[between:then] + source[start:between]
            yield _Edit("arguments", start, stop, text)

    def _negated(self, node: ast.If | ast.While | ast.Assert | ast.IfExp) -> Iterator[_Edit]:
        test = node.test
        start, stop = self._start(test), self._stop(test)
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            yield _Edit("negation", start, stop, self._text(test.operand))
        elif isinstance(test, ast.Name | ast.Call | ast.Attribute | ast.Subscript | ast.Compare):
            yield _Edit("negation", start, start, b"not ")
        else:
            yield _Edit("negation", start, stop, b"not (" + self._source[start:stop] + b")")

    _in_if = _in_while = _in_assert = _in_ifexp = _negated

    def _statements(self, block: list[ast.stmt]) -> Iterator[_Edit]:
        for node in block:
            alone = isinstance(node, ast.Assign | ast.AugAssign) or (
                isinstance(node, ast.Expr) and isinstance(node.value, ast.Call | ast.Await)
            )
            start, stop = self._lines[node.lineno - 1], self._lines[(node.end_lineno or node.lineno)]
            # nothing else on its lines but a comment
            before, after = self._source[start : self._start(node)], self._source[self._stop(node) : stop]
            if alone and not before.strip() and re.fullmatch(rb"\s*(#.*\s*)?", after):
                yield _Edit("statement", start, stop, b"")
