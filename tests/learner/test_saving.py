"""The thread that writes a rank's part of a checkpoint."""

from __future__ import annotations

import pytest
import torch

from megatron_pbsd.checkpointing.torch_dist import Reader, assemble, failures, unfinished
from megatron_pbsd.learner.errors import LearnerError
from megatron_pbsd.learner.saving import Content, Part, Saver

SIZE = 1 << 24
"""Elements: copying as many takes longer than starting a thread does."""


def content(tensors, common=None):
    return Content([Part(key, tuple(t.shape), (0,) * t.dim(), t) for key, t in tensors.items()], {"rng/0": {"n": 7}},
                   common)


@pytest.fixture
def saver():
    made = Saver("__0_0", torch.device("cpu"))
    yield made
    made.saved()


def test_what_is_written_is_what_was_there_when_the_save_began(saver, tmp_path):
    first, second = torch.full((SIZE,), 3.0), torch.arange(10, dtype=torch.bfloat16).view(2, 5)
    saver.begin(tmp_path / "a", content({"first": first, "second": second[:, 1:3]}, {"step": 4}))
    saver.copied()
    first.zero_()
    assert unfinished(tmp_path / "a", ["__0_0"]) == ["__0_0"]
    # The copies of the save before are used again, once they are written.
    saver.begin(tmp_path / "b", content({"first": first, "second": second[:, 1:3]}, {"step": 5}))
    assert unfinished(tmp_path / "a", ["__0_0"]) == []
    saver.saved()
    for name, value, step in (("a", 3, 4), ("b", 0, 5)):
        assemble(tmp_path / name, ["__0_0"])
        reader = Reader(tmp_path / name)
        assert (reader.read("first", (slice(0, SIZE),)) == value).all()
        assert reader.read("second", (slice(0, 2), slice(0, 2))).tolist() == [[1, 2], [6, 7]]
        assert reader.tensors["second"].dtype == torch.bfloat16
        assert reader.object("rng/0") == {"n": 7} and reader.common() == {"step": step}
        assert reader.damaged() == []


def test_no_tensor_is_written_with_another(saver, tmp_path):
    """torch.save writes whole storages."""
    tensors = {f"t{i}": torch.ones(3) for i in range(1000)}
    saver.begin(tmp_path, content(tensors))
    saver.saved()
    assert (tmp_path / "__0_0.distcp").stat().st_size < 1000 * 3000


def test_a_failure_is_raised_by_the_next_call_and_lies_beside_the_part(saver, tmp_path):
    (tmp_path / "__0_0.distcp").write_bytes(b"of another save")
    saver.begin(tmp_path, content({"t": torch.ones(3)}))
    with pytest.raises(LearnerError, match=r"saving __0_0 into .* failed: .*File exists"):
        saver.saved()
    assert failures(tmp_path, ["__0_0", "__1_0"]).keys() == {"__0_0"}
    assert "FileExistsError" in failures(tmp_path, ["__0_0"])["__0_0"]
    assert unfinished(tmp_path, ["__0_0"]) == ["__0_0"]
    saver.check()
    saver.begin(tmp_path / "elsewhere", content({"t": torch.ones(3)}))
    saver.saved()
    assert unfinished(tmp_path / "elsewhere", ["__0_0"]) == []
