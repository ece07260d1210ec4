import re
from collections import Counter

import pytest

from megatron_pbsd.environments.search_qa.questions import MAX_QUESTION_WORDS, generate_questions, is_held_out
from megatron_pbsd.environments.search_qa.relations import RELATIONS
from megatron_pbsd.environments.search_qa.verifier import exact_match, normalise


@pytest.fixture(params=["train", "heldout"])
def split(request):
    return request.param


def test_every_split_has_enough_of_every_length(search_data, split):
    counts = Counter(question.task.hops for question in search_data.questions[split])
    limit = search_data.limits[split]
    assert counts == {1: limit, 2: limit, 3: limit}


def test_questions_are_well_formed(search_data, split):
    questions = search_data.questions[split]
    assert len({question.task.question for question in questions}) == len(questions)
    assert len({question.task.task_id for question in questions}) == len(questions)
    for question in questions:
        text = question.task.question
        assert re.fullmatch(r"(What|Who) is the [^{}?]+\?|What is the [^{}]+\?", text) and text.isascii()
        assert len(text.split()) <= MAX_QUESTION_WORDS
        assert not exact_match(text, question.task.answers)
        assert f" {normalise(question.task.answers[0])} " not in f" {normalise(text)} "
        assert question.chain[0].anchor in text


def test_following_the_chain_finds_the_answer(search_data, split):
    """A perfect agent that reads only what the retriever returns gets from the anchor to the answer."""
    for question in search_data.questions[split]:
        known = question.chain[0].anchor
        for hop, gold in zip(question.chain, question.task.gold_passages, strict=True):
            assert hop.anchor == known and known in hop.query
            passage = search_data.retriever.search(hop.query)
            assert passage is not None and passage.passage_id == gold == hop.passage_id
            assert hop.target.lower() in f"{passage.title} {passage.text}".lower()
            known = hop.target
        assert exact_match(known, question.task.answers)
        assert question.task.hops == len(question.chain)


def test_inverse_hops_have_one_answer(search_data, split):
    objects = Counter((fact.relation, normalise(fact.object)) for fact in search_data.facts)
    for question in search_data.questions[split]:
        for position, hop in enumerate(question.chain):
            if hop.inverse:
                assert position == 0 and RELATIONS[hop.relation].inverse
                assert objects[hop.relation, normalise(hop.object)] == 1


def test_training_never_looks_up_a_held_out_entity(search_data):
    held_out = {fact.subject for fact in search_data.facts if is_held_out(fact.subject)}
    for question in search_data.questions["train"]:
        for hop in question.chain:
            assert hop.subject not in held_out and hop.anchor not in held_out
        assert question.chain[0].anchor not in held_out
    for question in search_data.questions["heldout"]:
        assert question.chain[0].subject in held_out
    train, heldout = ({q.task.question for q in search_data.questions[split]} for split in ("train", "heldout"))
    assert not train & heldout


def test_about_a_quarter_is_held_out(search_data):
    entities = {fact.subject for fact in search_data.facts}
    assert 0.2 < sum(map(is_held_out, entities)) / len(entities) < 0.3


@pytest.mark.parametrize("seed", [1, 2])
def test_splits_are_disjoint_for_any_seed(search_data, seed):
    limits = {"train": 500, "heldout": 500}
    questions = generate_questions(search_data.corpus, search_data.facts, search_data.retriever, limits, seed)
    assert questions["train"] != search_data.questions["train"]
    assert not any(is_held_out(hop.subject) for question in questions["train"] for hop in question.chain)
    assert all(is_held_out(question.chain[0].subject) for question in questions["heldout"])


def test_constant_guesses_fail(search_data, split):
    questions = search_data.questions[split]
    guesses = Counter(answer for question in questions for answer in {normalise(a) for a in question.task.answers})
    guess, right = guesses.most_common(1)[0]
    assert right < 0.05 * len(questions), guess


def test_all_relations_are_asked(search_data, split):
    asked = {question.chain[-1].relation for question in search_data.questions[split] if question.task.hops == 1}
    assert asked == RELATIONS.keys()


def test_the_same_seed_gives_the_same_questions(search_data):
    again = generate_questions(search_data.corpus, search_data.facts, search_data.retriever, search_data.limits)
    assert again == search_data.questions


def test_few_questions_are_given_when_few_are_wanted(search_data):
    few = generate_questions(search_data.corpus, search_data.facts, search_data.retriever, {"heldout": 5})
    assert [question.task.hops for question in few["heldout"]] == [1] * 5 + [2] * 5 + [3] * 5


def test_unknown_split_is_named(search_data):
    with pytest.raises(ValueError, match="'validation'.*'train'.*'heldout'"):
        generate_questions(search_data.corpus, search_data.facts, search_data.retriever, {"validation": 1})
