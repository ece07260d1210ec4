from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scripted_rollout import STOP, EchoEnvironment, ScriptedEngine, expected, requests

from megatron_pbsd.config import RolloutConfig
from megatron_pbsd.rollout.engines.protocol import ChunkResult
from megatron_pbsd.rollout.episode import Episode, EpisodeStart, merged, rerouted
from megatron_pbsd.rollout.errors import RolloutError
from megatron_pbsd.trajectory import VersionSpan

ENVIRONMENT = EchoEnvironment()


def begin(limits: RolloutConfig, request=requests(1, 1)[0], sample: int = 0) -> Episode:
    return Episode(EpisodeStart(
        f"1/{request.group_id}/{sample}", request.group_id, request.task, ENVIRONMENT.prompt(request.task),
        ENVIRONMENT.privileged_prompt(request.task, request.privileged_answer), seed=5, temperature=1.0,
        stop_token_ids=(STOP,)), limits)


def said(episode: Episode, *tokens: int, reason: str = "stop", version: int = 0) -> None:
    spans = (VersionSpan(version, 0, len(tokens)),)
    episode.advance(ChunkResult(episode.request_id, tokens, (-1.0,) * len(tokens), reason, 0, spans), ENVIRONMENT)


@settings(deadline=None, max_examples=60)
@given(turns=st.integers(1, 5), turn_tokens=st.integers(1, 12), context=st.integers(8, 60), chunk=st.integers(1, 12),
       sample=st.integers(0, 30))
def test_an_episode_is_the_plain_loop_however_it_is_cut(turns, turn_tokens, context, chunk, sample):
    limits = RolloutConfig(max_turns=turns, max_turn_tokens=turn_tokens, max_context=context)
    engine, episode = ScriptedEngine("e", chunk_tokens=chunk), begin(limits, sample=sample)
    while not episode.finished:
        engine.submit([episode.next_chunk()])
        for result in engine.collect():
            episode.advance(result, ENVIRONMENT)
    assert episode.trajectory() == expected(requests(1, 1)[0], sample, 1, 5, limits)


def test_the_next_turn_begins_with_everything_seen():
    episode = begin(RolloutConfig(max_turn_tokens=8))
    said(episode, 5, STOP)
    assert episode.next_chunk().tokens == (*ENVIRONMENT.prompt(requests(1, 1)[0].task), 5, STOP, 5, STOP)
    assert episode.next_chunk().max_new_tokens == 8
    said(episode, 4, 7, STOP)
    assert episode.finished
    trajectory = episode.trajectory()
    assert [turn.kind for turn in trajectory.turns] == ["search", "answer"]
    assert trajectory.turns[1].answer_span == (0, 2) and trajectory.complete


def test_a_turn_cut_by_its_limit_is_truncated_and_the_episode_goes_on():
    episode = begin(RolloutConfig(max_turn_tokens=3))
    said(episode, 5, 5, 5, reason="length")
    assert not episode.finished
    said(episode, 4, STOP)
    assert [turn.kind for turn in episode.trajectory().turns] == ["truncated", "answer"]


def test_an_observation_that_leaves_no_room_ends_the_episode():
    prompt = len(ENVIRONMENT.prompt(requests(1, 1)[0].task))
    episode = begin(RolloutConfig(max_turn_tokens=8, max_context=prompt + 4))
    said(episode, 5, STOP)
    assert episode.finished
    assert episode.trajectory().turns[-1].observation == ()
    assert not episode.trajectory().complete


def test_an_aborted_chunk_continues_the_same_turn_under_both_versions():
    episode = begin(RolloutConfig(max_turn_tokens=8))
    said(episode, 4, 4, reason="abort", version=1)
    assert episode.next_chunk().max_new_tokens == 6
    said(episode, 4, STOP, version=2)
    turn, = episode.trajectory().turns
    assert turn.tokens == (4, 4, 4, STOP)
    assert turn.versions == (VersionSpan(1, 0, 2), VersionSpan(2, 2, 4))


def test_spans_of_one_version_become_one():
    assert merged([VersionSpan(1, 0, 2)], [VersionSpan(1, 0, 3)], 2) == [VersionSpan(1, 0, 5)]
    assert merged([], [], 0) == []


READINGS = st.tuples(st.integers(0, 5), st.booleans(), st.booleans())


@given(prompt=st.integers(1, 9), readings=st.lists(READINGS, min_size=1, max_size=12))
def test_experts_are_those_of_the_pass_whose_kv_is_held(prompt, readings):
    """An engine's cache, token by token, against what is pieced together from its reports."""
    held, known, tokens = [], None, prompt
    for number, (new, lost, idle) in enumerate(readings):
        asked = 0 if known is None else len(known)
        if lost:
            held = []
        tokens += new
        fresh = len(held)
        if not idle:
            held += [number] * (tokens - 1 - len(held))
        start = min(asked, fresh)
        report = np.array(held[start:], np.int16).reshape(-1, 1, 1)
        known = rerouted(known, ChunkResult("r", (0,) * new, (), "length", 0, (), report, start))
        assert known.dtype == np.int16 and known[:, 0, 0].tolist() == held


def test_a_gap_in_the_experts_is_an_error():
    report = ChunkResult("1/g/0", (), (), "length", 0, (), np.zeros((2, 1, 1), np.int16), 3)
    with pytest.raises(RolloutError, match="1/g/0.* from token 3 on, but nobody those of tokens 1 to 2"):
        rerouted(np.zeros((1, 1, 1), np.int16), report)


def test_a_prompt_without_room_names_the_key_and_the_task():
    request = requests(1, 1)[0]
    long = replace(request, task=replace(request.task, question="q" * 16))
    with pytest.raises(RolloutError, match=r"rollout.max_context = 16 .* 'train-0', which has 16 tokens"):
        begin(RolloutConfig(max_context=16), long)
