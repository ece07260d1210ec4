"""What a real server answered (tests/sglang_server/record_replies.py), and replies that are not to be believed."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_pbsd.rollout.drafting.request_news import GROUP, REQUEST, taken
from megatron_pbsd.rollout.engines.protocol import Chunk, SiblingTokens
from megatron_pbsd.rollout.engines.sglang.client import message_of
from megatron_pbsd.rollout.engines.sglang.replies import (
    StaleWeights,
    WeightsName,
    experts_of,
    generate_body,
    metric,
    read_reply,
    read_scores,
    sampling_seed,
)
from megatron_pbsd.trajectory import VersionSpan

RECORDED = json.loads((Path(__file__).parent / "replies.json").read_text())
WEIGHTS = WeightsName(RECORDED["weights"].partition("@")[2], 0)
PROMPT = 6


def changed(name: str, **meta):
    reply = copy.deepcopy(RECORDED[name])
    reply["meta_info"] |= meta
    return reply


def test_a_chunk_that_reached_its_length():
    reply = read_reply(RECORDED["length"], [WEIGHTS])
    assert len(reply.tokens) == len(reply.log_probs) == 6 and max(reply.log_probs) < 0
    assert (reply.finish_reason, reply.stopped, reply.versions) == ("length", None, (VersionSpan(0, 0, 6),))


def test_its_continuation_says_what_was_cached():
    whole, rest = (read_reply(RECORDED[name], [WEIGHTS]) for name in ("length", "continued"))
    assert rest.tokens == whole.tokens[3:] and rest.cached_tokens >= PROMPT
    np.testing.assert_allclose(rest.log_probs, whole.log_probs[3:], atol=1e-5)
    experts = experts_of(whole.routed_experts, PROMPT + 5, 4, [0, 1, 2, 3])
    assert experts.shape == (PROMPT + 5, 4, 2) and experts.dtype == np.int16 and 0 <= experts.min() <= experts.max() < 8
    later = experts_of(rest.routed_experts, 3, 4, [1, 3])
    np.testing.assert_array_equal(later, experts[PROMPT + 2:, [1, 3]])
    with pytest.raises(ValueError, match="routed experts: not 7 tokens in 4 layers"):
        experts_of(whole.routed_experts, 7, 4, [0])


def test_a_stop_token_is_a_part_of_the_result():
    reply, whole = read_reply(RECORDED["stop"], [WEIGHTS]), read_reply(RECORDED["length"], [WEIGHTS])
    assert reply.finish_reason == "stop" and reply.tokens[-1] == reply.stopped == whole.tokens[2]
    assert reply.routed_experts is None


def test_scores():
    scores, single = read_scores(RECORDED["score"], WEIGHTS)
    assert scores.shape == (PROMPT,) and scores.dtype == np.float32 and scores[0] == 0 and scores[1:].max() < 0
    assert single.tolist() == [0]
    with pytest.raises(StaleWeights):
        read_scores(RECORDED["score"], WeightsName(WEIGHTS.owner, 1))


def test_what_was_aborted_keeps_what_there_was():
    """One ran, the other waited."""
    replies = [read_reply(reply, [WEIGHTS]) for reply in RECORDED["aborted"]]
    assert {reply.finish_reason for reply in replies} == {"abort"}
    assert sorted(len(reply.tokens) > 0 for reply in replies)[0] is False
    assert all(sum(span.end - span.start for span in reply.versions) == len(reply.tokens) for reply in replies)


@pytest.mark.parametrize("weights", [[], [WeightsName("another", 0)], [WeightsName(WEIGHTS.owner, 1)]])
def test_tokens_of_other_weights_are_refused(weights):
    with pytest.raises(StaleWeights, match=f"weights .*0@{WEIGHTS.owner}.*but was given"):
        read_reply(RECORDED["length"], weights)


def test_spans_of_weights_that_changed_meanwhile():
    newer = WeightsName(WEIGHTS.owner, 4)
    spans = [{"version": str(WEIGHTS), "start": 0, "end": 2}, {"version": str(newer), "start": 2, "end": 6}]
    reply = read_reply(changed("length", weight_versions=spans), [WEIGHTS, newer])
    assert reply.versions == (VersionSpan(0, 0, 2), VersionSpan(4, 2, 6))
    with pytest.raises(ValueError, match="do not cover 6 tokens"):
        read_reply(changed("length", weight_versions=spans[:1]), [WEIGHTS, newer])


@pytest.mark.parametrize(("reply", "message"), [
    ({}, "lacks what it should say .*meta_info"),
    ({"error": {"message": "x"}}, "lacks what it should say .*meta_info"),
    (changed("length", output_token_logprobs=[]), "log-probs of other tokens than it has: 0 and 6"),
    (changed("length", finish_reason={"type": "odd"}), "expected a type of 'stop', 'length' or 'abort'"),
    (changed("length", finish_reason={"type": "abort", "status_code": 500, "message": "bang"}), "gave up: bang"),
    (changed("length", finish_reason=None), "lacks what it should say"),
])
def test_what_is_no_reply_is_an_error(reply, message):
    with pytest.raises(ValueError, match=message):
        read_reply(reply, [WEIGHTS])


def test_refusals_are_put_in_words():
    assert "longer than the model's context length" in RECORDED["too_long"]["message"]
    assert "unknown field `bogus`" in RECORDED["unknown"]["message"]
    assert message_of(b"<html>") == "<html>" and message_of(b'{"detail": [1]}') == '{"detail": [1]}'
    assert message_of(b'{"error": {"message": "why"}}') == message_of(b'{"message": "why"}') == "why"


def test_metrics():
    text = RECORDED["metrics"]
    passes = metric(text, "sglang:cuda_graph_passes_total", tp_rank="0")
    assert passes > 6 and metric(text, "sglang:cuda_graph_passes_total", tp_rank="1") == 0
    assert metric(text, "sglang:cuda_graph_passes_total", mode="decode_none") < passes
    assert metric(text, "sglang:cuda_graph") == 0


def test_a_request_continues_what_is_there():
    chunk = Chunk("0/a/0", (1, 2), 10, seed=3, temperature=0.5, stop_token_ids=(7,))
    body = generate_body(chunk, (5, 6), "0/a/0#4", 8, None)
    assert body["input_ids"] == [1, 2, 5, 6] and body["sampling_params"]["max_new_tokens"] == 6
    assert body["sampling_params"]["stop_token_ids"] == [7] and "return_routed_experts" not in body
    assert generate_body(chunk, (), "r", 8, 1)["routed_experts_start_len"] == 1


def test_a_server_that_drafts_is_told_of_the_group():
    chunk = Chunk("0/a/0", (1, 2), 10, seed=3, group_id="0/a", siblings=(SiblingTokens("0/a/1", 2, (7, 8)),))
    said = generate_body(chunk, (5,), "0/a/0#4", 8, None, drafting=True)["sampling_params"]["custom_params"]
    assert said[GROUP] == "0/a" and said[REQUEST] == "0/a/0" and taken(said) == [("0/a/1", 2, [7, 8])]
    assert "custom_params" not in generate_body(chunk, (5,), "0/a/0#4", 8, None)["sampling_params"]


def test_what_became_of_drafts():
    plain = read_reply(RECORDED["length"], [WEIGHTS])
    assert plain.drafts == plain.drafted_tokens == plain.accepted_tokens == 0
    drafted = read_reply(
        changed("length", spec_verify_ct=2, spec_num_proposed_drafts=16, spec_num_correct_drafts=3), [WEIGHTS])
    assert (drafted.drafts, drafted.drafted_tokens, drafted.accepted_tokens) == (2, 16, 3)


def test_seeds():
    seeds = {sampling_seed(seed, f"0/{group}/{i}") for seed in range(4) for group in "ab" for i in range(8)}
    assert len(seeds) == 64 and all(0 <= seed < 2**63 for seed in seeds)
    assert sampling_seed(1, "a") == sampling_seed(1, "a")


def test_a_server_that_orders_requests_is_told_their_priority():
    chunk = Chunk("0/a/0", (1, 2), 6, seed=1, priority=-7)
    assert generate_body(chunk, (), "0/a/0#0", 6, None, prioritises=True)["priority"] == -7
    # Others would end a request that has one, or ignore it.
    assert "priority" not in generate_body(chunk, (), "0/a/0#0", 6, None)
