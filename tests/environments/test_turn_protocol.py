"""The turn protocol of search_qa: what the policy writes, what it reads back, and what counts as an answer."""

import pytest
from hypothesis import given, settings, strategies as st

from megatron_pbsd.batch import from_trajectories
from megatron_pbsd.config import EnvironmentConfig, SFTConfig
from megatron_pbsd.environments import build_environment
from megatron_pbsd.environments.search_qa import environment as search_qa
from megatron_pbsd.environments.search_qa.corpus import load_corpus
from megatron_pbsd.environments.search_qa.demonstrations import Demonstrator
from megatron_pbsd.environments.search_qa.tokenizer import SPECIAL_TOKENS, canonical, train
from megatron_pbsd.trajectory import Trajectory, Turn, VersionSpan


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    train((p.text for p in load_corpus().passages), 1024).save(str(folder / "tokenizer.json"))
    return str(folder)


@pytest.fixture(scope="module")
def environment(model_path):
    return build_environment(EnvironmentConfig(search_budget=2), model_path)


def write(environment, text):
    """Token ids of text in which tags stand for themselves."""
    ids, tokens = environment.tokenizer.ids, []
    for part in text.replace("<", "\n<").replace(">", ">\n").split("\n"):
        tokens += [ids[part]] if part in ids else environment.tokenizer.encode(part)
    return tuple(tokens)


def turn(environment, text, earlier=()):
    tokens = write(environment, text)
    reply = environment.reply(None, earlier, tokens)
    return Turn(tokens, (0.0,) * len(tokens), reply.observation, reply.kind, "stop",
                (VersionSpan(0, 0, len(tokens)),), reply.answer_span)


def test_a_search_returns_the_passage_and_the_answer_ends_the_episode(environment):
    question = next(q for q in environment.questions["train"] if q.task.hops == 1)
    task = question.task
    search = turn(environment, f"<think>let me see</think><search>{question.chain[0].query}</search>")
    assert search.kind == "search"
    gold = environment.corpus.passages[task.gold_passages[0]]
    assert canonical(gold.title) in environment.decode(search.observation)
    answer = turn(environment, f"<answer>{task.answers[0]}</answer>", [search])
    assert answer.kind == "answer" and answer.observation == ()
    trajectory = Trajectory("t", "g", task.task_id, environment.prompt(task), (), (search, answer))
    assert environment.score(task, trajectory).measures == {"exact_match": 1.0, "f1": 1.0}
    wrong = Trajectory("t", "g", task.task_id, environment.prompt(task), (),
                       (turn(environment, "<answer>something else entirely</answer>"),))
    assert environment.score(task, wrong).reward == 0.0


@pytest.mark.parametrize("text", [
    "", "just talking", "<search></search>", "<search>no end", "<answer>x</search>", "<think>a <search>x</search>",
    "<search>a<search>b</search>", "<think>a</think>", "<think><user></think><answer>x</answer>",
])
def test_malformed_turns_get_an_observation_that_says_so(environment, text):
    reply = environment.reply(None, [], write(environment, text))
    assert (reply.kind, reply.done, reply.answer_span) == ("malformed", False, None)
    assert search_qa.MALFORMED in environment.decode(reply.observation)


@settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(0, 1023), max_size=12))
def test_no_token_sequence_crashes_the_environment(environment, tokens):
    reply = environment.reply(None, [], tuple(tokens))
    assert reply.kind in ("search", "answer", "malformed")
    assert reply.done == (reply.kind == "answer")
    assert bool(reply.observation) != reply.done


