"""Count MBPP solutions with one mistake that fail their tests.

    uv run python bench/mutations.py data/mbpp [--seed N]

Each copy runs in the sandbox of ``pass-at-k``: the code is MBPP's, with one place changed.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from wmtp import Example, Mbpp, Mutated
from wmtp.evaluation.problems import mbpp
from wmtp.sandbox import Limits, Sandbox


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    problems = {problem.id: problem for problem in mbpp(arguments.folder, split="train", shots=0)}
    loader = Mutated(of=Mbpp(uri=str(arguments.folder), split="train"), seed=arguments.seed).build()
    wrong = [e for e in loader.examples(arguments.folder) if isinstance(e, Example) and e.is_correct is False]
    sandbox = Sandbox(Limits(seconds=5.0))

    def fails(example: Example) -> bool:
        return not problems[example.group or ""].score(sandbox, example.completion).passed

    with ThreadPoolExecutor(2) as pool:
        failed = sum(pool.map(fails, wrong))
    print(f"{failed} of {len(wrong)} wrong copies fail: {failed / len(wrong):.1%}")


if __name__ == "__main__":
    main()
