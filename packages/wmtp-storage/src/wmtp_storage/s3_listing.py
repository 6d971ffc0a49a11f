"""Listing of S3 buckets, with refusal of answers to another request.

obstore takes any XML for a listing: the login page of a proxy is an empty folder to it, and who finds a folder empty may remove
what belongs to it, or begin anew what was begun before.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, unquote_plus, urlencode

from attrs import frozen
from botocore.exceptions import BotoCoreError
from obstore.exceptions import GenericError

from wmtp_storage.failures import WrongAnswerError
from wmtp_storage.s3_responses import text_of

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    from obstore import ObjectMeta

    from wmtp_storage.s3_requests import S3Requests

__all__ = ["S3Listing"]

#: pages in a row without an object, after which no end is expected any more
_MOST_EMPTY = 1000
_PAGE = 1000  #: objects that a store lists at once, where it says nothing else
#: the ends of names that stand for a bucket of another name
_ALIASES = ("-s3alias", "--op-s3", "--xa-s3")
#: the end of the names of directory buckets, which are listed in no order
_UNORDERED = ("--x-s3", "--xa-s3")


@frozen
class S3Listing:
    """Lists one bucket.

    Args:
        requests: of the bucket.
        bucket: its name.
    """

    requests: S3Requests
    bucket: str

    @property
    def _is_ordered(self) -> bool:
        return not self.bucket.endswith(_UNORDERED)

    def pages(self, prefix: str) -> Iterator[list[ObjectMeta]]:
        """List all objects whose key begins with a prefix.

        Raises:
            WrongAnswerError: an answer is no listing, or one of something else, or it does not continue the one before.
            GenericError: the store refused, or could not be reached.
        """
        token, tokens, empty = "", set[str](), 0
        last: ObjectMeta | None = None
        keys = set[str]()  # of a bucket without an order, in which pages that come again show by nothing else
        while True:
            page = self._page({"prefix": prefix} | ({"continuation-token": token} if token else {}))
            found: list[ObjectMeta] = []
            for entry in page.findall("{*}Contents"):
                meta = _meta(entry, _decoded(page, text_of(entry, "Key")))
                if not self._repeats(meta, prefix, last) and meta["path"] not in keys:
                    found.append(meta)
                last = meta
            if not self._is_ordered:
                keys.update(each["path"] for each in found)
            yield [each | {"path": _path(each)} for each in found]  # type: ignore[misc]
            if _is_last(page):
                return
            token = text_of(page, "NextContinuationToken")
            if not token or token in tokens:
                raise WrongAnswerError(_no_next(page, token))
            tokens.add(token)
            empty = 0 if found else empty + 1
            if empty == _MOST_EMPTY:
                raise WrongAnswerError(f"{_MOST_EMPTY} pages came one after the other without a new object")

    def names(self, prefix: str) -> list[str]:
        """List what is directly in a folder, by full keys.

        Only the first page of it. Raises as `pages`.
        """
        page = self._page({"prefix": prefix, "delimiter": "/"})
        folders = [text_of(entry, "Prefix") for entry in page.iterfind("{*}CommonPrefixes")]
        keys = [text_of(entry, "Key") for entry in page.iterfind("{*}Contents")]
        return [_decoded(page, name) for name in (*folders, *keys)]

    def _page(self, query: dict[str, str]) -> Element:
        # encoded, since XML cannot hold every character of a key. A space must be %20: a signature is made of it
        words = urlencode({"list-type": "2", "encoding-type": "url", **query}, quote_via=quote, safe="")
        try:
            page = self.requests.ask("GET", f"{self.requests.address}?{words}", "ListBucketResult")
        except BotoCoreError as error:
            raise GenericError(str(error)) from error
        entries = [*page.iterfind("{*}Contents"), *page.iterfind("{*}CommonPrefixes")]
        bucket, prefix, echoed = text_of(page, "Name"), page.findtext("{*}Prefix"), text_of(page, "ContinuationToken")
        if bucket and bucket != self.bucket and not self.bucket.endswith(_ALIASES):
            raise WrongAnswerError(f"what came is the listing of another bucket, {bucket!r}")
        # a store that echoes no prefix is believed where its keys have it, which is looked at for each of them
        if prefix is not None and query["prefix"] not in (prefix, _decoded(page, prefix)):
            raise WrongAnswerError(f"what came is the listing of {prefix!r}, not of {query['prefix']!r}")
        if prefix is None and query["prefix"] and not entries:
            raise WrongAnswerError("an empty listing came that does not say of what")
        asked = query.get("continuation-token")
        if echoed and asked not in (echoed, unquote(echoed), unquote_plus(echoed)):
            raise WrongAnswerError("what came is another page than was asked for")
        count = text_of(page, "KeyCount").strip()
        if count.isdecimal() and int(count) > len(entries):
            raise WrongAnswerError(f"a listing came with {len(entries)} of the {count} entries that it counts")
        return page

    def _repeats(self, meta: ObjectMeta, prefix: str, before: ObjectMeta | None) -> bool:
        """Tell whether an entry repeats the one before; else it must follow.

        S3 orders keys by their bytes; some stores order them folder by folder.
        """
        key, last = meta["path"], "" if before is None else before["path"]
        if not key or not key.startswith(prefix):
            raise WrongAnswerError(f"a listing of {prefix!r} came with {key!r} in it")
        if key == last:  # of two versions the one counts that is there when it is asked for, see `list_objects`
            return meta == before
        if self._is_ordered and last and key < last and key.split("/") < last.split("/"):
            raise WrongAnswerError(f"a listing came in which {key!r} stands after {last!r}: its pages do not belong together")
        return False


def _decoded(page: Element, text: str) -> str:
    """Decode a key of a page that says it is percent-encoded."""
    return unquote_plus(text) if text_of(page, "EncodingType") == "url" else text


def _no_next(page: Element, token: str) -> str:
    if token:
        return "a page says that more follows, and names the same page again"
    if page.find("{*}NextMarker") is not None or page.find("{*}Marker") is not None:
        return (
            "the server lists by the first version of the protocol (ListObjects), a thousand objects and no more;"
            " only ListObjectsV2 is understood"
        )
    return "a page says that more follows, and names none"


def _is_last(page: Element) -> bool:
    """Return True if no page follows."""
    said = text_of(page, "IsTruncated").strip().lower()
    if not said:  # some stores leave it out
        if text_of(page, "NextContinuationToken"):
            return False
        limit = text_of(page, "MaxKeys").strip()
        if len(page.findall("{*}Contents")) < (int(limit) if limit.isdecimal() else _PAGE):
            return True
    if said not in ("true", "false"):
        raise WrongAnswerError(f"a full page came that does not say whether more follows (IsTruncated: {said!r})")
    return said == "false"


def _meta(entry: Element, key: str) -> ObjectMeta:
    """Describe an object as obstore does, by its full key."""
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


def _path(meta: ObjectMeta) -> str:
    """Write a key as obstore takes it: no slash at an end.

    An object with content and a slash at an end cannot be asked for by obstore: it keeps its key, which no file can have.
    """
    key = meta["path"]
    return key if meta["size"] else key.removeprefix("/").removesuffix("/")
