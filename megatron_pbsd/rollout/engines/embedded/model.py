"""A causal language model of transformers, run over packed batches and a slot cache."""

from __future__ import annotations

from collections.abc import Sequence as Sequences
from itertools import groupby

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from megatron_pbsd.rollout.engines.embedded.attention import (
    PACKED_ATTENTION,
    PackedLayout,
    decode_rows,
    split_segment,
)
from megatron_pbsd.rollout.engines.embedded.kv_cache import SlotCache
from megatron_pbsd.rollout.engines.embedded.routing import ExpertChoices
from megatron_pbsd.rollout.engines.embedded.sequence import Kind, Sequence
from megatron_pbsd.rollout.engines.protocol import Chunk

# Matrix products of fewer rows go through other CPU kernels, whose results differ in the last bit.
MINIMUM_ROWS = 16

SAME_MODEL = {"kimi_k2": "deepseek_v3"}
"""model_type that transformers does not know → the one under which it has the same model."""


def read_config(path: str) -> PretrainedConfig:
    """OSError and ValueError say what is wrong with the folder."""
    fields, _ = PretrainedConfig.get_config_dict(path, local_files_only=True)
    name = fields.pop("model_type", None)
    if name in SAME_MODEL:
        return AutoConfig.for_model(SAME_MODEL[name], **fields)
    return AutoConfig.from_pretrained(path, local_files_only=True)


def check_supported(config: PretrainedConfig, max_context: int) -> None:
    """ValueError for attention that the slot cache cannot serve, or a context beyond the trained positions."""
    positions = getattr(config, "max_position_embeddings", max_context)
    if max_context > positions:
        raise ValueError(f"max_context {max_context} exceeds the model's max_position_embeddings {positions}")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    if window and ("sliding_attention" in kinds or not getattr(config, "layer_types", None)) and window < max_context:
        raise ValueError(f"max_context {max_context} exceeds the model's sliding window {window}")
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layers of type {sorted(unknown)} are not supported, only full attention")


class PackedModel:
    """path: a local Hugging Face folder. ValueError and OSError say what is wrong with it.

    load_weights: False builds the model from config.json alone; its weights are to be published before use.
    """

    def __init__(self, path: str, max_context: int, device: str, dtype: str, load_weights: bool = True) -> None:
        config = read_config(path)
        check_supported(config, max_context)
        settings = {"dtype": getattr(torch, dtype), "attn_implementation": PACKED_ATTENTION}
        self.module = (
            AutoModelForCausalLM.from_pretrained(path, config=config, local_files_only=True, **settings)
            if load_weights
            else AutoModelForCausalLM.from_config(config, **settings)
        )
        self.module.eval().requires_grad_(False).to(device)
        self.device = torch.device(device)
        self.vocab_size: int = self.module.config.vocab_size
        self._choices: ExpertChoices | None = None
        self._like = torch.empty(0, dtype=getattr(torch, dtype), device=device)

    def record_experts(self) -> bool:
        """Keep in the cache, from now on, which experts read each token; False if that begins nothing new.

        ValueError for a family whose choices cannot be heard.
        """
        if self._choices is not None:
            return False
        self._choices = ExpertChoices(self.module)
        return len(self._choices) > 0

    def give_weights_away(self) -> None:
        """Keep the parameters without their memory. Storages that came from a checkpoint file cannot be resized."""
        self._shapes = {parameter: parameter.shape for parameter in self.module.parameters()}
        for parameter in self._shapes:
            parameter.data = parameter.data.new_empty(0)

    def take_weights_back(self) -> None:
        """Memory for the same parameters, whose values are undefined."""
        for parameter, shape in self._shapes.items():
            parameter.data = parameter.data.new_empty(shape)

    def warm_up(self, cache: SlotCache) -> None:
        """Allocate the cache and try the attention, so that what cannot work fails before the first request."""
        probe = Sequence.of(Chunk("warm-up", (0,), max_new_tokens=1, seed=0), max_context=cache.length)
        probe.slot = cache.scratch
        with torch.inference_mode():
            self.next_logits([probe], cache)

    def next_logits(self, sequences: Sequences[Sequence], cache: SlotCache) -> torch.Tensor:
        """Compute every token that is not in the cache yet, drafts too; logits [B + drafted tokens, V] after the last
        token of each sequence, and after each node of its draft. The nodes' KV is put after that of the sequence, in
        the order of their numbers.

        sequences: in the order of `Sequence.kind`, and of their slots.
        """
        unread = [s.unread for s in sequences]
        counts = [len(tokens) for tokens in unread]
        rows, segments, ends, end = [], [], [], 0
        for kind, members in groupby(zip(sequences, counts), lambda member: member[0].kind):
            if kind is not Kind.READS:
                few, new = zip(*members)
                lengths = [s.computed + n for s, n in zip(few, new)]
                rows.append(decode_rows(end, [s.slot for s in few], lengths, [s.draft for s in few], self._like))
                ends.extend(range(end + 1, end + sum(new) + 1))
                end += sum(new)
                continue
            for sequence, count in members:
                segments.extend(split_segment(end, count, sequence.slot, sequence.computed, self._like))
                end += count
                ends.append(end)
        padding = max(end, MINIMUM_ROWS, *(segment.reach for segment in segments)) - end
        positions = self._tensor([p for s in sequences for p in s.positions] + [0] * padding)
        places = [p for s, count in zip(sequences, counts) for p in range(s.computed, s.computed + count)]
        slots = [s.slot for s, count in zip(sequences, counts) for _ in range(count)]
        cache.place(self._tensor(slots + [cache.scratch] * padding), self._tensor(places + [0] * padding))
        # Keeping rows by index is a copy that a step of nothing but decoding does without.
        keep = self._tensor([e - 1 for e in ends] + [0] * (MINIMUM_ROWS - len(ends))) if segments or padding else 0
        logits = self.module(
            input_ids=self._tensor([t for tokens in unread for t in tokens] + [0] * padding)[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=keep,
            layout=PackedLayout(tuple(rows), tuple(segments), padding, cache),
        ).logits
        if self._choices:
            cache.keep_experts(self._choices.latest())
        return logits[0, : len(ends)]

    def all_logits(self, sequences: Sequences[Sequences[int]]) -> torch.Tensor:
        """Logits [sum of lengths, V] of whole sequences, end to end; no cache is read or written."""
        segments, end = [], 0
        for tokens in sequences:
            segments.extend(split_segment(end, len(tokens), None, 0, self._like))
            end += len(tokens)
        padding = max(MINIMUM_ROWS, max(segment.reach for segment in segments)) - end
        positions = [p for tokens in sequences for p in range(len(tokens))]
        logits = self.module(
            input_ids=self._tensor([t for tokens in sequences for t in tokens] + [0] * padding)[None],
            position_ids=self._tensor(positions + [0] * padding)[None],
            use_cache=False,
            layout=PackedLayout((), tuple(segments), padding),
        ).logits
        return logits[0, :end]

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)
