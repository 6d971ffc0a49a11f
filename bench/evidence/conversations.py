"""Writes MBPP as conversations.

A user gives the task and its tests, an assistant the solution.

    python bench/evidence/conversations.py MBPP_FOLDER DIR

MBPP_FOLDER has the splits as ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl``; each becomes ``DIR/mbpp-SPLIT.jsonl``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

SPLITS = ("train", "validation", "test")


def conversation(problem: dict[str, Any]) -> dict[str, Any]:
    """Write one problem as two messages."""
    tests = "\n".join(problem["test_list"])
    task = f"{problem['text'].strip()}\nIt must pass these tests:\n{tests}"
    solution = f"{problem['code'].strip()}\n".replace("\r\n", "\n").replace("\t", "    ")
    return {
        "id": f"mbpp-{problem['task_id']}",
        "messages": [{"role": "user", "content": task}, {"role": "assistant", "content": f"```python\n{solution}```"}],
    }


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("mbpp", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        problems = [json.loads(line) for line in (arguments.mbpp / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        lines = [json.dumps(conversation(problem)) + "\n" for problem in problems]
        (arguments.folder / f"mbpp-{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"mbpp-{split}.jsonl: {len(lines)} conversations")


if __name__ == "__main__":
    main()