def test_searches_are_budgeted_and_empty_results_are_said(environment, model_path):
    searches = [turn(environment, "<search>France capital</search>")] * 2
    spent = environment.reply(None, searches, write(environment, "<search>France capital</search>"))
    assert search_qa.BUDGET_SPENT in environment.decode(spent.observation)
    blind = build_environment(EnvironmentConfig(retriever="none"), model_path)
    nothing = blind.reply(None, [], write(blind, "<search>France capital</search>"))
    assert search_qa.NOTHING_FOUND in blind.decode(nothing.observation)
    assert [t.question for t in blind.tasks("heldout")] == [t.question for t in environment.tasks("heldout")]


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60) | st.sampled_from(SPECIAL_TOKENS))
def test_text_cannot_forge_a_tag_and_words_have_one_tokenisation(environment, text):
    tokens = environment.tokenizer.encode(text)
    assert not set(tokens) & set(environment.tokenizer.ids.values())
    assert environment.tokenizer.encode(f"France {text}") == environment.tokenizer.encode("France") + tokens


def test_the_privileged_prompt_discloses_the_answer_and_nothing_else(environment):
    task = environment.tasks("train")[0]
    plain, privileged = environment.prompt(task), environment.privileged_prompt(task, task.answers[0])
    assert canonical(task.answers[0]) in environment.decode(privileged)
    at = privileged.index(environment.tokenizer.ids["<hint>"])
    end = privileged.index(environment.tokenizer.ids["</hint>"]) + 1
    assert privileged[:at] + privileged[end:] == plain


def test_unknown_split_names_the_known_ones(environment):
    with pytest.raises(ValueError, match="'tset'.*train, heldout"):
        environment.tasks("tset")


def test_flawless_demonstrations_earn_the_reward_when_replayed(model_path):
    environment = build_environment(EnvironmentConfig(search_budget=4), model_path)
    world = Demonstrator(environment, SFTConfig(good_habits=1, privileged_fraction=0, fictional_names=0), "train", 3)
    tasks = {t.task_id: t for t in environment.tasks("train")}
    for index in range(60):
        demonstration = world.demonstration(index)
        task, turns = tasks[demonstration.task_id], []
        assert demonstration.prompt == environment.prompt(task)
        for scripted in demonstration.turns:
            reply = environment.reply(task, turns, scripted.tokens)
            assert (reply.kind, reply.observation) == (scripted.kind, scripted.observation)
            turns.append(Turn(scripted.tokens, scripted.log_probs, reply.observation, reply.kind, "stop",
                              scripted.versions, reply.answer_span))
        replayed = Trajectory("t", "g", task.task_id, demonstration.prompt, (), tuple(turns))
        assert environment.score(task, replayed).reward == 1.0, environment.decode(replayed.continuation)


def test_the_mixture_is_the_stated_one_and_a_function_of_the_index(environment):
    config = SFTConfig(good_habits=0.2, good_habits_privileged=0.8, privileged_fraction=0.5)
    world = Demonstrator(environment, config, "train", 3)
    demonstrations = [world.demonstration(i) for i in range(400)]
    assert demonstrations[7] == Demonstrator(environment, config, "train", 3).demonstration(7)
    hint = environment.tokenizer.ids["<hint>"]
    assert 0.4 < sum(hint in d.prompt for d in demonstrations) / 400 < 0.6
    batch = from_trajectories(demonstrations)
    assert all(mask.sum() == d.generated for mask, d in zip(batch["loss_mask"], demonstrations, strict=True))


def test_fiction_keeps_no_name_of_the_chain(environment):
    world = Demonstrator(environment, SFTConfig(fictional_names=1, good_habits=1), "train", 5)
    questions = {q.task.task_id: q for q in environment.questions["train"]}
    for index in range(40):
        demonstration = world.demonstration(index)
        asked = f" {environment.decode(demonstration.prompt)} "
        assert f" {canonical(questions[demonstration.task_id].chain[0].anchor)} " not in asked


@pytest.mark.parametrize("answer", ["Paris", "Guinea-Bissau", "1960", "Mount Everest"])
def test_neutral_text_is_as_long_as_the_answer_in_tokens(environment, answer):
    encode = environment.tokenizer.encode
    assert len(encode(environment.neutral_text(answer))) == len(encode(answer))
