"""One trajectory in the making: a state machine between engine and environment. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_pbsd.config import RolloutConfig
from megatron_pbsd.environments import Environment, Task
from megatron_pbsd.rollout.engines.protocol import Chunk, ChunkResult
from megatron_pbsd.trajectory import Trajectory, Turn


@dataclass(frozen=True)
class RolloutRequest:
    """Ask `task` `samples` times. privileged_answer: what the teacher's prompt discloses."""

    group_id: str
    task: Task
    samples: int
    privileged_answer: str


@dataclass
class Episode:
    """`next_chunk` and `advance` alternate until `finished`.

    trajectory_id is also the engine's request id, and with the seed the key of counter-based sampling.
    """

    trajectory_id: str
    request: RolloutRequest
    environment: Environment
    config: RolloutConfig
    seed: int
    temperature: float
    turns: list[Turn] = field(default_factory=list)
    finished: bool = False

    def __post_init__(self) -> None:
        self.prompt = self.environment.prompt(self.request.task)
        self.context = self.prompt

    def next_chunk(self) -> Chunk:
        return Chunk(
            request_id=self.trajectory_id,
            tokens=self.context,
            max_new_tokens=min(self.config.max_turn_tokens, self.config.max_context - len(self.context)),
            seed=self.seed,
            temperature=self.temperature,
            stop_token_ids=self.environment.stop_token_ids)

    def advance(self, result: ChunkResult) -> None:
        """Take the policy's turn and the environment's reply to it.

        The episode ends with an answer, with the last turn allowed, or where the context has no room for another
        turn; the last two leave a turn of kind 'truncated' if it was itself cut by the room that was left.
        """
        reply = self.environment.reply(self.request.task, self.turns, result.tokens)
        room = self.config.max_context - len(self.context) - len(result.tokens)
        cut = result.finish_reason != "stop" and len(result.tokens) < self.config.max_turn_tokens
        over = reply.done or cut or len(self.turns) + 1 >= self.config.max_turns or len(reply.observation) >= room
        turn = Turn(
            tokens=result.tokens,
            log_probs=result.log_probs,
            # What nobody will read is not part of the trajectory.
            observation=() if over else reply.observation,
            kind="truncated" if cut else reply.kind,
            finish_reason=result.finish_reason,
            versions=result.versions,
            answer_span=None if cut else reply.answer_span)
        self.turns.append(turn)
        self.context += turn.tokens + turn.observation
        self.finished = over

    def trajectory(self) -> Trajectory:
        return Trajectory(
            trajectory_id=self.trajectory_id,
            group_id=self.request.group_id,
            task_id=self.request.task.task_id,
            prompt=self.prompt,
            privileged_prompt=self.environment.privileged_prompt(self.request.task, self.request.privileged_answer),
            turns=tuple(self.turns))
