"""Tokenized documents of one or several sources, cut to row length."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import numpy as np
from attrs import field, frozen
from numpy.typing import NDArray

from wmtp.data.base import Document
from wmtp.data.segments import StoreSegments
from wmtp.data.store import TokenStore

__all__ = ["DatasetCounts", "TokenDataset", "TokenizedDocument"]

_CHUNK: Final = 2**24  # tokens in memory at once


@frozen(kw_only=True, eq=False)
class DatasetCounts:
    """Counts of documents kept, cut and dropped, before any holdout.

    Args:
        documents: read from the sources.
        truncated: cut to the length of a row; they have no end-of-sequence token.
        split: cut into several pieces.
        overlong: left out because they are longer than a row.
        without_target: pieces left out because they have no token to learn, or no second token.
        shortened: numbers of the documents of which tokens to learn were cut off.
        cut_off: those among them of which all were, so that they are left out.
        lost: tokens to learn that were cut off.
        bad: examples that could not be read.
    """

    documents: int
    truncated: int
    split: int
    overlong: int
    without_target: int
    shortened: NDArray[np.int64]
    cut_off: NDArray[np.int64]
    lost: int
    bad: int


@frozen(kw_only=True, eq=False)
class TokenizedDocument:
    """One piece, of L tokens.

    Args:
        tokens: ``[L]`` int64.
        loss_mask: ``[L]`` bool, whether the token is one to learn.
        weight: ``[L]`` float32; None where no document of the data set has weights.
        scale: ``[L]`` float32, what multiplies a trainer's weights; None where that is 1 in the whole data set.
        document: where it is from.
        prompt_length: how many of the tokens come before the completion, the begin token included.
    """

    tokens: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]
    weight: NDArray[np.float32] | None
    scale: NDArray[np.float32] | None
    document: Document
    prompt_length: int


@frozen(kw_only=True, eq=False)
class _Pieces:
    """Columns with one entry a piece.

    Args:
        index: the document's number in the data set.
        start: the piece's first token, in the document.
        stop: the token after its last, in the document.
        learned: how many of its tokens head 1 learns.
    """

    index: NDArray[np.int64]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    learned: NDArray[np.int64]
    length: NDArray[np.int64] = field(init=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "length", self.stop - self.start)

    def take(self, chosen: NDArray[Any]) -> _Pieces:
        return _Pieces(index=self.index[chosen], start=self.start[chosen], stop=self.stop[chosen], learned=self.learned[chosen])


class TokenDataset:
    """Pieces of documents, none longer than a row; mostly whole documents.

    Args:
        stores: the sources, in order. A document's index counts through them.
        max_length: tokens in a row.
        overlong: what happens to longer documents.
        learn_prompt: whether prompt tokens are learned too. The begin token never is.
        pad_id: the id that fills rows.
        names: what the config calls each source.
        prompt_weights: for each source by name, what multiplies a trainer's weights of prompt tokens, which are learned then.
        response_weights: for each source by name, what multiplies those of all other tokens to learn.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        *,
        max_length: int,
        overlong: Literal["truncate", "skip", "split"],
        learn_prompt: bool,
        pad_id: int,
        names: Sequence[str] | None = None,
        prompt_weights: Mapping[str, float] | None = None,
        response_weights: Mapping[str, float] | None = None,
    ) -> None:
        self.pad_id = pad_id
        self.names = tuple(names) if names is not None else ("",) * len(stores)
        self.has_weights = any(store.weights is not None for store in stores)
        self._stores = stores
        self._segments = [
            StoreSegments.of(
                store,
                learn_prompt=learn_prompt,
                prompt_weight=(prompt_weights or {}).get(name),
                response_weight=(response_weights or {}).get(name, 1.0),
            )
            for store, name in zip(stores, self.names, strict=True)
        ]
        self.has_scales = any(segments.scales is not None for segments in self._segments)
        self._first_index = np.cumsum([0, *(len(store) for store in stores)])
        lengths = np.concatenate([np.diff(store.starts) for store in stores])
        self._pieces, self.counts = self._cut(lengths, max_length, overlong)

    def _cut(self, lengths: NDArray[np.int64], max_length: int, overlong: str) -> tuple[_Pieces, DatasetCounts]:
        long = lengths > max_length
        index = np.arange(len(lengths), dtype=np.int64)
        start, stop = np.zeros_like(lengths), lengths
        if overlong == "truncate":
            stop = np.minimum(lengths, max_length)
        elif overlong == "skip":
            index, start, stop = index[~long], start[~long], stop[~long]
        else:
            pieces = -(-lengths // max_length)
            index = np.repeat(index, pieces)
            start = (np.arange(len(index)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * max_length
            stop = np.minimum(start + max_length, lengths[index])
        # the first token of a piece follows nothing, so nothing predicts it
        targets = self._count("learned", index, np.minimum(start + 1, stop), stop)
        # a document is its text and an end token, and perhaps a begin token that is never learned
        text_lengths = lengths[index] - self._count("never", index, np.zeros_like(index), lengths[index]) - 1
        useful = (targets > 0) & (text_lengths > 1)
        shortened = cut_off = np.zeros(0, np.int64)
        lost = 0
        if overlong == "truncate" and long.any():
            cut = np.flatnonzero(long)
            missing = self._count("learned", cut, stop[cut], lengths[cut])
            shortened, lost = cut[missing > 0], int(missing.sum())
            cut_off = shortened[targets[shortened] == 0]
        many = int(long.sum())
        counts = DatasetCounts(
            documents=len(lengths),
            truncated=many if overlong == "truncate" else 0,
            split=many if overlong == "split" else 0,
            overlong=many if overlong == "skip" else 0,
            without_target=int((~useful).sum()),
            shortened=shortened,
            cut_off=cut_off,
            lost=lost,
            bad=sum(store.info.bad for store in self._stores),
        )
        return _Pieces(index=index, start=start, stop=stop, learned=targets).take(useful), counts

    def _count(
        self, what: Literal["learned", "never"], index: NDArray[np.int64], start: NDArray[np.int64], stop: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Count the tokens of a kind in parts of documents."""
        counts = np.zeros(len(index), np.int64)
        source = self._source(index)
        for number, (store, segments) in enumerate(zip(self._stores, self._segments, strict=True)):
            own = source == number
            origin = store.starts[index[own] - self._first_index[number]]
            counts[own] = segments.count(what, origin + start[own], origin + stop[own])
        return counts

    def _source(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self._first_index, index, side="right") - 1

    def _located(self, index: int) -> tuple[int, int]:
        """Return a document's source, and its number there."""
        source = int(np.searchsorted(self._first_index, index, side="right")) - 1
        return source, index - int(self._first_index[source])

    def __len__(self) -> int:
        return len(self._pieces.index)

    @property
    def conversations(self) -> int:
        """Documents of the sources that a chat template has written."""
        return sum(store.info.conversations for store in self._stores)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens in each piece."""
        return self._pieces.length

    @property
    def indices(self) -> NDArray[np.int64]:
        """Document number of each piece."""
        return self._pieces.index

    @property
    def starts(self) -> NDArray[np.int64]:
        """Where each piece starts, in tokens of its document."""
        return self._pieces.start

    @property
    def tokens(self) -> int:
        """Tokens in all pieces."""
        return int(self.lengths.sum())

    @property
    def learned_lengths(self) -> NDArray[np.int64]:
        """Tokens of each piece that head 1 learns.

        Those are the tokens to learn, without the first of the piece.
        """
        return self._pieces.learned

    @property
    def learned_tokens(self) -> int:
        """Tokens in all pieces that head 1 learns."""
        return int(self.learned_lengths.sum())

    @property
    def sources(self) -> NDArray[np.int64]:
        """Source of each piece, an index into ``names``."""
        return self._source(self._pieces.index)

    @property
    def is_correct(self) -> NDArray[np.int8]:
        """Label of each piece's document: 1, 0, or -1 for none."""
        return np.concatenate([store.is_correct for store in self._stores])[self._pieces.index]

    @property
    def rewards(self) -> NDArray[np.float64]:
        """Reward of each piece's document; NaN where it has none."""
        return np.concatenate([store.reward for store in self._stores])[self._pieces.index]

    @property
    def groups(self) -> NDArray[np.int64]:
        """Group number of each piece's document.

        Answers to one problem of one source have the same.
        """
        numbers, first = [], 0
        for hashes in self.group_hashes():
            found, number = np.unique(hashes, return_inverse=True)
            numbers.append(number + first)
            first += len(found)
        return np.concatenate(numbers)[self._pieces.index]

    @property
    def fingerprint(self) -> str:
        """Hash of all documents and of how they are cut.

        It does not depend on where they were read from. It serves caches of a model's numbers per token, and a resume, which
        must continue with the same data.
        """
        digest = hashlib.sha256()
        for store in self._stores:
            digest.update(store.info.digest.encode())
        for column in (self._pieces.index, self._pieces.start, self._pieces.stop):
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()

    def document(self, number: int) -> TokenizedDocument:
        """Return the piece with this number, from 0 to ``len(self) − 1``."""
        pieces = self._pieces
        index, start, stop = int(pieces.index[number]), int(pieces.start[number]), int(pieces.stop[number])
        source, local = self._located(index)
        store = self._stores[source]
        origin = int(store.starts[local])
        weight = None
        if self.has_weights:
            weight = (
                np.ones(stop - start, np.float32)
                if store.weights is None
                else np.array(store.weights[origin + start : origin + stop], np.float32)
            )
        loss_mask, scale = self._segments[source].tokens(origin + start, origin + stop)
        return TokenizedDocument(
            tokens=store.tokens[origin + start : origin + stop].astype(np.int64),
            loss_mask=loss_mask,
            weight=weight,
            scale=None if not self.has_scales else np.ones(stop - start, np.float32) if scale is None else scale,
            document=store.document(local, index, start, self.names[source]),
            prompt_length=int(np.clip(store.prompt_lengths[local] - start, 0, stop - start)),
        )

    def token_counts(self, size: int) -> NDArray[np.int64]:
        """Count how often each id below ``size`` occurs in the sources."""
        counts = np.zeros(size, np.int64)
        for store in self._stores:
            for start in range(0, len(store.tokens), _CHUNK):
                counts += np.bincount(store.tokens[start : start + _CHUNK], minlength=size)
        return counts

    def number_of(self, document: Document) -> int:
        """Find the piece's number from what `document` returned."""
        first, last = (int(np.searchsorted(self.indices, document.index, side)) for side in ("left", "right"))
        return first + int(np.searchsorted(self.starts[first:last], document.start))  # pieces are in order

    def place(self, index: int) -> str:
        """Name the file and line of a document by its number."""
        source, local = self._located(index)
        return self._stores[source].place(local)

    def group_hashes(self) -> Sequence[NDArray[np.uint64]]:
        """For each source a hash of the group of each document."""
        return [store.group_hashes for store in self._stores]

    def select(self, chosen: NDArray[np.bool_]) -> TokenDataset:
        """Keep the pieces that the mask ``chosen`` marks; documents keep their index."""
        other = copy.copy(self)
        other._pieces = self._pieces.take(chosen)
        return other

    def first_from(self, token_id: int) -> tuple[Document, int] | None:
        """Find the first document with an id of at least ``token_id``.

        Returns it with that id; None where there is none.
        """
        for number, (store, name) in enumerate(zip(self._stores, self.names, strict=True)):
            for begin in range(0, len(store.tokens), _CHUNK):
                part = store.tokens[begin : begin + _CHUNK]
                if len(part) and int(part.max()) >= token_id:
                    place = begin + int((part >= token_id).argmax())
                    within = int(np.searchsorted(store.starts, place, side="right")) - 1
                    index = int(self._first_index[number]) + within
                    return store.document(within, index, 0, name), int(store.tokens[place])
        return None
