"""Plans carried out on numbers, against what SGLang's loaders would do with the whole tensors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st
from tiny_models import tiny_config

from megatron_pbsd.boxes import size
from megatron_pbsd.config import ParallelConfig
from megatron_pbsd.models import ModelError, family, sglang
from megatron_pbsd.models.layout import layout_problems
from megatron_pbsd.models.sglang import ServerParallel
from megatron_pbsd.resharding.layouts import embedded_layout, learner_layout, server_layout
from megatron_pbsd.resharding.minimum import learner_maps, minimum, server_maps
from megatron_pbsd.resharding.plan import Link, make_plan
from megatron_pbsd.resharding.sources import deal
from megatron_pbsd.resharding.wire import FLOAT8, Transform
from tests.resharding.plan_worlds import carried_out, lacking, learner_parameters, numbered, server_parameters


def decoder_of(model_type, **changes):
    hf = tiny_config(model_type, **changes)
    return family(hf).decoder(hf)


def planned(source, target, *, dtypes=("float32", "float32"), per_node=2, bucket=1 << 20):
    return make_plan(source, target, source_dtype=dtypes[0], target_dtype=dtypes[1], devices_per_node=per_node,
                     bucket_bytes=bucket)


def assert_right(plan, decoder, parallel, server, servers):
    """Bit for bit, every element once, bytes over links the fewest possible, rank by rank."""
    tensors = numbered(decoder)
    sources = learner_parameters(decoder, parallel, tensors)
    wanted = server_parameters(decoder, server, servers, tensors)
    held, written = carried_out(plan, sources, wanted)
    for rank, parameters in enumerate(wanted):
        for name, array in parameters.items():
            np.testing.assert_array_equal(held[rank][name], array, f"rank {rank}: {name}")
            np.testing.assert_array_equal(written[rank][name], array > 0, f"rank {rank}: {name}")
    over_links = plan.received(Link.NODE) + plan.received(Link.NETWORK)
    fewest = lacking(sources, plan.source_layout.device, wanted, plan.target_layout.device)
    np.testing.assert_array_equal(over_links, 4 * np.array(fewest))
    assert plan.moved == 4 * sum(fewest)


@st.composite
def pairs(draw, experts):
    sizes = st.sampled_from([1, 2, 4])
    tp, cp, dp, pp = draw(sizes), draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3])), draw(
        st.sampled_from([1, 2, 3]))
    stage = tp * cp * dp
    assume(stage * pp <= 24)
    ep = draw(st.sampled_from([n for n in (1, 2, 4) if stage % n == 0])) if experts else 1
    etp = draw(st.sampled_from([n for n in (1, 2) if stage // ep % n == 0])) if experts else 1
    parallel = ParallelConfig(world_size=stage * pp, tp=tp, cp=cp, pp=pp, ep=ep, etp=etp,
                              vpp=draw(st.sampled_from([1, 2])) if pp == 2 else 1)
    server_tp = draw(sizes)
    dividing = st.sampled_from([n for n in (1, 2, 4) if server_tp % n == 0])
    server = ServerParallel(tp=server_tp, ep=draw(dividing) if experts else 1, pp=draw(st.sampled_from([1, 2, 3])),
                            dp_attention=draw(dividing))
    return parallel, server, draw(st.integers(1, 2)), draw(st.booleans()), draw(st.sampled_from([1, 2, 8]))


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3_moe", "mixtral", "deepseek_v3"])
@settings(max_examples=15, deadline=None)
@given(data=st.data(), tied=st.booleans(), vocabulary=st.integers(20, 140),
       bucket=st.sampled_from([700, 5000, 1 << 20]))
def test_every_rank_gets_what_its_loader_would_load(model_type, data, tied, vocabulary, bucket):
    decoder = decoder_of(model_type, tie_word_embeddings=tied, vocab_size=vocabulary)
    parallel, server, servers, colocated, per_node = data.draw(pairs(decoder.experts is not None))
    assume(not layout_problems(decoder, parallel) and not sglang.problems(decoder, server))
    source = learner_layout(decoder, parallel)
    target = server_layout(decoder, server, servers, device=0 if colocated else parallel.world_size)
    plan = planned(source, target, per_node=per_node, bucket=bucket)
    assert_right(plan, decoder, parallel, server, servers)
    for rank in range(target.ranks):
        buckets = list(plan.buckets(rank))
        assert [t for bucket in buckets for t in bucket] == list(plan.transfers(target=rank))
        assert len(buckets) == plan.bucket_count(rank)
        for transfers in buckets:
            assert sum(t.nbytes for t in transfers) <= bucket or len(transfers) == 1
    counts = [len(list(plan.transfers(source=rank))) for rank in range(source.ranks)]
    assert sum(counts) == plan.transfer_count


PAIRS = {
    # name: model and changes, learner, server, servers, colocated
    "dense tp to tp": ("qwen3", {}, {"world_size": 4, "tp": 2}, {"tp": 4}, 1, True),
    "key-value heads on several ranks": ("qwen2", {}, {"world_size": 4, "tp": 1}, {"tp": 4}, 1, True),
    "tied embeddings over stages": (
        "llama", {"tie_word_embeddings": True, "vocab_size": 70}, {"world_size": 4, "tp": 2, "pp": 2},
        {"tp": 1, "pp": 2}, 2, True),
    "uneven stages, interleaved": (
        "qwen3", {"num_hidden_layers": 7}, {"world_size": 4, "tp": 2, "pp": 2, "vpp": 2}, {"tp": 2, "pp": 3}, 1, False),
    "experts to expert tensor parallelism": (
        "qwen3_moe", {}, {"world_size": 8, "tp": 2, "ep": 4}, {"tp": 4, "ep": 1}, 2, True),
    "expert tensor parallelism to experts": (
        "mixtral", {"num_key_value_heads": 4}, {"world_size": 8, "tp": 4, "ep": 2, "etp": 2}, {"tp": 4, "ep": 4}, 2,
        True),
    "latent attention": (
        "deepseek_v3", {}, {"world_size": 8, "tp": 2, "pp": 2, "ep": 4}, {"tp": 4, "ep": 2}, 2, True),
    "latent attention, halves interleaved": (
        "deepseek_v3", {"rope_interleave": False}, {"world_size": 4, "tp": 4, "ep": 2}, {"tp": 2, "ep": 2}, 2, False),
    "attention replicas": (
        "glm4_moe", {"num_key_value_heads": 4}, {"world_size": 8, "tp": 4, "ep": 8},
        {"tp": 8, "ep": 8, "dp_attention": 4}, 1, True),
    "context parallelism, other GPUs": (
        "qwen3_moe", {}, {"world_size": 8, "tp": 2, "cp": 2, "ep": 2, "etp": 2}, {"tp": 2, "ep": 2, "pp": 2}, 2, False),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_layouts(name):
    model_type, changes, learner, server, servers, colocated = PAIRS[name]
    decoder = decoder_of(model_type, **changes)
    parallel, server = ParallelConfig(**learner), ServerParallel(**server)
    offset = 0 if colocated else parallel.world_size
    plan = planned(learner_layout(decoder, parallel), server_layout(decoder, server, servers, offset), bucket=9000)
    assert_right(plan, decoder, parallel, server, servers)
    assert plan.moved == minimum(
        learner_maps(decoder, parallel), server_maps(decoder, server, servers, offset), lambda _, box: 4 * size(box))


def test_embedded_engines_get_every_tensor_whole():
    decoder = decoder_of("deepseek_v3")
    parallel = ParallelConfig(world_size=4, tp=2, pp=2, ep=2)
    tensors = numbered(decoder)
    plan = planned(learner_layout(decoder, parallel), embedded_layout(decoder, 2, device=4), per_node=8)
    held, written = carried_out(plan, learner_parameters(decoder, parallel, tensors), [tensors, tensors])
    for rank in range(2):
        assert all((held[rank][name] == array).all() for name, array in tensors.items())
        assert all((counts == 1).all() for counts in written[rank].values())
    assert plan.moved == 2 * 4 * sum(array.size for array in tensors.values())


@settings(max_examples=30, deadline=None)
@given(tp=st.sampled_from([1, 2, 4]), cp=st.sampled_from([1, 2]), dp=st.sampled_from([1, 2, 3, 4]),
       pp=st.sampled_from([1, 2]), ep=st.sampled_from([1, 2, 4]), etp=st.sampled_from([1, 2]),
       server=st.sampled_from([ServerParallel(), ServerParallel(4, 4), ServerParallel(2, 1, 2)]),
       servers=st.integers(1, 3))
def test_ranks_with_the_same_weights_send_equally_much(tp, cp, dp, pp, ep, etp, server, servers):
    """A rank's share ends at two cuts, each within half a transfer of where it should be, so that two ranks differ by
    two transfers at most (`sources.deal`). Of all 2016 cases that can be drawn here four differ by more than one."""
    world = tp * cp * dp * pp
    assume(world // pp % (ep * etp) == 0)
    decoder = decoder_of("qwen3_moe", num_key_value_heads=4)
    parallel = ParallelConfig(world_size=world, tp=tp, cp=cp, pp=pp, ep=ep, etp=etp)
    source, bucket = learner_layout(decoder, parallel), 6000
    plan = planned(source, server_layout(decoder, server, servers, world), per_node=64, bucket=bucket)
    sent = plan.sent(Link.NODE) + plan.sent(Link.NETWORK)
    alike: dict[tuple, list[int]] = {}
    for rank in range(world):
        weights = source.dense_share[rank], source.expert_share[rank], source.stage[rank], source.part[rank]
        alike.setdefault(tuple(map(int, weights)), []).append(int(sent[rank]))
    for loads in alike.values():
        assert max(loads) - min(loads) <= 2 * bucket


@given(loads=st.lists(st.integers(0, 9), min_size=1, max_size=5), units=st.lists(
    st.tuples(st.integers(1, 5), st.integers(1, 7)), min_size=1, max_size=6))
def test_dealing_levels_what_candidates_have_sent(loads, units):
    """A first set with one candidate each makes the loads; the last set has all of them."""
    ranks = len(loads)
    single = [(np.array([rank]), load) for rank, load in enumerate(loads) if load]
    candidates = [held for held, _ in single] + [np.arange(ranks)]
    chosen = [*range(len(single)), *[len(single)] * len(units)]
    sizes = np.array([load for _, load in single] + [unit for unit, _ in units])
    counts = np.array([1] * len(single) + [count for _, count in units])
    row, rank, first, count = deal(candidates, [0] * len(candidates), np.array(chosen), sizes, counts, ranks)
    taken = [sorted(n for r, f, c in zip(row, first, count) if r == i for n in range(f, f + c))
             for i in range(len(sizes))]
    assert taken == [list(range(n)) for n in counts]
    totals = np.bincount(rank, sizes[row] * count, ranks)
    free = [total for total, load in zip(totals, loads) if total > load]
    largest = max(unit for unit, _ in units)
    if free:
        assert max(free) - min(free) <= 2 * largest
        assert max(free) <= max(totals.sum() / ranks, *loads) + largest


def test_what_is_sent_of_models_in_8_bits():
    """Whole blocks are quantised where they come from; where a source has part of a block, at the target."""
    changes = {"hidden_size": 256, "moe_intermediate_size": 256, "q_lora_rank": 128, "kv_lora_rank": 256,
               "intermediate_size": 512, "qk_nope_head_dim": 96, "qk_rope_head_dim": 32, "head_dim": 32,
               "v_head_dim": 64}
    decoder = decoder_of("deepseek_v3", **changes)
    server = ServerParallel(tp=2, ep=1)

    def wires(**learner):
        parallel = ParallelConfig(world_size=8, **learner)
        plan = planned(learner_layout(decoder, parallel), server_layout(decoder, server, 1, 8),
                       dtypes=("bfloat16", FLOAT8))
        return {cell.kind.name.partition("layers.{layer}.")[2] or cell.kind.name: cell for cell in plan.cells}

    whole = wires(tp=2, ep=8)
    expert = whole["mlp.experts.{expert}.up_proj.weight"]
    assert expert.wire.transform is Transform.QUANTISE_AT_SOURCE and expert.nbytes == 128 * 256 + 2 * 4
    assert whole["mlp.gate.weight"].wire.transform is Transform.COPY
    assert whole["mlp.gate.e_score_correction_bias"].wire.dtype == "float32"
    assert whole["model.embed_tokens.weight"].wire.dtype == "bfloat16"
    # 288 rows: two blocks and a quarter.
    down = whole["self_attn.kv_a_proj_with_mqa.weight"]
    assert down.nbytes == 288 * 256 + 3 * 2 * 4
    cut = wires(tp=2, ep=2, etp=4)["mlp.experts.{expert}.up_proj.weight"]
    assert cut.wire.transform is Transform.QUANTISE_AT_TARGET and cut.nbytes == 64 * 256 * 2


@pytest.mark.parametrize("server, words", [
    ({"tp": 3}, "tp = 3 does not divide num_attention_heads = 4; valid for this model: [1, 2, 4]"),
    ({"tp": 4, "ep": 3}, "ep = 3 does not divide tp = 4; valid: [1, 2, 4]"),
    ({"tp": 16, "ep": 16, "dp_attention": 4}, "ep = 16 does not divide num_experts = 8"),
    ({"pp": 9}, "pp = 9 is more than num_hidden_layers = 4; valid for this model: 1 … 4"),
])
def test_servers_that_cannot_divide_a_model(server, words):
    with pytest.raises(ModelError) as raised:
        server_layout(decoder_of("qwen3_moe"), ServerParallel(**server), 1)
    assert words in str(raised.value)


def test_layouts_of_two_models():
    one, other = decoder_of("qwen3"), decoder_of("qwen3", intermediate_size=64)
    with pytest.raises(ValueError, match="both layouts must be of one model"):
        planned(learner_layout(one, ParallelConfig(world_size=1, tp=1)), server_layout(other, ServerParallel(), 1))
