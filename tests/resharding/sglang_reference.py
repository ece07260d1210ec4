"""What SGLang's loaders put into the parameters of a rank, written down tensor by tensor with numpy alone."""

from __future__ import annotations

import numpy as np

Arrays = dict[str, np.ndarray]


def chunk(tensor: np.ndarray, parts: int, index: int, axis: int = 0) -> np.ndarray:
    return np.split(tensor, parts, axis)[index]


def vocabulary(tensor: np.ndarray, parts: int, index: int) -> np.ndarray:
    rows = -len(tensor) % 64
    return chunk(np.concatenate([tensor, np.zeros((rows, tensor.shape[1]), tensor.dtype)]), parts, index)


def layers_of(layers: int, pp: int, rank: int) -> range:
    """The last ranks have the layers that remain."""
    sizes = [layers // pp + (stage >= pp - layers % pp) for stage in range(pp)]
    return range(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def rank_parameters(decoder, server, tensors: Arrays, tp_rank: int, pp_rank: int) -> Arrays:
    """By SGLang's name; tensors: the whole model by checkpoint name."""
    tp, attention_tp = server.tp, server.tp // server.dp_attention
    attention = tp_rank % attention_tp
    made: Arrays = {}
    if pp_rank == 0:
        made["model.embed_tokens.weight"] = vocabulary(
            tensors["model.embed_tokens.weight"], *((tp, tp_rank) if server.dp_attention == 1 else (1, 0)))
    for layer in layers_of(decoder.num_hidden_layers, server.pp, pp_rank):
        prefix = f"model.layers.{layer}"
        held = {name.removeprefix(f"{prefix}."): value for name, value in tensors.items()
                if name.startswith(f"{prefix}.")}
        own: Arrays = {name: value for name, value in held.items() if name.endswith(("norm.weight", "norm.bias"))}
        own["self_attn.o_proj.weight"] = chunk(held["self_attn.o_proj.weight"], attention_tp, attention, axis=1)
        if decoder.latent:
            own |= latent(held, attention_tp, attention)
        else:
            own |= grouped(decoder, held, attention_tp, attention)
        own |= mlps(decoder, server, held, tp_rank) if decoder.has_experts(layer) else mlp(held, "mlp", tp, tp_rank)
        made |= {f"{prefix}.{name}": value for name, value in own.items()}
    if pp_rank == server.pp - 1:
        made["model.norm.weight"] = tensors["model.norm.weight"]
        if not decoder.tie_word_embeddings or server.pp > 1:
            head = tensors["model.embed_tokens.weight" if decoder.tie_word_embeddings else "lm_head.weight"]
            made["lm_head.weight"] = vocabulary(head, tp, tp_rank)
    return made


def latent(held: Arrays, tp: int, rank: int) -> Arrays:
    made = {f"self_attn.{name}.weight": chunk(held[f"self_attn.{name}.weight"], tp, rank)
            for name in ("q_proj", "q_b_proj", "kv_b_proj") if f"self_attn.{name}.weight" in held}
    down = held["self_attn.kv_a_proj_with_mqa.weight"]
    if "self_attn.q_a_proj.weight" in held:
        made["self_attn.fused_qkv_a_proj_with_mqa.weight"] = np.concatenate([held["self_attn.q_a_proj.weight"], down])
    else:
        made["self_attn.kv_a_proj_with_mqa.weight"] = down
    return made


def grouped(decoder, held: Arrays, tp: int, rank: int) -> Arrays:
    made = {}
    heads = decoder.num_key_value_heads
    for kind in ("weight", "bias") if decoder.qkv_bias else ("weight",):
        parts = [chunk(held[f"self_attn.q_proj.{kind}"], tp, rank)]
        for name in ("k_proj", "v_proj"):
            value = held[f"self_attn.{name}.{kind}"]
            parts.append(chunk(value, tp, rank) if tp < heads else chunk(value, heads, rank * heads // tp))
        made[f"self_attn.qkv_proj.{kind}"] = np.concatenate(parts)
    return made


def mlp(held: Arrays, prefix: str, tp: int, rank: int) -> Arrays:
    gate, up, down = (held[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return {f"{prefix}.gate_up_proj.weight": np.concatenate([chunk(gate, tp, rank), chunk(up, tp, rank)]),
            f"{prefix}.down_proj.weight": chunk(down, tp, rank, axis=1)}


def mlps(decoder, server, held: Arrays, tp_rank: int) -> Arrays:
    experts = decoder.experts
    block, names = experts.names.mlp, experts.names
    tp = server.tp // server.ep
    ep_rank, rank = divmod(tp_rank, tp)
    numbers = np.split(np.arange(experts.num_experts), server.ep)[ep_rank]

    def weight(number: int, name: str) -> np.ndarray:
        return held[f"{block}.experts.{number}.{name}.weight"]

    made = {name: value for name, value in held.items() if name.startswith(f"{block}.gate.")}
    made[f"{block}.experts.w13_weight"] = np.stack([np.concatenate(
        [chunk(weight(n, names.gate), tp, rank), chunk(weight(n, names.up), tp, rank)]) for n in numbers])
    made[f"{block}.experts.w2_weight"] = np.stack([chunk(weight(n, names.down), tp, rank, axis=1) for n in numbers])
    if experts.shared_intermediate_size is not None:
        made |= mlp(held, f"{block}.shared_experts", server.tp, tp_rank)
    return made
