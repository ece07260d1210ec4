"""Attention over a packed batch: many sequences' new tokens lie end to end in one row, without padding.

Registered with transformers' attention interface, so that any decoder that goes through it can be batched this way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import AttentionInterface

PACKED_ATTENTION = "pbsd_packed"


@dataclass(frozen=True)
class Segment:
    """New tokens `[start, end)` of the row, continuing `past` tokens in `slot`; slot None: nothing is cached.

    mask: None where the segment has no past (plain causal), else additive [end - start, past + end - start].
    """

    start: int
    end: int
    slot: int | None
    past: int
    mask: torch.Tensor | None


@dataclass(frozen=True)
class DecodeRows:
    """The first `count` tokens of the row: each is the one new token of a sequence.

    span: range of slots to attend over in place, or None to gather `slots` first (when few of a wide range run).
    token_of_row: for each slot of the span the token it serves (idle slots serve an arbitrary one); None: identity.
    row_of_token: its inverse. length: longest context. mask: additive [rows, 1, 1, length].
    """

    count: int
    length: int
    mask: torch.Tensor
    slots: torch.Tensor
    span: tuple[int, int] | None
    token_of_row: torch.Tensor | None
    row_of_token: torch.Tensor | None


@dataclass(frozen=True)
class PackedLayout:
    """Who attends to what in one forward pass; made once per step, shared by all layers."""

    decode: DecodeRows | None
    segments: tuple[Segment, ...]


def causal_mask(count: int, past: int, like: torch.Tensor) -> torch.Tensor:
    """Additive mask [count, past + count]: new token i sees everything up to position past + i."""
    blocked = torch.ones(count, past + count, dtype=torch.bool, device=like.device).triu(past + 1)
    return torch.zeros(count, past + count, dtype=like.dtype, device=like.device).masked_fill_(blocked, float("-inf"))


def decode_rows(slots: Sequence[int], lengths: Sequence[int], like: torch.Tensor) -> DecodeRows:
    """slots: strictly increasing, one per token; lengths: context length of each, the new token included."""
    count, low, high = len(slots), slots[0], slots[-1] + 1
    index = torch.tensor(slots, device=like.device)
    length = max(lengths)
    # Attending over idle slots costs less than copying the running ones out, unless most of the range is idle.
    span = (low, high) if 2 * count >= high - low else None
    token_of_row = row_of_token = None
    limit = torch.tensor(lengths, device=like.device)
    if span and count < high - low:
        row_of_token = index - low
        token_of_row = torch.zeros(high - low, dtype=torch.long, device=like.device)
        token_of_row[row_of_token] = torch.arange(count, device=like.device)
        limit = limit[token_of_row]
    blocked = torch.arange(length, device=like.device) >= limit[:, None]
    mask = torch.zeros(blocked.shape, dtype=like.dtype, device=like.device).masked_fill_(blocked, float("-inf"))
    return DecodeRows(count, length, mask[:, None, None], index, span, token_of_row, row_of_token)


def attend_decode(
    rows: DecodeRows, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """query [count, heads, head_dim] against the slots' keys and values; returns [count, heads, value_dim]."""
    take = slice(*rows.span) if rows.span else rows.slots
    keys, values = keys[take, :, : rows.length], values[take, :, : rows.length]
    if rows.token_of_row is not None:
        query = query.index_select(0, rows.token_of_row)
    # Query heads that share a key/value head become query positions: no key or value is ever repeated.
    grouped = query.reshape(query.shape[0], keys.shape[1], -1, query.shape[-1])
    output = scaled_dot_product_attention(grouped, keys, values, attn_mask=rows.mask, scale=scaling)
    output = output.reshape(query.shape[0], query.shape[1], -1)
    return output if rows.row_of_token is None else output.index_select(0, rows.row_of_token)


def attend_segment(
    segment: Segment, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """query [1, heads, T, head_dim] of the whole row; returns [end - start, heads, value_dim]."""
    if segment.slot is None:
        where = (slice(None), slice(None), slice(segment.start, segment.end))
    else:
        where = (slice(segment.slot, segment.slot + 1), slice(None), slice(0, segment.past + segment.end - segment.start))
    output = scaled_dot_product_attention(
        query[:, :, segment.start : segment.end],
        keys[where],
        values[where],
        attn_mask=segment.mask,
        is_causal=segment.mask is None,
        scale=scaling,
        enable_gqa=True,
    )
    return output[0].transpose(0, 1)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    *,
    layout: PackedLayout,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function. query [1, heads, T, head_dim]; key, value: a layer of SlotCache, or the row's own.

    Returns [1, T, heads, value_dim]. NotImplementedError for soft-capped scores and attention sinks.
    """
    if softcap is not None or s_aux is not None:
        raise NotImplementedError(f"{type(module).__name__}: soft-capped scores and attention sinks are not supported")
    parts = []
    if layout.decode:
        parts.append(attend_decode(layout.decode, query[0, :, : layout.decode.count].transpose(0, 1), key, value, scaling))
    parts.extend(attend_segment(segment, query, key, value, scaling) for segment in layout.segments)
    output = parts[0] if len(parts) == 1 else torch.cat(parts)
    return output[None], None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
