"""Begin the shell command ``wmtp``, and ``python -m wmtp``."""

import signal

__all__ = ["start"]


def start() -> None:
    """Run the command line.

    Ctrl-C while it is imported ends the process without a traceback.
    """
    catches = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else it is ignored, as under nohup
    if catches:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from wmtp.cli import run_from_shell

    if catches:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run_from_shell()


if __name__ == "__main__":
    start()
