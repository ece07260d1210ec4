"""Drafts for requests that say what group they are of."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from megatron_pbsd.rollout.drafting.draft_tree import NO_DRAFT, ROOT, DraftTree
from megatron_pbsd.rollout.drafting.request_drafts import RequestDrafts
from megatron_pbsd.rollout.drafting.request_news import told
from megatron_pbsd.rollout.engines.protocol import SiblingTokens

TEXT = list(range(100, 130))


def asked(drafts: RequestDrafts, context: list[int], *, group="g", request="r", siblings=(), longest=4) -> DraftTree:
    """The draft of a request with this context, of which all but one token were generated."""
    said = told(group, request, siblings)
    drafts.learn(said)
    drafts.remember(said, context[:1], context[1:])
    return drafts.tree(said, longest)


def test_what_siblings_did_elsewhere_is_drafted():
    drafts = RequestDrafts(4)
    assert asked(drafts, TEXT[:3]) == NO_DRAFT
    tree = asked(drafts, TEXT[:3], siblings=[SiblingTokens("s", 0, TEXT)])
    assert tree == DraftTree.line(TEXT[3:7])
    assert asked(drafts, TEXT[:3], longest=2) == DraftTree.line(TEXT[3:5])
    assert asked(drafts, TEXT[:3], group="other") == NO_DRAFT
    assert asked(drafts, TEXT[:3], group="", request="alone") == NO_DRAFT


def test_news_come_in_pieces_and_again():
    drafts = RequestDrafts(4)
    for start, end in ((0, 10), (5, 20), (20, 30), (0, 30)):
        asked(drafts, [1], siblings=[SiblingTokens("s", start, TEXT[start:end])])
    assert asked(drafts, [1, *TEXT[17:19]], request="q").tokens == tuple(TEXT[19:23])


def test_news_after_a_gap_say_nothing():
    drafts = RequestDrafts(4)
    asked(drafts, [1], siblings=[SiblingTokens("s", 0, TEXT[:5]), SiblingTokens("s", 9, TEXT[9:])])
    assert asked(drafts, [1, TEXT[9]], request="q") == NO_DRAFT


def test_a_request_is_remembered_over_its_chunks():
    """Its last tokens, which no draft came after, too: what it does elsewhere from then on continues them."""
    drafts, said = RequestDrafts(4), told("g", "r", ())
    drafts.remember(said, TEXT[:2], TEXT[2:6])
    drafts.remember(said, TEXT[:8], TEXT[8:12])
    asked(drafts, [1], request="s", siblings=[SiblingTokens("r", 12, TEXT[12:])])
    assert asked(drafts, [1, *TEXT[10:12]], request="q").tokens == tuple(TEXT[12:16])


def test_where_siblings_differ_the_tree_branches():
    drafts = RequestDrafts(4)
    siblings = [SiblingTokens(str(i), 0, [1, 2, token, 9]) for i, token in enumerate((3, 3, 4))]
    assert asked(drafts, [7, 1, 2], siblings=siblings) == DraftTree((3, 9, 4, 9), (ROOT, 0, ROOT, 2), (1, 2, 1, 2), 2)


def test_what_is_forgotten_is_learnt_from_the_request_again():
    drafts = RequestDrafts(4, budget=40)
    asked(drafts, [*TEXT, TEXT[0]])
    asked(drafts, TEXT, group="other")
    assert asked(drafts, [*TEXT, *TEXT[:2]]).tokens == tuple(TEXT[2:6])


def test_sglangs_environment_needs_nothing_else_for_it():
    code = ("import sys; import megatron_pbsd.rollout.drafting.request_drafts as m; m.RequestDrafts(4);"
            "print(sorted({'torch', 'ray', 'pydantic', 'transformers', 'psutil'} & set(sys.modules)))")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert ran.stdout.strip() == "[]", ran.stderr
