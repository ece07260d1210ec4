"""Decoder modules for a CPU: an RMSNorm that allows sequence parallelism, attention by torch's fused kernel, rotary
positions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_layer_specs
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch.distributed import ProcessGroup

LONGEST_OVER_SHORTEST = 1.5
"""Packed sequences within this ratio of lengths share one call of the attention kernel, padded to the longest."""


class RMSNorm(torch.nn.RMSNorm):
    """Megatron's own torch norm refuses sequence parallelism; this one marks its weight for the gradient all-reduce."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float):
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel


class CausalAttention(MegatronModule):
    """Causal softmax attention over right-padded or packed sequences, each of which may be divided over
    context-parallel ranks.

    Padding stands after every real token, so the causal rule alone keeps real tokens from reading it: no mask.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        super().__init__(config)
        if attn_mask_type != AttnMaskType.causal or attention_type != "self":
            raise ValueError(f"CausalAttention is causal self-attention, not {attn_mask_type} {attention_type!r}")
        self.scale = softmax_scale or 1 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.context_group = pg_collection.cp

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """query [S, B, H, D], key [S, B, G, D], value [S, B, G, V] with G dividing H; result [S, B, H * V].

        Packed: the same without the dimension B. `cu_seqlens_q` bounds the sequences over all context-parallel ranks,
        of which this rank holds S positions in zigzag order: of 2 cp chunks the r-th and the r-th from the end. These
        ranks are `packed_seq_params.cp_group`, if it is given.
        """
        if attention_mask is not None or attention_bias is not None:
            raise ValueError("CausalAttention takes no mask and no bias")
        group = self.context_group
        if packed_seq_params is None:
            lengths = [len(query) * group.size()]
        else:
            group = packed_seq_params.cp_group or group
            lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        if group.size() > 1:
            out = self._divided(query, key, value, lengths, group)
        elif len(lengths) == 1:
            out = self._attend(query, key, value, is_causal=True)
        else:
            out = self._packed(query[0], key[0], value[0], lengths)[None]
        out = out.transpose(0, 1).flatten(2)
        return out if packed_seq_params is None else out.squeeze(1)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **mask) -> torch.Tensor:
        """All [B, S, heads, width]; values may be narrower than keys."""
        width, missing = value.shape[-1], key.shape[-1] - value.shape[-1]
        if missing > 0:
            # The fused kernel is for equal widths; the other keeps all scores.
            value = F.pad(value, (0, missing))
        return F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scale=self.scale, enable_gqa=True,
            dropout_p=self.dropout if self.training else 0.0, **mask).transpose(1, 2)[..., :width]

    def _packed(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Sequence[int]
    ) -> torch.Tensor:
        """Sequences [sum of lengths, heads, D] end to end; those of like length are attended to in one call."""
        widths = torch.tensor(lengths)
        starts = widths.cumsum(0) - widths
        # Where each position's result stands among those of all calls.
        source = torch.empty(len(query), dtype=torch.int64)
        parts, done = [], 0
        for members in like_lengths(lengths):
            offset = torch.arange(lengths[members[0]])
            # Beyond a sequence's end stands whatever follows it: causality hides it.
            place = (starts[members][:, None] + offset).clamp_(max=len(query) - 1)
            rows = [x.index_select(0, place.flatten()).unflatten(0, place.shape) for x in (query, key, value)]
            parts.append(self._attend(*rows, is_causal=True).flatten(0, 1))
            real = offset < widths[members][:, None]
            source[place[real]] = done + real.flatten().nonzero()[:, 0]
            done += place.numel()
        return torch.cat(parts).index_select(0, source)

    def _divided(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Sequence[int],
        group: ProcessGroup,
    ) -> torch.Tensor:
        """Queries of this rank against the keys of all context-parallel ranks, `group`."""
        cp, rank = group.size(), group.rank()
        gathered = gather_from_sequence_parallel_region(
            torch.cat([key, value], -1).transpose(0, 1).contiguous(), tensor_parallel_output_grad=True,
            group=group)
        key, value = gathered.transpose(0, 1).split([key.shape[-1], value.shape[-1]], -1)
        parts, start, held = [], 0, query.shape[1]
        for length in lengths:
            chunk = length // (2 * cp)
            # Chunk c lies with rank min(c, 2 cp - 1 - c), in its first half or in its second.
            place = torch.cat([
                min(c, 2 * cp - 1 - c) * held + start + (c >= cp) * chunk + torch.arange(chunk) for c in range(2 * cp)])
            for half, c in enumerate((rank, 2 * cp - 1 - rank)):
                first = start + half * chunk
                visible = place[: (c + 1) * chunk]
                mask = torch.ones(chunk, len(visible), dtype=torch.bool).tril(c * chunk)
                parts.append(self._attend(
                    query[:, first : first + chunk], key[:, visible], value[:, visible], attn_mask=mask))
            start += length // cp
        return torch.cat(parts, 1)


def like_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Indices grouped so that lengths in a group differ by no more than `LONGEST_OVER_SHORTEST`, longest first."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[groups[-1][0]] <= LONGEST_OVER_SHORTEST * lengths[i]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def rotate_packed(
    tensor: torch.Tensor,
    cu_seqlens: torch.Tensor,
    freqs: torch.Tensor,
    rotary_interleaved: bool = False,
    multi_latent_attention: bool = False,
    mscale: float = 1.0,
    cp_group: ProcessGroup | None = None,
) -> torch.Tensor:
    """Rotary positions of sequences end to end, [T, heads, D] (RoFormer, arXiv 2104.09864): in the order of GPT-NeoX,
    or for latent attention of neighbouring dimensions, whose first ones come out before all second ones.

    In place of Megatron-core's, which slices the angles in Python for each sequence, and takes sine and cosine of all
    positions of all sequences in every layer. freqs: [longest, 1, 1, rotated dimensions], angles by position, each
    twice; mscale: what rotated dimensions are multiplied by. `cp_group` and `cu_seqlens` as in
    `CausalAttention.forward`; rotary_interleaved must be False.
    """
    if rotary_interleaved:
        raise ValueError("rotary positions of packed sequences on a CPU do not come out interleaved")
    place, rotated = packed_positions(cu_seqlens, cp_group), freqs.shape[-1]
    cos, sin = freqs[:, 0].cos() * mscale, freqs[:, 0].sin() * mscale
    sin[..., : rotated // 2].neg_()
    cos, sin = (table.to(tensor.dtype).index_select(0, place) for table in (cos, sin))
    turned, rest = tensor[..., :rotated], tensor[..., rotated:]
    if multi_latent_attention:
        turned = torch.cat([turned[..., ::2], turned[..., 1::2]], -1)
    first, second = turned.chunk(2, -1)
    turned = torch.addcmul(turned * cos, torch.cat([second, first], -1), sin)
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


def packed_positions(bounds: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """int64 [T]: where in its sequence each of this rank's tokens stands; `bounds` as of `CausalAttention.forward`."""
    cp, rank = group.size(), group.rank()
    held = bounds.diff() // cp
    within = torch.arange(int(bounds[-1]) // cp) - (held.cumsum(0) - held).repeat_interleave(held)
    if cp == 1:
        return within
    chunk = (held // 2).repeat_interleave(held)
    return within + torch.where(within < chunk, rank, 2 * cp - 2 - rank) * chunk


def layer_specs(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Local (not Transformer Engine) layers of this pipeline stage with the two modules above."""
    layers = get_gpt_decoder_layer_specs(config, use_transformer_engine=False, normalization=config.normalization)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    layers = layers[first : first + get_num_layers_to_build(config, vp_stage=vp_stage)]
    for layer in layers:
        layer.submodules.input_layernorm = RMSNorm
        layer.submodules.pre_mlp_layernorm = RMSNorm
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = CausalAttention
        if config.multi_latent_attention:
            # Core's local layers divide the down projections, and the rotated part of the keys then has the gradient
            # of one rank's heads: silently wrong weights. Whole ones, with sequence parallelism, add all ranks'.
            attention.linear_q_down_proj = attention.linear_kv_down_proj = Linear
            attention.q_layernorm = attention.kv_layernorm = RMSNorm
        elif attention.q_layernorm is not IdentityOp:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
        if hasattr(layer.submodules.mlp.submodules, "router"):
            # Core's local specs name the norm before experts in checkpoints as if these had taken it in, as dense MLPs
            # do; Transformer Engine's specs do not, and checkpoints are to be the same.
            names = layer.submodules.sharded_state_dict_keys_map
            layer.submodules.sharded_state_dict_keys_map = {
                old: new for old, new in names.items() if old != "pre_mlp_layernorm."}
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
