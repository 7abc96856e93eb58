"""A PaliGemma of the real classes with a small random config, saved locally: what tests load instead of 3 B weights."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

VOCABULARY = 1500  # bytes, specials, and the 1,152 location and segmentation tokens that the processor adds


def save_small_paligemma(folder: Path, seed: int = 0, **text_config: object) -> Path:
    """Save a model of about 0.4 M weights (28 px pictures, 4 image tokens) with its processor."""
    torch.manual_seed(seed)
    config = PaliGemmaConfig(
        vision_config=dict(
            model_type="siglip_vision_model", hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=2, patch_size=14, image_size=28, projection_dim=64, vision_use_head=False,
        ),
        text_config=dict(
            model_type="gemma", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=32, vocab_size=VOCABULARY, max_position_embeddings=2048,
            tie_word_embeddings=True, hidden_activation="gelu_pytorch_tanh", **text_config,
        ),
        image_token_index=260, projection_dim=64, hidden_size=64, pad_token_id=0, bos_token_id=2, eos_token_id=1,
    )  # fmt: skip
    processor = PaliGemmaProcessor(_image_processor(), _byte_tokenizer())
    assert processor.image_token_id == 260
    PaliGemmaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _image_processor() -> SiglipImageProcessorPil:
    processor = SiglipImageProcessorPil(size={"height": 28, "width": 28}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor.image_seq_length = 4
    return processor


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    names = ["<pad>", "<eos>", "<bos>", "<unk>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
