"""Weights in 8 bits: quantised where they come from, sent, and read again by the reader of such checkpoints."""

from __future__ import annotations

import json
from contextlib import closing

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megatron_pbsd.checkpointing.block_scaled import weights
from megatron_pbsd.config import ParallelConfig
from megatron_pbsd.models import ModelError
from megatron_pbsd.models.decoder import hf_tensors
from megatron_pbsd.models.sglang import ServerParallel
from megatron_pbsd.resharding.block_scale import SCALE, in_8_bits, quantise
from megatron_pbsd.resharding.manifest import layout
from megatron_pbsd.resharding.shared_memory import attach
from megatron_pbsd.resharding.shares import parts, shares_of
from megatron_pbsd.resharding.stream import Buckets, Parts, messages, plan_for, sent_by, tensors_in, unpack
from megatron_pbsd.resharding.wire import FLOAT8
from tests.resharding.local_members import OneRank
from tests.resharding.plan_worlds import learner_parameters, numbered
from tests.resharding.sglang_reference import rank_parameters
from tests.resharding.test_plan import decoder_of

SIZES = {"hidden_size": 136, "moe_intermediate_size": 256, "intermediate_size": 256, "num_attention_heads": 2,
         "num_key_value_heads": 2, "head_dim": 128, "num_experts": 2, "num_hidden_layers": 2, "mlp_only_layers": [1]}
LEARNER = ParallelConfig(world_size=2, tp=2, ep=2)


@pytest.fixture(scope="module")
def decoder():
    return decoder_of("qwen3_moe", **SIZES)


@pytest.fixture(scope="module")
def tensors(decoder):
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(shape, generator=generator) * torch.rand((), generator=generator)
            for name, shape in hf_tensors(decoder).items()}


@pytest.fixture(scope="module")
def ranks(decoder, tensors):
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
    return [{place: torch.where(numbers > 0, flat[numbers - 1], 0.0) for place, array in rank.items()
             for numbers in [torch.from_numpy(array)]}
            for rank in learner_parameters(decoder, LEARNER, numbered(decoder))]


@pytest.fixture(scope="module")
def plan(decoder, tensors):
    return plan_for(decoder, LEARNER, described(tensors), 1 << 17, target_dtype=FLOAT8)


def described(tensors):
    return {name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in tensors.items()}


