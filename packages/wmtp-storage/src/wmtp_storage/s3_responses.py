"""Parsing of S3's XML answers, with refusal of any other content."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.etree import ElementTree

from obstore.exceptions import GenericError

from wmtp_storage.failures import WrongAnswerError

if TYPE_CHECKING:
    from botocore.awsrequest import AWSResponse

__all__ = ["parsed", "text_of"]

_SHOWN = 80  # characters of a wrong answer


def parsed(answer: AWSResponse, root: str) -> ElementTree.Element:
    """Parse an answer that must be XML of one kind.

    Args:
        answer: its status is 200 where the store did what it was asked.
        root: the name of the outermost element.

    Raises:
        GenericError: the store refused, in the form in which obstore says so, or its answer is cut.
        WrongAnswerError: something else than the store answered.
    """
    status, body = answer.status_code, answer.content
    try:
        element = ElementTree.fromstring(body.strip())  # S3 sends spaces while it works
    except ElementTree.ParseError:
        element = None
    name = "" if element is None else element.tag.rpartition("}")[2]
    if element is not None and name == root and element.find("{*}Error") is not None:  # the store failed half way
        name = "Error"
    if status != 200 or name == "Error":  # S3 may find out that it failed when the status has been sent
        where = f" to {answer.headers['Location']}" if "Location" in answer.headers else ""
        status = status if status != 200 else 500
        raise GenericError(f"Server returned non-2xx status code: {status}{where}: {body.decode(errors='replace')}")
    if element is None and f"<{root}".encode() in body[: 4 * _SHOWN]:
        raise GenericError(f"the answer broke off after {len(body)} bytes, before the end of its {root}")
    if element is None or name != root:
        begins = " ".join(body[: 4 * _SHOWN].decode(errors="replace").split())[:_SHOWN]
        kind = answer.headers.get("Content-Type", "no content type")
        raise WrongAnswerError(f"what came is no whole {root} but {kind}, {len(body)} bytes that begin with {begins!r}")
    return element


def text_of(element: ElementTree.Element, name: str) -> str:
    """Return the text of a child; empty where there is none."""
    return element.findtext(f"{{*}}{name}") or ""
