"""A model with real weights: converted, loaded by Megatron-core, and computed like transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from launcher.smollm2 import make_smollm2
from megatron_pbsd.batch import Batch
from megatron_pbsd.checkpointing.conversion.compare import damage, differences
from megatron_pbsd.checkpointing.conversion.driver import convert
from megatron_pbsd.checkpointing.conversion.locate import locate
from megatron_pbsd.checkpointing.conversion.to_hf import ToHf
from megatron_pbsd.checkpointing.conversion.to_megatron import ToMegatron
from megatron_pbsd.config import LearnerConfig, ParallelConfig
from tests.checkpointing.tiny_conversions import assert_same
from tests.distributed.test_dist_checkpoint import megatron_loads
from tests.distributed.training import learner_of
from tests.rank_pool import RankPool

pytestmark = pytest.mark.slow
TEXT = "Fiji is a country in the South Pacific Ocean. Its capital is Suva, and its currency is the Fijian dollar."
THREE = ParallelConfig(world_size=3, tp=3)
"""Nine heads and three key-value heads can be divided by nothing else."""


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    return make_smollm2(tmp_path_factory.mktemp("smollm2") / "hf")


@pytest.fixture(scope="module")
def ranks():
    pool = RankPool(3)
    yield pool
    pool.close()


def test_there_and_back(smollm2, tmp_path):
    done = convert(ToMegatron(smollm2, layout=THREE), tmp_path / "megatron")
    assert done.nbytes == 2 * 134_515_008  # 49152 and 30 layers of 576 dimensions, tied
    convert(ToHf(tmp_path / "megatron"), tmp_path / "back")
    assert_same(smollm2, tmp_path / "back")
    assert damage(tmp_path / "megatron") == damage(tmp_path / "back") == []
    assert differences(tmp_path / "megatron", smollm2) == ([], 272)


def test_megatron_loads_the_import(smollm2, ranks, tmp_path):
    convert(ToMegatron(smollm2, "float32"), tmp_path / "megatron")
    assert ranks.run(megatron_loads, 3, smollm2, THREE, locate(tmp_path / "megatron")) == [[]] * 3


def scored(rank, rendezvous, folder, tokens):
    with learner_of(rank, rendezvous, folder, LearnerConfig(parallel=THREE)) as learner:
        scores = learner.score(Batch({"tokens": [tokens]}), ("log_probs",))
        return scores["log_probs"][0] if rank == 0 else None


def test_log_probs_are_those_of_transformers(smollm2, ranks):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = np.array(AutoTokenizer.from_pretrained(smollm2)(TEXT)["input_ids"])
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens)[None]).logits
    expected = logits[0, :-1].log_softmax(-1)[torch.arange(len(tokens) - 1), tokens[1:]].numpy()
    found = ranks.run(scored, 3, smollm2, tokens)[0]
    np.testing.assert_allclose(found[1:], expected, atol=1e-4)
    assert expected.mean() > -3  # it is a model of language
