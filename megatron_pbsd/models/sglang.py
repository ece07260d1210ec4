"""Where the elements of Hugging Face tensors lie in the parameters of each rank of an SGLang server. Pure data.

The facts are those of SGLang 0.5: fused projections are the shares of their parts one after the other; every rank of a
tensor-parallel group of `tp` has `1 / ep` of the experts, of each of which `tp / ep` ranks have a share; with
data-parallel attention the ranks of one attention replica are neighbours. Its experts are those of the checkpoint:
shared ones are not fused with them (`--disable-shared-experts-fusion`), and none is there twice (no `--init-expert-
location`, `--ep-num-redundant-experts` 0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_pbsd.models.decoder import Decoder, ExpertNames, Experts, hf_tensors
from megatron_pbsd.models.errors import ModelError
from megatron_pbsd.models.parameters import ParameterMap, Piece, Placement

VOCABULARY_MULTIPLE = 64
"""The rows of an embedding are padded to a multiple of this, whatever its ranks."""


@dataclass(frozen=True)
class ServerParallel:
    """Layout of one server of tp * pp ranks; rank = pp rank * tp + tp rank.

    ep:            parts of the experts; each expert is divided over tp / ep ranks.
    dp_attention:  replicas of attention within the tensor-parallel group (`--attn-dp-size`), each on
                   tp / dp_attention of its ranks.
    """

    tp: int = 1
    ep: int = 1
    pp: int = 1
    dp_attention: int = 1

    @property
    def size(self) -> int:
        return self.tp * self.pp

    @property
    def attention_tp(self) -> int:
        return self.tp // self.dp_attention

    @property
    def expert_tp(self) -> int:
        return self.tp // self.ep


def server_of(arguments: Mapping[str, Any]) -> ServerParallel:
    """The layout that SGLang's own arguments ask for, by the names of its ServerArgs."""
    sizes = {key: int(arguments.get(f"{key}_size", 1)) for key in ("tp", "ep", "pp")}
    replicas = int(arguments.get("attn_dp_size", 1))
    if replicas == 1 and arguments.get("enable_dp_attention"):  # the older name
        replicas = int(arguments.get("dp_size", 1))
    return ServerParallel(**sizes, dp_attention=replicas)


def problems(decoder: Decoder, server: ServerParallel) -> list[str]:
    """One sentence for each way in which a server cannot divide this model like this; empty when it can."""
    found = [f"{key} = {size} does not divide tp = {server.tp}; valid: {_divisors(server.tp)}"
             for key, size in (("ep", server.ep), ("dp_attention", server.dp_attention)) if server.tp % size]
    if server.pp > decoder.num_hidden_layers:
        found.append(f"pp = {server.pp} is more than num_hidden_layers = {decoder.num_hidden_layers}; "
                     f"valid for this model: 1 … {decoder.num_hidden_layers}")
    if found:
        return found
    attention, experts = server.attention_tp, decoder.experts
    where = "tp" if server.dp_attention == 1 else "tp / dp_attention"
    rows = padded_vocabulary(decoder.vocab_size)
    checks = [(where, attention, "num_attention_heads", decoder.num_attention_heads)]
    if server.dp_attention == 1:
        checks.append(("tp", server.tp, f"the vocabulary, padded to a multiple of {VOCABULARY_MULTIPLE},", rows))
    if experts is None or not all(experts.layers):
        checks.append(("tp", server.tp, "intermediate_size", decoder.intermediate_size))
    if experts is None and server.ep > 1:
        found.append(f"ep = {server.ep} divides experts, and this model has none; valid for this model: [1]")
    if experts is not None:
        checks += [("ep", server.ep, "num_experts", experts.num_experts),
                   ("tp / ep", server.expert_tp, "moe_intermediate_size", experts.moe_intermediate_size)]
        if experts.shared_intermediate_size is not None:
            checks.append(("tp", server.tp, "shared_intermediate_size", experts.shared_intermediate_size))
    found += [f"{key} = {size} does not divide {name} = {length}; valid for this model: {_divisors(length, 2 * size)}"
              for key, size, name, length in checks if length % size]
    keys = decoder.num_key_value_heads
    if decoder.latent is None and keys % attention and attention % keys:
        valid = [n for n in _divisors(decoder.num_attention_heads) if not keys % n or not n % keys]
        found.append(f"{where} = {attention} neither divides num_key_value_heads = {keys} nor is a multiple of it; "
                     f"valid for this model: {valid}")
    return found