def nearest(block):
    """To each number of a block what 8 bits and the block's scale come nearest to, looked for among all of them."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    codes = np.unique(codes[np.isfinite(codes)])
    scale = np.abs(block).max() / 448
    return codes[np.abs(block[..., None] / scale - codes).argmin(-1)] * scale


@pytest.mark.parametrize("shape", [(128, 128), (300, 200), (1, 129)])
def test_every_number_is_the_nearest_that_there_is(shape):
    generator = torch.Generator().manual_seed(shape[0])
    matrix = torch.randn(shape, generator=generator, dtype=torch.float32) * 10
    matrix[:1, :1] = -300.0
    values, scales = quantise(matrix)
    assert scales.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    for row in range(0, shape[0], 128):
        for column in range(0, shape[1], 128):
            block = slice(row, row + 128), slice(column, column + 128)
            held = values[block].double().numpy() * float(scales[row // 128, column // 128])
            exact = matrix[block].double().numpy()
            # Single precision has put some of what lies half-way on the other side.
            np.testing.assert_allclose(np.abs(held - exact), np.abs(nearest(exact) - exact), atol=1e-5)


def test_blocks_of_zeros_and_the_largest_numbers():
    matrix = torch.zeros(256, 128, dtype=torch.bfloat16)
    matrix[200, 5] = torch.finfo(torch.bfloat16).max
    values, scales = quantise(matrix)
    assert scales.tolist() == [[1.0], [pytest.approx(torch.finfo(torch.bfloat16).max / 448)]]
    assert values.float().sum() == values[200, 5].float() == 448


def assert_quantised(made, tensors, folder):
    """What the reader of published checkpoints makes of them is each tensor, quantised as a whole."""
    assert described(made) == in_8_bits(described(tensors))
    save_file(made, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"dtype": "float32", "quantization_config": {
        "quant_method": "fp8", "weight_block_size": [128, 128]}}))
    read = weights(folder)
    assert read.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        expected = tensor
        if name + SCALE in made:
            values, scales = quantise(tensor)
            expected = values.float() * scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[
                : tensor.shape[0], : tensor.shape[1]]
            assert (expected - tensor).abs().max() < tensor.abs().max() / 14
        torch.testing.assert_close(read.read(name, tuple(slice(0, n) for n in tensor.shape)), expected.to(
            made[name].dtype if name + SCALE not in made else torch.float32), rtol=0, atol=0)


def test_ranks_put_quantised_tensors_together_in_shared_memory(plan, ranks, tensors, tmp_path):
    with closing(Buckets(plan)) as owner:
        given = [Parts(owner.buckets, rank, parameters) for rank, parameters in enumerate(ranks)]
        made = {}
        for number, bucket in enumerate(owner.buckets):
            for each in given:
                each.gather(number)
            made |= {name: tensor.clone() for name, tensor in attach(bucket.manifest).items()}
        assert len(owner.buckets) > 3
    assert_quantised(made, tensors_kept(tensors), tmp_path)


def test_and_from_what_they_send(plan, ranks, tensors, tmp_path):
    made = {}
    for number, bucket in enumerate(buckets := messages(plan)):
        flat = torch.zeros(bucket.manifest.nbytes, dtype=torch.uint8)
        Parts(buckets, 0, ranks[0]).write(number, flat)
        for source, nbytes in sent_by(bucket).items():
            if source:
                packed = Parts(buckets, source, ranks[source]).pack(number)
                assert len(packed) == nbytes
                unpack(bucket, source, packed, flat)
        made |= {name: tensor.clone() for name, tensor in tensors_in(flat, bucket.manifest.entries).items()}
    assert_quantised(made, tensors_kept(tensors), tmp_path)


def tensors_kept(tensors):
    """What a model of 8 bits does not have in these is bfloat16."""
    return {name: tensor if what[0] == FLOAT8 else tensor.bfloat16() for name, tensor in tensors.items()
            for what in [in_8_bits(described(tensors))[name]]}


def test_a_learner_compares_what_was_published_with_what_it_would_send(decoder, tensors):
    whole = tensors_kept(tensors)
    everything = {name: tensor.float() for name, tensor in whole.items()}
    learner = OneRank(decoder, everything)
    one = ParallelConfig(world_size=1, tp=1)
    plan = plan_for(decoder, one, learner.tensors(), None, target_dtype=FLOAT8)
    with closing(Buckets(plan)) as owner:
        (bucket,) = owner.buckets
        names = [name for name, what in bucket.manifest.described.items() if what[0] == FLOAT8]
        parts_of = Parts(owner.buckets, 0, learner._parameters)
        parts_of.gather(0)
        assert learner.differing(bucket.manifest) == sorted(
            name for name, what in bucket.manifest.described.items() if what[0] == "bfloat16")
        attach(bucket.manifest)[names[0] + SCALE][0, 0] *= 2
        attach(bucket.manifest)[names[1]].view(torch.uint8)[3, 3] ^= 1
        assert {names[0], names[1]} <= set(learner.differing(bucket.manifest))


def test_scales_go_where_their_matrices_go(decoder):
    """They are divided as tensors of a model would be that has one element for each block."""
    server = ServerParallel(tp=2)
    shapes = in_8_bits({name: ("float32", shape) for name, shape in hf_tensors(decoder).items()})
    scales = {name: torch.arange(1, 1 + int(np.prod(shape))).view(shape) + 1000 * number
              for number, (name, (_, shape)) in enumerate(shapes.items()) if name.endswith(SCALE)}
    manifest = layout("", {name: ("int64", tuple(tensor.shape)) for name, tensor in scales.items()})
    stand_in = {name: scales[name + SCALE].numpy() if name + SCALE in scales else np.zeros(shape, np.int64)
                for name, (_, shape) in shapes.items() if not name.endswith(SCALE)}
    for rank, share in enumerate(shares_of(decoder, server, FLOAT8)):
        wanted = {f"{name}{SCALE}": array for name, array in rank_parameters(decoder, server, stand_in, rank, 0).items()
                  if name.endswith(("_proj.weight", "w13_weight", "w2_weight"))}
        held = {name: np.zeros_like(array) for name, array in wanted.items()}
        sent = list(parts(share, manifest, scales))
        places = [each for name in scales for each in share.get(name, ())]
        assert len(sent) == len(places) > 10
        for each, numbers in zip(places, sent, strict=True):
            place = held[each.parameter][each.place]
            place[...] = numbers.reshape(place.shape)
        for name, array in wanted.items():
            np.testing.assert_array_equal(held[name], array, name)


def test_servers_whose_ranks_would_have_parts_of_blocks():
    with pytest.raises(ModelError, match="a rank's part has shape .* which is not whole blocks"):
        shares_of(decoder_of("qwen3_moe"), ServerParallel(tp=4), FLOAT8)
