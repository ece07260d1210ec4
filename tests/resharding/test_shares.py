"""What ranks of a server take of whole tensors, against SGLang's loaders written down, and sent end to end."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from megatron_pbsd.config import ParallelConfig
from megatron_pbsd.models.sglang import ServerParallel
from megatron_pbsd.resharding.layouts import learner_layout, server_layout
from megatron_pbsd.resharding.manifest import layout
from megatron_pbsd.resharding.plan import Link, make_plan
from megatron_pbsd.resharding.shares import parts, shares_of
from megatron_pbsd.resharding.stream import end_to_end
from megatron_pbsd.rollout.engines.sglang.weights import shortened, written
from tests.resharding.plan_worlds import numbered, server_parameters
from tests.resharding.test_plan import decoder_of

SERVERS = {
    "dense": ("qwen3", ServerParallel(tp=4)),
    "key-value heads on several ranks": ("qwen2", ServerParallel(tp=4, pp=2)),
    "experts divided": ("qwen3_moe", ServerParallel(tp=4)),
    "experts dealt": ("mixtral", ServerParallel(tp=2, ep=2)),
    "latent attention": ("deepseek_v3", ServerParallel(tp=4, ep=2)),
}


@pytest.mark.parametrize("name", SERVERS)
def test_each_rank_has_what_its_loader_would_load(name):
    """Sent as a bucket's bytes, each rank's alone, and written where each share says."""
    model_type, server = SERVERS[name]
    decoder = decoder_of(model_type)
    tensors = {name: torch.from_numpy(array) for name, array in numbered(decoder).items()}
    manifest = layout("", {name: ("int64", tuple(tensor.shape)) for name, tensor in tensors.items()}, alignment=1)
    learner = ParallelConfig(world_size=4, tp=2, pp=2, ep=2 if decoder.experts else 1)
    plan = make_plan(learner_layout(decoder, learner), server_layout(decoder, server, 1, device=4),
                     source_dtype="float32", target_dtype="float32", devices_per_node=64, bucket_bytes=900)
    wanted = server_parameters(decoder, server, 1, {name: tensor.numpy() for name, tensor in tensors.items()})
    for rank, share in enumerate(shares_of(decoder, server)):
        sent = end_to_end(parts(share, manifest, tensors)).view(torch.int64)
        assert 4 * len(sent) == plan.received(Link.NODE)[rank]
        held, start = {name: np.zeros_like(array) for name, array in wanted[rank].items()}, 0
        for each in (each for entry in manifest.entries for each in share.get(entry.name, ())):
            place = held[each.parameter][each.place]
            place[...] = sent[start : start + place.size].view(*place.shape).numpy()
            start += place.size
        assert start == len(sent)
        for parameter, array in wanted[rank].items():
            np.testing.assert_array_equal(held[parameter], array, f"rank {rank}: {parameter}")


def test_shares_as_servers_are_told_them():
    share = shares_of(decoder_of("mixtral"), ServerParallel(tp=2, ep=2))[1]
    up = "model.layers.0.block_sparse_moe.experts.5.w3.weight"
    assert json.loads(json.dumps([written(each) for each in share[up]])) == [
        [up, [[0, 48], [0, 32]], "model.layers.0.block_sparse_moe.experts.w13_weight", [[1, 2], [48, 96], [0, 32]]]]


def test_many_reasons_are_not_all_said():
    assert shortened(["a", "b", "c"]) == "a; b; c" and shortened(list("abcde")) == "a; b; c; and 2 more"
