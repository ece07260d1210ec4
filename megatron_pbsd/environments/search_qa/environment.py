"""The search agent's world: parse a turn, run the tool, verify the answer.

A turn is an optional thought, then either a search call or the final answer:

    [<think> … </think>] <search> query </search>      ->  <result> title : passage </result>
    [<think> … </think>] <answer> text </answer>       ->  the episode ends

Anything else is malformed and gets an observation that says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_pbsd.config import EnvironmentConfig
from megatron_pbsd.environments.protocol import Reply, Score, Task
from megatron_pbsd.environments.search_qa import tokenizer as tags
from megatron_pbsd.environments.search_qa.corpus import Passage, load_corpus
from megatron_pbsd.environments.search_qa.facts import extract_facts
from megatron_pbsd.environments.search_qa.questions import Question, generate_questions
from megatron_pbsd.environments.search_qa.retriever import BM25Retriever, EmptyRetriever
from megatron_pbsd.environments.search_qa.text import cut
from megatron_pbsd.environments.search_qa.tokenizer import SearchTokenizer, canonical
from megatron_pbsd.environments.search_qa.verifier import exact_match, f1
from megatron_pbsd.trajectory import Trajectory, Turn

QUESTIONS_PER_HOP_COUNT = {"train": 4000, "heldout": 400}
NOTHING_FOUND = "nothing found"
BUDGET_SPENT = "no searches left"
MALFORMED = "malformed call"


@dataclass(frozen=True)
class Move:
    """A well-formed turn: its tag and the half-open token range of its content."""

    tag: str
    start: int
    end: int


class SearchQA:
    def __init__(self, config: EnvironmentConfig, model_path: str):
        self.config = config
        self.tokenizer = SearchTokenizer(model_path)
        self.corpus = load_corpus()
        self.retriever = EmptyRetriever() if config.retriever == "none" else self.index
        ids = self.tokenizer.ids
        self.stop_token_ids = (ids[tags.END_SEARCH], ids[tags.END_ANSWER])
        self.pad_token_id = ids[tags.PAD]
        self._special = frozenset(ids.values())

    @cached_property
    def index(self) -> BM25Retriever:
        return BM25Retriever(self.corpus.passages)

    @cached_property
    def questions(self) -> dict[str, tuple[Question, ...]]:
        """All questions by split, with the chains that answer them; the same whatever `environment.retriever` is."""
        return generate_questions(self.corpus, extract_facts(self.corpus), self.index, QUESTIONS_PER_HOP_COUNT)

    def tasks(self, split: str) -> list[Task]:
        if split not in self.questions:
            raise ValueError(f"unknown split {split!r} of environment 'search_qa'; known: {', '.join(self.questions)}")
        return [q.task for q in self.questions[split] if q.task.hops in self.config.hops]

    def prompt(self, task: Task) -> tuple[int, ...]:
        ids = self.tokenizer.ids
        return (ids[tags.USER], *self.tokenizer.encode(task.question), ids[tags.ASSISTANT])

    def privileged_prompt(self, task: Task, answer: str) -> tuple[int, ...]:
        ids = self.tokenizer.ids
        hint = (ids[tags.HINT], *self.tokenizer.encode(answer), ids[tags.END_HINT])
        return (ids[tags.USER], *self.tokenizer.encode(task.question), *hint, ids[tags.ASSISTANT])

    def neutral_text(self, answer: str) -> str:
        return " ".join(["the"] * len(self.tokenizer.encode(answer)))

    def reply(self, task: Task, turns: Sequence[Turn], tokens: Sequence[int]) -> Reply:
        move = self.parse(tokens)
        if move is None:
            return Reply("malformed", self.observation(MALFORMED), done=False)
        if move.tag == tags.ANSWER:
            return Reply("answer", (), done=True, answer_span=(move.start, move.end))
        if sum(turn.kind == "search" for turn in turns) >= self.config.search_budget:
            return Reply("search", self.observation(BUDGET_SPENT), done=False)
        passage = self.retriever.search(self.tokenizer.decode(tokens[move.start : move.end]))
        return Reply("search", self.observation(self.show(passage)), done=False)

    def parse(self, tokens: Sequence[int]) -> Move | None:
        """The turn's call, or None if it is not one well-formed call."""
        ids, tokens = self.tokenizer.ids, list(tokens)
        start = 0
        if tokens and tokens[0] == ids[tags.THINK]:
            if ids[tags.END_THINK] not in tokens:
                return None
            start = tokens.index(ids[tags.END_THINK]) + 1
            if self._special & set(tokens[1 : start - 1]):
                return None
        for tag, end_tag in ((tags.SEARCH, tags.END_SEARCH), (tags.ANSWER, tags.END_ANSWER)):
            if len(tokens) - start > 2 and tokens[start] == ids[tag] and tokens[-1] == ids[end_tag]:
                if self._special & set(tokens[start + 1 : -1]):
                    return None
                return Move(tag, start + 1, len(tokens) - 1)
        return None

    def show(self, passage: Passage | None) -> str:
        if passage is None:
            return NOTHING_FOUND
        return f"{passage.title} | {cut(passage.text, self.config.observation_words)}"

    def observation(self, text: str) -> tuple[int, ...]:
        ids = self.tokenizer.ids
        return (ids[tags.RESULT], *self.tokenizer.encode(text), ids[tags.END_RESULT])

    def score(self, task: Task, trajectory: Trajectory) -> Score:
        last = trajectory.turns[-1] if trajectory.turns else None
        if last is None or last.answer_span is None:
            return Score(0.0, {"exact_match": 0.0, "f1": 0.0})
        prediction = self.tokenizer.decode(last.tokens[slice(*last.answer_span)])
        # The policy writes canonical text, in which punctuation stands apart.
        answers = [form for answer in task.answers for form in (answer, canonical(answer))]
        matched = float(exact_match(prediction, answers))
        return Score(matched, {"exact_match": matched, "f1": f1(prediction, answers)})

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens)
