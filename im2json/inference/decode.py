"""Greedy decoding of many texts at once. A pass accepts several tokens of a text if its draft is right."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from tqdm.auto import tqdm

from im2json.data.collate import Collator, Pictures, join_pictures
from im2json.families import Reader, family_of
from im2json.inference.cache import KeyValues
from im2json.inference.constrain import Grammar
from im2json.inference.drafts import DraftLength
from im2json.inference.slots import Report, Room, Slots, positions
from im2json.model.memory import PREFIXES, SLOTS, most_that_fit, slots_that_fit

CPU_BYTES = 4 * 2**30  # that keys and values may take of a CPU's memory if the number of slots is left open
GROUP = {"cuda": PREFIXES, "cpu": 4}  # prefixes read at once
OVERHEAD = {"cuda": 256, "cpu": 40}  # tokens that take as long as all in a pass that does not grow with its tokens


@dataclass(frozen=True)
class Answer:
    """What was written for a picture."""

    text: str
    tokens: list[int]  # EOS included, where it was written, and what a grammar added where the limit came first
    logprobs: list[float]  # of each token, in nats: of the model's own softmax over all words, final cap included; a
    # grammar changes none, so a token that it forced upon the model has the little that the model gave it, and one
    # that it added at the limit has minus infinity
    starts: list[int]  # where in the text each token begins; those of one character's bytes begin at the same place
    cut: bool = False  # a grammar has ended the text, as the limit came first


class Request(NamedTuple):
    """A picture to be read."""

    picture: Callable[[], Pictures]  # waits for it; of one row, see Collator.pictures
    limit: int  # tokens that the answer may have, at least 1
    source: Sequence[int] = ()  # tokens that the answer is drafted from; they never change it


class Decoder:
    """Writes the most likely text for each picture until EOS or a limit.

    The texts are those of transformers' greedy `generate`, whatever they are drafted from. Where a GPU rounds, two
    tokens that are equally likely up to rounding may change places. A model that overflows on the tokens of a draft
    loses that text.

    Keep one decoder for an evaluation, and none longer, since it holds the model's weights and the slots' keys and
    values.

    Args:
        model: plain weights, in eval mode (see model.lora.merged_copy).
        grammar: what every text is held to. What cannot become a text of it is passed over; a text that the model would
            have written without it stays the same.
        slots: how many texts are written at a time. auto: see model.memory.slots_that_fit.
    """

    def __init__(
        self,
        model: Any,
        collator: Collator,
        grammar: Grammar | None = None,
        slots: int | Literal["auto"] = "auto",
    ) -> None:
        self.model = model
        self.collator = collator
        self.grammar = grammar
        self.slots = slots  # halved where a GPU's memory is exceeded
        self.reader: Reader = family_of(model.config).reader(model, collator)
        self.fixed = model.device.type == "cuda"
        self.group = GROUP[model.device.type]
        self.tokens = 0  # written so far, EOS included
        self.passes = 0
        self._idle: Slots | None = None
        self._pieces: dict[int, str] = {}  # what each token is by itself

    def answers(
        self, requests: Iterable[Request], longest: int, source: int = 0, count: int | None = None
    ) -> Iterator[tuple[int, Answer]]:
        """Yield the number of each request and its answer, in the order in which they are finished.

        While an answer is in the caller's hands a GPU goes on with a pass. Another call may be made before this one has
        ended.

        Args:
            requests: taken one by one when there is a free slot, and not asked for the picture before. An iterator that
                has ended is asked again after each pass while answers are being written, so that one may serve a queue.
            longest: the highest limit among them.
            source: the length of their longest source.
            count: how many there are, if that is known.
        """
        waiting = _Waiting(requests)
        if not (first := waiting.take(1)):
            return
        waiting.give_back(first)
        while True:
            room, begun = self._room(longest, source, count), {}  # type: ignore[var-annotated]
            try:
                slots = self._take(room)
                yield from _Work(self, slots, waiting, begun)
                self._idle = slots
                return
            except torch.cuda.OutOfMemoryError:
                if room.slots == 1:
                    raise
            # Out here nothing holds on to the tensors of the attempt, as the error did with its traceback.
            slots = self._idle = None  # type: ignore[assignment]
            torch.cuda.empty_cache()
            self.slots = room.slots // 2
            tqdm.write(f"out of GPU memory with {room.slots} answers at once: going on with {self.slots}")
            waiting.give_back(begun.values())

    def __call__(self, pictures: Pictures, limits: int | Sequence[int]) -> list[Answer]:
        """Return the answers to B pictures.

        Args:
            limits: how many tokens each may have, at least 1; of all, or one for each.
        """
        count = len(next(iter(pictures.values())))
        each = [limits] * count if isinstance(limits, int) else list(limits)

        def picture(row: int) -> Pictures:
            return {name: value[row : row + 1] for name, value in pictures.items()}

        requests = [Request(partial(picture, row), limit) for row, limit in enumerate(each)]
        found = dict(self.answers(requests, max(each, default=1), count=len(requests)))
        return [found[number] for number in range(len(requests))]

    def answer(self, tokens: list[int], logprobs: list[float]) -> Answer:
        """Return what was written as an answer."""
        decode = self.collator.texts
        self.tokens += len(tokens)
        rest = [] if self.grammar is None else self.grammar.rest(tokens)
        logprobs = logprobs + [-math.inf] * len(rest)
        tokens = tokens + rest
        (text,), new = decode([tokens]), sorted(set(tokens) - self._pieces.keys())
        self._pieces.update(zip(new, decode([[token] for token in new])))
        pieces = [self._pieces[token] for token in tokens]
        if "".join(pieces) == text:
            starts = [0, *itertools.accumulate(map(len, pieces[:-1]))]
        else:  # some characters take several tokens, each of which is none by itself
            beginnings = decode([tokens[:i] for i in range(len(tokens))])
            shared = (sum(1 for _ in itertools.takewhile(bool, map(str.__eq__, text, some))) for some in beginnings)
            starts = list(itertools.accumulate(shared, max))
        return Answer(text, tokens, logprobs, starts, cut=bool(rest))

    @property
    def seconds_recording(self) -> float:
        """Return the seconds that slots which are not in use have spent on recording graphs."""
        return 0.0 if self._idle is None else self._idle.seconds_recording

    def _room(self, tokens: int, source: int, count: int | None) -> Room:
        """Return the room to make, with no more slots than `count` answers need, in whole groups."""
        if self.slots != "auto":
            slots = self.slots
        elif self.model.device.type == "cuda":
            slots = slots_that_fit(self._slot_bytes(tokens))
        else:
            slots = most_that_fit(SLOTS, lambda count: count * self._slot_bytes(tokens), CPU_BYTES)
        if count is not None:
            slots = min(slots, max(1, -(-count // self.group)) * self.group)
        return Room(slots, tokens, source)

    def _slot_bytes(self, tokens: int) -> int:
        return KeyValues.slot_bytes(self.reader, positions(self.reader, tokens))

    def _take(self, room: Room) -> Slots:
        """Return slots with so much room, those of an earlier call if they are free and have it."""
        idle, self._idle = self._idle, None
        if idle is not None and idle.room.holds(room):
            idle.clear()
            return idle
        return Slots(self.reader, room, min(self.group, room.slots), self.grammar, fixed=self.fixed)


class _Waiting:
    """Requests and their numbers, in order. Those that were given back come first."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._rest = enumerate(requests)
        self._back: deque[tuple[int, Request]] = deque()

    def take(self, most: int) -> list[tuple[int, Request]]:
        """Return as many as there are now, up to `most`."""
        back = [self._back.popleft() for _ in range(min(most, len(self._back)))]
        return back + list(itertools.islice(self._rest, most - len(back)))

    def give_back(self, requests: Iterable[tuple[int, Request]]) -> None:
        self._back.extendleft(reversed(list(requests)))


