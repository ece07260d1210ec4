"""Buckets of whole tensors, filled from a learner's parameters."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
import torch
from tiny_models import tiny_config

from megatron_pbsd.config import ParallelConfig
from megatron_pbsd.models import family
from megatron_pbsd.models.sglang import ServerParallel
from megatron_pbsd.resharding.layouts import learner_layout, server_layout
from megatron_pbsd.resharding.plan import make_plan
from megatron_pbsd.resharding.shared_memory import attach
from megatron_pbsd.resharding.stream import (
    SLOTS,
    Buckets,
    Parts,
    divided,
    messages,
    overlapped,
    plan_for,
    sent_by,
    tensors_in,
    unpack,
)
from megatron_pbsd.resharding.wire import FLOAT8
from tests.resharding.plan_worlds import learner_parameters, numbered

PARALLEL = ParallelConfig(world_size=4, tp=2, pp=2, ep=2)
BUCKET = 1 << 15


@pytest.fixture(scope="module")
def decoder():
    hf = tiny_config("deepseek_v3", rope_interleave=False)
    return family(hf).decoder(hf)


@pytest.fixture(scope="module")
def plan(decoder):
    tensors = {name: ("float32", array.shape) for name, array in numbered(decoder).items()}
    return plan_for(decoder, PARALLEL, tensors, BUCKET)


@pytest.fixture(scope="module")
def ranks(decoder):
    return [{place: torch.from_numpy(array % 251).float() for place, array in rank.items()}
            for rank in learner_parameters(decoder, PARALLEL, numbered(decoder))]


def is_whole(decoder, tensors):
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor.numpy(), numbered(decoder)[name] % 251, name)


def test_ranks_put_whole_tensors_into_two_buckets(decoder, plan, ranks):
    """And move the fewest bytes: each number of the model once."""
    owner = Buckets(plan)
    try:
        assert len(owner.buckets) > 3 and owner.slots == SLOTS
        parts = [Parts(owner.buckets, rank, parameters) for rank, parameters in enumerate(ranks)]
        seen = []
        for number, bucket in enumerate(owner.buckets):
            for each in parts:
                each.gather(number)
            is_whole(decoder, attach(bucket.manifest))
            seen += bucket.manifest.described
            # As large as asked, but for one that a tensor has to itself.
            assert sum(e.nbytes for e in bucket.manifest.entries) <= BUCKET or len(bucket.manifest.entries) == 1
            assert bucket.manifest.nbytes <= SLOTS * owner.nbytes
    finally:
        owner.close()
    model = {name: array.shape for name, array in numbered(decoder).items()}
    assert sorted(seen) == sorted(model)
    assert sum(bucket.nbytes for bucket in owner.buckets) == plan.moved == 4 * sum(map(prod, model.values()))


def test_messages_are_put_together_from_what_ranks_pack(decoder, plan, ranks):
    for number, bucket in enumerate(buckets := messages(plan)):
        flat = torch.full((bucket.manifest.nbytes,), 255, dtype=torch.uint8)
        Parts(buckets, 0, ranks[0]).write(number, flat)
        for source, nbytes in sent_by(bucket).items():
            if source:
                packed = Parts(buckets, source, ranks[source]).pack(number)
                assert len(packed) == nbytes
                unpack(bucket, source, packed, flat)
        assert bucket.manifest.nbytes == bucket.nbytes
        is_whole(decoder, tensors_in(flat, bucket.manifest.entries))


def test_what_has_to_be_quantised_is_named(decoder):
    plan = make_plan(learner_layout(decoder, PARALLEL), server_layout(decoder, ServerParallel(), 1),
                     source_dtype="float32", target_dtype=FLOAT8, devices_per_node=8, bucket_bytes=BUCKET)
    with pytest.raises(ValueError, match=r"_proj.*.weight: quantise at the target"):
        divided(plan)


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
