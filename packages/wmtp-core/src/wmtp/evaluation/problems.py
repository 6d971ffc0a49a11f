"""Programming problems with tests: their prompts, and the scoring of solutions."""

from __future__ import annotations

import ast
import builtins
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

from attrs import frozen

from wmtp.data.base import BadExample
from wmtp.data.fields import text_field
from wmtp.data.files import read_records
from wmtp.data.loaders.humaneval import HumanEvalLoader
from wmtp.data.loaders.mbpp import MbppLoader, MbppProblem, mbpp_problem, mbpp_prompt
from wmtp.data.splits import data_files
from wmtp.errors import FileError, InputError, WMTPError
from wmtp.sandbox import Outcome, Sandbox

__all__ = ["Problem", "code_contests", "human_eval", "mbpp"]

logger = logging.getLogger("wmtp")

#: where Codex's completions were cut (arXiv 2107.03374, §3.1)
_FUNCTION_ENDS: Final = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@")
#: the problems that the paper's prompt shows (arXiv 2108.07732, §3)
_SHOTS: Final = ("mbpp/2", "mbpp/3", "mbpp/4")


@frozen(kw_only=True)
class Problem:
    """One problem.

    Args:
        id: its name.
        prompt: what the model is given.
        stop: texts that end a completion.
        before: the program's text before the completion: the prompt, or nothing.
        tests: Python code that raises where a solution is wrong; None for a problem of input and output.
        names: of the solution, which the tests use.
        setup: run before the tests.
        cases: pairs of input and expected output, for a problem without ``tests``.
    """

    id: str
    prompt: str
    stop: tuple[str, ...]
    before: str = ""
    tests: str | None = None
    names: tuple[str, ...] = ()
    setup: str = ""
    cases: tuple[tuple[str, str], ...] = ()

    def score(self, sandbox: Sandbox, completion: str) -> Outcome:
        """Run the program that a completion makes, and return whether it passes."""
        code = self.before + completion
        if self.tests is not None:
            return sandbox.run_tests(code, self.tests, names=self.names, setup=self.setup)
        outcome = Outcome(passed=False, detail="failed: the problem has no tests")
        for given, expected in self.cases:
            outcome = sandbox.run_program(code, given, expected)
            if not outcome.passed:
                break
        return outcome


def human_eval(path: Path | None) -> list[Problem]:
    """HumanEval (arXiv 2107.03374): of the package ``human-eval``, or the file ``path``."""
    problems = []
    for file in HumanEvalLoader().files(path):
        for where, record in _records([file]):
            prompt, entry = text_field(where, record, "prompt"), text_field(where, record, "entry_point")
            problems.append(
                Problem(
                    id=text_field(where, record, "task_id"),
                    prompt=prompt,
                    stop=_FUNCTION_ENDS,
                    before=prompt,
                    tests=f"{text_field(where, record, 'test')}\ncheck({entry})\n",
                    names=(entry,),
                    # the tests may use helpers from the prompt before the function
                    setup=f"{prompt}\n    pass\n",
                )
            )
    return problems


def mbpp(path: Path, *, split: str, shots: int) -> list[Problem]:
    """MBPP (arXiv 2108.07732).

    Args:
        path: the folder with the splits, or one file.
        split: which file of the folder.
        shots: 3: the prompt of the paper, with three solved problems; 0: a docstring of task and tests.
    """
    # the default says nothing of a file that is named
    files = data_files(path) if path.is_file() and split == "test" else MbppLoader(split).files(path)
    records = list(_records(files))
    shown = "".join(_published(shot, solved=True) for shot in _shots(path)) if shots else ""
    problems = []
    for where, record in records:
        found = mbpp_problem(where, record)
        tests, setup = "\n".join(found.tests), str(record.get("test_setup_code") or "")
        if shots:
            prompt, stop = shown + _published(found, solved=False), ("[DONE]",)
        else:
            prompt, stop = mbpp_prompt(found.text, found.tests), ('\n"""', "\nassert ", "\nprint(", "\n# Test")
        problems.append(
            Problem(
                id=found.id,
                prompt=prompt,
                stop=stop,
                tests=tests,
                names=_used_names(tests, setup, found.code),
                setup="".join(f"import {name}\n" for name in _modules(tests, setup)) + setup,
            )
        )
    return problems


