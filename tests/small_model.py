"""Models of the real classes with small random configs, saved locally: what tests load instead of billions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    PaddleOCRVLConfig,
    PaddleOCRVLForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
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


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
]  # fmt: skip


def save_small_chat(folder: Path, seed: int = 0, tied: bool = True, template: str = CHAT_TEMPLATE) -> Path:
    """Save a Qwen3-VL of 0.1 M weights (pictures of 8 px a token) with what its processor is made from."""
    torch.manual_seed(seed)
    tokenizer, ids = _chat_tokenizer(CHAT_TOKENS, template)
    config = Qwen3VLConfig(
        vision_config=dict(
            depth=3, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=4, temporal_patch_size=2,
            spatial_merge_size=2, out_hidden_size=64, num_position_embeddings=64, deepstack_visual_indexes=[0, 1],
        ),
        text_config=dict(
            hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, vocab_size=320, max_position_embeddings=2048, tie_word_embeddings=tied,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2],
                             "mrope_interleaved": True},
        ),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]], pad_token_id=ids["<|endoftext|>"]
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": 4 * 64, "longest_edge": 4096 * 64}
    shown = Qwen2VLImageProcessorPil(
        size=size, patch_size=4, merge_size=2, temporal_patch_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    shown.save_pretrained(folder)
    return folder


def save_small_qwen25(folder: Path) -> Path:
    """Save a Qwen2.5-VL of the same sizes, whose tower looks at windows of two by two tokens."""
    torch.manual_seed(0)
    tokenizer, ids = _chat_tokenizer(CHAT_TOKENS, CHAT_TEMPLATE)
    config = Qwen2_5_VLConfig(
        vision_config=dict(
            depth=2, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=4, temporal_patch_size=2,
            spatial_merge_size=2, out_hidden_size=64, window_size=16, fullatt_block_indexes=[1],
        ),
        text_config=dict(
            hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=320, max_position_embeddings=2048, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
        ),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]], pad_token_id=ids["<|endoftext|>"]
    )
    size = {"shortest_edge": 4 * 64, "longest_edge": 4096 * 64}
    shown = Qwen2VLImageProcessorPil(
        size=size, patch_size=4, merge_size=2, temporal_patch_size=2, image_mean=[0.48, 0.46, 0.41],
        image_std=[0.27, 0.26, 0.28],
    )  # fmt: skip
    return _saved(folder, model, tokenizer, shown)


GEMMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{% for part in message.content %}{% if part.type == 'image' %}<start_of_image>"
    "{% else %}{{ part.text | trim }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GEMMA3_TOKENS = [
    "<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>",
    "<image_soft_token>",
]  # fmt: skip


def save_small_gemma3(folder: Path) -> Path:
    """Save a Gemma 3 with pictures of 4 tokens, and a window of 16 in two of three layers."""
    torch.manual_seed(0)
    tokenizer, ids = _chat_tokenizer(GEMMA3_TOKENS, GEMMA3_TEMPLATE)
    named = dict(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", pad_token="<pad>", bos_token="<bos>",
        extra_special_tokens=named, chat_template=GEMMA3_TEMPLATE,
    )  # fmt: skip
    config = Gemma3Config(
        vision_config=dict(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, patch_size=7,
            image_size=28, vision_use_head=False,
        ),
        text_config=dict(
            hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, vocab_size=320, max_position_embeddings=2048, sliding_window=16, query_pre_attn_scalar=16,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        mm_tokens_per_image=4, image_token_index=ids["<image_soft_token>"], boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"], tie_word_embeddings=True,
    )  # fmt: skip
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    model.generation_config = GenerationConfig(eos_token_id=[ids["<eos>"], ids["<end_of_turn>"]], pad_token_id=0)
    shown = Gemma3ImageProcessorPil(size={"height": 28, "width": 28}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return _saved(folder, model, tokenizer, shown, image_seq_length=4)


SMOL_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message.role | capitalize }}"
    "{{ ':' if message.content[0].type == 'image' else ': ' }}"
    "{% for part in message.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
SMOL_TOKENS = [
    "<|im_start|>", "<|im_end|>", "<end_of_utterance>", "<image>", "<fake_token_around_image>", "<global-img>",
    *[f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)],
]  # fmt: skip
DOCLING_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_small_smolvlm(folder: Path) -> Path:
    """Save a SmolVLM2 with tiles of 16 pixels and 4 tokens, up to 3 by 3 of them."""
    return _save_small_tiles(folder, SmolVLMConfig, SmolVLMForConditionalGeneration, SMOL_TEMPLATE)


def save_small_idefics3(folder: Path) -> Path:
    """Save an Idefics 3 of the same sizes, with a template as Granite-Docling's."""
    return _save_small_tiles(folder, Idefics3Config, Idefics3ForConditionalGeneration, DOCLING_TEMPLATE)


