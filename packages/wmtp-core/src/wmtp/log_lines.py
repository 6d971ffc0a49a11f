"""Lines on standard error."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from wmtp.redaction import redact

__all__ = ["in_notebook", "lines_by_itself", "set_up_logging", "transformers_quiet"]


def in_notebook() -> bool:
    """Tell whether this process is the kernel of a notebook.

    Nothing is imported for it.
    """
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


@contextmanager
def lines_by_itself() -> Iterator[None]:
    """Show log lines meanwhile where logging is not configured.

    As in a script, and in a notebook. Nothing changes where the logger ``wmtp`` has handlers or a level, as under the command
    line, or where the program logs by itself: in a notebook the host may have done that (Colab), and then its level counts only
    if it lets the lines through.
    """
    logger, root = logging.getLogger("wmtp"), logging.getLogger()
    is_configured = bool(root.handlers) and (logger.isEnabledFor(logging.INFO) or not in_notebook())
    if logger.handlers or logger.level != logging.NOTSET or is_configured:
        yield
        return
    set_up_logging(verbose=False)
    try:
        yield
    finally:
        logger.handlers.clear()
        logger.setLevel(logging.NOTSET)
        logger.propagate = True


def set_up_logging(*, verbose: bool, rank: int = 0) -> None:
    """Write log lines to standard error.

    All of rank 0, of other ranks warnings with their number.
    """
    logger = logging.getLogger("wmtp")
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
    # a notebook shows standard error as if something were wrong
    handler = logging.StreamHandler(sys.stdout if in_notebook() else sys.stderr)
    handler.setFormatter(_Lines(f"rank {rank}: " if rank else ""))
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING if rank else logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False
    # torch 2.15 warns torchao's authors as soon as transformers imports torchao, which it does where it is installed
    logging.getLogger("torch.utils._pytree").addFilter(_is_for_users)


def _is_for_users(record: logging.LogRecord) -> bool:
    return "is an Enum subclass" not in str(record.msg)


class _Lines(logging.Formatter):
    """Plain lines; only a warning says that it is one."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self._prefix = prefix

    def format(self, record: logging.LogRecord) -> str:
        text = redact(super().format(record))
        return f"{record.levelname.lower()}: {self._prefix}{text}" if record.levelno >= logging.WARNING else text


@contextmanager
def transformers_quiet() -> Iterator[None]:
    """Turn off transformers' own lines and progress bars meanwhile.

    What they would say is raised or logged by us.
    """
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    # its bar over a file's tensors is tqdm's own, which no setting of transformers turns off
    if gguf := sys.modules.get("transformers.modeling_gguf_pytorch_utils"):
        gguf.__dict__["tqdm"] = theirs.tqdm
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()
