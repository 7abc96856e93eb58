"""Read a picture's prefix and the tokens after it with PaliGemma: the model's side of decoding."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import PaliGemmaForConditionalGeneration
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer

from im2json.data.collate import Collator
from im2json.inference.cache import KeyValues, PrefixCache, TokenCache, grouped_attention, tiled

# B rows, S positions read of each, P prefix positions, D hidden, H query heads, G key/value heads, E head size,
# V vocabulary.
FEW = 1024  # positions whose joint product is quicker than two; with more, its halves lie too far apart in memory


class PaliGemmaReader:
    """Computes hidden states of prefixes and of the tokens after them, and logits from those.

    The layers are transformers', computed in fewer and larger products: a pass over few tokens takes as long as its
    weights take to be read and its kernels to be launched. Gemma (PaliGemma) and Gemma 2 (PaliGemma 2) alike.

    Args:
        model: plain weights, in eval mode. Those of q, k and v, and of gate and up, become views of one tensor each.
    """

    def __init__(self, model: PaliGemmaForConditionalGeneration, collator: Collator) -> None:
        self.model = model
        self.config = model.config.get_text_config()
        self.text: Any = model.model.language_model
        self.prefix = torch.tensor(collator.prefix_ids, device=model.lm_head.weight.device)  # P
        self.stops = [collator.processor.tokenizer.eos_token_id]
        kinds = getattr(self.config, "layer_types", None) or ["full_attention"] * len(self.text.layers)
        window = getattr(self.config, "sliding_window", None)
        self.windows = [window if kind == "sliding_attention" else None for kind in kinds]
        attentions = [layer.self_attn for layer in self.text.layers]
        self.qkv = [_joined(each.q_proj, each.k_proj, each.v_proj) for each in attentions]
        self.gate_up = [_joined(layer.mlp.gate_proj, layer.mlp.up_proj) for layer in self.text.layers]

    def new_cache(self, slots: int, length: int) -> KeyValues:
        """Return room for `slots` texts of `length` positions each, prefix included."""
        config = self.config
        like = self.model.lm_head.weight
        return KeyValues(len(self.text.layers), config.num_key_value_heads, config.head_dim, slots, length, like)

    def slot_bytes(self, length: int) -> int:
        """Return what the keys and values of a slot take."""
        config, weight = self.config, self.model.lm_head.weight
        return 2 * len(self.text.layers) * config.num_key_value_heads * config.head_dim * weight.itemsize * length

    def read_prefixes(self, pixels: torch.Tensor, cache: PrefixCache) -> tuple[torch.Tensor, torch.Tensor]:
        """Read what precedes the answers to B pictures, B x 3 x H x W.

        Returns:
            How many positions each prefix has, and what is added to a position for its rotation; B each.
        """
        pictures = self.model.model.get_image_features(pixels.to(self.model.dtype)).pooler_output  # B x I x D
        words = self.text.embed_tokens(self.prefix[pictures.shape[1] :]).expand(len(pixels), -1, -1)
        hidden = torch.cat([pictures.to(words.dtype), words], 1)
        self._layers(hidden, 1 + torch.arange(hidden.shape[1], device=hidden.device)[None], cache)
        length = torch.full((len(pixels),), hidden.shape[1], device=pixels.device)
        return length, torch.ones_like(length)  # PaliGemma counts from 1

    def read_tokens(self, tokens: torch.Tensor, rotations: torch.Tensor, cache: TokenCache) -> torch.Tensor:
        """Return the hidden states of B x S tokens with these rotary positions; B x S x D."""
        return self.text.norm(self._layers(self.text.embed_tokens(tokens), rotations, cache))

    def logits(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits that a token is chosen by, and those that its probability is worked out from; ... x V.

        They differ in PaliGemma 2's final cap, which transformers leaves out where it generates.
        """
        logits, cap = self.model.lm_head(hidden), getattr(self.config, "final_logit_softcapping", None)
        return logits, logits if cap is None else cap * torch.tanh(logits.float() / cap)

    def _layers(self, hidden: torch.Tensor, rotations: torch.Tensor, cache: PrefixCache | TokenCache) -> torch.Tensor:
        """Return what the last layer makes of B x S x D."""
        cos, sin = (part[:, :, None] for part in self.text.rotary_emb(hidden, rotations))  # B x S x 1 x E
        half = sin.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
        shared = self.config.num_attention_heads // self.config.num_key_value_heads
        masks = {window: tiled(cache.mask(window), shared) for window in set(self.windows)}
        for number, layer in enumerate(self.text.layers):
            attention = layer.self_attn
            heads = F.linear(layer.input_layernorm(hidden), *self.qkv[number]).unflatten(-1, (-1, attention.head_dim))
            query_key, value = heads.tensor_split([-self.config.num_key_value_heads], 2)
            query_key = torch.addcmul(query_key * cos, query_key.roll(half, -1), sin)
            query, key = query_key.tensor_split([self.config.num_attention_heads], 2)
            seen = cache.update(number, key, value)
            if isinstance(cache, PrefixCache) and number == len(self.text.layers) - 1:
                break  # of a prefix only keys and values are wanted
            cap = getattr(attention, "attn_logit_softcapping", None)
            attended = grouped_attention(query, *seen, masks[self.windows[number]], attention.scaling, cap)
            hidden = _after_attention(layer, hidden, attention.o_proj(attended.flatten(2)), self.gate_up[number])
        return hidden


def _after_attention(layer: Any, hidden: torch.Tensor, attended: torch.Tensor, gate_up: Any) -> torch.Tensor:
    """Return what the rest of a layer makes of its input and of what it attended to, B x S x D both."""
    if isinstance(layer, Gemma2DecoderLayer):
        hidden = hidden + layer.post_attention_layernorm(attended)
        return hidden + layer.post_feedforward_layernorm(
            _feed_forward(layer.mlp, layer.pre_feedforward_layernorm(hidden), gate_up)
        )
    hidden = hidden + attended
    return hidden + _feed_forward(layer.mlp, layer.post_attention_layernorm(hidden), gate_up)


def _feed_forward(mlp: Any, x: torch.Tensor, gate_up: Any) -> torch.Tensor:
    if x.shape[:2].numel() > FEW:
        return mlp(x)
    gate, up = F.linear(x, *gate_up).chunk(2, -1)
    return mlp.down_proj(mlp.act_fn(gate) * up)


def _joined(*layers: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return weight and bias of linear layers with the same input as one, whose parts the layers then share."""
    parts = [len(layer.weight) for layer in layers]
    weight = torch.cat([layer.weight.data for layer in layers])
    for layer, part in zip(layers, weight.split(parts)):
        layer.weight.data = part
    return weight, None if layers[0].bias is None else torch.cat([layer.bias.data for layer in layers])
