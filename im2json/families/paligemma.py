"""PaliGemma and PaliGemma 2: a SigLIP tower, and a Gemma that attends to picture and prompt in both directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from PIL import Image
from transformers import PaliGemmaProcessor

from im2json.data.collate import Collator, Pictures
from im2json.families.base import PictureFeatures, Squares, as_on_hub, check_processor, refuse
from im2json.families.reader import TextReader
from im2json.model.base import from_pretrained
from im2json.model.memory import Sizes, Tower
from im2json.options import DataOptions, PrefixMask, Trim

# B examples, S positions, I image tokens, D hidden.


class PaliGemma:
    """The family of PaliGemma, see families.base.Family."""

    model_types: Sequence[str] = ("paligemma",)
    text_types: Sequence[str] = ("gemma", "gemma2")
    tower = "vision_tower"
    records_steps = True
    hub_names: ClassVar[Mapping[str, str]] = {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    }

    def load_processor(self, model: str, config: Any) -> PaliGemmaProcessor:
        """Load the processor of a model, and compare it with the model's config.

        Raises:
            UserError: if it cannot be loaded, or would make other inputs than the model takes.
        """
        processor, vision = from_pretrained(PaliGemmaProcessor, model), config.vision_config
        side, shown = vision.image_size, processor.image_processor.size
        check_processor(model, model, {
            "size": ((shown.get("height"), shown.get("width")), (side, side)),
            "image_seq_length": (processor.image_seq_length, (side // vision.patch_size) ** 2),
        })  # fmt: skip
        return processor

    def collator(self, processor: Any, options: DataOptions) -> Collator:
        """Return the collator.

        Raises:
            UserError: if the prompt cannot be used, or a number of image tokens is asked for.
        """
        refuse(options, image_tokens=f"every picture takes {processor.image_seq_length} image tokens with this model")
        return PaliGemmaCollator(processor, options.prompt, options.letterbox, options.trim, options.prefix_mask)

    def hidden_states(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the last hidden states of pictures, prompts and targets; B x S x D.

        transformers looks for the image tokens and compares counts on the GPU, at the cost of a synchronisation; here
        they are known to stand in front (see PaliGemmaCollator), and the rest follows. Everything is queued at once.

        Args:
            inputs: input_ids, attention_mask and token_type_ids (B, S), padded on the right; pixel_values
                (B, 3, H, W), or image_features (B, I, D) as they are computed from those.
        """
        pictures = inputs.get("image_features")  # B x I x D
        if pictures is None:
            pictures = _features(model, inputs)
        words = model.model.get_input_embeddings()(inputs["input_ids"][:, pictures.shape[1] :])  # B x (S - I) x D
        positions = torch.arange(1, inputs["input_ids"].shape[1] + 1, device=words.device)  # S: PaliGemma counts from 1
        config = model.config.get_text_config()
        mask = prefix_mask(inputs["attention_mask"], inputs["token_type_ids"], getattr(config, "sliding_window", None))
        if config._attn_implementation == "eager":
            mask = _added(mask, words.dtype)
        return model.model.language_model(
            inputs_embeds=torch.cat([pictures.to(words.dtype), words], dim=1),
            attention_mask=mask,
            position_ids=positions[None],
            use_cache=False,
        ).last_hidden_state

    def features(self, model: Any) -> PictureFeatures:
        """Return how the features of pictures are computed."""
        sizes = self.sizes(model.config)
        return PictureFeatures((sizes.image_tokens, sizes.text.hidden), partial(_features, model))

    def reader(self, model: Any, collator: Collator) -> PaliGemmaReader:
        """Return what reads prefixes and tokens with a model of plain weights."""
        assert isinstance(collator, PaliGemmaCollator)
        return PaliGemmaReader(model, collator)

    def sizes(self, config: Any, image_tokens: int | None = None) -> Sizes:
        """Return the sizes of a PaliGemmaConfig, with the first or the second Gemma."""
        text, vision = config.get_text_config(), config.vision_config
        tokens = (vision.image_size // vision.patch_size) ** 2
        gemma = Tower.of_decoder(text, norms=4 if text.model_type == "gemma2" else 2)
        d = vision.hidden_size
        siglip = Tower.of_siglip(vision)
        patches = d * (3 * vision.patch_size**2 + tokens)
        return Sizes(gemma, siglip, text.vocab_size, tokens, d * text.hidden_size, patches)

    def hub_layout(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return a PaliGemma's weights under the names that google/paligemma-* has on the hub.

        transformers (5.x) reads these and others; vLLM names its own modules after them, SigLIP's `vision_model`
        included (vllm/model_executor/models/paligemma.py and siglip.py), which transformers leaves out for a model that
        it did not load.
        """
        return as_on_hub(weights, self.hub_names)


class PaliGemmaCollator(Squares, Collator):
    """Lays out examples as PaliGemma was trained, with the tokens that PaliGemmaProcessor makes of text and suffix:

    <image> x 256, BOS, prompt, newline | target JSON, EOS
    """

    def __init__(
        self,
        processor: PaliGemmaProcessor,
        prompt: str,
        letterbox: bool = False,
        trim: Trim = "off",
        prefix_mask: PrefixMask = "full",
    ) -> None:
        super().__init__(processor, prompt, trim)
        if prefix_mask == "picture":
            self.both_ways = processor.image_seq_length
        tokenizer: Any = processor.tokenizer
        image_tokens = processor.image_token * processor.image_seq_length
        prefix = tokenizer(f"{image_tokens}{tokenizer.bos_token}{prompt}\n", add_special_tokens=False)
        self.prefix_ids: list[int] = prefix["input_ids"]  # P
        self.stop, self.last, self.longest_prefix = tokenizer.eos_token_id, self.prefix_ids[-1], len(self.prefix_ids)
        self.image_token = processor.image_token_id
        self.text = f"{processor.image_token}{prompt}"
        self.described = self.to_squares(processor, letterbox)

    def pictures(self, images: Sequence[Image.Image]) -> Pictures:
        """Return {"pixel_values": B x 3 x H x W}: squashed to the square that the tower sees, or letterboxed."""
        encoded = self.processor.image_processor([*map(self.shown, images)], return_tensors="pt")
        return {"pixel_values": encoded["pixel_values"]}

    def prefixes(self, pictures: Mapping[str, torch.Tensor]) -> list[list[int]]:
        """Return the same tokens for each picture, whose pixels or features are given."""
        return [self.prefix_ids] * len(next(iter(pictures.values())))

    def image_tokens(self, width: int, height: int) -> tuple[int, float]:
        """Return the tokens that every picture takes, and the scale that this one is seen in."""
        return self.processor.image_seq_length, self.scale(width, height)

    def seen(self, pictures: Pictures) -> Image.Image:
        """Return the picture in the square that the tower sees."""
        (pixels,) = pictures["pixel_values"]  # 3 x H x W
        shown = self.processor.image_processor
        mean, std = (torch.tensor(values)[:, None, None] for values in (shown.image_mean, shown.image_std))
        return Image.fromarray(((pixels * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


class PaliGemmaReader(TextReader):
    """Reads PaliGemma's prefixes, which are equally long, and the tokens after them."""

    records_prefixes = True

    def __init__(self, model: Any, collator: PaliGemmaCollator) -> None:
        super().__init__(model, model.model.language_model, collator)
        self.prefix = torch.tensor(collator.prefix_ids, device=self.like.device)  # P
        self.both_ways = collator.both_ways

    def read_prefixes(self, pictures: Pictures, cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Read what precedes the answers to B pictures, B x 3 x H x W; see Reader."""
        seen = _features(self.model, {"pixel_values": pictures["pixel_values"].to(self.model.dtype)})  # B x I x D
        words = self.text.embed_tokens(self.prefix[seen.shape[1] :]).expand(len(seen), -1, -1)
        hidden = torch.cat([seen.to(words.dtype), words], 1)
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]  # 1 x P
        length = torch.full((len(seen),), hidden.shape[1], device=seen.device)
        if self.both_ways is not None:
            cache.look_back(length, hidden.shape[1], together=positions < self.both_ways)
        self._read_prefixes(hidden, 1 + positions, cache)
        return length, torch.ones_like(length)  # PaliGemma counts from 1


def _features(model: Any, pictures: Pictures) -> torch.Tensor:
    """Return what the language model gets of B pictures, B x I x D."""
    return model.model.get_image_features(pictures["pixel_values"]).pooler_output


def prefix_mask(
    attention_mask: torch.Tensor, token_type_ids: torch.Tensor, window: int | None
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Return who attends to whom, B x 1 x S x S: in both directions where the type is 0, otherwise causally, nobody to
    padding. For a model with sliding windows, a mask for each kind of layer.
    """
    steps = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    back = (steps[:, None] - steps[None, :])[None, None]  # 1 x 1 x S x S
    in_prefix = token_type_ids == 0  # B x S
    within = in_prefix[:, None, :, None] & in_prefix[:, None, None, :]  # B x 1 x S x S
    real = attention_mask.bool()[:, None, None, :]  # B x 1 x 1 x S
    full = real & (within | (back >= 0))  # B x 1 x S x S
    if window is None:
        return full
    return {"full_attention": full, "sliding_attention": real & (within | (back >= 0) & (back < window))}


def _added(mask: torch.Tensor | dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor | dict[str, torch.Tensor]:
    """Return the mask as it is added to scores."""
    if isinstance(mask, dict):
        return {kind: _added(each, dtype) for kind, each in mask.items()}  # type: ignore[misc]
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
