"""Buckets in shared memory, filled from a learner's parameters and loaded into an engine's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import tiny_config

from megatron_pbsd.config import ParallelConfig
from megatron_pbsd.models import family
from megatron_pbsd.models.sglang import ServerParallel
from megatron_pbsd.resharding.layouts import embedded_layout, learner_layout, server_layout
from megatron_pbsd.resharding.plan import make_plan
from megatron_pbsd.resharding.stream import SLOTS, Buckets, Receiver, Sender, overlapped, parcels
from megatron_pbsd.resharding.wire import FLOAT8
from tests.resharding.plan_worlds import learner_parameters, numbered, server_parameters

PARALLEL = ParallelConfig(world_size=4, tp=2, pp=2, ep=2)
BUCKET = 1 << 15


@pytest.fixture(scope="module")
def decoder():
    hf = tiny_config("deepseek_v3", rope_interleave=False)
    return family(hf).decoder(hf)


def plan_to(decoder, target, dtypes=("float32", "float32")):
    return make_plan(learner_layout(decoder, PARALLEL), target, source_dtype=dtypes[0], target_dtype=dtypes[1],
                     devices_per_node=8, bucket_bytes=BUCKET)


def as_tensors(arrays, dtype):
    """Numbers that neither dtype rounds."""
    return {name: torch.from_numpy(array % 251).to(dtype) for name, array in arrays.items()}


def streamed(decoder, plan, target, wanted, source_dtype, target_dtype):
    """Carry the plan out for one target rank; its parameters are NaN before."""
    sources = [as_tensors(rank, source_dtype) for rank in learner_parameters(decoder, PARALLEL, numbered(decoder))]
    held = {name: torch.full(array.shape, torch.nan, dtype=target_dtype) for name, array in wanted.items()}
    packed = parcels(plan, target)
    buckets = Buckets(packed)
    try:
        shared = buckets.segment, buckets.nbytes
        senders = [Sender(packed, rank, parameters, *shared) for rank, parameters in enumerate(sources)]
        receiver = Receiver(packed, held, *shared)

        def gather(number):
            return lambda: [sender.gather(number) for sender in senders]

        def load(number):
            return lambda: receiver.load(number)

        overlapped(len(packed), gather, load)
    finally:
        buckets.close()
    assert len(packed) > 3 and buckets.nbytes <= BUCKET
    return held


@pytest.mark.parametrize(("dtype", "sent"), [("float32", 4), ("bfloat16", 2)])
def test_an_embedded_engine_gets_every_tensor(decoder, dtype, sent):
    decoder_tensors = numbered(decoder)
    plan = plan_to(decoder, embedded_layout(decoder, 1, device=4), ("float32", dtype))
    held = streamed(decoder, plan, 0, decoder_tensors, torch.float32, getattr(torch, dtype))
    for name, expected in as_tensors(decoder_tensors, torch.float32).items():
        assert torch.equal(held[name].float(), expected), name
    bias = {name for name in decoder_tensors if name.endswith("e_score_correction_bias")}
    assert plan.moved == sum(array.size * (4 if name in bias else sent) for name, array in decoder_tensors.items())


def test_a_rank_of_a_server_gets_its_part_fused(decoder):
    server = ServerParallel(tp=2, ep=2, pp=2)
    wanted = server_parameters(decoder, server, 1, numbered(decoder))
    plan = plan_to(decoder, server_layout(decoder, server, 1))
    held = streamed(decoder, plan, 3, wanted[3], torch.float32, torch.float32)
    for name, expected in wanted[3].items():
        np.testing.assert_array_equal(
            np.where(expected > 0, held[name].numpy(), 0), np.where(expected > 0, expected % 251, 0), name)


def test_what_has_to_be_quantised_is_named(decoder):
    plan = plan_to(decoder, server_layout(decoder, ServerParallel(), 1), ("float32", FLOAT8))
    with pytest.raises(ValueError, match=r"q_a_proj.weight: quantise at the (source|target)"):
        parcels(plan, 0)


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_a_slot_is_never_written_while_it_is_read(count):
    """And gathering has begun before loading is waited for."""
    events, reading, writing = [], set(), set()

    def gather(number):
        assert number % SLOTS not in reading | writing
        writing.add(number % SLOTS)
        events.append(("gather", number))
        return lambda: writing.remove(number % SLOTS)

    def load(number):
        assert number % SLOTS not in writing
        reading.add(number % SLOTS)
        events.append(("load", number))
        return lambda: (events.append(("loaded", number)), reading.remove(number % SLOTS))

    overlapped(count, gather, load)
    assert not reading and not writing
    assert [event for event in events if event[0] == "loaded"] == [("loaded", n) for n in range(count)]
    for number in range(count - 1):
        assert events.index(("gather", number + 1)) < events.index(("loaded", number))