def code_contests(path: Path, *, split: str, max_tests: int | None) -> list[Problem]:
    """CodeContests (arXiv 2203.07814): programs from standard input to standard output.

    Args:
        path: a data file, or a folder of them.
        split: which files of a folder, where their names tell splits.
        max_tests: maximum number of tests a problem: public ones first, then private, then generated ones. None: all.
    """
    problems = []
    for where, record in _records(data_files(path, preferred=split)):
        cases: list[tuple[str, str]] = []
        for key in ("public_tests", "private_tests", "generated_tests"):
            tests = record.get(key) or {}
            cases += zip(map(str, tests.get("input") or ()), map(str, tests.get("output") or ()), strict=True)
        if not cases:
            raise WMTPError(f"{where}: the problem has no tests (public_tests, private_tests, generated_tests)")
        description = text_field(where, record, "description").strip()
        problems.append(
            Problem(
                id=text_field(where, record, "name"),
                prompt=f"{description}\n\nSolution in python3:\n",
                stop=("\nSolution in ",),
                cases=tuple(cases[:max_tests]),
            )
        )
    return problems


def _records(files: Sequence[Path]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for record in read_records(files):
        if isinstance(record, BadExample):
            raise record
        yield record


def _shots(path: Path) -> Sequence[MbppProblem]:
    """Read the solved problems of the paper's prompt: 2, 3 and 4.

    Where they are missing, the first three training problems take their place.
    """
    folder = path if path.is_dir() else path.parent
    found: dict[str, MbppProblem] = {}
    for file in sorted(folder.glob("*.jsonl")):  # other data may lie beside
        for record in read_records([file]):
            if not isinstance(record, BadExample) and record[1].keys() >= {"task_id", "text", "code", "test_list"}:
                problem = mbpp_problem(*record)
                found[problem.id] = problem
    if all(name in found for name in _SHOTS):
        return [found[name] for name in _SHOTS]
    try:
        files = MbppLoader("train").files(folder)
    except InputError as error:
        raise FileError(
            f"{folder}: shots = 3 shows the problems 2, 3 and 4 of MBPP or the first three of its split train, which are not "
            "there; add train.jsonl, or set shots = 0"
        ) from error
    first = [mbpp_problem(*record) for record in islice(_records(files), 3)]
    logger.warning(
        "mbpp: the problems 2, 3 and 4 of the published prompt are not in %s; shown are %s",
        folder, ", ".join(problem.id for problem in first),
    )  # fmt: skip
    return first


def _published(problem: MbppProblem, *, solved: bool) -> str:
    tests = "\n".join(problem.tests)
    text = f"You are an expert Python programmer, and here is your task: {problem.text} Your code should pass these tests:"
    answer = f"{problem.code}\n[DONE]\n\n" if solved else ""
    return f"{text}\n\n{tests}\n[BEGIN]\n{answer}"


def _used_names(tests: str, setup: str, reference: str) -> tuple[str, ...]:
    """List the names that the tests take from the solution.

    These are names that neither Python nor the setup defines, and names that the reference solution defines. A builtin function
    is the solution's only where the reference solution redefines it: else a solution could redefine ``set`` or ``sorted`` and
    so be its own judge.
    """
    defined = (set(dir(builtins)) | _defined(setup)) - _defined(reference)
    names = [node for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Name)]
    defined |= {node.id for node in names if isinstance(node.ctx, ast.Store)} | set(_modules(tests, setup))
    return tuple(dict.fromkeys(node.id for node in names if isinstance(node.ctx, ast.Load) and node.id not in defined))


def _modules(tests: str, setup: str) -> list[str]:
    """Modules that tests use and only the solution imports, such as ``math.isclose``."""
    bases = [
        node.value.id
        for node in ast.walk(ast.parse(tests))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    ]
    return sorted({base for base in bases if base in sys.stdlib_module_names and base not in _defined(setup)})


def _defined(code: str) -> set[str]:
    """Functions, classes and modules that code defines."""
    try:
        nodes = list(ast.walk(ast.parse(code)))
    except SyntaxError:  # a few reference solutions are of Python 2
        return set()
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return names
