"""Loaders that run inside a server, on a model with a loader of its own."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from megatron_pbsd.resharding.checksum import checksum, part_sums
from megatron_pbsd.resharding.manifest import layout
from megatron_pbsd.resharding.shared_memory import Segment, attach
from megatron_pbsd.resharding.shares import Share
from megatron_pbsd.rollout.engines.sglang.inside import pbsd_weights
from megatron_pbsd.rollout.engines.sglang.weights import held_parts, together, where, written

SHAPES = {"gate": (6, 4), "up": (6, 4), "down": (4, 6), "norm": (4,)}
ROWS, HALF = (slice(0, 3), slice(0, 4)), (slice(3, 6), slice(0, 4))
RIGHT = [
    Share("gate", HALF, "gate_up", ROWS), Share("up", HALF, "gate_up", HALF),
    Share("down", (slice(0, 4), slice(3, 6)), "down", (slice(0, 1), slice(0, 4), slice(0, 3))),
    Share("norm", (slice(0, 4),), "norm", (slice(0, 4),))]


class Model(torch.nn.Module):
    """The second of two ranks; its down projection is the only one of a stack."""

    def __init__(self):
        super().__init__()
        for name, shape in (("gate_up", (6, 4)), ("down", (1, 4, 3)), ("norm", (4,))):
            setattr(self, name, torch.nn.Parameter(torch.zeros(shape), requires_grad=False))
        self.derived = None

    def load_weights(self, tensors):
        for name, tensor in tensors:
            if name in ("gate", "up"):
                self.gate_up.data.narrow(0, 3 * (name == "up"), 3).copy_(tensor.narrow(0, 3, 3))
            elif name == "down":
                self.down.data[0].copy_(tensor.narrow(1, 3, 3))
            else:
                self.norm.data.copy_(tensor)

    def post_load_weights(self):
        self.derived = self.norm * 2


def asked(function, model, tmp_path, given, **more):
    request = {**where(given), **more, "report": str(tmp_path / "report")}
    getattr(pbsd_weights, function)(model, [(json.dumps(request), torch.empty(0))])
    return json.loads((tmp_path / "report.0").read_text())


def placed(tmp_path, shares):
    model, path = Model(), tmp_path / "0.json"
    path.write_text(json.dumps([written(share) for share in shares]))
    manifest = layout("", {name: ("float32", shape) for name, shape in SHAPES.items()})
    return model, asked("place", model, tmp_path, manifest, shares=[str(path)])


@pytest.fixture
def tensors():
    return {name: torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))
            for name, shape in SHAPES.items()}


@pytest.mark.parametrize("stored", ["segment", "file"])
def test_shares_are_taken_and_counted(tmp_path, tensors, stored):
    model, report = placed(tmp_path, RIGHT)
    assert report["otherwise"] == report["problems"] == [] and report["derives"]
    segment = Segment(layout("", described := {name: ("float32", shape) for name, shape in SHAPES.items()}).nbytes)
    try:
        manifest = layout(segment.name, described)
        for name, tensor in attach(manifest).items():
            tensor.copy_(tensors[name])
        if stored == "segment":
            report = asked("take", model, tmp_path, manifest)
        else:
            save_file(tensors, tmp_path / "file")
            request = {"file": str(tmp_path / "file"), "names": list(tensors), "report": str(tmp_path / "report")}
            pbsd_weights.take(model, [(json.dumps(request), torch.empty(0))])
            report = json.loads((tmp_path / "report.0").read_text())
    finally:
        segment.close()
    assert report["problems"] == [] and report["taken"] == 4 * (12 + 12 + 12 + 4)
    expected = Model()
    expected.load_weights(list(tensors.items()))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.state_dict().items())
    assert model.derived is None and asked("finish", model, tmp_path, layout("", {}))["problems"] == []
    assert torch.equal(model.derived, tensors["norm"] * 2)
    sums = asked("sums", model, tmp_path, layout("", {}), names=["gate", "down"])["sums"]
    assert sums == [["gate", 12, [3, 4], [4, 1], *part_sums(tensors["gate"][3:], (6, 4), 12, (4, 1))],
                    ["down", 3, [4, 3], [6, 1], *part_sums(tensors["down"][:, 3:], (4, 6), 3, (6, 1))]]


@pytest.mark.parametrize(("shares", "words"), [
    ([Share("gate", HALF, "gate_up", HALF), Share("up", HALF, "gate_up", ROWS), *RIGHT[2:]],
     ["other parts of 'gate' are taken, or put elsewhere", "other parts of 'up' are taken, or put elsewhere"]),
    ([Share("gate", ROWS, "gate_up", ROWS), *RIGHT[1:]], ["other parts of 'gate' are taken"]),
    (RIGHT[:3], ["other parts of 'norm' are taken"]),
    ([*RIGHT, RIGHT[0]], ["other parts of 'gate' are taken"]),
    ([*RIGHT[:3], Share("norm", (slice(0, 4),), "normal", (slice(0, 4),))],
     ["there is no parameter 'normal' for 'norm'"]),
    ([*RIGHT[:2], Share("down", (slice(0, 4), slice(3, 6)), "down", (slice(1, 2), slice(0, 4), slice(0, 3))), RIGHT[3]],
     ["'down' has shape [1, 4, 3]: 'down' [4, 6] has no part for [[1, 2], [0, 4], [0, 3]]"]),
    ([*RIGHT[:3], Share("norm", (slice(0, 5),), "norm", (slice(0, 5),))], ["'norm' has shape [4]: 'norm' [4] has no"]),
])
def test_shares_that_are_not_what_the_model_would_load(tmp_path, shares, words):
    model, report = placed(tmp_path, shares)
    assert report["problems"] == [] and len(report["otherwise"]) == len(words)
    for said, word in zip(report["otherwise"], words, strict=True):
        assert word in said
    assert not any(parameter.any() for parameter in model.parameters())


def test_copies_that_are_cut_otherwise_are_the_same(tmp_path):
    """As one piece of a stack, or row by row, where rows follow one another on both sides."""
    model = Model()
    whole = pbsd_weights.Piece(model.gate_up.data, "x", 0, (6, 4), (4, 1))
    assert whole.copy == pbsd_weights.Piece(model.gate_up.data.view(24), "x", 0, (24,), (1,)).copy
    assert whole.copy != pbsd_weights.Piece(model.gate_up.data, "x", 0, (6, 4), (1, 6)).copy


def reported(*parts):
    """What a rank says of these parts of a tensor 'x' of its own."""
    return {"sums": [["x", part.storage_offset(), list(part.shape), list(part.stride()),
                      *part_sums(part, (6, 4), part.storage_offset(), part.stride())] for part in parts]}


def test_parts_of_ranks_make_a_checksum():
    """Also where ranks have the same part, in as many dimensions as they like."""
    x = torch.randn(6, 4)
    cut = held_parts([reported(x[:3]), reported(x[3:, :1], x[3:, 1:]), reported(x[None, :3]), reported(x[:0])])
    assert together(cut["x"], "float32", (6, 4)) == checksum(x)


def test_parts_that_say_nothing_of_the_whole():
    """One is missing; one is there that overlaps with others."""
    x = torch.randn(6, 4)
    for ranks in ([reported(x[:3])], [reported(x[:3]), reported(x[2:])], [reported(x), reported(x[:1])], []):
        assert together(held_parts(ranks).get("x", ()), "float32", (6, 4)) is None


def test_ranks_that_have_different_versions_of_a_part_are_told():
    x = torch.randn(6, 4)
    other = x.clone()
    other[0, 0] += 1
    parts = held_parts([reported(x[:3]), reported(x[3:]), reported(other[:3])])
    assert together(parts["x"], "float32", (6, 4)) == "ranks 0 and 2 have different versions of the same part"
