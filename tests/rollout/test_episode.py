from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_rollout import STOP, EchoEnvironment, ScriptedEngine, expected, requests

from megatron_pbsd.config import RolloutConfig
from megatron_pbsd.rollout.engines.protocol import ChunkResult
from megatron_pbsd.rollout.episode import Episode
from megatron_pbsd.trajectory import VersionSpan

REQUEST = requests(1, 1)[0]


def begin(limits: RolloutConfig, name: str = "1/0/0") -> Episode:
    return Episode(name, REQUEST, EchoEnvironment(), limits, seed=5, temperature=1.0)


def said(episode: Episode, *tokens: int, reason: str = "stop") -> None:
    versions = (VersionSpan(0, 0, len(tokens)),)
    episode.advance(ChunkResult(episode.trajectory_id, tokens, (-1.0,) * len(tokens), reason, 0, versions))


@settings(deadline=None, max_examples=80)
@given(turns=st.integers(1, 5), turn_tokens=st.integers(1, 12), context=st.integers(8, 60), sample=st.integers(0, 30))
def test_an_episode_is_the_plain_loop_over_turns(turns, turn_tokens, context, sample):
    limits = RolloutConfig(max_turns=turns, max_turn_tokens=turn_tokens, max_context=context)
    engine, episode = ScriptedEngine("e"), begin(limits, f"1/0/{sample}")
    while not episode.finished:
        chunk = episode.next_chunk()
        assert chunk.max_new_tokens >= 1
        engine.submit([chunk])
        for result in engine.collect():
            episode.advance(result)
    assert episode.trajectory() == expected(REQUEST, f"1/0/{sample}", 5, limits)


def test_the_next_turn_begins_with_everything_seen():
    episode = begin(RolloutConfig(max_turn_tokens=8))
    said(episode, 5, STOP)
    assert episode.next_chunk().tokens == (*EchoEnvironment().prompt(REQUEST.task), 5, STOP, 5, STOP)
    said(episode, 4, 7, STOP)
    assert episode.finished
    trajectory = episode.trajectory()
    assert [turn.kind for turn in trajectory.turns] == ["search", "answer"]
    assert trajectory.turns[1].answer_span == (0, 2) and trajectory.complete


def test_an_observation_that_leaves_no_room_ends_the_episode_unread():
    prompt = len(EchoEnvironment().prompt(REQUEST.task))
    episode = begin(RolloutConfig(max_turn_tokens=8, max_context=prompt + 4))
    said(episode, 5, STOP)
    assert episode.finished and episode.trajectory().turns[-1].observation == ()
    assert not episode.trajectory().complete
