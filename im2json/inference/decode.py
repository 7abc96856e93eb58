"""Greedy decoding in batches: one CUDA graph per evaluation on a GPU, as few rows as possible on a CPU."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import LogitsProcessorList, PaliGemmaForConditionalGeneration

from im2json.data.collate import Collator
from im2json.inference.attention import KeyValues, grouped
from im2json.inference.constrain import Allowed, Grammar

# B rows, P prefix positions, T tokens that may be written, L = P + T rounded up, D hidden, V vocabulary.
CHECK_EVERY = 16  # steps between two looks at whether all rows are done: on a GPU each look waits for the device
WARM_UP = 1  # steps before the graph is captured
ROUND_UP = 64  # cached positions on a GPU: few lengths to capture for, and kernels like multiples of 8


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


class Decoder:
    """Writes the most likely text for each picture, token by token, until EOS or a limit.

    The texts are those of transformers' greedy `generate`. On a GPU the step is captured once as a CUDA graph, for the
    first batch, and replayed for that batch and all that fit in it: keep one decoder for an evaluation, and none
    longer, since it holds the model's weights and a batch's keys and values.

    Args:
        model: plain weights, in eval mode (see model.lora.merged_copy).
        grammar: what every text is held to. What cannot become a text of it is passed over; a text that the model would
            have written without it stays the same.
    """

    def __init__(
        self, model: PaliGemmaForConditionalGeneration, collator: Collator, grammar: Grammar | None = None
    ) -> None:
        self.model = model
        self.collator = collator
        self.grammar = grammar
        self.tokens = 0  # written so far, EOS included
        self.seconds_capturing = 0.0
        self.most_rows: int | None = None  # what fits into the GPU's memory, once it was exceeded
        self._batch: _Batch | None = None  # the captured one
        self._pieces: dict[int, str] = {}  # what each token is by itself

    @torch.no_grad()
    def __call__(
        self, pixels: torch.Tensor, limits: Sequence[int], meanwhile: Callable[[], None] = lambda: None
    ) -> list[Answer]:
        """The answers for one batch.

        Args:
            pixels: B x 3 x H x W, see Collator.pixels.
            limits: how many tokens each of the B may have, at least 1.
            meanwhile: see `generate`.
        """
        if self._beyond_window(limits):
            meanwhile()
            rows = self._by_transformers(pixels, max(limits))
        else:
            with grouped(self.model.model.language_model.config):
                rows = self._rows(pixels, limits, meanwhile)
        return [self._answer(*row, limit) for row, limit in zip(rows, limits)]

    @torch.no_grad()
    def prepare(self, limits: Sequence[int]) -> None:
        """Capture the step for a batch with these limits, if it has not been, while its pictures are being loaded.

        Where the memory does not suffice nothing is done: `generate` finds out what fits.
        """
        if self.model.device.type != "cuda" or not limits or self._beyond_window(limits):
            return
        try:
            with grouped(self.model.model.language_model.config):
                self._captured(min(len(limits), self.most_rows or len(limits)), max(limits))
            return
        except torch.cuda.OutOfMemoryError:
            pass
        self.release()
        torch.cuda.empty_cache()

    def release(self) -> None:
        """Give up the captured graph and its memory."""
        self._batch = None

    def _beyond_window(self, limits: Sequence[int]) -> bool:
        return _window(self.model) < len(self.collator.prefix_ids) + max(limits, default=0)

    def _answer(self, tokens: list[int], logprobs: list[float], limit: int) -> Answer:
        """A row up to EOS or its limit."""
        tokens, decode = _until(self.collator.processor.tokenizer.eos_token_id, tokens[:limit]), self.collator.texts
        self.tokens += len(tokens)
        rest = [] if self.grammar is None else self.grammar.rest(tokens)
        logprobs = logprobs[: len(tokens)] + [-math.inf] * len(rest)
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

    def _rows(self, pixels: torch.Tensor, limits: Sequence[int], meanwhile: Callable[[], None]) -> list[_Row]:
        """What was written for each picture, what follows EOS included."""
        captured = self.model.device.type == "cuda"
        batch = self._captured(len(limits), max(limits)) if captured else self._fresh(len(limits), max(limits))
        batch.begin(pixels, limits)
        meanwhile()
        rows: list[_Row] = [([], [])] * len(limits)
        places = list(range(len(limits)))  # which picture each row of the batch is
        for step in range(1, max(limits)):
            if not captured or step % CHECK_EVERY == 0:
                going = (~batch.finished).nonzero().flatten()
                if len(going) == 0:
                    break
                if not captured and len(going) <= len(batch.finished) * 7 // 8:  # copying the rest costs a bit
                    for place, row in zip(places, batch.rows(step)):
                        rows[place] = row
                    places = [places[i] for i in going.tolist()]
                    batch.keep(going)
            batch.advance()
        for place, row in zip(places, batch.rows()):
            rows[place] = row
        return rows

    def _fresh(self, rows: int, tokens: int) -> _Batch:
        length = len(self.collator.prefix_ids) + tokens
        return _Batch.make(self.model, self.collator, rows, length, whole=False, grammar=self.grammar)

    def _captured(self, rows: int, tokens: int) -> _Batch:
        """A batch with a CUDA graph of the step that has room for so much, the present one if possible."""
        length = len(self.collator.prefix_ids) + max(tokens, WARM_UP)
        length = -(-length // ROUND_UP) * ROUND_UP
        if self._batch is not None:
            have, reach = len(self._batch.finished), self._batch.length
            if rows <= have and length <= reach:
                return self._batch
            rows, length = max(rows, have), max(length, reach)
            self.release()
        start = time.perf_counter()
        batch = _Batch.make(self.model, self.collator, rows, length, whole=True, grammar=self.grammar)
        batch.capture()
        self.seconds_capturing += time.perf_counter() - start
        self._batch = batch
        return batch

    def _by_transformers(self, pixels: torch.Tensor, longest: int) -> list[_Row]:
        """Slower. For a Gemma 2 whose sliding window is shorter than what is decoded: its layers see different parts
        of it. PaliGemma 2's window is 4,096."""
        device, tokenizer = self.model.device, self.collator.processor.tokenizer
        prefixes = self.collator.prefixes(pixels.to(self.model.dtype))
        allowed = None if self.grammar is None else Allowed(self.grammar, len(pixels), device)
        logprobs: list[torch.Tensor] = []  # T times B

        def note(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            if allowed is None:
                masked = logits
            else:
                if logprobs:
                    allowed.look(ids[:, -1:])
                    allowed.update()
                else:
                    allowed.begin(len(ids))
                masked = allowed.mask(logits)
            logprobs.append(_logprob(self.model, logits, masked.argmax(-1)))
            return masked

        output = self.model.generate(  # B x (P + T)
            **{name: value.to(device) for name, value in prefixes.items()},
            max_new_tokens=longest,
            do_sample=False,
            use_cache=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            logits_processor=LogitsProcessorList([note]),
        )
        written = output[:, prefixes["input_ids"].shape[1] :]
        return list(zip(written.tolist(), torch.stack(logprobs, 1).tolist()))


def generate(
    decoder: Decoder,
    pixels: torch.Tensor,
    max_new_tokens: int | Sequence[int],
    meanwhile: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """The answers for pictures, in as many batches as the GPU's memory asks for.

    Args:
        pixels: B x 3 x H x W, see Collator.pixels.
        max_new_tokens: for all, or one for each.
        meanwhile: called once, when the prefixes have been handed to the device: where work for other threads is best
            begun. The host starts the thousands of kernels of a prefix one by one, and each would wait for Python's
            lock; a step is two launches.
    """
    meanwhile = functools.cache(meanwhile)  # once, in however many batches
    limits = [max_new_tokens] * len(pixels) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    answers: list[Answer] = []
    while len(answers) < len(pixels):
        rows = slice(len(answers), len(answers) + (decoder.most_rows or len(pixels)))
        try:
            answers += decoder(pixels[rows], limits[rows], meanwhile)
            continue
        except torch.cuda.OutOfMemoryError:
            count = len(pixels[rows])
            if count == 1:
                raise
        # Out here nothing holds on to the tensors of the attempt, as the error did with its traceback.
        decoder.release()
        torch.cuda.empty_cache()
        decoder.most_rows = count // 2
        tqdm.write(f"out of GPU memory with {count} examples at once: going on with {count // 2}")
    meanwhile()
    return answers


_Row = tuple[list[int], list[float]]  # tokens and their log probabilities


@dataclass(eq=False)
class _Batch:
    """Rows that are decoded together, and all that a step reads and writes, on the device."""

    model: PaliGemmaForConditionalGeneration
    prefix: torch.Tensor  # 1 x P
    pad: int
    eos: int
    cache: KeyValues
    cache_name: str  # in the models' forward
    written: torch.Tensor  # B x T, pad where nothing is
    logprobs: torch.Tensor  # B x T, of what is written
    latest: torch.Tensor  # B x 1, the token that each row goes on from
    count: torch.Tensor  # 1, tokens written so far
    limits: torch.Tensor  # B
    finished: torch.Tensor  # B
    length: int  # L
    allowed: Allowed | None
    hidden: torch.Tensor  # B x D, what the next token is chosen by
    graphs: tuple[Any, Any] | None = None  # torch.cuda.CUDAGraph of the model, and of the choice

    @classmethod
    def make(
        cls,
        model: PaliGemmaForConditionalGeneration,
        collator: Collator,
        rows: int,
        length: int,
        whole: bool,
        grammar: Grammar | None = None,
    ) -> _Batch:
        like, tokenizer = model.lm_head.weight, collator.processor.tokenizer
        numbers: dict[str, Any] = {"dtype": torch.long, "device": like.device}
        shape = rows, length - len(collator.prefix_ids)
        return cls(
            model=model,
            prefix=torch.tensor([collator.prefix_ids], **numbers),
            pad=tokenizer.pad_token_id,
            eos=tokenizer.eos_token_id,
            cache_name=_cache_name(model.model.language_model),
            cache=KeyValues(model.config.get_text_config(), rows, length, whole, like),
            written=torch.full(shape, tokenizer.pad_token_id, **numbers),
            logprobs=torch.zeros(shape, device=like.device),
            latest=torch.full((rows, 1), tokenizer.pad_token_id, **numbers),
            count=torch.zeros(1, **numbers),
            limits=torch.zeros(rows, **numbers),
            finished=torch.ones(rows, dtype=torch.bool, device=like.device),
            length=length,
            allowed=None if grammar is None else Allowed(grammar, rows, like.device),
            hidden=like.new_zeros(rows, like.shape[1]),
        )

    def begin(self, pixels: torch.Tensor, limits: Sequence[int]) -> None:
        """Read the prefixes and write each row's first token. Rows that are not needed count as finished."""
        rows, device = len(limits), self.latest.device
        ids = self.prefix.expand(rows, -1)  # B x P
        self.written.fill_(self.pad)
        self.count.zero_()
        self.limits.zero_()
        self.limits[:rows] = torch.tensor(limits, device=device)
        self.finished.fill_(True)
        self.finished[:rows] = False
        hidden = self.model.model(  # B x P x D
            input_ids=ids,
            pixel_values=pixels.to(device, self.model.dtype),
            position_ids=1 + torch.arange(ids.shape[1], device=device)[None],  # PaliGemma counts from 1
            use_cache=True,
            **{self.cache_name: self.cache},
        ).last_hidden_state
        self.cache.position.fill_(ids.shape[1])
        self.cache.filled = ids.shape[1]
        self.hidden[:rows] = hidden[:, -1]
        if self.allowed is not None:
            self.allowed.begin(rows)
        self._choose()

    def advance(self) -> None:
        """One more token for each row."""
        read, choose = (self._read, self._choose) if self.graphs is None else (graph.replay for graph in self.graphs)
        self.cache.filled += 1
        if self.allowed is None:
            read()
        else:
            self.allowed.look(self.latest)
            read()
            self.allowed.update()
        choose()

    def capture(self) -> None:
        """Capture the step as two CUDA graphs: its thousand kernels take a GPU less time than a host needs to start
        them one by one. Between the two is where a host says what may be written."""
        present = torch.cuda.current_stream()
        aside = _aside()
        aside.wait_stream(present)
        with torch.cuda.stream(aside):  # the first runs allocate and choose kernels, which cannot be captured
            for _ in range(WARM_UP):
                self._read()
                self._choose()
        present.wait_stream(aside)
        read, choose = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Other threads load pictures meanwhile, and may do as they like.
        with torch.cuda.graph(read, capture_error_mode="thread_local"):
            self._read()
        with torch.cuda.graph(choose, pool=read.pool(), capture_error_mode="thread_local"):
            self._choose()
        self.graphs = read, choose

    def keep(self, rows: torch.Tensor) -> None:
        """Leave out all other rows."""
        self.cache.keep(rows)
        self.written, self.logprobs, self.latest = self.written[rows], self.logprobs[rows], self.latest[rows]
        self.limits, self.finished = self.limits[rows], self.finished[rows]
        self.hidden = self.hidden[rows]
        if self.allowed is not None:
            self.allowed.keep(rows)

    def rows(self, count: int | None = None) -> list[_Row]:
        """What is written, up to `count` tokens of each row."""
        return list(zip(self.written[:, :count].tolist(), self.logprobs[:, :count].tolist()))

    def _read(self) -> None:
        """Take in the latest token of each row."""
        language_model: Any = self.model.model.language_model
        hidden = language_model(  # B x 1 x D
            inputs_embeds=language_model.embed_tokens(self.latest),
            attention_mask=self.cache.mask(),
            position_ids=1 + self.cache.position[None],
            use_cache=True,
            **{self.cache_name: self.cache},
        ).last_hidden_state
        self.cache.position += 1
        self.hidden.copy_(hidden[:, -1])

    def _choose(self) -> None:
        """Write the next token of each row."""
        logits = self.model.lm_head(self.hidden)  # B x V
        token = (logits if self.allowed is None else self.allowed.mask(logits)).argmax(-1)  # B
        self.logprobs.index_copy_(1, self.count, _logprob(self.model, logits, token)[:, None])
        token = token.masked_fill(self.finished, self.pad)
        self.written.index_copy_(1, self.count, token[:, None])
        self.latest.copy_(token[:, None])
        self.count += 1
        self.finished |= (token == self.eos) | (self.limits <= self.count)


def _logprob(model: PaliGemmaForConditionalGeneration, logits: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Log probability of each row's token (B), from B x V. transformers leaves out PaliGemma 2's cap on logits."""
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if cap is not None:
        logits = cap * torch.tanh(logits.float() / cap)
    return F.log_softmax(logits, 1, dtype=torch.float32).gather(1, token[:, None])[:, 0]


@functools.cache
def _aside() -> torch.cuda.Stream:
    """The one stream for first runs: cuBLAS keeps 32 MiB for each stream that it was ever used on."""
    return torch.cuda.Stream()


def _until(eos: int, row: list[int]) -> list[int]:
    return row[: row.index(eos) + 1] if eos in row else row


def _window(model: PaliGemmaForConditionalGeneration) -> float:
    """How many positions all layers can see."""
    config = model.config.get_text_config()
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    return config.sliding_window if sliding else float("inf")


def _cache_name(model: torch.nn.Module) -> str:
    """What `forward` calls its cache: transformers has renamed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
