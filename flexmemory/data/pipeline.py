"""Batches from token shards: batch k is a pure function of (seed, k), with its unique ids ready for
the memory layers.

Letters: A accumulation steps, b sequences of this host per accumulation step, T tokens, R unique
ids of a section of the batch (padded), C unique ids of the whole batch (padded).
"""

from collections.abc import Iterator

import grain
import numpy as np

from flexmemory.data.shards import TokenShards
from flexmemory.errors import UserError

Batch = dict[str, np.ndarray]
SAMPLES = 32  # batches that measured_sizes looks at


class Batches:
    """An endless sequence of batches; `batches[k]` needs nothing but k. Made by `make_batches`.

    A batch is a dict of
      ids        int32 [A, b, T]
      targets    int32 [A, b, T], the next tokens
      unique_ids int32 [R] for each section of this host, one after another: its ids over all
      accumulation steps, ascending, then padded with id 0
      inverse    int32 [A, b, T], places within the section's unique_ids, unique_ids[inverse] ==
      ids; never refers to padding
      table_ids  int32 [C], the ids of all sections together, ascending, and V, which is no row, in
      the places that are left
      places     int32 [R] for each section of this host: the place of each of unique_ids among
      table_ids, and C of those that no token has
      segments   int32 [A, b, T], number of the document within the sequence; only when asked for

    A section is the part of a batch that one device group computes: the sequences of each
    accumulation step are cut into `sections` equal parts. The sequences do not depend on the cut. R
    is one of `row_sizes`, the smallest that holds every section of the batch, so that a compiled
    step meets few shapes and all hosts the same ones. Where R >= V, unique_ids is 0..V-1. C is one
    of `table_sizes`; with one section, C = R.

    row_sizes: the possible R, ascending.
    table_sizes: the possible C of several sections, ascending, if all sections together have not
    fewer places than that.
    steps_per_epoch: whole batches in one pass over the split, at least 1.
    """

    def __init__(
        self,
        shards: TokenShards,
        seq_len: int,
        shape: tuple[int, int, int],
        own: tuple[int, ...],
        seed: int,
        segments: bool,
        shuffle: bool,
    ):
        self._shards, self._seq_len, self._segments = shards, seq_len, segments
        # a global batch has A x sections x sequences windows
        self._accum, self._sections, self._sequences = shape
        self._own = own
        self.batch_size = self._accum * self._sections * self._sequences
        n_windows = shards.num_windows(seq_len)
        order = grain.MapDataset.range(n_windows).seed(seed)
        # Reshuffled in each epoch, and still addressable: the order is computed from (seed, epoch),
        # never stored.
        self._order = (order.shuffle() if shuffle else order).repeat(None)
        self.steps_per_epoch = max(1, n_windows // self.batch_size)
        self.row_sizes: tuple[int, ...] = (
            min(shards.vocab_size, self._accum * self._sequences * seq_len),
        )
        self.table_sizes: tuple[int, ...] = (
            min(shards.vocab_size, self._sections * self.row_sizes[-1]),
        )

    def window_numbers(self, k: int) -> np.ndarray:
        """Windows of global batch k, int64 [A, B]."""
        if k < 0:
            raise IndexError(f"batch {k} is below 0")
        first = k * self.batch_size
        numbers = [self._order[i] for i in range(first, first + self.batch_size)]
        return np.array(numbers, np.int64).reshape(self._accum, self._sections * self._sequences)

    def __getitem__(self, k: int) -> Batch:
        numbers_AB = self.window_numbers(k)
        # Every host reads the whole batch: only so do all agree on R without talking.
        tokens_ABT = self._tokens(numbers_AB)
        own = places_of(self._own, self._sequences)
        batch = {"ids": tokens_ABT[:, own, :-1], "targets": tokens_ABT[:, own, 1:]}
        batch |= unique_rows(
            tokens_ABT[..., :-1],
            self._shards.vocab_size,
            self.row_sizes,
            self._sections,
            self._own,
            self.table_sizes,
        )
        if self._segments:
            rows = [
                [self._shards.segments(int(i), self._seq_len)[:-1] for i in row]
                for row in numbers_AB[:, own]
            ]
            batch["segments"] = np.array(rows, np.int32)
        return batch

    def unique_counts(self, k: int) -> tuple[int, int]:
        """Number of different ids in global batch k: in the section that has most, and in all."""
        seen_SV = _seen(
            self._tokens(self.window_numbers(k))[..., :-1], self._shards.vocab_size, self._sections
        )
        return int(seen_SV.sum(1).max()), int(seen_SV.any(0).sum())

    def _tokens(self, numbers_AB: np.ndarray) -> np.ndarray:
        tokens = np.empty((*numbers_AB.shape, self._seq_len + 1), np.int32)
        for place, i in np.ndenumerate(numbers_AB):
            tokens[place] = self._shards.window(int(i), self._seq_len)
        return tokens


def make_batches(
    shards: TokenShards,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    accum: int = 1,
    segments: bool = False,
    shuffle: bool = True,
    sections: int = 1,
    own: tuple[int, ...] | None = None,
    row_sizes: tuple[int, ...] | None = None,
) -> Batches:
    """Batches of `batch_size` windows of `seq_len` tokens over all hosts; this host's share of
    them.

    sections: into how many parts devices cut the sequences of an accumulation step.
    own: the sections of this host, ascending; None for all.
    row_sizes: the padded sizes R to choose from; these and `table_sizes` are measured by
      `measured_sizes` where None. A size that always suffices is appended.

    Raises UserError: sizes that do not fit each other or the shards, a seed outside 0..2^32-1.
    """
    for name, value in (("batch_size", batch_size), ("accum", accum), ("sections", sections)):
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1")
    own = tuple(range(sections)) if own is None else own
    if not own or list(own) != sorted(set(own) & set(range(sections))):
        raise UserError(f"own={own} are not sections inside 0..{sections - 1}, ascending")
    if not 0 <= seed < 1 << 32:
        raise UserError(f"seed={seed} is outside 0..{(1 << 32) - 1}")
    if batch_size % (accum * sections):
        raise UserError(
            f"batch_size={batch_size} is not divisible by accum*sections={accum}*{sections}; use a"
            f" multiple of {accum * sections}"
        )
    shape = (accum, sections, batch_size // (accum * sections))
    batches = Batches(shards, seq_len, shape, own, seed, segments, shuffle)
    table_sizes: tuple[int, ...] = ()
    if row_sizes is None:
        row_sizes, table_sizes = measured_sizes(batches)
    if any(size < 1 for size in row_sizes):
        raise UserError(f"row_sizes={row_sizes} must be at least 1")
    batches.row_sizes = _with_enough(row_sizes, enough=batches.row_sizes[-1])
    batches.table_sizes = _with_enough(table_sizes, enough=batches.table_sizes[-1])
    return batches


def measured_sizes(
    batches: Batches, samples: int = SAMPLES
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(padded sizes R, padded sizes C) for `batches`, each ascending. Of R: the largest of the
    sampled batches, that with a tenth of room for the few that are larger still; before them the
    median where it is a tenth less. Of a small R, and of C, the one with room alone. A pure
    function of the batches' arguments.
    """
    last = batches.steps_per_epoch
    # Spread over the epoch; a bigger sample would cost more than the rare overflow it avoids.
    steps = sorted({i * last // samples for i in range(samples)})
    sampled = [batches.unique_counts(k) for k in steps]
    counts, table_sizes = (
        sorted(count for count, _ in sampled),
        (padded_rows(max(count for _, count in sampled)),),
    )
    median, largest, room = (
        _round_up(counts[len(counts) // 2]),
        _round_up(counts[-1]),
        padded_rows(counts[-1]),
    )
    if largest < 512:  # a compilation costs more than some rows
        return (room,), table_sizes
    return (*((median,) if median <= 0.9 * largest else ()), largest, room), table_sizes


def unique_rows(
    ids: np.ndarray,
    vocab_size: int,
    row_sizes: tuple[int, ...],
    sections: int = 1,
    own: tuple[int, ...] | None = None,
    table_sizes: tuple[int, ...] = (),
) -> Batch:
    """unique_ids, inverse, table_ids and places, as in `Batches`, of the sections `own` (None: all)
    of ids int32 [..., B, T]; R from `row_sizes`, C from `table_sizes`, or as much as may be needed,
    and of one section R.
    """
    parts, own = np.split(ids, sections, axis=-2), tuple(range(sections)) if own is None else own
    seen_SV = _seen(ids, vocab_size, sections)
    seen_V = seen_SV.any(0)
    size = min(next(size for size in row_sizes if size >= seen_SV.sum(1).max()), vocab_size)
    count = min(
        next(
            (count for count in table_sizes if count >= seen_V.sum() and sections > 1), vocab_size
        ),
        sections * size,
    )
    if count == vocab_size:
        place_V = np.arange(vocab_size, dtype=np.int32)
        table_ids = np.where(seen_V, place_V, vocab_size).astype(np.int32)
    else:
        place_V = np.cumsum(seen_V, dtype=np.int32) - 1  # of an id among those seen
        table_ids = np.full(count, vocab_size, np.int32)
        table_ids[: seen_V.sum()] = np.flatnonzero(seen_V)
    unique_SR, places_SR, inverse = (
        np.zeros((len(own), size), np.int32),
        np.full((len(own), size), count, np.int32),
        [],
    )
    for unique_R, places_R, s in zip(unique_SR, places_SR, own, strict=True):
        seen = np.flatnonzero(seen_SV[s])
        if size == vocab_size:
            unique_R[:], places_R[seen] = np.arange(vocab_size), place_V[seen]
            inverse.append(parts[s])
        else:
            unique_R[: len(seen)], places_R[: len(seen)] = seen, place_V[seen]
            inverse.append((np.cumsum(seen_SV[s], dtype=np.int32) - 1)[parts[s]])
    return {
        "unique_ids": unique_SR.ravel(),
        "inverse": np.concatenate(inverse, axis=-2),
        "table_ids": table_ids,
        "places": places_SR.ravel(),
    }


def places_of(own: tuple[int, ...], rows: int) -> np.ndarray:
    """Positions in a batch of the sequences of the sections ``own``, of ``rows`` each."""
    return (np.array(own)[:, None] * rows + np.arange(rows)).ravel()


def eval_batches(
    shards: TokenShards,
    *,
    seq_len: int,
    batch_size: int,
    max_tokens: int | None = None,
    segments: bool = False,
    sections: int = 1,
    own: tuple[int, ...] | None = None,
    row_sizes: tuple[int, ...] | None = None,
) -> Iterator[Batch]:
    """The split in order, once: batches as in `Batches` without the axis A, and `weight` float32
    [b, T].

    The weight is 1 for every target to count and 0 for padding, so that each token but the first of
    each shard counts exactly once; the last window of a shard is padded with the end of document,
    the last batch with rows of it. `max_tokens` takes whole windows at even distances over the
    split, because sources lie one after another in it: at most so many targets, the same ones each
    time.

    Raises UserError: bad sizes; a split of fewer than two tokens.
    """
    if batch_size < 1 or seq_len < 1:
        raise UserError(f"batch_size={batch_size} and seq_len={seq_len} must be at least 1")
    if batch_size % sections:
        raise UserError(f"batch_size={batch_size} is not divisible by sections={sections}")
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max_tokens={max_tokens} must be at least 1")
    spans = _eval_spans(shards, seq_len, max_tokens)
    if not spans:
        raise UserError(
            f"the {shards.split} split has no token to predict; prepare it from more text"
        )
    return _eval_batches(
        shards,
        spans,
        seq_len,
        batch_size,
        segments,
        sections,
        tuple(range(sections)) if own is None else own,
        row_sizes,
    )


def _eval_batches(
    shards: TokenShards,
    spans: list[tuple[int, int, int]],
    seq_len: int,
    batch_size: int,
    segments: bool,
    sections: int,
    own: tuple[int, ...],
    row_sizes: tuple[int, ...] | None,
) -> Iterator[Batch]:
    rows = batch_size // sections
    enough, own_sequences = min(shards.vocab_size, rows * seq_len), places_of(own, rows)
    groups = [spans[i : i + batch_size] for i in range(0, len(spans), batch_size)]
    if row_sizes is None:
        sample = (
            [groups[i * len(groups) // SAMPLES] for i in range(SAMPLES)]
            if len(groups) > SAMPLES
            else groups
        )
        ids = (_eval_rows(shards, group, seq_len, batch_size)[0][:, :-1] for group in sample)
        typical = max(
            int(_seen(ids_bT, shards.vocab_size, sections).sum(1).max()) for ids_bT in ids
        )
        row_sizes = (_round_up(typical), padded_rows(typical))
    row_sizes = _with_enough(row_sizes, enough)
    for group in groups:
        tokens_bT, weight_bT, segments_bT = _eval_rows(shards, group, seq_len, batch_size, segments)
        batch = {
            "ids": tokens_bT[own_sequences, :-1],
            "targets": tokens_bT[own_sequences, 1:],
            "weight": weight_bT[own_sequences],
        }
        batch |= unique_rows(tokens_bT[:, :-1], shards.vocab_size, row_sizes, sections, own)
        if segments:
            batch["segments"] = segments_bT[own_sequences]
        yield batch


def _eval_spans(
    shards: TokenShards, seq_len: int, max_tokens: int | None
) -> list[tuple[int, int, int]]:
    """(shard, start, number of targets) of each row, in order."""
    spans = [
        (shard, start, min(seq_len, tokens - 1 - start))
        for shard, tokens in enumerate(shards.shard_tokens)
        for start in range(0, tokens - 1, seq_len)
    ]
    if max_tokens is None or sum(count for _, _, count in spans) <= max_tokens:
        return spans
    rows = max(1, max_tokens // seq_len)
    return [
        (shard, start, min(count, max_tokens))
        for shard, start, count in (spans[i * len(spans) // rows] for i in range(rows))
    ]


def _eval_rows(
    shards: TokenShards,
    group: list[tuple[int, int, int]],
    seq_len: int,
    batch_size: int,
    segments: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tokens_bT = np.full((batch_size, seq_len + 1), shards.eos_id, np.int32)
    weight_bT = np.zeros((batch_size, seq_len), np.float32)
    segments_bT = np.zeros((batch_size, seq_len), np.int32)
    for row, (shard, start, count) in enumerate(group):
        tokens_bT[row, : count + 1] = shards.tokens(shard, start, start + count + 1)
        weight_bT[row, :count] = 1
        if segments:
            segments_bT[row, :count] = shards.token_segments(shard, start, start + count)
            segments_bT[row, count:] = segments_bT[row, count - 1] + 1
    return tokens_bT, weight_bT, segments_bT


def _seen(ids: np.ndarray, vocab_size: int, sections: int) -> np.ndarray:
    """Which ids the sections of ids int32 [..., B, T] have, bool [S, V]."""
    seen_SV = np.zeros((sections, vocab_size), bool)
    for seen_V, part in zip(seen_SV, np.split(ids, sections, axis=-2), strict=True):
        seen_V[part.ravel()] = True
    return seen_SV


def padded_rows(count: int) -> int:
    """The size R for sections of which the largest has about ``count`` unique ids: with a tenth of
    room for the few that have more.
    """
    return _round_up(count * 11 // 10)


def _round_up(count: int) -> int:
    """The next whole number of 64, or of 8 where that would be much for a small size: R is the side
    of a matrix product.
    """
    step = 64 if count >= 512 else 8
    return -(-count // step) * step


def _with_enough(row_sizes: tuple[int, ...], enough: int) -> tuple[int, ...]:
    return (*sorted({size for size in row_sizes if size < enough}), enough)
