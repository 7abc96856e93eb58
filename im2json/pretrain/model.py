"""The embedded base's architecture, and its forward pass as pre-training needs it.

B examples, I image tokens, S positions, D hidden, V vocabulary, A characters that the read-out tells apart.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from im2json.data.receipts.layout import SIDE
from im2json.errors import UserError

PATCH = 14  # px
GRID = SIDE // PATCH
IMAGE_TOKENS = GRID * GRID
COLUMNS, ROWS = 3, 2  # cells that a patch is cut into for the read-out
SIZES = {  # hidden and inner width, layers, heads of the picture's and the text's tower
    "tiny": {"vision": (192, 768, 6, 3), "text": (256, 768, 6, 4)},
    "toy": {"vision": (32, 64, 1, 2), "text": (32, 64, 1, 2)},
}


def build_processor(tokenizer: PreTrainedTokenizerFast) -> PaliGemmaProcessor:
    """The tokenizer with SigLIP's picture processing. It appends its <loc> and <seg> tokens to the tokenizer."""
    pictures = SiglipImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_convert_rgb=True
    )
    setattr(pictures, "image_seq_length", IMAGE_TOKENS)  # noqa: B010, PaliGemmaProcessor asks for it
    return PaliGemmaProcessor(pictures, tokenizer)


def build_model(tokenizer: PreTrainedTokenizerFast, size: str = "tiny") -> PaliGemmaForConditionalGeneration:
    """A PaliGemma with fresh weights whose embedding holds every token of a processor's tokenizer."""
    width, inner, layers, heads = SIZES[size]["vision"]
    vision = SiglipVisionConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        image_size=SIDE, patch_size=PATCH, vision_use_head=False,
    )  # fmt: skip
    width, inner, layers, heads = SIZES[size]["text"]
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    text = GemmaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=1, head_dim=width // heads, vocab_size=len(tokenizer),
        max_position_embeddings=2048, **special,
    )  # fmt: skip
    config = PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.image_token_id,
        vocab_size=len(tokenizer), projection_dim=width, hidden_size=width, **special,
    )  # fmt: skip
    model = PaliGemmaForConditionalGeneration(config)
    model.generation_config.update(**special)
    return model


def load_model(folder: str | Path, tokenizer: PreTrainedTokenizerFast) -> PaliGemmaForConditionalGeneration:
    """Stored weights in float32, to go on from. Raises UserError if they were made with another tokenizer."""
    theirs = PaliGemmaProcessor.from_pretrained(folder).tokenizer
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise UserError(f"the model in {folder} has another tokenizer than pre-training, so it cannot be continued")
    return PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


class Reader(nn.Module):
    """The model with a linear read-out of the projected image features: which character has its centre in a cell.

    The read-out teaches the picture's tower to see; the decoder then only has to learn where to look. It is thrown
    away after pre-training.
    """

    def __init__(self, model: PaliGemmaForConditionalGeneration, alphabet: int):
        super().__init__()
        self.model = model
        self.alphabet = alphabet
        self.read_out = nn.Linear(model.config.projection_dim, COLUMNS * ROWS * alphabet)

    def forward(
        self, pixels: Tensor, tokens: Tensor, prompt_lengths: Tensor, teach: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Logits of the next token after each token of the text, and of each cell's character.

        pixels: float (B, 3, SIDE, SIDE); tokens: (B, S), the text after the image tokens (BOS, prompt, newline, suffix,
        EOS, padding); prompt_lengths: (B,), how many of them belong to the prefix. Without `teach` the read-out's
        gradient ends at the read-out.
        Returns (B, S, V) and (B, I, COLUMNS * ROWS, A).
        """
        base = self.model.model
        image = base.multi_modal_projector(base.vision_tower(pixels).last_hidden_state)  # B x I x D
        cells = self.read_out(image if teach else image.detach())  # B x I x 6A
        cells = cells.unflatten(-1, (COLUMNS * ROWS, self.alphabet))  # B x I x 6 x A
        text = base.language_model.embed_tokens(tokens)  # B x S x D
        # Under autocast this keeps the residual stream in 16 bit
        hidden = torch.cat((image, text.to(image.dtype)), dim=1)  # B x (I + S) x D
        positions = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)[None]  # PaliGemma counts from 1
        hidden = base.language_model(
            inputs_embeds=hidden,
            attention_mask=prefix_mask(prompt_lengths + IMAGE_TOKENS, hidden.shape[1]),
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state  # B x (I + S) x D
        return self.model.lm_head(hidden[:, IMAGE_TOKENS:]), cells


def prefix_mask(prefix_lengths: Tensor, length: int) -> Tensor:
    """Who may look at whom, bool (B, 1, length, length): everybody at the prefix, the suffix at its past.

    Padding comes last, so that no real position looks at it.
    """
    at = torch.arange(length, device=prefix_lengths.device)
    causal = at[None, :] <= at[:, None]  # S x S
    prefix = at[None, None, :] < prefix_lengths[:, None, None]  # B x 1 x S
    return (causal | prefix)[:, None]  # B x 1 x S x S
