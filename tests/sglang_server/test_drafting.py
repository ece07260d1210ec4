"""Grouped drafting inside SGLang, beside the same server without."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import count

import numpy as np
import pytest

from megatron_pbsd.rollout.engines.protocol import Chunk, ChunkResult, Engine, SiblingTokens

PROMPT = tuple(range(3, 20))
NEW = 60
NUMBERS = count()


@pytest.fixture(params=["dense", "moe"])
def pair(request, engines) -> tuple[Engine, Engine]:
    """The same model in a server that drafts and in one that does not."""
    return engines("drafting", request.param), engines("sglang", request.param)


@pytest.fixture(params=["dense"])
def engine(request, engines) -> Engine:
    return engines("drafting", request.param)


@dataclass
class Measured:
    """drafts: passes that verified one; accepted: tokens of drafts that were kept."""

    results: list[ChunkResult]
    drafts: int
    accepted: int

    @property
    def length(self) -> float:
        """Tokens per such pass."""
        return 1 + self.accepted / self.drafts


def measured(engine: Engine, *chunks: Chunk) -> Measured:
    before = engine.statistics()
    engine.submit(chunks)
    results: dict[str, ChunkResult] = {}
    while ended := engine.collect():
        results |= {result.request_id: result for result in ended}
    after = engine.statistics()
    assert after.drafted_tokens - before.drafted_tokens == 8 * (after.drafts - before.drafts)
    return Measured([results[chunk.request_id] for chunk in chunks], after.drafts - before.drafts,
                    after.accepted_tokens - before.accepted_tokens)


def group() -> str:
    return f"0/drafting/{next(NUMBERS)}"


def member(group_id: str, number: int = 0, tokens=PROMPT, new: int = NEW, temperature: float = 1.0, **fields) -> Chunk:
    return Chunk(f"{group_id}/{number}", tuple(tokens), new, 1, temperature, group_id=group_id, **fields)


def elsewhere(result: ChunkResult, start: int = 0, end: int | None = None, name: str = "") -> SiblingTokens:
    """What it read and generated, as of a sibling at another engine."""
    return SiblingTokens(name or f"{result.request_id}/elsewhere", start, (*PROMPT, *result.tokens)[start:end])


def leaving(chunk: Chunk, result: ChunkResult) -> tuple[SiblingTokens, ...]:
    """Siblings that did the same, but for 8, 4 and 2 whose 10th, 25th and 40th token is another one, after which they
    differ: a draft begins with that one, and has it alone."""
    truth = (*chunk.tokens, *result.tokens)
    texts = [truth]
    for after, siblings in ((10, 8), (25, 4), (40, 2)):
        at = len(chunk.tokens) + after
        for number in range(siblings):
            left = ((token + 2 + number) % 64 for token in truth[at + 1 : at + 8])
            texts.append((*truth[:at], (truth[at] + 1) % 64, *left))
    return tuple(SiblingTokens(f"{chunk.request_id}/{i}", 0, text) for i, text in enumerate(texts))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_but_the_number_of_passes_is_another(pair, temperature):
    """Of siblings that go on as the trajectory will, most leave it at each of several tokens: there the tree branches,
    and what is kept follows what others did, wherever that lies in memory."""
    drafting, plain = pair
    chunks = [member(group_id, i, PROMPT[i:], temperature=temperature, routed_from=0)
              for group_id in (group(), group()) for i in range(4)]
    expected = measured(plain, *chunks)
    told = [replace(chunk, siblings=leaving(chunk, result)) for chunk, result in zip(chunks, expected.results)]
    found = measured(drafting, *told)
    assert found.length > 3
    for result, reference in zip(found.results, expected.results):
        assert result.tokens == reference.tokens and result.finish_reason == reference.finish_reason
        np.testing.assert_allclose(result.log_probs, reference.log_probs, atol=1e-5)
        if reference.routed_experts is not None:
            np.testing.assert_array_equal(np.sort(result.routed_experts), np.sort(reference.routed_experts))
    assert measured(plain, *chunks[:1]).accepted == expected.drafts == 0


def test_more_is_kept_of_drafts_with_siblings_of_the_same_group(pair):
    """Random models sample what nobody foresees, but for a sibling that did the same."""
    drafting, _ = pair
    chunk = member(group())
    alone = measured(drafting, chunk)
    (result,) = alone.results

    def again(group_id: str, *siblings: SiblingTokens) -> Measured:
        """The trajectory's samples depend on its own name alone."""
        found = measured(drafting, replace(chunk, group_id=group_id, siblings=siblings))
        assert found.results[0].tokens == result.tokens
        return found

    told = again(group(), elsewhere(result))
    others = group()
    measured(drafting, member(others, siblings=(elsewhere(result),)))
    apart = again(group())
    assert alone.length < 1.5 and apart.length < 1.5 and told.length > 6, (alone, apart, told)


def test_siblings_at_this_engine_and_another_add_up(engine):
    """One is told in pieces, with the chunks of several members; what another did here until its chunk ended, last
    tokens included, goes on elsewhere."""
    text = measured(engine, member(group(), temperature=0.0, new=100)).results[0]
    pieces = group()
    measured(engine, member(pieces, 1, (5, 4), 2, siblings=(elsewhere(text, 0, 50),)))
    measured(engine, member(pieces, 2, (5, 4), 1, siblings=(elsewhere(text, 50),)))
    moved = group()
    (first,) = measured(engine, member(moved, 1, temperature=0.0, new=23)).results
    rest = elsewhere(text, len(PROMPT) + 23, name=first.request_id)
    for group_id, news in ((pieces, ()), (moved, (rest,))):
        found = measured(engine, member(group_id, 3, temperature=0.0, new=100, siblings=news))
        assert found.results[0].tokens == text.tokens and found.length > 6, found


def test_what_was_aborted_goes_on(pair):
    drafting, plain = pair
    chunk = member(group(), new=100)
    (expected,) = measured(plain, chunk).results
    (other,) = measured(plain, member(group(), new=100)).results
    told = replace(chunk, siblings=(elsewhere(other), elsewhere(expected)))
    drafting.submit([told, *(member(chunk.group_id, i, PROMPT[i:], 100) for i in range(1, 5))])
    drafting.abort([chunk.request_id])
    aborted = {result.request_id: result for result in drafting.collect()}[chunk.request_id]
    while drafting.collect():
        pass
    assert aborted.tokens == expected.tokens[: len(aborted.tokens)]
    left = 100 - len(aborted.tokens)
    if left:
        (result,) = measured(drafting, replace(chunk, tokens=PROMPT + aborted.tokens, max_new_tokens=left)).results
        assert aborted.tokens + result.tokens == expected.tokens