def pieces(decoder: Decoder, server: ServerParallel, tp_rank: int, pp_rank: int) -> ParameterMap:
    """Parameters of a rank by SGLang's name; those of experts are [experts of the rank, rows, columns]. Layers keep
    their numbers. Every piece is primary: a server is not asked who speaks for a tensor.

    ModelError when the model cannot be divided like this.
    """
    if found := problems(decoder, server):
        raise ModelError("; ".join(found))
    shapes = hf_tensors(decoder)
    attention = Placement(shapes, tp_rank % server.attention_tp, server.attention_tp, primary=True)
    dense = Placement(shapes, tp_rank, server.tp, primary=True)
    expert = Placement(shapes, tp_rank % server.expert_tp, server.expert_tp, primary=True)
    local: dict[str, list[Piece]] = {}
    first, last = pp_rank == 0, pp_rank == server.pp - 1
    if first:
        spread = Placement(shapes, 0, 1, primary=True) if server.dp_attention > 1 else dense
        local["model.embed_tokens.weight"] = _vocabulary(spread, "model.embed_tokens.weight")
    for layer in stage_layers(decoder.num_hidden_layers, server.pp, pp_rank):
        prefix = f"model.layers.{layer}"
        local |= {f"{prefix}.{norm}.weight": dense.whole(f"{prefix}.{norm}.weight")
                  for norm in ("input_layernorm", "post_attention_layernorm")}
        project = _latent_attention if decoder.latent else _attention
        local |= project(decoder, attention, f"{prefix}.self_attn")
        if decoder.experts is not None and decoder.has_experts(layer):
            each = decoder.experts.num_experts // server.ep
            start = tp_rank // server.expert_tp * each
            local |= _experts(decoder.experts, range(start, start + each), dense, expert,
                              f"{prefix}.{decoder.experts.names.mlp}")
        else:
            local |= _mlp(dense, f"{prefix}.mlp")
    if last:
        local["model.norm.weight"] = dense.whole("model.norm.weight")
        if not decoder.tie_word_embeddings:
            local["lm_head.weight"] = _vocabulary(dense, "lm_head.weight")
        elif not first:
            local["lm_head.weight"] = _vocabulary(dense, "model.embed_tokens.weight")
    return {name: parts for name, parts in local.items() if parts}


def stage_layers(layers: int, pp: int, pp_rank: int) -> range:
    """Layers of a pipeline rank. Where they are not divisible, the last stages have one more."""
    each, longer = divmod(layers, pp)
    first_longer = pp - longer
    start = pp_rank * each + max(pp_rank - first_longer, 0)
    return range(start, start + each + (pp_rank >= first_longer))


