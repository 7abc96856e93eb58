"""Models of published sizes with random weights in bf16, saved as the hub has them.

Speed and memory do not depend on the values. Tokenizers are byte-level, with the ids of the special tokens that the
layout needs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def random_weights(kind, config):
    """Return a model of a class of transformers with random weights in bf16, made on the GPU if there is one."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = kind(config)
    torch.set_default_dtype(torch.float32)
    return model


def save_random_paligemma(folder: Path, size: str, resolution: int) -> None:
    """A PaliGemma-3B of the published config, of the first or the second Gemma (3b, 3b-2), or a toy of the first one's
    shape, with random weights in bf16."""
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    tokens = (resolution // 14) ** 2
    vision = dict(
        model_type="siglip_vision_model", hidden_size=1152, intermediate_size=4304, num_hidden_layers=27,
        num_attention_heads=16, num_image_tokens=tokens, patch_size=14, image_size=resolution, projection_dim=2048,
        vision_use_head=False,
    )  # fmt: skip
    text = dict(
        model_type="gemma", hidden_size=2048, intermediate_size=16384, num_hidden_layers=18, num_attention_heads=8,
        num_key_value_heads=1, head_dim=256, num_image_tokens=tokens, vocab_size=257216, tie_word_embeddings=True,
        hidden_activation="gelu_pytorch_tanh",
    )  # fmt: skip
    if size == "3b-2":
        text |= dict(
            model_type="gemma2", hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_key_value_heads=4,
            query_pre_attn_scalar=256,
        )  # fmt: skip
        vision["projection_dim"] = 2304
    if size == "toy":
        vision |= dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2)
        text |= dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, head_dim=32)
        vision["projection_dim"] = 64
    config = PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_index=257152, projection_dim=text["hidden_size"],
        hidden_size=text["hidden_size"], pad_token_id=0, bos_token_id=2, eos_token_id=1,
    )  # fmt: skip
    random_weights(PaliGemmaForConditionalGeneration, config).save_pretrained(folder)
    _processor(resolution).save_pretrained(folder)


QWEN_SPECIALS = {
    151643: "<|endoftext|>", 151644: "<|im_start|>", 151645: "<|im_end|>", 151652: "<|vision_start|>",
    151653: "<|vision_end|>", 151655: "<|image_pad|>", 151656: "<|video_pad|>",
}  # fmt: skip
QWEN_IDS = dict(image_token_id=151655, video_token_id=151656, vision_start_token_id=151652, vision_end_token_id=151653)
SIGLIP = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, patch_size=14)
# hidden, intermediate, layers, query heads, key/value heads, head size
DECODERS = {
    "qwen-4b": (2560, 9728, 36, 32, 8, 128),
    "qwen-2b": (2048, 6144, 28, 16, 8, 128),
    "qwen-toy": (64, 128, 4, 4, 2, 16),
    "qwen2.5-3b": (2048, 11008, 36, 16, 2, 128),
    "gemma3-4b": (2560, 10240, 34, 8, 4, 256),
    "smolvlm-2b": (2048, 8192, 24, 32, 32, 64),
    "docling": (576, 1536, 30, 9, 3, 64),
    "paddleocr": (1024, 3072, 18, 16, 2, 128),
}
CHAT = list(DECODERS)
SIZES = ["3b", "3b-2", "toy", *CHAT]
IMAGE_TOKENS = 1080  # of a receipt, where a model reads pictures in their own shape


def save_random(folder: Path, size: str, resolution: int) -> None:
    """Save a random model of one of SIZES; the resolution is PaliGemma's."""
    if size in CHAT:
        _save_random_chat(folder, size)
    else:
        save_random_paligemma(folder, size, resolution)


def picture_size(size: str, resolution: int) -> tuple[int, int]:
    """Return width and height of the pictures for a model: a square for PaliGemma, and for others a receipt of 864 x
    1280 pixels, which is 1,080 image tokens for Qwen3-VL."""
    return (resolution, resolution) if size not in CHAT else (864, 1280) if size != "qwen-toy" else (96, 128)


def image_tokens(size: str) -> int | None:
    """Return --image-tokens for a model, None where it means nothing or is left to the model."""
    return IMAGE_TOKENS if size.startswith(("qwen", "paddle")) else None


def _save_random_chat(folder: Path, size: str) -> None:
    make = {"qwen2": _qwen25, "gemma": _gemma3, "smolv": _tiles, "docli": _tiles, "paddl": _paddleocr}
    kind, config, tokenizer, shown, stop, features = make.get(size[:5], _qwen3)(size)
    model = random_weights(kind, config)
    model.generation_config.eos_token_id = stop
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    for each in (model, tokenizer, shown):
        each.save_pretrained(folder)
    if features:
        (folder / "processor_config.json").write_text(json.dumps(features))


