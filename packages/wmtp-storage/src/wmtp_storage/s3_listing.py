"""Lists buckets of S3, and believes only answers that are a listing of what was asked for.

obstore takes any XML for a listing: the login page of a proxy is an empty folder to it, and who finds a folder empty may remove
what belongs to it, or begin anew what was begun before.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode

from attrs import frozen
from botocore.exceptions import BotoCoreError
from obstore.exceptions import GenericError

from wmtp_storage.failures import WrongAnswerError
from wmtp_storage.s3_answers import parsed, text_of

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    from obstore import ObjectMeta

    from wmtp_storage.s3_questions import S3Questions

__all__ = ["S3Listing"]

#: pages in a row without an object, after which no end is expected any more
_MOST_EMPTY = 1000
#: the ends of names that stand for a bucket of another name
_ALIASES = ("-s3alias", "--op-s3", "--xa-s3")
#: the end of the names of directory buckets, which are listed in no order
_UNORDERED = ("--x-s3", "--xa-s3")


@frozen
class S3Listing:
    """Lists one bucket.

    Args:
        questions: of the bucket.
        bucket: its name.
    """

    questions: S3Questions
    bucket: str

    def pages(self, prefix: str) -> Iterator[list[ObjectMeta]]:
        """List all objects whose key begins with a prefix.

        Raises:
            WrongAnswerError: an answer is no listing, or one of something else, or it does not continue the one before.
            GenericError: the store refused, or could not be reached.
            ValueError: a key cannot be the name of a file.
        """
        token, tokens, last, empty = "", set[str](), "", 0
        while True:
            page = self._page({"prefix": prefix} | ({"continuation-token": token} if token else {}))
            found = page.findall("{*}Contents")
            for entry in found:
                last = self._checked_key(entry, prefix, last)
            yield [_meta(entry) for entry in found]
            if _is_last(page):
                return
            token = text_of(page, "NextContinuationToken")
            if not token or token in tokens:
                raise WrongAnswerError(f"a page says that more follows, and names {'the same page again' if token else 'none'}")
            tokens.add(token)
            empty = 0 if found else empty + 1
            if empty == _MOST_EMPTY:
                raise WrongAnswerError(f"{_MOST_EMPTY} pages came one after the other without an object")

    def names(self, prefix: str) -> list[str]:
        """List what is directly in a folder, by full keys: the first page of it. Raises as `pages`."""
        page = self._page({"prefix": prefix, "delimiter": "/"})
        folders = [text_of(entry, "Prefix") for entry in page.iterfind("{*}CommonPrefixes")]
        return [*folders, *(text_of(entry, "Key") for entry in page.iterfind("{*}Contents"))]

    def _page(self, query: dict[str, str]) -> Element:
        # a space must be %20, since a signature is made of it
        words = urlencode({"list-type": "2", **query}, quote_via=quote, safe="")
        try:
            page = parsed(self.questions.send("GET", f"{self.questions.address}?{words}"), "ListBucketResult")
        except BotoCoreError as error:
            raise GenericError(str(error)) from error
        bucket, prefix, echoed = text_of(page, "Name"), text_of(page, "Prefix"), text_of(page, "ContinuationToken")
        if bucket and bucket != self.bucket and not self.bucket.endswith(_ALIASES):
            raise WrongAnswerError(f"what came is the listing of another bucket, {bucket!r}")
        if prefix != query["prefix"]:
            raise WrongAnswerError(f"what came is the listing of {prefix!r}, not of {query['prefix']!r}")
        if echoed and echoed != query.get("continuation-token"):
            raise WrongAnswerError("what came is another page than was asked for")
        return page

    def _checked_key(self, entry: Element, prefix: str, last: str) -> str:
        """The key of an entry, which must follow the key before it.

        S3 orders keys by their bytes; some stores order them folder by folder.
        """
        key = text_of(entry, "Key")
        if not key or not key.startswith(prefix):
            raise WrongAnswerError(f"a listing of {prefix!r} came with {key!r} in it")
        is_ordered = not self.bucket.endswith(_UNORDERED)
        if key == last or (is_ordered and last and key < last and key.split("/") < last.split("/")):
            raise WrongAnswerError(f"a listing came in which {key!r} stands after {last!r}: its pages do not belong together")
        return key


def _is_last(page: Element) -> bool:
    """Whether no page follows."""
    said = text_of(page, "IsTruncated").strip().lower()
    if said not in ("true", "false"):
        raise WrongAnswerError(f"a listing came that does not say whether more follows (IsTruncated: {said!r})")
    return said == "false"


def _meta(entry: Element) -> ObjectMeta:
    """An object as obstore describes it: keys as it takes them, so without a slash at an end."""
    key = text_of(entry, "Key").removeprefix("/").removesuffix("/")
    for part in key.split("/"):
        if part in ("", ".", "..") or any(ord(letter) < 32 or ord(letter) == 127 for letter in part):
            raise ValueError(f"Path {key!r} contained the illegal part {part!r}")
    try:
        modified, size = datetime.fromisoformat(text_of(entry, "LastModified")), int(text_of(entry, "Size"))
    except ValueError:
        raise WrongAnswerError(f"a listing came in which {key!r} has no size or no time") from None
    return {
        "path": key,
        "last_modified": modified,
        "size": size,
        "e_tag": text_of(entry, "ETag") or None,
        "version": None,
    }
