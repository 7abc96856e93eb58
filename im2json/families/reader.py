"""Read prefixes and tokens through a stack of decoder layers: what the families' sides of decoding have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer

from im2json.data.collate import Collator
from im2json.families.base import Cache
from im2json.model.attention import causal_attention, grouped_attention, tiled
from im2json.model.memory import head_size

# B rows, S positions read of each, D hidden, H query heads, G key/value heads, E head size, V vocabulary.
FEW = 1024  # positions whose joint product is quicker than two; with more, its halves lie too far apart in memory


class TextReader:
    """Computes hidden states of embedded prefixes and of the tokens after them, and logits from those.

    The layers are transformers', computed in fewer and larger products: a pass over few tokens takes as long as its
    weights take to be read and its kernels to be launched. Those of Gemma 1 to 3, Qwen 2 and 3, and Llama are known.

    Args:
        model: plain weights, in eval mode. Those of q, k and v, and of gate and up, become views of one tensor each.
        text: its stack of decoder layers.
    """

    records_prefixes = False

    def __init__(self, model: Any, text: Any, collator: Collator) -> None:
        self.model, self.text = model, text
        self.config = config = model.config.get_text_config()
        self.like = model.lm_head.weight
        self.longest_prefix = collator.longest_prefix
        self.last = collator.last
        self.stops = [collator.stop]
        self.layers, self.hidden = len(text.layers), model.lm_head.in_features
        self.kv_heads, self.head_dim = config.num_key_value_heads, head_size(config)
        self.kinds = getattr(config, "layer_types", None) or ["full_attention"] * self.layers
        self.windows = {"full_attention": None, "sliding_attention": getattr(config, "sliding_window", None)}
        attentions = [layer.self_attn for layer in text.layers]
        self.qkv = [_joined(each.q_proj, each.k_proj, each.v_proj) for each in attentions]
        self.gate_up = [_joined(layer.mlp.gate_proj, layer.mlp.up_proj) for layer in text.layers]

    def read_tokens(self, tokens: torch.Tensor, rotations: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Return the hidden states of B x S tokens with these rotary positions; B x S x D."""
        return self.text.norm(self._run(self.text.embed_tokens(tokens), rotations, cache))

    def logits(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits that a token is chosen by, and those that its probability is computed from; ... x V.

        They differ in PaliGemma 2's final cap, which transformers leaves out where it generates.
        """
        logits, cap = self.model.lm_head(hidden), getattr(self.config, "final_logit_softcapping", None)
        return logits, logits if cap is None else cap * torch.tanh(logits.float() / cap)

    def rotary(self, hidden: torch.Tensor, rotations: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines of rotary positions for layers of a kind, B x S x E each."""
        return self.text.rotary_emb(hidden, rotations)

    def _read_prefixes(
        self, hidden: torch.Tensor, rotations: torch.Tensor, cache: Cache, more: Sequence[torch.Tensor] = ()
    ) -> None:
        """Leave the keys and values of B x S x D in the cache. more: what is added after each of the first layers."""
        self._run(hidden, rotations, cache, more, prefix=True)

    def _run(
        self,
        hidden: torch.Tensor,
        rotations: torch.Tensor,
        cache: Cache,
        more: Sequence[torch.Tensor] = (),
        prefix: bool = False,
    ) -> torch.Tensor:
        """Return what the last layer makes of B x S x D."""
        half, heads = self.head_dim // 2, self.config.num_attention_heads
        turns, masks = {}, {}
        for kind in sorted(set(self.kinds)):
            cos, sin = (part[:, :, None] for part in self.rotary(hidden, rotations, kind))  # B x S x 1 x E
            turns[kind] = cos, torch.cat([-sin[..., :half], sin[..., half:]], -1)
            masks[kind] = tiled(cache.mask(self.windows[kind]), heads // self.kv_heads)
        for number, (kind, layer) in enumerate(zip(self.kinds, self.text.layers)):
            attention, (cos, sin), mask = layer.self_attn, turns[kind], masks[kind]
            joint = F.linear(layer.input_layernorm(hidden), *self.qkv[number]).unflatten(-1, (-1, attention.head_dim))
            query_key, value = joint.tensor_split([-self.kv_heads], 2)
            if hasattr(attention, "q_norm"):
                query, key = query_key.tensor_split([heads], 2)
                query_key = torch.cat([attention.q_norm(query), attention.k_norm(key)], 2)
            query_key = torch.addcmul(query_key * cos, query_key.roll(half, -1), sin)
            query, key = query_key.tensor_split([heads], 2)
            seen = cache.update(number, key, value)
            if prefix and number == self.layers - 1:
                break  # of a prefix only keys and values are wanted
            cap = getattr(attention, "attn_logit_softcapping", None)
            if mask is None and cache.causal:
                attended = causal_attention(query, *seen, attention.scaling)
            else:
                attended = grouped_attention(query, *seen, mask, attention.scaling, cap)
            hidden = _after_attention(layer, hidden, attention.o_proj(attended.flatten(2)), self.gate_up[number])
            if number < len(more):
                hidden = hidden + more[number]
        return hidden


def _after_attention(layer: Any, hidden: torch.Tensor, attended: torch.Tensor, gate_up: Any) -> torch.Tensor:
    """Return what the rest of a layer makes of its input and of what it attended to, B x S x D both."""
    if isinstance(layer, Gemma2DecoderLayer | Gemma3DecoderLayer):
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
