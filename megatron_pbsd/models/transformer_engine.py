"""Names of parameters where Transformer Engine's modules replace Megatron-core's own."""

from __future__ import annotations

import re
from collections.abc import Collection

EXPERT = re.compile(r"experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight$")
LATENT_NORM = re.compile(r"(.*\.self_attention)\.(q|kv)_layernorm\.(.*)")


def parameter_names(names: Collection[str]) -> dict[str, str]:
    """Name in the parameter map → name in a model of Transformer Engine layers with grouped experts; `names` are all
    names of one model chunk.

    A norm moves into the linear layer that follows it: the one before grouped-query attention (before latent attention
    two layers follow), those of latents, and the MLP's where the layer has no experts. A rank's experts are one module
    with a weight per expert.
    """
    return {name: _renamed(name, names) for name in names}


def _renamed(name: str, names: Collection[str]) -> str:
    layer, _, norm = name.rpartition(".input_layernorm.")
    if layer and f"{layer}.self_attention.linear_qkv.weight" in names:
        return f"{layer}.self_attention.linear_qkv.layer_norm_{norm}"
    layer, _, norm = name.rpartition(".pre_mlp_layernorm.")
    if layer and f"{layer}.mlp.linear_fc1.weight" in names:
        return f"{layer}.mlp.linear_fc1.layer_norm_{norm}"
    if (latent := LATENT_NORM.fullmatch(name)) and f"{latent[1]}.linear_{latent[2]}_up_proj.weight" in names:
        return f"{latent[1]}.linear_{latent[2]}_up_proj.layer_norm_{latent[3]}"
    return EXPERT.sub(r"experts.\2.weight\1", name)
