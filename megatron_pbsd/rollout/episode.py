"""One trajectory while it is being generated: which tokens to ask for next, and when it is over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_pbsd.config import RolloutConfig
from megatron_pbsd.environments.protocol import Environment, Task
from megatron_pbsd.rollout.engines.protocol import Chunk, ChunkResult
from megatron_pbsd.rollout.errors import RolloutError
from megatron_pbsd.rollout.request import Unfinished
from megatron_pbsd.trajectory import NOT_ROUTED, Trajectory, Turn, VersionSpan


@dataclass(frozen=True)
class EpisodeStart:
    """What an episode begins with; fields as in `trajectory.Trajectory` and `protocol.Chunk`.

    routed_experts: ask the engine for the experts that read each token.
    """

    trajectory_id: str
    group_id: str
    task: Task
    prompt: tuple[int, ...]
    privileged_prompt: tuple[int, ...]
    seed: int
    temperature: float
    stop_token_ids: tuple[int, ...]
    routed_experts: bool = False


class Episode:
    """A state machine: `next_chunk` → engine → `advance`, until `finished`; then `trajectory`.

    A chunk may end before its turn does (an abort, a division): the next one continues the same turn, under whatever
    weights the engine has then. It may be one of another episode that begins with what this one has `unfinished`.
    A turn that reaches `max_turn_tokens` or `max_context` before a stop token is of kind 'truncated', unless the
    environment finds it final. The episode ends when the environment says so, with `max_turns`, and when the
    environment's answer leaves no room for another token; the last turn never has an observation, as nobody would read
    it.

    begun: what there is of it already. RolloutError when the prompt alone, or what there is, leaves no room.
    """

    def __init__(self, start: EpisodeStart, limits: RolloutConfig, begun: Unfinished | None = None):
        if len(start.prompt) >= limits.max_context:
            raise RolloutError(
                f"rollout.max_context = {limits.max_context} has no room for the prompt of task "
                f"{start.task.task_id!r}, which has {len(start.prompt)} tokens; set it to at least "
                f"{len(start.prompt) + limits.max_turn_tokens}")
        self._start, self._limits = start, limits
        self._context = list(start.prompt)
        self._turns: list[Turn] = []
        self._experts: np.ndarray | None = None
        self._begin_turn()
        self.finished = False
        if begun is not None:
            self._go_on(begun)

    def _go_on(self, begun: Unfinished) -> None:
        self._turns = list(begun.trajectory.turns)
        self._tokens, self._log_probs = list(begun.tokens), list(begun.log_probs)
        self._versions, self._experts = list(begun.versions), begun.routed_experts
        self._context += (*begun.trajectory.continuation, *begun.tokens)
        limits = self._limits
        if self.room <= 0 or len(self._turns) >= limits.max_turns:
            raise RolloutError(
                f"trajectory {self.request_id!r}, which an earlier step began, has no room to go on: it has "
                f"{len(self._turns)} turns, {len(self._tokens)} tokens of another and {len(self._context)} tokens in "
                f"all; rollout.max_turns = {limits.max_turns}, max_turn_tokens = {limits.max_turn_tokens}, max_context "
                f"= {limits.max_context}: set them to at least what they were")

    def _begin_turn(self) -> None:
        self._tokens: list[int] = []
        self._log_probs: list[float] = []
        self._versions: list[VersionSpan] = []

    @property
    def request_id(self) -> str:
        return self._start.trajectory_id

    @property
    def group_id(self) -> str:
        return self._start.group_id

    @property
    def context_tokens(self) -> int:
        return len(self._context)

    @property
    def room(self) -> int:
        """Tokens that the present turn may still have."""
        return min(self._limits.max_turn_tokens - len(self._tokens), self._limits.max_context - len(self._context))

    def next_chunk(self, max_tokens: int | None = None, kv_from: str | None = None, priority: int = 0) -> Chunk:
        """max_tokens: of this chunk, if it is to end before the turn has to. kv_from, priority: see `Chunk`."""
        start, room = self._start, self.room
        room = room if max_tokens is None else min(room, max_tokens)
        # Other steps have groups of the same id, with other prompts.
        group = start.trajectory_id.rpartition("/")[0]
        return Chunk(start.trajectory_id, tuple(self._context), room, start.seed, start.temperature,
                     start.stop_token_ids, self._routed if start.routed_experts else None,
                     kv_from, group, priority=priority)

    @property
    def _routed(self) -> int:
        """Tokens whose experts are known."""
        return 0 if self._experts is None else len(self._experts)

    def advance(self, result: ChunkResult, environment: Environment) -> None:
        """Take in what the engine generated; if that ends the turn, let the environment answer it."""
        offset = len(self._tokens)
        if result.routed_experts is not None:
            self._experts = rerouted(self._experts, result)
        self._tokens += result.tokens
        self._log_probs += result.log_probs
        self._context += result.tokens
        self._versions = merged(self._versions, result.versions, offset)
        if result.finish_reason == "stop" or self.room <= 0:
            self._end_turn(result, environment)

    def _end_turn(self, result: ChunkResult, environment: Environment) -> None:
        reply = environment.reply(self._start.task, self._turns, self._tokens)
        fits = len(self._context) + len(reply.observation) < self._limits.max_context
        self.finished = reply.done or not fits or len(self._turns) + 1 == self._limits.max_turns
        observation = () if self.finished else tuple(reply.observation)
        cut = result.finish_reason != "stop" and not reply.done
        self._turns.append(Turn(
            tokens=tuple(self._tokens),
            log_probs=tuple(self._log_probs),
            observation=observation,
            kind="truncated" if cut else reply.kind,
            finish_reason=result.finish_reason,
            versions=tuple(self._versions),
            answer_span=reply.answer_span,
        ))
        self._context += observation
        self._begin_turn()

    def trajectory(self) -> Trajectory:
        start, experts = self._start, self._experts
        if experts is not None:
            unread = len(self._context) - len(experts)
            experts = np.pad(experts, ((0, unread), (0, 0), (0, 0)), constant_values=NOT_ROUTED)
        return Trajectory(start.trajectory_id, start.group_id, start.task.task_id, start.prompt,
                          start.privileged_prompt, tuple(self._turns), routed_experts=experts)


    def unfinished(self) -> Unfinished:
        """What there is of it, between two chunks."""
        start = self._start
        turns = Trajectory(start.trajectory_id, start.group_id, start.task.task_id, start.prompt,
                           start.privileged_prompt, tuple(self._turns))
        return Unfinished(turns, tuple(self._tokens), tuple(self._log_probs), tuple(self._versions), self._experts)


def merged(spans: Sequence[VersionSpan], more: Sequence[VersionSpan], offset: int) -> list[VersionSpan]:
    """`spans` and then `more`, which count from `offset`; neighbours of one version become one span."""
    joined = list(spans)
    for span in more:
        start, end = span.start + offset, span.end + offset
        if joined and joined[-1].version == span.version:
            joined[-1] = VersionSpan(span.version, joined[-1].start, end)
        else:
            joined.append(VersionSpan(span.version, start, end))
    return joined


def rerouted(known: np.ndarray | None, result: ChunkResult) -> np.ndarray:
    """Experts of a trajectory's first tokens, [m, MoE layers, top-k], brought up to date: where the engine read a token
    again, or lost what it had read, its report replaces what was known from there on.

    RolloutError when the report leaves a gap.
    """
    start, experts = result.routed_from, result.routed_experts
    before = experts[:0] if known is None else known
    if start > len(before):
        raise RolloutError(f"request {result.request_id!r}: the engine reported routed experts from token {start} on, "
                           f"but nobody those of tokens {len(before)} to {start - 1}")
    return np.concatenate([before[:start], experts])
