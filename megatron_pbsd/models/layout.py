"""Whether a decoder can be divided over ranks in a given way, and trained as configured."""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd, isqrt

from megatron_pbsd.config import LearnerConfig, ParallelConfig
from megatron_pbsd.models.decoder import Decoder
from megatron_pbsd.models.parameters import padded_vocabulary


def layout_problems(decoder: Decoder, parallel: ParallelConfig) -> list[str]:
    """One sentence for each way in which the model cannot be divided like this; empty when it can.

    Context parallelism divides sequences, not the model: any size is possible.
    """
    problems = _indivisible("tp", parallel.tp, _tensor_parallel_lengths(decoder))
    if decoder.latent and parallel.dynamic_cp:
        problems.append("learner.parallel.dynamic_cp = True is not for latent attention: Megatron-core divides its "
                        "sequences over fixed context-parallel ranks; set it to False, and cp for long sequences")
    share = padded_vocabulary(decoder.vocab_size, parallel.tp) // parallel.tp
    if share * (parallel.tp - 1) >= decoder.vocab_size:
        problems.append(f"learner.parallel.tp = {parallel.tp} leaves a rank without any of the vocab_size = "
                        f"{decoder.vocab_size} tokens, of which each holds {share}; this vocabulary allows any tp up "
                        f"to {isqrt(decoder.vocab_size)}")
    problems += _pipeline_problems(decoder.num_hidden_layers, parallel)
    experts = decoder.experts
    if experts is None:
        problems += [
            f"learner.parallel.{key} = {size} divides experts, and this model has none; valid for this model: [1]"
            for key, size in (("ep", parallel.ep), ("etp", parallel.etp)) if size > 1]
    else:
        problems += _indivisible("ep", parallel.ep, {"num_experts": experts.num_experts})
        problems += _indivisible("etp", parallel.etp, {"moe_intermediate_size": experts.moe_intermediate_size})
    return problems


def learner_problems(decoder: Decoder, learner: LearnerConfig) -> list[str]:
    """`layout_problems`, and one sentence for each key that this model cannot heed."""
    problems = layout_problems(decoder, learner.parallel)
    moe, experts = learner.moe, decoder.experts
    if (experts or decoder.latent) and learner.parallel.sequence_parallel is False and learner.parallel.tp > 1:
        problems.append(
            f"learner.parallel.sequence_parallel = False with tp = {learner.parallel.tp}: Megatron-core trains experts "
            "and latent attention under tensor parallelism with sequence parallelism only; set it to True or null")
    if experts is None:
        problems += [
            f"learner.moe.{key} = {value} is for experts, and this model has none; set it to {unset}"
            for key, value, unset in (
                ("routing_replay", moe.routing_replay, False), ("aux_loss_coefficient", moe.aux_loss_coefficient, 0),
                ("expert_bias_update_rate", moe.expert_bias_update_rate, 0)) if value]
        return problems
    if moe.expert_bias_update_rate and not experts.score_bias:
        problems.append(
            f"learner.moe.expert_bias_update_rate = {moe.expert_bias_update_rate:g} moves a bias that this model's "
            "checkpoints have no place for; set it to 0, and learner.moe.aux_loss_coefficient to balance by a loss")
    return problems


def _pipeline_problems(layers: int, parallel: ParallelConfig) -> list[str]:
    """Every stage needs a layer; they need not have equally many."""
    if parallel.pp > layers:
        return [f"learner.parallel.pp = {parallel.pp} is more than num_hidden_layers = {layers}; "
                f"valid for this model: 1 … {layers}"]
    if parallel.pp * parallel.vpp > layers:
        return [f"learner.parallel.vpp = {parallel.vpp} makes pp * vpp = {parallel.pp * parallel.vpp} stages of "
                f"num_hidden_layers = {layers}; valid for this model: 1 … {layers // parallel.pp}"]
    return []


def _tensor_parallel_lengths(decoder: Decoder) -> dict[str, int]:
    experts = decoder.experts
    # Each head of latent attention has keys, whatever num_key_value_heads is.
    heads = ("num_attention_heads",) if decoder.latent else ("num_attention_heads", "num_key_value_heads")
    lengths = {name: getattr(decoder, name) for name in heads}
    if experts is None or not all(experts.layers):
        lengths["intermediate_size"] = decoder.intermediate_size
    if experts is not None and experts.shared_intermediate_size is not None:
        lengths["shared_intermediate_size"] = experts.shared_intermediate_size
    return lengths


def _indivisible(key: str, size: int, lengths: Mapping[str, int]) -> list[str]:
    blocking = ", ".join(f"{name} = {length}" for name, length in lengths.items() if length % size)
    if not blocking:
        return []
    common = gcd(*lengths.values())
    valid = [n for n in range(1, common + 1) if common % n == 0]
    return [f"learner.parallel.{key} = {size} does not divide {blocking}; valid for this model: {valid}"]
