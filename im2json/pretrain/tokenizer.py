"""The embedded base's tokenizer: one token a character, JSON's punctuation merged, any Unicode text writable.

Reading is then one step a character, and JSON costs little more than its values. Characters without a token
of their own are written as UTF-8 bytes, one token each.
"""

from __future__ import annotations

import string

from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

PAD, EOS, BOS, UNK, IMAGE = "<pad>", "<eos>", "<bos>", "<unk>", "<image>"
SPECIAL = (PAD, EOS, BOS, UNK, IMAGE)
CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \nÉÈÑÇÜÖÄéèñçüöä£€"
# Every prefix of a piece is a token too, so that the piece grows from left to right; what comes first wins
PIECES = (
    *('":"', '","', '"},{"', '"},"', '"}],"', '"}]}', '"}}'),
    *('":{"', '":[{"', '":["', '"],"', '"],["', '"]]', '"]}'),
)
OPENINGS = ('{"', '[{"', '["', '[["')


def _merges() -> list[tuple[str, str]]:
    """Pairs that BPE joins, in order of precedence."""
    merges: dict[tuple[str, str], None] = {}
    for length in range(2, max(map(len, PIECES)) + 1):
        for piece in PIECES:
            if len(piece) >= length:
                merges[(piece[: length - 1], piece[length - 1])] = None
    for opening in OPENINGS:
        for length in range(2, len(opening) + 1):
            merges[(opening[: length - 1], opening[length - 1])] = None
    return list(merges)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, without the <loc> and <seg> tokens that PaliGemmaProcessor appends."""
    merges = _merges()
    pieces = dict.fromkeys(a + b for a, b in merges)
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *CHARACTERS, *pieces]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    assert len(vocabulary) == len(tokens)
    model = BPE(vocab=vocabulary, merges=merges, unk_token=UNK, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD, eos_token=EOS, bos_token=BOS, unk_token=UNK,
        extra_special_tokens={"image_token": IMAGE},
        clean_up_tokenization_spaces=False,
        padding_side="right",
        model_max_length=1024,
    )  # fmt: skip
