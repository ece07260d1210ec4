"""A learner rank sends two ranks of a server their shares alone, in a gloo group of three processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_pbsd.models.decoder import Decoder, hf_tensors
from megatron_pbsd.models.parameters import local_shape
from megatron_pbsd.models.sglang import ServerParallel, pieces
from megatron_pbsd.platform.process_group import GroupPlace, WeightsGroup
from megatron_pbsd.ports import free_port
from megatron_pbsd.resharding.checksum import checksum
from megatron_pbsd.resharding.shares import shares_of
from megatron_pbsd.resharding.stream import messages, plan_for
from megatron_pbsd.rollout.engines.sglang.inside import pbsd_weights
from tests.resharding.local_members import ONE, OneRank
from tests.resharding.plan_worlds import numbered
from tests.resharding.sglang_reference import rank_parameters
from tests.resharding.test_plan import decoder_of

BUCKET = 1 << 14


def weights_of(decoder: Decoder) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array).float() for name, array in numbered(decoder).items()}


class Model:
    """A server's parameters, and no more of it."""

    def __init__(self, decoder: Decoder, server: ServerParallel, rank: int):
        self._parameters = {name: torch.zeros(local_shape(parts))
                            for name, parts in pieces(decoder, server, rank, 0).items()}
        self.pbsd_shares = {
            name: [pbsd_weights.Share(each.tensor, each.box, each.parameter, each.place) for each in found]
            for name, found in shares_of(decoder, server)[rank].items()}

    def named_parameters(self):
        return self._parameters.items()

    def parameters(self):
        return iter(self._parameters.values())


def take_part(rank: int, _, decoder: Decoder, server: ServerParallel, port: int):
    tensors = weights_of(decoder)
    place = GroupPlace("scattered", "127.0.0.1", port, 1 + server.size, "gloo", 60.0)
    described = {name: ("float32", tuple(tensor.shape)) for name, tensor in tensors.items()}
    buckets = messages(plan_for(decoder, ONE, described, BUCKET))
    if rank == 0:
        learner, found = OneRank(decoder, tensors), {}
        learner.prepare(buckets)
        learner.open_group(place)
        learner.divide(decoder, server, 1)
        for number in range(len(buckets)):
            found |= learner.scatter(number)
        learner.sent()
        learner.close_group()
        return len(buckets), found
    group, model, taken = WeightsGroup(place, rank), Model(decoder, server, rank - 1), 0
    for bucket in buckets:
        entries = [[e.name, e.dtype, e.shape, e.offset] for e in bucket.manifest.entries]
        report = pbsd_weights._receive(model, {"group": place.name, "entries": entries})
        assert "problems" not in report, report
        taken += report.get("taken", 0)
    group.close()
    return taken, {name: parameter.numpy() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("model_type", "server"), [
    ("qwen3", ServerParallel(tp=2)), ("deepseek_v3", ServerParallel(tp=2, ep=2))])
def test_ranks_receive_their_shares_and_nothing_else(ranks, model_type, server):
    decoder = decoder_of(model_type)
    (count, checksums), *held = ranks.run(take_part, 3, decoder, server, free_port())
    tensors = weights_of(decoder)
    assert count > 3 and checksums == {name: checksum(tensor) for name, tensor in tensors.items()}
    assert tensors.keys() == hf_tensors(decoder).keys()
    for rank, (taken, parameters) in enumerate(held):
        wanted = rank_parameters(decoder, server, {name: tensor.numpy() for name, tensor in tensors.items()}, rank, 0)
        assert parameters.keys() == wanted.keys()
        for name, array in wanted.items():
            np.testing.assert_array_equal(parameters[name], array, name)
        # A number is at least 1, and padding is 0.
        assert taken == 4 * sum(int((array > 0).sum()) for array in wanted.values())
