"""The slots that texts are written in: all that a pass reads and writes, on the device."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from im2json.data.collate import Pictures
from im2json.families import Reader
from im2json.inference.cache import KeyValues, PrefixCache, TokenCache
from im2json.inference.constrain import Allowed, Grammar
from im2json.inference.drafts import LENGTHS, NOTHING, TAIL, aligned
from im2json.model.memory import CHOICES

# R slots, B rows computed, K tokens read of each, T tokens that may be written, S tokens of a source, L positions,
# D hidden, V vocabulary.
ROUND_UP = 64  # positions: kernels like multiples of 8, and what is recorded once fits more often
FEWEST = 32  # rows of a graph: a pass over fewer takes a GPU hardly less time
MOST_HELD = 8  # tokens of a row in a pass that are held to a grammar: each takes a bit for every word


class Room(NamedTuple):
    """What slots have room for."""

    slots: int
    tokens: int  # of an answer
    source: int  # of what drafts are taken from

    def holds(self, other: Room) -> bool:
        return self.slots >= other.slots and self.tokens >= other.tokens and self.source >= other.source


@dataclass(frozen=True)
class Report:
    """The slots between two passes, on the host. It is read before the next one is asked for."""

    counts: np.ndarray  # R, tokens written
    finished: np.ndarray  # R, bool
    right: np.ndarray  # R, draft tokens of the pass before that were right
    tried: np.ndarray  # R, those up to the first that was not
    written: np.ndarray  # R x T
    logprobs: np.ndarray  # R x T
    drafts: np.ndarray  # R x (K - 1), of the next pass


def positions(reader: Reader, tokens: int) -> int:
    """Return how many positions a slot for so many tokens has."""
    return -(-(reader.longest_prefix + tokens + LENGTHS[-1]) // ROUND_UP) * ROUND_UP


class Slots:
    """Rows that are written side by side, each at its own position.

    A pass reads the last token of each row and a draft of K - 1 more. It accepts the draft up to the first token that
    the model would not have written itself, and adds the model's own next token.

    On a GPU a pass is two CUDA graphs, recorded when its K is first used: its thousand kernels take the GPU less time
    than a host needs to start them one by one. Between the two the host says what a grammar allows.

    Args:
        room: the slots' number and sizes.
        group: how many texts are begun at once, at most.
        fixed: whether rows are computed that hold no text, since a graph has a fixed number of them. The rows of a pass
            are the first `used` slots.
    """

    def __init__(self, reader: Reader, room: Room, group: int, grammar: Grammar | None, *, fixed: bool) -> None:
        device = reader.like.device
        numbers: dict[str, Any] = {"dtype": torch.long, "device": device}
        slots = room.slots
        most = self.most = LENGTHS[-1] if grammar is None else MOST_HELD
        length = positions(reader, room.tokens)
        self.reader = reader
        self.room = room
        self.group = group
        self.device = device
        self.fixed = fixed
        self.used = slots if fixed else 0
        self.cache = KeyValues(reader, slots, length)
        self.stops = torch.tensor(reader.stops, **numbers)
        # what a row writes beyond its count is written over by its next pass
        self.written = torch.zeros((slots, room.tokens + most), **numbers)
        self.logprobs = torch.zeros((slots, room.tokens + most), device=device)
        self.latest = torch.zeros((slots, 1), **numbers)  # the token that a row goes on from
        self.position = torch.zeros(slots, **numbers)  # of `latest`, in the slot
        self.offset = torch.zeros(slots, **numbers)  # what is added to it for rotation
        self.begins = torch.zeros(slots, **numbers)  # position from which windows hold
        self.count = torch.zeros(slots, **numbers)  # tokens written
        self.limit = torch.zeros(slots, **numbers)
        self.finished = torch.ones(slots, dtype=torch.bool, device=device)
        # what drafts are taken from: a text that was handed in, and the row's own behind it
        self.source = torch.full((slots, room.source + room.tokens + most), NOTHING, **numbers)  # R x S
        self.place = torch.zeros(slots, **numbers)  # where in the source a row is
        self.draft = torch.full((slots, most - 1), NOTHING, **numbers)
        self.right, self.tried = torch.zeros(slots, **numbers), torch.zeros(slots, **numbers)
        self.hidden = reader.like.new_zeros((slots, most, reader.hidden))
        self.allowed = None if grammar is None else Allowed(grammar, slots, most, device)
        self.seconds_recording = 0.0
        self._graphs: dict[tuple[str, int, int], torch.cuda.CUDAGraph] = {}
        self._pictures: Pictures | None = None  # what the recorded prefixes are read from
        self._slots = torch.zeros(group, **numbers)
        # for a report while another is read
        self._hosts = itertools.cycle([self._host(), self._host()] if fixed else [])

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def clear(self) -> None:
        """End all texts."""
        self.finished.fill_(True)
        self.right.zero_()
        self.tried.zero_()
        self.used = self.room.slots if self.fixed else 0

    @torch.no_grad()
    def admit(
        self, slots: Sequence[int], pictures: Pictures, limits: Sequence[int], sources: Sequence[Sequence[int]]
    ) -> None:
        """Begin a text in each of B slots, at most `group`; where rows are not `fixed`, in those from `used` on.

        Args:
            pictures: of B rows.
            limits: how many tokens each may have, 1 to T.
            sources: what each is drafted from; what is longer than there is room for is left out.
        """
        if self.fixed and self.reader.records_prefixes:
            more = [0] * (self.group - len(slots))  # rows that a recorded graph asks for: the first again
            rows = [*range(len(slots)), *more]
            pictures = {name: value[rows] for name, value in pictures.items()}
            slots, limits = [*slots, *(slots[0] for _ in more)], [*limits, *(limits[0] for _ in more)]
            sources = [*sources, *(sources[0] for _ in more)]
        if not self.fixed:
            self.used += len(slots)
        given = torch.full((len(slots), self.source.shape[1]), NOTHING)
        for row, source in zip(given, sources):
            part = source[: self.room.source]
            row[: len(part)] = torch.tensor(part, dtype=torch.long)
        where, given, limited = (self._sent(values) for values in (torch.tensor(slots), given, torch.tensor(limits)))
        self.source.index_copy_(0, where, given)
        self.limit.index_copy_(0, where, limited)
        self.place.index_fill_(0, where, 0)
        self.draft.index_copy_(0, where, given[:, : self.draft.shape[1]])
        self.count.index_fill_(0, where, 0)
        self.finished.index_fill_(0, where, False)
        if self.allowed is not None:
            self.allowed.begin(slots)
        sent = {name: self._sent(value) for name, value in pictures.items()}
        if self.on_gpu and not self._graphs:
            self._warm_up(where, sent)
        if not (self.on_gpu and self.reader.records_prefixes):
            self._read_prefixes(where, sent)
            return
        if self._pictures is None:
            self._pictures = sent
        for name, value in sent.items():
            self._pictures[name].copy_(value)
        self._slots.copy_(where)
        shown = self._pictures
        self._run("prefixes", self.group, lambda _: self._read_prefixes(self._slots, shown))

    @torch.no_grad()
    def advance(self, length: int, present: Callable[[], Report]) -> None:
        """Make a pass of `length` tokens a row.

        Args:
            present: returns a report of the state before the pass, see `report`.
        """
        self._run("read", length, self._read)
        if self.allowed is not None:
            self.allowed.update(present(), length)
        self._run("choose", length, self._choose)

    def report(self) -> Callable[[], Report]:
        """Return a function that returns the state.

        With fixed rows it is the present one, which begins to be fetched and is waited for then: so a pass can be begun
        meanwhile, and a GPU never waits for the host. Otherwise it is the state at the time of that call.
        """
        if not self.fixed:
            return lambda: Report(*(value.numpy() for value in self._state()))
        host, fetched = next(self._hosts)
        for kept, value in zip(host, self._state()):
            kept.copy_(value, non_blocking=True)
        if fetched is not None:
            fetched.record()

        def wait() -> Report:
            if fetched is not None:
                fetched.synchronize()
            return Report(*(kept.numpy() for kept in host))

        return wait

    def rows(self, texts: int) -> int:
        """Return how many rows to compute for so many texts, if no more are begun.

        Where rows are `fixed`, their number is halved as often as that leaves enough: each takes graphs of its own.
        """
        if not self.fixed:
            return texts
        rows = self.used
        while rows > FEWEST and texts <= rows // 2:
            rows //= 2
        return rows

    @torch.no_grad()
    def move(self, moves: Mapping[int, int]) -> None:
        """Go on with rows in other slots, which are free. moves: from which slot to which"""
        sources, targets = (self._sent(torch.tensor(slots)) for slots in zip(*moves.items()))
        self.cache.move(sources, targets)
        of_a_row = (
            self.written, self.logprobs, self.latest, self.position, self.offset, self.begins, self.count, self.limit,
            self.finished, self.source, self.place, self.draft, self.right, self.tried,
        )  # fmt: skip
        for kept in of_a_row:
            kept.index_copy_(0, targets, kept.index_select(0, sources))
        self.finished.index_fill_(0, sources, True)
        if self.allowed is not None:
            self.allowed.move(moves)

    def _read_prefixes(self, slots: torch.Tensor, pictures: Pictures) -> None:
        cache = PrefixCache(self.cache, slots)
        length, offset = self.reader.read_prefixes(pictures, cache)
        # The last token is read once more with the first draft, where it finds what it found before.
        self.begins.index_copy_(0, slots, length if cache.lengths is None else torch.zeros_like(length))
        self.position.index_copy_(0, slots, length - 1)
        self.offset.index_copy_(0, slots, offset)
        self.latest.index_fill_(0, slots, self.reader.last)

    def _read(self, length: int) -> None:
        """Take in the latest token of each row and `length` - 1 of its draft."""
        rows = slice(0, self.used)
        tokens = torch.cat([self.latest[rows], self.draft[rows, : length - 1].clamp(min=0)], 1)  # B x K
        places = self.position[rows, None] + torch.arange(length, device=self.device)  # B x K
        end = self.cache.length if self.fixed else int(self.position[rows].max()) + length
        rotations = places + self.offset[rows, None]
        self.hidden[rows, :length] = self.reader.read_tokens(
            tokens, rotations, TokenCache(self.cache, places, end, self.begins[rows])
        )

    def _choose(self, length: int) -> None:
        """Accept what is right of each row's draft, write one token more, and draft what may follow."""
        rows = slice(0, self.used)
        steps = torch.arange(length, device=self.device)
        choice, logprobs = self._likeliest(length)  # B x K
        going, count, draft = ~self.finished[rows], self.count[rows], self.draft[rows]
        shown = max(1, length - 1)  # a draft that was not read is compared all the same
        right = (choice[:, :shown] == draft[:, :shown]).long().cumprod(1).sum(1)  # B
        stops = (choice[:, :, None] == self.stops).any(-1)
        first_stop = torch.where(stops, steps, length).min(1).values
        new = torch.minimum(right.clamp(max=length - 1), first_stop) + 1
        new = torch.minimum(new, self.limit[rows] - count) * going
        self.right[rows] = right * going
        self.tried[rows] = (right + 1).clamp(max=shown) * going
        self.written[rows].scatter_(1, count[:, None] + steps, choice)
        self.logprobs[rows].scatter_(1, count[:, None] + steps, logprobs)
        own = torch.where(steps < new[:, None], choice, NOTHING)
        self.source[rows].scatter_(1, self.room.source + count[:, None] + steps, own)
        self.finished[rows] |= (first_stop < new) | (count + new >= self.limit[rows])
        self.count[rows] += new
        self.position[rows] += new
        last = choice.gather(1, (new[:, None] - 1).clamp(min=0))
        self.latest[rows] = torch.where(new[:, None] > 0, last, self.latest[rows])
        self._draft(rows, new)

    def _draft(self, rows: slice, new: torch.Tensor) -> None:
        """Find where in its source each row is, and take the next draft from there. new: B, tokens just written"""
        source, expected = self.source[rows], self.place[rows] + new
        back = self.count[rows, None] - torch.arange(TAIL, 0, -1, device=self.device)  # B x TAIL
        tail = torch.where(back >= 0, self.written[rows].gather(1, back.clamp(min=0)), NOTHING - 1)
        before = source.gather(1, (expected - 1).clamp(0, source.shape[1] - 1)[:, None])
        as_expected = before == self.latest[rows]
        self.place[rows] = torch.where(as_expected[:, 0], expected, aligned(source, tail, expected))
        places = self.place[rows, None] + torch.arange(self.draft.shape[1], device=self.device)
        there = source.gather(1, places.clamp(max=source.shape[1] - 1))
        self.draft[rows] = torch.where(places < source.shape[1], there, NOTHING)

    def _likeliest(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the token that each of B x K positions goes on with, and its log probability in nats."""
        hidden = self.hidden[: self.used, :length].flatten(0, 1)
        tokens, logprobs = [], []
        for start in range(0, len(hidden), CHOICES):
            part = slice(start, start + CHOICES)
            logits, plain = self.reader.logits(hidden[part])
            if self.allowed is not None:
                logits = self.allowed.mask(logits, part)
            token = logits.argmax(-1)
            tokens.append(token)
            logprobs.append(F.log_softmax(plain, 1, dtype=torch.float32).gather(1, token[:, None])[:, 0])
        return torch.cat(tokens).view(-1, length), torch.cat(logprobs).view(-1, length)

    def _sent(self, values: torch.Tensor) -> torch.Tensor:
        """Copy values to the device without waiting for it."""
        return values.pin_memory().to(self.device, non_blocking=True) if self.on_gpu else values

    def _state(self) -> tuple[torch.Tensor, ...]:
        return self.count, self.finished, self.right, self.tried, self.written, self.logprobs, self.draft

    def _host(self) -> tuple[list[torch.Tensor], torch.cuda.Event | None]:
        """Return room for a report."""
        room = [torch.empty_like(value, device="cpu", pin_memory=self.on_gpu) for value in self._state()]
        return room, torch.cuda.Event() if self.on_gpu else None

    def _warm_up(self, slots: torch.Tensor, pictures: Pictures) -> None:
        """Run everything once, as what is allocated and chosen in first runs cannot be recorded.

        State is restored afterwards. Only the first group has begun, and its prefixes are read again.
        """
        begun = [value.clone() for value in (self.count, self.finished, self.source, self.place, self.draft)]
        present, aside = torch.cuda.current_stream(), _aside()
        aside.wait_stream(present)
        with torch.cuda.stream(aside):
            self._read_prefixes(slots, pictures)
            self._read(1)
            self._choose(1)
        present.wait_stream(aside)
        for kept, value in zip((self.count, self.finished, self.source, self.place, self.draft), begun):
            kept.copy_(value)

    def _run(self, name: str, length: int, work: Callable[[int], None]) -> None:
        """Do some work, from a CUDA graph on a GPU."""
        if not self.on_gpu:
            work(length)
            return
        key = name, length, self.used
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = self._record(functools.partial(work, length))
        graph.replay()

    def _record(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Record some work, without doing it. torch.cuda.graph would collect Python's garbage each time."""
        start = time.perf_counter()
        graph, pool = torch.cuda.CUDAGraph(), next(iter(self._graphs.values())).pool() if self._graphs else None
        present, aside = torch.cuda.current_stream(), _aside()
        aside.wait_stream(present)
        with torch.cuda.stream(aside):
            # Other threads load pictures meanwhile, and may do as they like.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with suppress(RuntimeError):  # what went wrong first is what counts
                    graph.capture_end()
                raise
            graph.capture_end()
        present.wait_stream(aside)
        self.seconds_recording += time.perf_counter() - start
        return graph


@functools.cache
def _aside() -> torch.cuda.Stream:
    """The one stream for first runs: cuBLAS keeps 32 MiB for each stream that it was ever used on."""
    return torch.cuda.Stream()
