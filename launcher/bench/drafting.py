"""Drafts from siblings: what they cost, and how much of them the quickstart's policy accepts.

us_per_draft         microseconds per draft of at most 8 tokens
us_per_token         per token appended, in pieces of 64 as chunks bring them; us_per_token_alone: one at a time
over_arctic          our time over that of arctic-inference's suffix tree of the same depth, on the same traces in the
                     same order; null, with `without_arctic` saying why, if it is not installed
megabytes_per_million_tokens  of the automaton
accepted_over_arctic how many tokens of drafts agree with the traces, ours over arctic's
acceptance_by_siblings  mean acceptance length, bonus token included, by number of finished siblings: linear drafts, and
                     2 and 4 paths, on trajectories that the quickstart's policy generates at temperature 1
acceptance_arctic    the same of arctic-inference's linear drafts

Timed traces are synthetic: each of 16 siblings follows its group's text of 4096 tokens, and leaves it now and then.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import numpy as np

from launcher.overrides import load_config
from megatron_pbsd.components import build_engine
from megatron_pbsd.controller.inline import InlineRuntime
from megatron_pbsd.environments import build_environment
from megatron_pbsd.prompts import tasks_between
from megatron_pbsd.rollout.coordinator import Coordinator, RolloutRequest
from megatron_pbsd.rollout.drafting.acceptance import Trace, acceptance
from megatron_pbsd.rollout.drafting.suffix_automaton import SuffixAutomaton
from megatron_pbsd.rollout.drafting.verification import agreeing
from megatron_pbsd.rollout.engines.host import EngineHost
from megatron_pbsd.trajectory import Trajectory

CONFIG = Path("configs/quickstart.yaml")
GROUPS, SIBLINGS, TOKENS, VOCABULARY = 3, 16, 4096, 32_000
PIECE, DEPTH, LONGEST = 64, 64, 8
PROMPTS, REFERENCES, WIDTHS = 12, (0, 1, 5, 15), (1, 2, 4)
REPEATS = 3


def run(overrides: Sequence[str] = ()) -> dict[str, Any]:
    groups = [synthetic(np.random.default_rng(seed)) for seed in range(GROUPS)]
    drafters: dict[str, Callable[[], Drafter]] = {"ours": Ours}
    missing = None
    try:
        from arctic_inference.suffix_decoding import _C

        drafters["arctic"] = lambda: Arctic(_C.SuffixTree(DEPTH))
    except ImportError as error:
        missing = str(error)
    timed = {name: measure(make, groups) for name, make in drafters.items()}
    ours, arctic = timed["ours"], timed.get("arctic")
    real = real_traces(overrides)
    return {
        **{name: ours[name] for name in ("us_per_draft", "us_per_token", "us_per_token_alone")},
        "over_arctic": arctic and {name: ours[name] / arctic[name]
                                   for name in ("us_per_draft", "us_per_token", "us_per_token_alone")},
        "without_arctic": missing,
        "accepted_over_arctic": arctic and ours["accepted"] / arctic["accepted"],
        "megabytes_per_million_tokens": megabytes(groups),
        "trajectories": sum(map(len, real)),
        "generated_tokens": fmean(sum(e - s for s, e in trace.generated) for group in real for trace in group),
        "acceptance_by_siblings": acceptance_by_siblings(real),
        "acceptance_arctic": arctic and {str(n): arctic_acceptance(drafters["arctic"], real, n) for n in REFERENCES},
    }


class Drafter(Protocol):
    """What is compared: one group's structure."""

    def append(self, sequence: int, tokens: np.ndarray) -> None: ...

    def draft(self, sequence: int, context: np.ndarray) -> Sequence[int]:
        """context: the sequence's latest tokens, for those who need to be told."""


class Ours:
    def __init__(self) -> None:
        self._automaton = SuffixAutomaton(DEPTH)
        for _ in range(SIBLINGS):
            self._automaton.add_sequence()

    def append(self, sequence: int, tokens: np.ndarray) -> None:
        self._automaton.append(sequence, tokens)

    def draft(self, sequence: int, context: np.ndarray) -> Sequence[int]:
        return self._automaton.draft(sequence, LONGEST).tokens

    @property
    def nbytes(self) -> int:
        return self._automaton.nbytes


class Arctic:
    """With the limits that arctic-inference's own cache passes on by default, but for the least chance, 0 as ours."""

    def __init__(self, tree: Any) -> None:
        self._tree = tree

    def append(self, sequence: int, tokens: np.ndarray) -> None:
        self._tree.extend_ndarray(sequence, tokens)

    def draft(self, sequence: int, context: np.ndarray) -> Sequence[int]:
        return self._tree.speculate_ndarray(context, LONGEST, 1.0, 0.0, 0.0, False).token_ids


def synthetic(rng: np.random.Generator) -> list[np.ndarray]:
    """int32 [TOKENS] of each sibling. Tokens are Zipf-distributed; one in 12 is another than the text's, and one in 50
    is followed by another place of the text."""
    text = rng.zipf(1.2, TOKENS) % VOCABULARY
    siblings = []
    for _ in range(SIBLINGS):
        jumps = np.where(rng.random(TOKENS) < 0.02, rng.integers(0, TOKENS, TOKENS), 1)
        tokens = text[np.cumsum(jumps) % TOKENS]
        noise = rng.zipf(1.2, TOKENS) % VOCABULARY
        siblings.append(np.where(rng.random(TOKENS) < 1 / 12, noise, tokens).astype(np.int32))
    return siblings


