"""An assert of the packages says what it takes for granted: it is all that a user sees of it."""

import ast
from pathlib import Path

PACKAGES = Path(__file__).parent.parent / "packages"


def test_every_assert_has_a_message():
    found = []
    for file in sorted(PACKAGES.glob("*/src/**/*.py")):
        if "testing" in file.parts:  # pytest shows the values of an assert there
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            bare = isinstance(node, ast.Assert) and node.msg is None
            raised = isinstance(node, ast.Raise) and isinstance(node.exc, ast.Name) and node.exc.id == "AssertionError"
            if bare or raised:
                found.append(f"{file}:{node.lineno}")
    assert not found
