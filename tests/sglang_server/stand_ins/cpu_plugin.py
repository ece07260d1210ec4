"""A plug-in of SGLang's for a machine without CUDA."""


def register():
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.server_args import (
        add_deterministic_attention_backend_choices,
        add_radix_supported_deterministic_attention_backend_choices,
    )

    # The host buffer of routed experts is pinned through CUDA's runtime.
    HookRegistry.register(
        "sglang.srt.mem_cache.pool_host.common._cuda_host_register", lambda *_, **__: None, HookType.REPLACE)
    # Sampling by seeds is part of deterministic inference, whose kernels and matrix products are for GPUs. The seeds
    # work without: what runs beside a sequence then changes its log-probs by rounding.
    HookRegistry.register(
        "sglang.srt.model_executor.model_runner.ModelRunner.maybe_enable_batch_invariant_mode", lambda *_: None,
        HookType.REPLACE)
    add_deterministic_attention_backend_choices(["torch_native"])
    add_radix_supported_deterministic_attention_backend_choices(["torch_native"])
