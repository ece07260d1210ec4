"""Questions of one to three hops: chains over facts, put into words, split by entity."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from megatron_pbsd.environments.protocol import Task
from megatron_pbsd.environments.search_qa.corpus import Corpus
from megatron_pbsd.environments.search_qa.facts import Fact
from megatron_pbsd.environments.search_qa.relations import RELATIONS
from megatron_pbsd.environments.search_qa.retriever import Retriever
from megatron_pbsd.environments.search_qa.verifier import normalise

MAX_HOPS = 3
MAX_QUESTION_WORDS = 20
# No answer may hold a larger share of a split's questions with the same number of hops: constant guesses must fail.
MAX_ANSWER_SHARE = 0.015


@dataclass(frozen=True)
class Hop:
    """One fact looked up. Forward hops ask for the object; inverse hops start from the object and ask for the subject.

    query: what a perfect agent searches for; its best passage is `passage_id`.
    """

    relation: str
    subject: str
    object: str
    query: str
    passage_id: int
    inverse: bool
    aliases: tuple[str, ...] = ()

    @property
    def anchor(self) -> str:
        return self.object if self.inverse else self.subject

    @property
    def target(self) -> str:
        return self.subject if self.inverse else self.object


@dataclass(frozen=True)
class Question:
    """A task and the chain of facts that answers it: each hop starts from the target of the one before."""

    task: Task
    chain: tuple[Hop, ...]


def is_held_out(entity: str) -> bool:
    """Whether `entity` belongs to the fixed quarter of entities that training questions never look up."""
    return blake2b(f"search_qa {entity}".encode(), digest_size=4).digest()[0] < 64


def generate_questions(
    corpus: Corpus, facts: Sequence[Fact], retriever: Retriever, limits: dict[str, int], seed: int = 0
) -> dict[str, tuple[Question, ...]]:
    """Questions of each split, by number of hops, at most `limits[split]` for each number of hops.

    'train': no hop's subject is held out. 'heldout': the first hop's subject is held out.
    """
    if unknown := limits.keys() - {"train", "heldout"}:
        raise ValueError(f"unknown split {sorted(unknown)[0]!r} in limits; the splits are 'train' and 'heldout'")
    hops = _Hops(corpus, facts, retriever)
    held_out = {fact.subject for fact in facts if is_held_out(fact.subject)}
    questions: dict[str, list[Question]] = {split: [] for split in limits}
    for length in range(1, MAX_HOPS + 1):
        chains = defaultdict(list)
        for chain in hops.chains(length):
            if chain[0].subject in held_out:
                chains["heldout"].append(chain)
            elif not any(hop.subject in held_out for hop in chain):
                chains["train"].append(chain)
        for split, limit in limits.items():
            for chain in _sample(chains[split], limit, random.Random(f"{seed} {split} {length}")):
                questions[split].append(_question(split, len(questions[split]), chain, hops.aliases))
    return {split: tuple(of_split) for split, of_split in questions.items()}


class _Hops:
    """The hops that can be looked up: forward from each entity, and inverse where only one subject fits."""

    def __init__(self, corpus: Corpus, facts: Sequence[Fact], retriever: Retriever) -> None:
        self.aliases = {country.name: country.aliases for country in corpus.countries}
        self._forward: dict[str, list[Hop]] = defaultdict(list)
        self._inverse: list[Hop] = []
        texts = _texts_by_label(corpus)
        for fact in facts:
            relation = RELATIONS[fact.relation]
            parts = (fact.relation, fact.subject, fact.object)
            forward = Hop(*parts, f"{fact.subject} {relation.words}", fact.passage_id, False, fact.aliases)
            if _finds(retriever, forward):
                self._forward[fact.subject].append(forward)
            if relation.inverse and _count(fact.object, texts[relation.label]) == 1:
                inverse = Hop(*parts, f"{relation.words} {fact.object}", fact.passage_id, True)
                if _finds(retriever, inverse):
                    self._inverse.append(inverse)

    def chains(self, length: int) -> Iterator[tuple[Hop, ...]]:
        """All chains of `length` hops. Only the first hop may be inverse; the others follow entities."""
        if length == 1:
            yield from ((hop,) for hop in self._inverse)
            yield from ((hop,) for of_subject in self._forward.values() for hop in of_subject)
            return
        for chain in self.chains(length - 1):
            if chain[-1].inverse or RELATIONS[chain[-1].relation].leads_to:
                yield from ((*chain, hop) for hop in self._forward.get(chain[-1].target, ()))


def _texts_by_label(corpus: Corpus) -> dict[str, list[str]]:
    texts = defaultdict(list)
    for passage, source in zip(corpus.passages, corpus.sources, strict=True):
        texts[passage.title.partition(": ")[2]].append(f" {normalise(source)} ")
    return texts


def _count(answer: str, texts: Iterable[str]) -> int:
    """How many of the normalised `texts` mention `answer`: one, if nothing else could be meant."""
    mention = f" {normalise(answer)} "
    return sum(mention in text for text in texts)


def _finds(retriever: Retriever, hop: Hop) -> bool:
    passage = retriever.search(hop.query)
    return passage is not None and passage.passage_id == hop.passage_id


def _sample(chains: list[tuple[Hop, ...]], limit: int, rng: random.Random) -> list[tuple[Hop, ...]]:
    """At most `limit` chains, in random order, balanced over the last relation, without an answer that dominates."""
    rng.shuffle(chains)
    groups = defaultdict(list)
    for chain in chains:
        groups[chain[-1].relation, chain[-1].inverse].append(chain)
    while True:
        chosen = _round_robin(groups.values(), limit, max(1, int(limit * MAX_ANSWER_SHARE)))
        if len(chosen) == limit:
            rng.shuffle(chosen)
            return chosen
        limit = len(chosen)  # the cap is a share of what there is


def _round_robin(groups: Iterable[list[tuple[Hop, ...]]], limit: int, cap: int) -> list[tuple[Hop, ...]]:
    """Take the next good chain of each group in turn until there are `limit`, no answer more than `cap` times."""
    chosen: list[tuple[Hop, ...]] = []
    seen: Counter[str] = Counter()
    queues = [iter(group) for group in groups]
    while queues:
        for queue in tuple(queues):
            if len(chosen) == limit:
                return chosen
            chain = next((chain for chain in queue if seen[chain[-1].target.lower()] < cap and _is_fair(chain)), None)
            if chain is None:
                queues.remove(queue)
            else:
                seen[chain[-1].target.lower()] += 1
                chosen.append(chain)
    return chosen


def _is_fair(chain: Sequence[Hop]) -> bool:
    """Whether the chain never comes back to where it has been, and its question is short and hides the answer."""
    entities = [chain[0].subject, *(hop.target for hop in chain if not hop.inverse)]
    question = ask(chain)
    hidden = f" {normalise(chain[-1].target)} " not in f" {normalise(question)} "
    return hidden and len(set(entities)) == len(entities) and len(question.split()) <= MAX_QUESTION_WORDS


def _question(split: str, index: int, chain: tuple[Hop, ...], aliases: dict[str, tuple[str, ...]]) -> Question:
    last = chain[-1]
    other = aliases.get(last.subject, ()) if last.inverse else last.aliases
    task = Task(
        task_id=f"{split}-{index}",
        question=ask(chain),
        answers=tuple(dict.fromkeys((last.target, *other))),
        hops=len(chain),
        gold_passages=tuple(hop.passage_id for hop in chain),
    )
    return Question(task, chain)


def ask(chain: Sequence[Hop]) -> str:
    """'What is the capital of the country where Dysprosium was discovered?'"""
    phrase = chain[0].anchor
    for hop in chain:
        relation = RELATIONS[hop.relation]
        phrase = ((relation.inverse or "") if hop.inverse else relation.phrase).format(phrase)
    return f"{'Who' if chain[-1].relation == 'discoverer' and not chain[-1].inverse else 'What'} is {phrase}?"
