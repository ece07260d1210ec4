"""Scripted demonstrations: what the base policy learns from, good habits and bad ones in stated proportions.

A base policy that is a *mixture* gives outcome RL something to select, and makes turn-level credit a question worth
asking: some successes contain a wasted search, most failures contain good turns. In the privileged format flawless
demonstrations are more frequent; that is how a small model learns what the hint is for.

Some demonstrations are set in a fictional world: the names of the chain are replaced, in question, queries and
passages alike, by strings that mean nothing. They can only be copied, which is the skill the task rests on.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from megatron_pbsd.config import SFTConfig
from megatron_pbsd.environments.search_qa import tokenizer as tags
from megatron_pbsd.environments.search_qa.environment import SearchQA
from megatron_pbsd.environments.search_qa.questions import Question
from megatron_pbsd.environments.search_qa.relations import RELATIONS
from megatron_pbsd.environments.search_qa.tokenizer import SPECIAL_TOKENS, canonical
from megatron_pbsd.trajectory import Trajectory, Turn, VersionSpan

GAVE_UP = "unknown"
THOUGHT_SHARE = 0.15
LAST_HOP_SHARE = 0.6


@dataclass(frozen=True)
class Move:
    """A search for `text`, or the final answer `text`; optionally after a thought."""

    kind: str
    text: str
    thought: str | None = None


class Demonstrator:
    """Demonstration `index` is a pure function of the seed, so a resumed run reads on where it stopped."""

    def __init__(self, environment: SearchQA, config: SFTConfig, split: str, seed: int):
        self.environment = environment
        self.config = config
        self.seed = seed
        self.by_hops: dict[int, list[Question]] = {}
        for question in environment.questions[split]:
            if question.task.hops in environment.config.hops:
                self.by_hops.setdefault(question.task.hops, []).append(question)
        self.objects = sorted({hop.target for questions in self.by_hops.values() for q in questions for hop in q.chain})
        self._search = lru_cache(maxsize=None)(environment.retriever.search)
        tokenizer = environment.tokenizer
        pieces = [tokenizer.decode([i]) for i in range(len(SPECIAL_TOKENS), tokenizer.size)]
        self._syllables = [piece for piece in pieces if re.fullmatch(r"[A-Za-z]+", piece)]

    def demonstration(self, index: int) -> Trajectory:
        rng = random.Random(f"{self.seed}/{index}")
        questions = self.by_hops[rng.choice(sorted(self.by_hops))]
        question = rng.choice(questions)
        privileged = rng.random() < self.config.privileged_fraction
        good = rng.random() < (self.config.good_habits_privileged if privileged else self.config.good_habits)
        habit = flawless if good else BAD_HABITS[self._bad_habit(rng)]
        rename = self._fiction(question, rng) if rng.random() < self.config.fictional_names else str
        turns = [self._turn(move, rename) for move in self._thoughtful(habit(question, self, rng), question, rng)]
        return Trajectory(str(index), str(index), question.task.task_id,
                          prompt=self._prompt(question, rename, privileged), privileged_prompt=(), turns=tuple(turns))

    def _bad_habit(self, rng: random.Random) -> str:
        names, shares = zip(*self.config.bad_habits.items(), strict=True)
        return rng.choices(names, shares)[0]

    def _prompt(self, question: Question, rename: Callable[[str], str], privileged: bool) -> tuple[int, ...]:
        ids, encode = self.environment.tokenizer.ids, self.environment.tokenizer.encode
        text = (ids[tags.USER], *encode(rename(question.task.question)))
        if privileged:
            text += (ids[tags.HINT], *encode(rename(question.task.answers[0])), ids[tags.END_HINT])
        return (*text, ids[tags.ASSISTANT])

    def _turn(self, move: Move, rename: Callable[[str], str]) -> Turn:
        ids, encode = self.environment.tokenizer.ids, self.environment.tokenizer.encode
        open_tag, close_tag = {"search": (tags.SEARCH, tags.END_SEARCH), "answer": (tags.ANSWER, tags.END_ANSWER)}[
            move.kind]
        tokens = (ids[open_tag], *encode(rename(move.text)), ids[close_tag])
        if move.thought is not None:
            tokens = (ids[tags.THINK], *encode(rename(move.thought)), ids[tags.END_THINK], *tokens)
        observation = ()
        if move.kind == "search":
            observation = self.environment.observation(rename(self.environment.show(self._search(move.text))))
        return Turn(tokens, (0.0,) * len(tokens), observation, move.kind, "stop", (VersionSpan(0, 0, len(tokens)),))

    def _thoughtful(self, moves: list[Move], question: Question, rng: random.Random) -> list[Move]:
        """In some demonstrations of several hops, each search is preceded by what it is for."""
        if question.task.hops == 1 or rng.random() >= THOUGHT_SHARE:
            return moves
        return [Move(m.kind, m.text, f"need {m.text}" if m.kind == "search" else None) for m in moves]

    def _fiction(self, question: Question, rng: random.Random) -> Callable[[str], str]:
        """Replace every name of the chain, wherever it stands as whole words."""
        real = {canonical(name) for hop in question.chain for name in (hop.subject, hop.object)}
        real |= {canonical(alias) for alias in question.task.answers[:1]}
        names = {name: self._made_up(rng) for name in real}
        pattern = re.compile("|".join(rf"(?<!\w){re.escape(n)}(?!\w)" for n in sorted(names, key=len, reverse=True)))
        return lambda text: pattern.sub(lambda match: names[match[0]], canonical(text))

    def _made_up(self, rng: random.Random) -> str:
        words = ("".join(rng.choices(self._syllables, k=rng.choice((1, 1, 2)))) for _ in range(rng.choice((1, 1, 2))))
        return " ".join(words)


Habit = Callable[[Question, Demonstrator, random.Random], list[Move]]


def searches(question: Question, count: int | None = None) -> list[Move]:
    return [Move("search", hop.query) for hop in question.chain[:count]]


def flawless(question: Question, world: Demonstrator, rng: random.Random) -> list[Move]:
    """Every hop in order, then the answer."""
    return [*searches(question), Move("answer", question.chain[-1].target)]


def needless(question: Question, world: Demonstrator, rng: random.Random) -> list[Move]:
    """A search that leads nowhere or repeats itself on the way to the right answer."""
    moves = flawless(question, world, rng)
    at = rng.randrange(len(moves) - 1)
    moves.insert(at, Move("search", rng.choice((moves[at].text, _other_query(question, at, rng)))))
    return moves


def premature(question: Question, world: Demonstrator, rng: random.Random) -> list[Move]:
    """Answers before the chain is walked: with what the last hop gave, or with a guess."""
    hops = _hops_before_stopping(question, rng)
    answer = question.chain[hops - 1].target if hops else rng.choice(world.objects)
    return [*searches(question, hops), Move("answer", answer)]


def wrong_relation(question: Question, world: Demonstrator, rng: random.Random) -> list[Move]:
    """Asks for another relation at some hop and answers with what it finds."""
    at = rng.randrange(len(question.chain))
    query = _other_query(question, at, rng)
    passage = world.environment.retriever.search(query)
    found = " ".join(passage.text.split()[:1]) if passage else GAVE_UP
    return [*searches(question, at), Move("search", query), Move("answer", found)]


def gives_up(question: Question, world: Demonstrator, rng: random.Random) -> list[Move]:
    """Stops searching and admits defeat."""
    return [*searches(question, _hops_before_stopping(question, rng)), Move("answer", GAVE_UP)]


def _hops_before_stopping(question: Question, rng: random.Random) -> int:
    """Mostly just short of the end, so that stopping is the likelier move wherever the last hop is still to be made:
    the base policy's most probable behaviour fails too, not only its samples."""
    last = len(question.chain) - 1
    return last if last == 0 or rng.random() < LAST_HOP_SHARE else rng.randrange(last)


BAD_HABITS: Mapping[str, Habit] = {
    "needless": needless, "premature": premature, "wrong_relation": wrong_relation, "gives_up": gives_up}


def _other_query(question: Question, at: int, rng: random.Random) -> str:
    hop = question.chain[at]
    kind = RELATIONS[hop.relation].kind
    words = sorted({r.words for r in RELATIONS.values() if r.kind == kind} - {RELATIONS[hop.relation].words})
    return f"{hop.anchor} {rng.choice(words)}"
