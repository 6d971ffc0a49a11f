"""``python -m wmtp``."""

from wmtp.cli import run_from_shell

run_from_shell()
