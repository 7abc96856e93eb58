"""Decoding held to a schema: what each row may write next, worked out by llguidance while the model computes."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from im2json.errors import UserError
from im2json.inference.grammar import lark
from im2json.scoring.schema import Schema

# B rows, V vocabulary, W bytes of V bits, rounded up to words of 32 bits.
NO_LIMIT = 10**9  # of the engine's work for a token; what it would give up on by default is a large schema
MOST_ADDED = 1_000  # tokens
ALL = 255  # eight tokens that may all be written


class Grammar:
    """A schema, made ready for a tokenizer.

    Args:
        size: V, of the model's logits; it may be larger or smaller than the tokenizer's vocabulary.
        name: what the schema is called in an error.

    Raises:
        UserError: if llguidance is not installed, or does not support what the schema asks for.
    """

    def __init__(self, schema: Schema, tokenizer: PreTrainedTokenizerFast, size: int, name: str) -> None:
        try:
            import llguidance
            import llguidance.hf
        except ImportError as error:
            raise UserError("--constrain needs the package llguidance: pip install -e '.[constrain]'") from error
        self.ends = {tokenizer.eos_token_id, tokenizer.pad_token_id}
        self.engine = llguidance.hf.from_tokenizer(tokenizer, n_vocab=max(size, len(tokenizer)))
        self.executor = llguidance.LLExecutor(num_threads=torch.get_num_threads())
        limits = llguidance.LLParserLimits(step_max_items=NO_LIMIT, step_lexer_fuel=NO_LIMIT)
        try:
            grammar = lark(schema)
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
    """What each row of a batch may write next.

    The bits lie where the model computes and never move, so a CUDA graph can read them. A step is `look`, which starts
    to fetch the tokens written last, then whatever the device does meanwhile, then `update`.
    """

    def __init__(self, grammar: Grammar, rows: int, device: torch.device) -> None:
        words = -(-grammar.engine.vocab_size // 32)
        gpu = device.type == "cuda"
        self.grammar = grammar
        self.matchers: list[Any] = [None] * rows  # none for a row that has ended
        self.bits = torch.full((rows, 4 * words), ALL, dtype=torch.uint8, device=device)  # B x W
        self._host = torch.full((rows, 4 * words), ALL, dtype=torch.uint8, pin_memory=gpu)  # B x W
        self._latest = torch.zeros((rows, 1), dtype=torch.long, pin_memory=gpu)  # B x 1
        self._bit = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=device)
        self._fetched = torch.cuda.Event() if gpu else None

    def begin(self, rows: int) -> None:
        """Put the first `rows` at the start of a text; the others are not needed."""
        self.matchers = [self.grammar.matcher() if row < rows else None for row in range(len(self.matchers))]
        self._fill()

    def look(self, latest: torch.Tensor) -> None:
        """Start to fetch what was written last, B x 1."""
        self._latest.copy_(latest, non_blocking=True)
        if self._fetched is not None:
            self._fetched.record()

    def update(self) -> None:
        """Let the bits follow what `look` has fetched."""
        if self._fetched is not None:
            self._fetched.synchronize()  # waits for the step before, not for what was started since
        for row, token in enumerate(self._latest.flatten().tolist()):
            matcher = self.matchers[row]
            if matcher is None or token in self.grammar.ends:
                self.matchers[row] = None
                continue
            consumed = matcher.consume_token(token)
            assert consumed, matcher.get_error()
        self._fill()

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits, B x V, with minus infinity for what may not be written."""
        forbidden = (self.bits[:, :, None] & self._bit) == 0  # B x W x 8
        return logits.masked_fill(forbidden.flatten(1)[:, : logits.shape[1]], float("-inf"))

    def keep(self, rows: torch.Tensor) -> None:
        """Leave out all other rows."""
        self.matchers = [self.matchers[row] for row in rows.tolist()]
        self.bits, self._host, self._latest = (kept[rows] for kept in (self.bits, self._host, self._latest))

    def _fill(self) -> None:
        from llguidance.numpy import fill_next_token_bitmask_par

        going = [(matcher, row) for row, matcher in enumerate(self.matchers) if matcher is not None]
        if going:
            fill_next_token_bitmask_par(self.grammar.executor, going, self._host.numpy().view(np.int32))
        self.bits.copy_(self._host, non_blocking=True)
