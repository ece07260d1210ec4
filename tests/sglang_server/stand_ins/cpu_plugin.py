"""A plug-in of SGLang's for a machine without CUDA."""

import torch
from torch.nn.functional import linear, scaled_dot_product_attention, silu


def verify_drafts(original, self, q, k, v, layer, forward_batch, save_kv_cache=True, **named):
    """Attention in plain torch does not know of drafts. Each request has as many tokens more than `seq_lens` says,
    which attend to what is before them, and to one another as a mask says."""
    if not forward_batch.forward_mode.is_target_verify():
        return original(self, q, k, v, layer, forward_batch, save_kv_cache, **named)
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    pool = self.token_to_kv_pool
    pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc), k, v)
    nodes = forward_batch.spec_info.draft_token_num
    among = forward_batch.spec_info.custom_mask.view(-1, nodes, nodes)
    queries = q.view(len(among), nodes, layer.tp_q_head_num, layer.qk_head_dim).transpose(1, 2)
    read = torch.empty(len(among), nodes, layer.tp_q_head_num, layer.v_head_dim, dtype=q.dtype)
    rows = zip(forward_batch.req_pool_indices.tolist(), forward_batch.seq_lens.tolist())
    for request, (row, length) in enumerate(rows):
        places = self.req_to_token_pool.req_to_token[row, : length + nodes]
        mask = torch.cat([torch.ones(nodes, length, dtype=torch.bool), among[request]], 1)
        keys, values = (part[places].transpose(0, 1)[None] for part in pool.get_kv_buffer(layer.layer_id))
        read[request] = scaled_dot_product_attention(
            queries[request : request + 1], keys, values, attn_mask=mask, scale=layer.scaling,
            enable_gqa=layer.tp_q_head_num != layer.tp_k_head_num)[0].transpose(0, 1)
    return read.view(len(q), -1)


def experts_here(original, layer, x, topk_output, *arguments, **named):
    """Experts in plain torch do not know of those that other ranks have, -1."""
    weights, chosen, _ = topk_output
    if not (chosen < 0).any():
        return original(layer, x, topk_output, *arguments, **named)
    made = torch.zeros_like(x)
    for expert in chosen[chosen >= 0].unique().tolist():
        rows, which = (chosen == expert).nonzero(as_tuple=True)
        gate, up = linear(x[rows], layer.w13_weight[expert]).chunk(2, -1)
        down = linear(silu(gate) * up, layer.w2_weight[expert])
        made.index_add_(0, rows, down * weights[rows, which, None].to(x.dtype))
    return made


def register():
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.server_args import (
        add_deterministic_attention_backend_choices,
        add_radix_supported_deterministic_attention_backend_choices,
    )

    # The host buffer of routed experts is pinned through CUDA's runtime.
    HookRegistry.register(
        "sglang.srt.mem_cache.pool_host.common._cuda_host_register", lambda *_, **__: None, HookType.REPLACE)
    HookRegistry.register(
        "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend.forward_extend", verify_drafts,
        HookType.AROUND)
    HookRegistry.register(
        "sglang.srt.layers.moe.fused_moe_native.moe_forward_native", experts_here, HookType.AROUND)
    # Sampling by seeds is part of deterministic inference, whose kernels and matrix products are for GPUs. The seeds
    # work without: what runs beside a sequence then changes its log-probs by rounding.
    HookRegistry.register(
        "sglang.srt.model_executor.model_runner.ModelRunner.maybe_enable_batch_invariant_mode", lambda *_: None,
        HookType.REPLACE)
    # As attention's other backends say how long a sequence is that only fills up a batch of replicas.
    TorchNativeAttnBackend.get_cpu_graph_seq_len_fill_value = lambda self: 1
    add_deterministic_attention_backend_choices(["torch_native"])
    add_radix_supported_deterministic_attention_backend_choices(["torch_native"])