def _decoder(size: str, **more: Any) -> dict[str, Any]:
    hidden, intermediate, layers, heads, kv_heads, head = DECODERS[size]
    return dict(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head, **more,
    )  # fmt: skip


def _qwen3(size: str) -> tuple[Any, ...]:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    toy = size == "qwen-toy"
    vision = dict(
        depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16, deepstack_visual_indexes=[5, 11, 17]
    )
    if toy:
        vision = dict(depth=4, hidden_size=64, intermediate_size=128, num_heads=4, deepstack_visual_indexes=[0, 1, 2])
    config = Qwen3VLConfig(
        text_config=_decoder(
            size, vocab_size=151936, max_position_embeddings=262144, tie_word_embeddings=True,
            rope_parameters=dict(
                rope_type="default", rope_theta=5e6, mrope_section=[2, 3, 3] if toy else [24, 20, 20],
                mrope_interleaved=True,
            ),
        ),
        vision_config=dict(
            patch_size=16, spatial_merge_size=2, temporal_patch_size=2, in_channels=3, num_position_embeddings=2304,
            out_hidden_size=DECODERS[size][0], **vision,
        ),
        tie_word_embeddings=True, **QWEN_IDS,
    )  # fmt: skip
    tokenizer = _tokenizer(QWEN_SPECIALS, 151669, QWEN_TEMPLATE, "<|im_end|>", "<|endoftext|>")
    return Qwen3VLForConditionalGeneration, config, tokenizer, _patches(16), [151645, 151643], None


def _qwen25(size: str) -> tuple[Any, ...]:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config=_decoder(
            size, vocab_size=151936, max_position_embeddings=128000, tie_word_embeddings=True,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]),
        ),
        vision_config=dict(
            depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=2048, window_size=112,
            fullatt_block_indexes=[7, 15, 23, 31], patch_size=14, temporal_patch_size=2, spatial_merge_size=2,
        ),
        tie_word_embeddings=True, **QWEN_IDS,
    )  # fmt: skip
    tokenizer = _tokenizer(QWEN_SPECIALS, 151669, QWEN_TEMPLATE, "<|im_end|>", "<|endoftext|>")
    return Qwen2_5_VLForConditionalGeneration, config, tokenizer, _patches(14), [151645, 151643], None