def _save_small_tiles(folder: Path, config_class: Any, model_class: Any, template: str) -> Path:
    torch.manual_seed(0)
    tokenizer, ids = _chat_tokenizer(SMOL_TOKENS, template)
    config = config_class(
        vision_config=dict(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, patch_size=4,
            image_size=16,
        ),
        text_config=dict(
            model_type="llama", hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, vocab_size=320, max_position_embeddings=2048,
            pad_token_id=ids["<|im_end|>"],
        ),
        scale_factor=2, image_token_id=ids["<image>"], tie_word_embeddings=True, pad_token_id=ids["<|im_end|>"],
    )  # fmt: skip
    model = model_class(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[ids["<end_of_utterance>"], ids["<|im_end|>"]], pad_token_id=ids["<|im_end|>"]
    )
    shown = Idefics3ImageProcessorPil(
        size={"longest_edge": 48}, max_image_size={"longest_edge": 16}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return _saved(folder, model, tokenizer, shown, image_seq_len=4)


PADDLE_TEMPLATE = (
    "{% for message in messages %}{{ 'User: ' if message.role == 'user' else 'Assistant: ' }}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{{ '\\n' if message.role == 'user' else '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
PADDLE_TOKENS = ["<unknown>", "</s>", "<|IMAGE_START|>", "<|IMAGE_PLACEHOLDER|>", "<|IMAGE_END|>"]


def save_small_paddleocr(folder: Path) -> Path:
    """Save a PaddleOCR-VL with pictures of 8 pixels a token."""
    torch.manual_seed(0)
    tokenizer, ids = _chat_tokenizer(PADDLE_TOKENS, PADDLE_TEMPLATE, eos="</s>")
    named = dict(image_token="<|IMAGE_PLACEHOLDER|>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", pad_token="<unknown>",
        extra_special_tokens=named, chat_template=PADDLE_TEMPLATE,
    )  # fmt: skip
    config = PaddleOCRVLConfig(
        vision_config=dict(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, patch_size=4,
            image_size=32,
        ),
        text_config=dict(
            hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, vocab_size=320, max_position_embeddings=2048, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
        ),
        image_token_id=ids["<|IMAGE_PLACEHOLDER|>"], vision_start_token_id=ids["<|IMAGE_START|>"],
        vision_end_token_id=ids["<|IMAGE_END|>"], tie_word_embeddings=True,
    )  # fmt: skip
    model = PaddleOCRVLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(eos_token_id=ids["</s>"], pad_token_id=ids["<unknown>"])
    size = {"shortest_edge": 4 * 64, "longest_edge": 4096 * 64}
    shown = PaddleOCRVLImageProcessorPil(
        size=size, patch_size=4, merge_size=2, temporal_patch_size=1, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return _saved(folder, model, tokenizer, shown)


def _chat_tokenizer(
    special: list[str], template: str, eos: str = "<|im_end|>"
) -> tuple[PreTrainedTokenizerFast, dict[str, int]]:
    """Return a byte-level tokenizer with these special tokens, their ids among 320, and the template."""
    tokenizer = _byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token = eos, special[0], None
    tokenizer.chat_template = template
    assert len(tokenizer) <= 320
    return tokenizer, {name: tokenizer.convert_tokens_to_ids(name) for name in special}


def _saved(folder: Path, model: Any, tokenizer: Any, image_processor: Any, **described: int) -> Path:
    for each in (model, tokenizer, image_processor):
        each.save_pretrained(folder)
    if described:
        (folder / "processor_config.json").write_text(json.dumps(described))
    return folder
