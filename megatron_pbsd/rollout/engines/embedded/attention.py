"""Attention over a packed batch: many sequences' new tokens lie end to end in one row, without padding.

Registered with transformers' attention interface, so that any decoder that goes through it can be batched this way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.modeling_utils import AttentionInterface

from megatron_pbsd.rollout.drafting.draft_tree import DraftTree
from megatron_pbsd.rollout.engines.embedded.kv_cache import SlotCache
from megatron_pbsd.rollout.engines.embedded.padding import LONGEST_SEGMENT, QUERY_MULTIPLE, padded_keys, round_up

PACKED_ATTENTION = "pbsd_packed"


def least_queries(head_dim: int) -> int:
    """Fewest query rows per key/value head that take the same kernel as many rows do."""
    return max(2, head_dim // 16)


@dataclass(frozen=True)
class Segment:
    """New tokens `[start, end)` of the row, which continue `past` tokens.

    slot: where the sequence's keys lie, or None: in the row itself, just before `start`.
    mask: additive [queries, keys], both rounded up to their multiples; what is beyond the sequence is discarded.
    """

    start: int
    end: int
    slot: int | None
    past: int
    mask: torch.Tensor

    @property
    def reach(self) -> int:
        """How long the row must be for the rounded queries, and keys where they lie in the row."""
        queries, keys = self.mask.shape
        return self.start + (queries if self.slot is not None else max(queries, keys - self.past))


@dataclass(frozen=True)
class DecodeRows:
    """Tokens `[start, start + count)` of the row: the few new ones of many sequences, in the order of their slots.

    width: most tokens of a sequence. slots [sequences], increasing. span: range of slots to attend over in place, or
    None to gather `slots` first. token_of_row: for each slot of the span, `width` times, the token it serves, counted
    from `start` (where there is none an arbitrary one); None: identity. row_of_token: its inverse.
    mask: additive [rows, 1, width, keys].
    """

    start: int
    count: int
    width: int
    slots: torch.Tensor
    mask: torch.Tensor
    span: tuple[int, int] | None
    token_of_row: torch.Tensor | None
    row_of_token: torch.Tensor | None


@dataclass(frozen=True)
class PackedLayout:
    """Who attends to what in one forward pass; made once per step, shared by all layers.

    decode: sequences with one new token each, and those with a draft, as far as there are any. The row ends with
    `padding` tokens that belong to nobody. cache: where its keys and values go, and those of earlier tokens are; None:
    nothing is cached, and all lie in the row.
    """

    decode: tuple[DecodeRows, ...]
    segments: tuple[Segment, ...]
    padding: int
    cache: SlotCache | None = None


def blocked_mask(blocked: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask: -inf where blocked."""
    return torch.zeros(blocked.shape, dtype=dtype, device=blocked.device).masked_fill_(blocked, float("-inf"))


def split_segment(start: int, count: int, slot: int | None, past: int, like: torch.Tensor) -> list[Segment]:
    """`count` tokens from `start` on, as segments no longer than LONGEST_SEGMENT."""
    segments = []
    for offset in range(0, count, LONGEST_SEGMENT):
        seen, new = past + offset, min(LONGEST_SEGMENT, count - offset)
        shape = (round_up(new, QUERY_MULTIPLE), padded_keys(seen + new))
        blocked = torch.ones(shape, dtype=torch.bool, device=like.device).triu_(seen + 1)
        mask = blocked_mask(blocked, like.dtype)
        segments.append(Segment(start + offset, start + offset + new, slot, seen, mask))
    return segments


def decode_rows(
    start: int, slots: Sequence[int], lengths: Sequence[int], drafts: Sequence[DraftTree], like: torch.Tensor
) -> DecodeRows:
    """slots: strictly increasing, one per sequence; lengths: keys of each, those of its new tokens included, which are
    its last one and the nodes of its draft."""
    counts = [1 + len(draft) for draft in drafts]
    count, width, low, high = sum(counts), max(counts), slots[0], slots[-1] + 1
    index = torch.tensor(slots, device=like.device)
    # Attending over idle slots costs less than copying the running ones out, unless most of the range is idle.
    span = (low, high) if 2 * len(slots) >= high - low else None
    rows = high - low if span else len(slots)
    # By row and token of the sequence: up to which key it sees.
    limit = torch.full((rows, width), lengths[0], device=like.device)
    token_of_row = row_of_token = None
    if count < rows * width:
        token_of_row = torch.zeros(rows, width, dtype=torch.long, device=like.device)
    places, first, branching = [], 0, []
    for i, (slot, length, new) in enumerate(zip(slots, lengths, counts)):
        row = slot - low if span else i
        limit[row, :new] = torch.arange(length - new + 1, length + 1, device=like.device)
        if token_of_row is not None:
            token_of_row[row, :new] = torch.arange(first, first + new, device=like.device)
        places.extend(range(row * width, row * width + new))
        first += new
        if drafts[i].branches:
            branching.append((row, length - len(drafts[i]), drafts[i]))
    if token_of_row is not None:
        token_of_row, row_of_token = token_of_row.flatten(), torch.tensor(places, device=like.device)
    blocked = torch.arange(padded_keys(max(lengths)), device=like.device) >= limit[..., None]
    if branching:
        blocked[tuple(hidden_keys(branching).to(like.device))] = True
    mask = blocked_mask(blocked, like.dtype)[:, None]
    return DecodeRows(start, count, width, index, mask, span, token_of_row, row_of_token)