def measure(make: Callable[[], Drafter], groups: list[list[np.ndarray]]) -> dict[str, float]:
    """The fastest of some repeats of each, in processor time."""
    # Compiled here, if it is at all.
    replay(make(), [tokens[: 3 * PIECE] for tokens in groups[0]], PIECE)
    pieces = [[replay(make(), group, PIECE) for group in groups] for _ in range(REPEATS)]
    alone = [[replay(make(), group, 1, drafts=False) for group in groups] for _ in range(REPEATS)]
    tokens, drafts = GROUPS * SIBLINGS * TOKENS, GROUPS * SIBLINGS * (TOKENS // PIECE)
    return {
        "us_per_token": 1e6 * min(sum(r[0] for r in runs) for runs in pieces) / tokens,
        "us_per_draft": 1e6 * min(sum(r[1] for r in runs) for runs in pieces) / drafts,
        "us_per_token_alone": 1e6 * min(sum(r[0] for r in runs) for runs in alone) / tokens,
        "accepted": sum(r[2] for r in pieces[0])}


def replay(drafter: Drafter, group: list[np.ndarray], piece: int, drafts: bool = True) -> tuple[float, float, int]:
    """Siblings grow in turn by `piece` tokens. Seconds of appending and of drafting; how many drafted tokens agree."""
    appending = drafting = 0.0
    accepted = 0
    gc.collect()
    for start in range(0, len(group[0]), piece):
        began = time.process_time()
        for sequence, tokens in enumerate(group):
            drafter.append(sequence, tokens[start : start + piece])
        appending += time.process_time() - began
        if drafts:
            end = start + piece
            contexts = [tokens[max(0, end - DEPTH) : end] for tokens in group]
            began = time.process_time()
            made = [drafter.draft(sequence, context) for sequence, context in enumerate(contexts)]
            drafting += time.process_time() - began
            accepted += sum(agreeing(draft, tokens[end : end + LONGEST].tolist()) for draft, tokens in zip(made, group)
                            if len(tokens) >= end + LONGEST)
    return appending, drafting, accepted


def megabytes(groups: list[list[np.ndarray]]) -> float:
    total = 0
    for group in groups:
        drafter = Ours()
        replay(drafter, group, PIECE, drafts=False)
        total += drafter.nbytes
    return total / (GROUPS * SIBLINGS * TOKENS)


def real_traces(overrides: Sequence[str] = ()) -> list[list[Trace]]:
    """Of groups of 16 for some prompts of the quickstart, from its shipped policy unless overridden."""
    config = load_config(CONFIG, ["--rollout.group_size", str(max(REFERENCES) + 1), *overrides])
    runtime, rollout = InlineRuntime(), config.rollout
    engine = runtime.spawn("engine-0", EngineHost, build_engine, name="engine-0", model_path=config.model.path,
                           slots=rollout.slots, max_context=rollout.max_context)
    environment = build_environment(config.environment, config.model.path)
    coordinator = Coordinator([engine], environment, rollout, runtime.client)
    tasks = tasks_between(environment.tasks(config.environment.train_split), config.seed, 0, PROMPTS)
    requests = [RolloutRequest(str(i), task, rollout.group_size, task.answers[0]) for i, task in enumerate(tasks)]
    groups = coordinator.collect(requests, step=1, seed=config.seed, temperature=rollout.temperature)
    return [trace_group(group.trajectories) for group in groups]


def trace_group(members: Sequence[Trajectory]) -> list[Trace]:
    traces = []
    for member in members:
        tokens, spans = list(member.prompt), []
        for turn in member.turns:
            spans.append((len(tokens), len(tokens) + len(turn.tokens)))
            tokens += [*turn.tokens, *turn.observation]
        traces.append(Trace(tuple(tokens), tuple(spans)))
    return traces


def acceptance_by_siblings(groups: list[list[Trace]]) -> dict[str, dict[str, float]]:
    """Number of siblings → linear drafts, or paths → mean acceptance length."""
    return {str(n): {("linear" if k == 1 else f"k={k}"): mean_acceptance(groups, n, k) for k in WIDTHS}
            for n in REFERENCES}


def mean_acceptance(groups: list[list[Trace]], siblings: int, width: int) -> float:
    found = [acceptance(group, siblings, width=width, longest=LONGEST) for group in groups]
    return round(sum(f.tokens for f in found) / sum(f.passes for f in found), 3)


def arctic_acceptance(make: Callable[[], Drafter], groups: list[list[Trace]], siblings: int) -> float:
    """As `acceptance` counts."""
    passes = generated = 0
    for group in groups:
        for i, trace in enumerate(group):
            drafter, tokens, known = make(), np.array(trace.tokens, np.int32), 0
            for k in range(siblings):
                drafter.append(k + 1, np.array(group[(i + 1 + k) % len(group)].tokens, np.int32))
            for at, end in trace.generated:
                while at < end:
                    drafter.append(0, tokens[known:at])
                    known = at
                    draft = drafter.draft(0, tokens[max(0, at - DEPTH) : at])[: end - at - 1]
                    kept = agreeing(draft, trace.tokens[at:end])
                    passes, generated, at = passes + 1, generated + kept + 1, at + kept + 1
    return round(generated / passes, 3)
