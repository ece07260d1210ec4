"""A tiny engine and environment that obey the protocols, for tests of what is built on top of them."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_pbsd.environments.protocol import Reply, Score, Task
from megatron_pbsd.rollout.coordinator import RolloutRequest
from megatron_pbsd.rollout.engines.protocol import Chunk, ChunkResult, EngineError, EngineStatistics
from megatron_pbsd.trajectory import Trajectory, Turn, VersionSpan

VOCABULARY = 50
STOP = 1


def sampled(seed: int, request_id: str, position: int) -> int:
    """Counter-based: a token depends on nothing but its request and position. 1 in 8 is the stop token."""
    digest = hashlib.blake2b(f"{seed}/{request_id}/{position}".encode(), digest_size=4).digest()
    value = int.from_bytes(digest, "big")
    return STOP if value % 8 == 0 else 2 + value // 8 % (VOCABULARY - 2)


def chosen_experts(tokens: Sequence[int], start: int = 0) -> np.ndarray:
    """int16 [T, 2, 2]: of each token its own number and its position, as if two layers of two experts had chosen."""
    rows = [[(token, start + i), (start + i, token)] for i, token in enumerate(tokens)]
    return np.array(rows, np.int16).reshape(-1, 2, 2)


class ScriptedEngine:
    """One token for every running chunk per round, which takes `slow_s`. `crash_after`, `hang_after`: tokens until it
    does. `hang_over`: the method that never returns."""

    def __init__(self, name: str, crash_after: int | None = None, hang_after: int | None = None,
                 chunk_tokens: int = 99, hang_over: str | None = None, slow_s: float = 0.0):
        self.hang_over, self.slow_s = hang_over, slow_s
        self.name, self.crash_after, self.hang_after, self.chunk_tokens = name, crash_after, hang_after, chunk_tokens
        self.running: dict[str, tuple[Chunk, list[int]]] = {}
        self.kept: set[str] = set()
        self.generated = self.cached = self.most_running = self.weights = 0
        self.busy = 0.0
        self.interrupted = False
        self.aborted: list[ChunkResult] = []

    def submit(self, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            if chunk.request_id in self.running:
                raise EngineError(f"engine {self.name!r}: request {chunk.request_id!r} is already running")
            self.running[chunk.request_id] = (chunk, [])
            self.cached += chunk.request_id in self.kept
        self.most_running = max(self.most_running, len(self.running))

    def collect(self) -> list[ChunkResult]:
        start, ended = time.perf_counter(), []
        while self.running and not ended and not self.interrupted:
            time.sleep(self.slow_s)
            for chunk, tokens in list(self.running.values()):
                tokens.append(sampled(chunk.seed, chunk.request_id, len(chunk.tokens) + len(tokens)))
                self.generated += 1
                if tokens[-1] in chunk.stop_token_ids:
                    ended.append(self._end(chunk, tokens, "stop"))
                elif len(tokens) == chunk.max_new_tokens or len(tokens) == self.chunk_tokens:
                    ended.append(self._end(chunk, tokens, "length"))
            if self.crash_after is not None and self.generated >= self.crash_after:
                print(f"{self.name} runs into its scripted end", flush=True)
                os._exit(7)
            if self.hang_after is not None and self.generated >= self.hang_after:
                self._hang()
        self.busy += time.perf_counter() - start
        ended, self.aborted = self.aborted + ended, []
        return ended

    def interrupt(self) -> None:
        self.interrupted = True

    def abort(self, request_ids: Sequence[str]) -> None:
        self.interrupted = False
        self.aborted = [self._end(*self.running[name], "abort") for name in request_ids if name in self.running]

    def _hang(self) -> None:
        while True:
            time.sleep(0.05)

    def _end(self, chunk: Chunk, tokens: list[int], reason: str) -> ChunkResult:
        del self.running[chunk.request_id]
        self.kept.add(chunk.request_id)
        versions = (VersionSpan(self.weights, 0, len(tokens)),) if tokens else ()
        experts = None
        if chunk.routed_from is not None:
            read = (*chunk.tokens, *tokens)[chunk.routed_from : -1]
            experts = chosen_experts(read, chunk.routed_from)
        return ChunkResult(chunk.request_id, tuple(tokens), tuple(-0.5 for _ in tokens), reason, 0, versions, experts,
                           chunk.routed_from or 0)

    def release(self, request_ids: Sequence[str]) -> None:
        self.kept -= set(request_ids)

    def hand_over(self, request_ids: Sequence[str]) -> None:
        self.release(request_ids)

    def update_weights(self, manifest: object, version: int) -> None:
        if self.hang_over == "update_weights":
            self._hang()
        self.weights = version

    def checksums(self) -> dict[str, str]:
        return {"weights": str(self.weights)}

    def score(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        return [np.zeros(len(s), np.float32) for s in sequences]

    def statistics(self) -> EngineStatistics:
        if self.hang_over == "statistics":
            self._hang()
        return EngineStatistics(self.weights, len(self.running), 0, len(self.kept), self.generated, 0, self.cached,
                                self.most_running, self.busy)


@dataclass(frozen=True)
class EchoEnvironment:
    """Repeats what the policy said; a turn whose first token is even is the final answer."""

    stop_token_ids: tuple[int, ...] = (STOP,)
    pad_token_id: int = 0

    def tasks(self, split: str) -> list[Task]:
        return [Task(f"{split}-{i}", "q" * (3 + i % 5), (str(i),), 1) for i in range(40)]

    def prompt(self, task: Task) -> tuple[int, ...]:
        return tuple(range(2, 2 + len(task.question)))

    def privileged_prompt(self, task: Task, answer: str) -> tuple[int, ...]:
        return (*self.prompt(task), *(2 + ord(c) % 40 for c in answer))

    def reply(self, task: Task, turns: Sequence[Turn], tokens: Sequence[int]) -> Reply:
        if tokens[-1] != STOP:
            return Reply("malformed", (3,), False)
        if tokens[0] % 2 == 0:
            return Reply("answer", (), True, (0, len(tokens) - 1))
        return Reply("search", tuple(tokens), False)

    def score(self, task: Task, trajectory: Trajectory) -> Score:
        return Score(float(trajectory.complete), {})

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(map(str, tokens))


def requests(count: int, samples: int) -> list[RolloutRequest]:
    tasks = EchoEnvironment().tasks("train")
    return [RolloutRequest(f"g{i}", tasks[i % len(tasks)], samples, tasks[i % len(tasks)].answers[0])
            for i in range(count)]


def expected(request: RolloutRequest, sample: int, step: int, seed: int, limits) -> Trajectory:
    """The trajectory written out as one loop over turns, without chunks, engines or a scheduler."""
    environment, turns = EchoEnvironment(), []
    prompt, name = environment.prompt(request.task), f"{step}/{request.group_id}/{sample}"
    context = list(prompt)
    while True:
        tokens: list[int] = []
        while len(tokens) < limits.max_turn_tokens and len(context) < limits.max_context:
            tokens.append(sampled(seed, name, len(context)))
            context.append(tokens[-1])
            if tokens[-1] == STOP:
                break
        stopped = tokens[-1] == STOP
        reply = environment.reply(request.task, turns, tokens)
        over = (reply.done or len(turns) + 1 == limits.max_turns
                or len(context) + len(reply.observation) >= limits.max_context)
        reason = "stop" if stopped else "length"
        turn = Turn(tuple(tokens), (-0.5,) * len(tokens), reply.observation, reply.kind, reason,
                    (VersionSpan(0, 0, len(tokens)),), reply.answer_span)
        turns.append(turn if stopped else replace(turn, kind="truncated"))
        if over:
            turns[-1] = replace(turns[-1], observation=())
            return Trajectory(name, request.group_id, request.task.task_id, prompt,
                              environment.privileged_prompt(request.task, request.privileged_answer), tuple(turns))
        context += reply.observation