def hidden_keys(branching: Sequence[tuple[int, int, DraftTree]]) -> torch.Tensor:
    """branching: row of a sequence, key of its draft's first node, and the draft. Returns [3, n]: row, token of the
    sequence and key of all that must not be attended to because it is on another path."""
    found = []
    for row, first, draft in branching:
        nodes, others = draft.hidden.nonzero()
        found.append(np.stack([np.full(len(nodes), row), 1 + nodes, first + others]))
    return torch.from_numpy(np.concatenate(found, axis=1))


def attend_decode(
    rows: DecodeRows, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """query [T, heads, head_dim] of the whole row against the slots' keys and values; returns
    [count, heads, value_dim]."""
    take = slice(*rows.span) if rows.span else rows.slots
    length = rows.mask.shape[-1]
    keys, values = keys[take, :, :length], values[take, :, :length]
    query = query[rows.start : rows.start + rows.count]
    if rows.token_of_row is not None:
        query = query.index_select(0, rows.token_of_row)
    heads, size, kv_heads, width = *query.shape[1:], keys.shape[1], rows.width
    # Query heads that share a key/value head become query positions: no key or value is ever repeated.
    grouped = query.reshape(-1, width, kv_heads, heads // kv_heads, size).permute(0, 2, 3, 1, 4).flatten(2, 3)
    queries, mask = grouped.shape[2], rows.mask
    if width > 1:
        mask = mask.repeat(1, 1, heads // kv_heads, 1)
        missing = round_up(queries, QUERY_MULTIPLE) - queries
        mask = pad(mask, (0, 0, 0, missing))
    else:
        missing = max(0, least_queries(size) - queries)
    if missing:
        grouped = pad(grouped, (0, 0, 0, missing))
    output = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scaling)[:, :, :queries]
    output = output.unflatten(2, (-1, width)).permute(0, 3, 1, 2, 4).reshape(-1, heads, values.shape[-1])
    return output if rows.row_of_token is None else output.index_select(0, rows.row_of_token)


def attend_segment(
    segment: Segment, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """query [1, heads, T, head_dim] of the whole row; returns [end - start, heads, value_dim]."""
    queries, length = segment.mask.shape
    if segment.slot is None:
        first = segment.start - segment.past
        where = (slice(None), slice(None), slice(first, first + length))
    else:
        where = (slice(segment.slot, segment.slot + 1), slice(None), slice(length))
    output = scaled_dot_product_attention(
        query[:, :, segment.start : segment.start + queries],
        keys[where],
        values[where],
        attn_mask=segment.mask,
        scale=scaling,
        enable_gqa=True,
    )
    return output[0, :, : segment.end - segment.start].transpose(0, 1)


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
    """transformers' attention function over a row of T packed tokens.

    query [1, heads, T, head_dim]; key, value [1, kv_heads, T, head_dim], values may be narrower. Returns
    [1, T, heads, value_dim]. NotImplementedError for soft-capped scores and attention sinks.
    """
    if softcap is not None or s_aux is not None:
        raise NotImplementedError(f"{type(module).__name__}: soft-capped scores and attention sinks are not supported")
    width, missing = value.shape[-1], key.shape[-1] - value.shape[-1]
    if missing > 0:
        # The bounds above are of the kernel for equal widths.
        value = pad(value, (0, missing))
    if layout.cache is not None:
        key, value = layout.cache.update(key, value, module.layer_idx)
    parts = [attend_decode(rows, query[0].transpose(0, 1), key, value, scaling) for rows in layout.decode]
    parts.extend(attend_segment(segment, query, key, value, scaling) for segment in layout.segments)
    if layout.padding:
        parts.append(query.new_zeros(layout.padding, query.shape[1], value.shape[-1]))
    output = parts[0] if len(parts) == 1 else torch.cat(parts)
    return output[None, ..., :width], None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
