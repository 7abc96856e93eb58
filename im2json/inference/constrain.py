"""Decoding held to a schema: what each row may write next, worked out by llguidance while the model computes."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from im2json.errors import UserError
from im2json.inference.grammar import lark
from im2json.scoring.schema import Schema

if TYPE_CHECKING:
    from im2json.inference.slots import Report

# B rows, K tokens of each in a pass, T tokens of a text, V vocabulary, W bytes of V bits, in whole words of 32 bits.
NO_LIMIT = 10**9  # of the engine's work for a token; what it would give up on by default is a large schema
MOST_ADDED = 1_000  # tokens
ALL = 255  # eight tokens that may all be written


class Grammar:
    """A schema, made ready for a tokenizer.

    Args:
        size: V, of the model's logits; it may be larger or smaller than the tokenizer's vocabulary.
        name: what the schema is called in an error.
        stop: the token that ends a text. Default: the tokenizer's EOS.
        lead: what precedes the JSON of a text.

    Raises:
        UserError: if llguidance is not installed, or does not support what the schema asks for.
    """

    def __init__(
        self,
        schema: Schema,
        tokenizer: PreTrainedTokenizerFast,
        size: int,
        name: str,
        stop: int | None = None,
        lead: str = "",
    ) -> None:
        try:
            import llguidance
            import llguidance.hf
        except ImportError as error:
            raise UserError("--constrain needs the package llguidance: pip install -e '.[constrain]'") from error
        self.engine = llguidance.hf.from_tokenizer(tokenizer, n_vocab=max(size, len(tokenizer)), eos_token=stop)
        self.executor = llguidance.LLExecutor(num_threads=torch.get_num_threads())
        limits = llguidance.LLParserLimits(step_max_items=NO_LIMIT, step_lexer_fuel=NO_LIMIT)
        try:
            grammar = lark(schema, lead)
        except UserError as error:
            raise UserError(f"{name} cannot be decoded by: {error}") from error
        self._first = llguidance.LLMatcher(self.engine, grammar, log_level=0, limits=limits)
        if self._first.is_error():
            raise UserError(f"{name} cannot be decoded by: {self._first.get_error().splitlines()[0]}")

    def matcher(self) -> Any:
        """An llguidance.LLMatcher at the start of a text."""
        return self._first.deep_copy()

    def rest(self, tokens: Sequence[int]) -> list[int]:
        """What ends a text that the length limit has cut: what is open is closed, and what the schema still asks for
        is as empty as it allows. Nothing where the text is whole, and at most EOS is missing.

        A string with a `pattern` is guessed at. Where MOST_ADDED tokens do not end the text, it is left open.
        """
        matcher, rng = self.matcher(), random.Random(0)
        ids = list(tokens)
        if ids[-1:] == [self.engine.eos_token]:
            return []
        matcher.consume_tokens(ids)
        while not matcher.is_accepting() and len(ids) < len(tokens) + MOST_ADDED:
            ids.append(self._shortest(matcher, self.engine.decode_bytes(ids), rng))
            consumed = matcher.consume_token(ids[-1])
            assert consumed, matcher.get_error()
        return ids[len(tokens) :]

    def _shortest(self, matcher: Any, text: bytes, rng: random.Random) -> int:
        """The allowed token that leads to the end soonest: it closes what is open, or else is one of the shortest, by
        chance, since always the same might lead nowhere."""
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
        in_string = re.sub(rb"\\.", b"", text).count(b'"') % 2
        for character in ('"',) if in_string else ("}", "]", '"', ",", "0"):
            (token,) = self.engine.tokenize_str(character)
            if token in allowed:
                return token
        lengths = [len(self.engine.decode_bytes([token])) for token in allowed.tolist()]
        return int(rng.choice(allowed[np.array(lengths) == min(lengths)]))


class Allowed:
    """Mask what each row of a batch may not write next, and after each token of its draft.

    The bits lie where the model computes and never move, so a CUDA graph can read them.

    Args:
        most: tokens of a row in a pass.
    """

    def __init__(self, grammar: Grammar, rows: int, most: int, device: torch.device) -> None:
        words = -(-grammar.engine.vocab_size // 32)
        self.grammar = grammar
        self.matchers: list[Any] = [None] * rows  # none for a row that has ended
        self.seen = [0] * rows  # tokens of each that its matcher knows
        self.bits = torch.full((rows * most, 4 * words), ALL, dtype=torch.uint8, device=device)  # (B K) x W
        self._host = torch.full(self.bits.shape, ALL, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._bit = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=device)

    def begin(self, rows: Sequence[int]) -> None:
        """Put some rows at the start of a text."""
        for row in rows:
            self.matchers[row], self.seen[row] = self.grammar.matcher(), 0

    def update(self, report: Report, length: int) -> None:
        """Let the bits follow what is written, in a pass of `length` tokens a row."""
        from llguidance.numpy import (
            fill_next_token_bitmask_par,
            fill_next_token_bitmask_par_with_draft_tokens,
        )

        alone, drafted = [], []
        for row, matcher in enumerate(self.matchers):
            if matcher is None:
                continue
            if report.finished[row]:
                self.matchers[row] = None
                continue
            count = int(report.counts[row])
            new, self.seen[row] = report.written[row, self.seen[row] : count].tolist(), count
            consumed = matcher.consume_tokens(new)
            assert consumed, matcher.get_error()
            draft = list(itertools.takewhile(lambda token: token >= 0, report.drafts[row, : length - 1].tolist()))
            if draft:
                drafted.append((matcher, row * length, draft))
            else:
                alone.append((matcher, row * length))
        bits = self._host.numpy().view(np.int32)
        if alone:
            fill_next_token_bitmask_par(self.grammar.executor, alone, bits)
        if drafted:
            fill_next_token_bitmask_par_with_draft_tokens(self.grammar.executor, drafted, bits)
        used = len(self.matchers) * length
        self.bits[:used].copy_(self._host[:used], non_blocking=True)

    def mask(self, logits: torch.Tensor, part: slice) -> torch.Tensor:
        """Return logits, N x V, with minus infinity for what may not be written.

        Args:
            part: which N of the B x K tokens of a pass.
        """
        forbidden = (self.bits[part][: len(logits), :, None] & self._bit) == 0  # N x W x 8
        return logits.masked_fill(forbidden.flatten(1)[:, : logits.shape[1]], float("-inf"))

    def move(self, moves: Mapping[int, int]) -> None:
        """Go on with rows in other places, which are free. moves: from which to which"""
        for source, target in moves.items():
            self.matchers[target], self.seen[target] = self.matchers[source], self.seen[source]
            self.matchers[source] = None