class _Work:
    """Requests on their way through the slots.

    Args:
        begun: the requests whose answers are being written, by slot.
    """

    def __init__(
        self,
        decoder: Decoder,
        slots: Slots,
        waiting: _Waiting,
        begun: dict[int, tuple[int, Request]],
    ) -> None:
        self.decoder = decoder
        self.slots = slots
        self.waiting = waiting
        self.begun = begun
        self.length = DraftLength(OVERHEAD[slots.device.type], slots.most)
        self.all_begun = False  # so no slot is needed for now

    def __iter__(self) -> Iterator[tuple[int, Answer]]:
        slots = self.slots
        self._admit(1)
        while self.begun:
            report = slots.report()
            slots.advance(self.length.choose(slots.used), report)
            self.decoder.passes += 1
            yield from self._settle(report())
            self._admit(slots.group)

    def _settle(self, report: Report) -> Iterator[tuple[int, Answer]]:
        """Yield what is finished, and make room for what is waiting."""
        used = slice(0, self.slots.used)
        self.length.observe(int(report.right[used].sum()), int(report.tried[used].sum()))
        done: list[tuple[int, list[int], list[float]]] = []
        for slot in sorted(slot for slot in self.begun if report.finished[slot]):
            number, _ = self.begun.pop(slot)
            count = report.counts[slot]
            done.append((number, report.written[slot, :count].tolist(), report.logprobs[slot, :count].tolist()))
        for number, tokens, logprobs in done:
            yield number, self.decoder.answer(tokens, logprobs)
        self._close_up()  # which may run out of memory, and then loses nothing that is finished

    def _close_up(self) -> None:
        """Have what is still written stand in the first slots, and compute no more rows than it needs."""
        if self.slots.fixed and not self.all_begun:
            return
        rows = self.slots.rows(len(self.begun))
        high = sorted(slot for slot in self.begun if slot >= rows)
        moves = dict(zip(high, (slot for slot in range(rows) if slot not in self.begun)))
        if moves:
            self.slots.move(moves)
            for source, target in moves.items():
                self.begun[target] = self.begun.pop(source)
        self.slots.used = rows

    def _admit(self, least: int) -> None:
        """Begin with what is waiting, a group at a time, while at least so many slots are free."""
        slots = self.slots
        free = [slot for slot in range(slots.room.slots) if slot not in self.begun]
        while len(free) >= least:
            chosen = dict(zip(free, self.waiting.take(min(slots.group, len(free)))))
            if not chosen:
                self.all_begun = True
                return
            if self.all_begun and slots.fixed:
                slots.used = slots.room.slots  # there were fewer rows meanwhile
            self.all_begun = False
            self.begun.update(chosen)
            pictures = join_pictures([request.picture() for _, request in chosen.values()])
            limits = [request.limit for _, request in chosen.values()]
            slots.admit(list(chosen), pictures, limits, [request.source for _, request in chosen.values()])
            free = free[len(chosen) :]