def padded_vocabulary(vocabulary: int) -> int:
    """Rows of the embedding and the output layer over all ranks."""
    return -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def quantised(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a checkpoint in 8 bits with a scale per block has this tensor in 8 bits: projections of layers, but not
    the router, nor embeddings and the output layer."""
    return len(shape) == 2 and name.startswith("model.layers.") and not name.endswith(".gate.weight")


def _vocabulary(place: Placement, name: str) -> list[Piece]:
    rows, columns = place.shapes[name]
    share = place.share(padded_vocabulary(rows))
    count = max(min(share.stop, rows) - share.start, 0)
    if not count:
        return []
    every = slice(0, columns)
    return [Piece(name, (slice(share.start, share.start + count), every), (slice(0, count), every), True,
                  padding=share.stop - share.start - count)]


def _attention(decoder: Decoder, place: Placement, prefix: str) -> ParameterMap:
    """With more ranks than key-value heads, neighbouring ranks have the same one."""
    head, keys = decoder.head_dim, decoder.num_key_value_heads
    copies = max(place.size // keys, 1)
    each = max(keys // place.size, 1) * head
    start = place.rank // copies * each
    rows = [("q_proj", place.share(decoder.num_attention_heads * head)),
            ("k_proj", slice(start, start + each)), ("v_proj", slice(start, start + each))]
    kinds = ("weight", "bias") if decoder.qkv_bias else ("weight",)
    norms = ("q_norm", "k_norm") if decoder.qk_norm else ()
    return {
        **{f"{prefix}.qkv_proj.{kind}": place.stacked([(f"{prefix}.{name}.{kind}", span) for name, span in rows])
           for kind in kinds},
        **{f"{prefix}.{norm}.weight": place.whole(f"{prefix}.{norm}.weight") for norm in norms},
        f"{prefix}.o_proj.weight": place.part(f"{prefix}.o_proj.weight", 1),
    }


def _latent_attention(decoder: Decoder, place: Placement, prefix: str) -> ParameterMap:
    """Every rank has both down projections whole, one after the other, and of the up projections its heads' rows."""
    def rows(name: str) -> tuple[str, slice]:
        return f"{prefix}.{name}.weight", slice(0, place.shapes[f"{prefix}.{name}.weight"][0])

    assert decoder.latent is not None
    if decoder.latent.q_lora_rank is None:
        queries = {f"{prefix}.q_proj.weight": place.part(f"{prefix}.q_proj.weight", 0),
                   f"{prefix}.kv_a_proj_with_mqa.weight": place.whole(f"{prefix}.kv_a_proj_with_mqa.weight")}
    else:
        queries = {
            f"{prefix}.fused_qkv_a_proj_with_mqa.weight": place.stacked(
                [rows("q_a_proj"), rows("kv_a_proj_with_mqa")]),
            f"{prefix}.q_a_layernorm.weight": place.whole(f"{prefix}.q_a_layernorm.weight"),
            f"{prefix}.q_b_proj.weight": place.part(f"{prefix}.q_b_proj.weight", 0)}
    return queries | {
        f"{prefix}.kv_a_layernorm.weight": place.whole(f"{prefix}.kv_a_layernorm.weight"),
        f"{prefix}.kv_b_proj.weight": place.part(f"{prefix}.kv_b_proj.weight", 0),
        f"{prefix}.o_proj.weight": place.part(f"{prefix}.o_proj.weight", 1),
    }


def _mlp(place: Placement, prefix: str) -> ParameterMap:
    gate_up, down = _projections(place, prefix, ExpertNames())
    return {f"{prefix}.gate_up_proj.weight": gate_up, f"{prefix}.down_proj.weight": down}


def _projections(place: Placement, prefix: str, names: ExpertNames) -> tuple[list[Piece], list[Piece]]:
    halves = [f"{prefix}.{half}.weight" for half in (names.gate, names.up)]
    return (place.stacked([(name, place.share(place.shapes[name][0])) for name in halves]),
            place.part(f"{prefix}.{names.down}.weight", 1))


def _experts(experts: Experts, held: range, dense: Placement, expert: Placement, prefix: str) -> ParameterMap:
    """Router, the experts `held` by this rank in two parameters, and the shared one."""
    local = {f"{prefix}.gate.weight": dense.whole(f"{prefix}.gate.weight")}
    if experts.score_bias:
        name = f"{prefix}.gate.e_score_correction_bias"
        local[name] = dense.whole(name)
    up: list[Piece] = []
    down: list[Piece] = []
    for i, number in enumerate(held):
        for stack, parts in zip((up, down), _projections(expert, f"{prefix}.experts.{number}", experts.names),
                                strict=True):
            stack += [replace(piece, local_index=(slice(i, i + 1), *piece.local_index)) for piece in parts]
    local |= {f"{prefix}.experts.w13_weight": up, f"{prefix}.experts.w2_weight": down}
    if experts.shared_intermediate_size is not None:
        local |= _mlp(dense, f"{prefix}.shared_experts")
    return local


def _divisors(number: int, most: int | None = None) -> list[int]:
    """Up to `most`."""
    return [n for n in range(1, min(number, most or number) + 1) if number % n == 0]