def _gemma3(size: str) -> tuple[Any, ...]:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    special = {
        105: "<start_of_turn>", 106: "<end_of_turn>", 255999: "<start_of_image>", 256000: "<end_of_image>",
        262144: "<image_soft_token>",
    }  # fmt: skip
    config = Gemma3Config(
        text_config=_decoder(size, vocab_size=262208, query_pre_attn_scalar=256, sliding_window=1024),
        vision_config=dict(image_size=896, vision_use_head=False, **SIGLIP),
        mm_tokens_per_image=256, image_token_index=262144, boi_token_index=255999, eoi_token_index=256000,
    )  # fmt: skip
    template = (
        "{% for message in messages %}<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
        "{% for part in message.content %}{% if part.type == 'image' %}<start_of_image>{% else %}{{ part.text }}"
        "{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    )
    tokenizer = _tokenizer(special, 262145, template, "<end_of_turn>", "<unk>")
    shown = Gemma3ImageProcessorPil(size={"height": 896, "width": 896}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return Gemma3ForConditionalGeneration, config, tokenizer, shown, [106], {"image_seq_length": 256}


def _tiles(size: str) -> tuple[Any, ...]:
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
    )
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    smol = size == "smolvlm-2b"
    rows = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    words = ["<|im_start|>", "<end_of_utterance>", "<image>", "<fake_token_around_image>", "<global-img>", *rows]
    special = {300 + i: word for i, word in enumerate(words)}
    tower = SIGLIP | dict(image_size=384)
    if not smol:
        tower = dict(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=16,
            image_size=512,
        )  # fmt: skip
    tile, scale = (384, 3) if smol else (512, 4)
    text = _decoder(size, model_type="llama", vocab_size=49280 if smol else 100352, max_position_embeddings=8192)
    made = dict(
        text_config=text, vision_config=tower, scale_factor=scale, image_token_id=302, pad_token_id=0,
        tie_word_embeddings=not smol,
    )  # fmt: skip
    config = SmolVLMConfig(**made) if smol else Idefics3Config(**made)
    template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
        "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}<end_of_utterance>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = _tokenizer(special, 1000, template, "<end_of_utterance>", "<unk>")
    shown = Idefics3ImageProcessorPil(
        size={"longest_edge": 4 * tile}, max_image_size={"longest_edge": tile}, image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )  # fmt: skip
    features = (tower["image_size"] // tower["patch_size"]) ** 2 // scale**2
    kind = SmolVLMForConditionalGeneration if smol else Idefics3ForConditionalGeneration
    return kind, config, tokenizer, shown, [301], {"image_seq_len": features}


def _paddleocr(size: str) -> tuple[Any, ...]:
    from transformers import PaddleOCRVLConfig, PaddleOCRVLForConditionalGeneration
    from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil

    special = {
        2: "</s>", 100295: "<|IMAGE_PLACEHOLDER|>", 101305: "<|IMAGE_START|>", 101306: "<|IMAGE_END|>",
    }  # fmt: skip
    config = PaddleOCRVLConfig(
        text_config=_decoder(
            size, vocab_size=103424, tie_word_embeddings=True,
            rope_parameters=dict(rope_type="default", rope_theta=5e5, mrope_section=[16, 24, 24]),
        ),
        vision_config=SIGLIP | dict(image_size=384), tie_word_embeddings=True,
    )  # fmt: skip
    template = (
        "{% for message in messages %}{{ 'User: ' if message.role == 'user' else 'Assistant: ' }}"
        "{% for part in message.content %}{% if part.type == 'image' %}"
        "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>{% else %}{{ part.text }}{% endif %}{% endfor %}"
        "{{ '\\n' if message.role == 'user' else '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}Assistant: {% endif %}"
    )
    tokenizer = _tokenizer(special, 103400, template, "</s>", "<unk>")
    shown = PaddleOCRVLImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return PaddleOCRVLForConditionalGeneration, config, tokenizer, shown, [2], None


QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _patches(size: int) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": 65536, "longest_edge": 16777216}, patch_size=size, merge_size=2, temporal_patch_size=2,
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip


def _tokenizer(special: dict[int, str], size: int, template: str, eos: str, pad: str) -> Any:
    """Return a byte-level tokenizer of so many words, some of which are special."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    names += [f"<unused{i}>" for i in range(len(names), size)]
    for place, name in special.items():
        if place < 257:  # a byte's name makes room
            names.append(names[place])
        names[place] = name
    words = {name: i for i, name in enumerate(names)}
    bpe = Tokenizer(models.BPE(words, [], unk_token="<unk>", byte_fallback=True))
    bpe.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(special.values())})
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template = eos, pad, template
    assert all(tokenizer.convert_tokens_to_ids(name) == place for place, name in special.items())
    return tokenizer


def as_transformers(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the inputs of transformers' own forward pass for a batch of ours."""
    from im2json.families.qwen import pixel_values

    kind = model.config.model_type
    if kind == "paligemma":
        return inputs
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    of_picture = (inputs["input_ids"] == model.config.image_token_id).int()
    if "patches" in inputs:
        frames = getattr(model.config.vision_config, "temporal_patch_size", 1)
        pixels = pixel_values(inputs, frames, torch.float32)
        if kind == "paddleocr_vl":
            pixels = pixels.unflatten(1, (3, 14, 14))
        return text | {
            "pixel_values": pixels, "image_grid_thw": inputs["image_grid_thw"], "mm_token_type_ids": of_picture,
        }  # fmt: skip
    name = "pixels" if kind == "gemma3" else "tiles"
    shape = (-1, 2, *[1] * (inputs[name].ndim - 4), 3, 1, 1)
    black, white = inputs["levels"].view(shape).unbind(1)
    pixels = black + (white - black) / 255 * inputs[name]
    if kind == "gemma3":
        return text | {"pixel_values": pixels, "token_type_ids": of_picture}
    counts = inputs["grid"].prod(1) + 1
    real = torch.arange(pixels.shape[1], device=pixels.device) < counts[:, None]  # B x T
    return text | {"pixel_values": pixels * real[..., None, None, None]}


def _processor(resolution: int):
    """PaliGemma's processor around a byte-level tokenizer with its vocabulary's size and the ids of its specials."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PaliGemmaProcessor, PreTrainedTokenizerFast
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    names = ["<pad>", "<eos>", "<bos>", "<unk>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    names += [f"<unused{i}>" for i in range(len(names), 256000)]
    bpe = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True))
    bpe.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
    tokenizer.add_tokens([f"<loc{i:04}>" for i in range(1024)] + [f"<seg{i:03}>" for i in range(128)])
    pictures = SiglipImageProcessorPil(
        size={"height": resolution, "width": resolution}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    pictures.image_seq_length = (resolution // 14) ** 2
    processor = PaliGemmaProcessor(pictures, tokenizer)
    assert processor.image_token_id == 257152
    return processor
