"""Generation and measurement: engines, environment, evaluation."""

from __future__ import annotations

from math import ceil
from typing import Annotated, Any, Literal

from pydantic import Field

from megatron_pbsd.config.section import Positive, PositiveInt, Section

DIVIDING = ("divided", "context_aware", "longest_remaining")
"""Policies that run requests in chunks, any of which may run on any engine."""
CHUNKS_PER_TURN, SHORTEST_CHUNK = 8, 16


class SpeculationConfig(Section):
    enabled: bool = False
    """Draft tokens from what siblings generated, where that is measured to pay; what is generated stays the same."""
    max_draft_tokens: Annotated[int, Field(ge=1, le=64)] = 8
    """Longest draft."""


class SGLangConfig(Section):
    python: str | None = None
    """Interpreter of the environment that SGLang is installed in."""
    args: dict[str, Any] = {}
    """Any of SGLang's server arguments by the names of its ServerArgs, e.g. `tp_size`."""
    environment: dict[str, str] = {}
    """Environment variables of the servers."""
    port: Annotated[int, Field(ge=1024, le=65535)] | None = None
    """HTTP port of the first engine; the others take those after it. null takes any free ones."""
    start_deadline_s: Positive = 900.0
    """After this long a server that is not ready has failed."""


class RolloutConfig(Section):
    engine: Literal["embedded", "sglang"] = "embedded"
    """What generates: an engine in the component's own process, or an SGLang server of its own."""
    sglang: SGLangConfig = SGLangConfig()
    """SGLang servers, one per engine."""
    engines: PositiveInt = 2
    """Number of engines."""
    slots: PositiveInt = 64
    """Sequences that one engine decodes at a time."""
    prompts_per_step: PositiveInt = 16
    """Prompts, and so groups, per step."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Trajectories per prompt."""
    over_sampling: Annotated[float, Field(ge=1)] = 1.0
    """Prompts in flight per prompt of `prompts_per_step`. Above 1 a step ends as soon as `prompts_per_step` groups are
    complete; the others are dropped, or carried to the next step if `max_staleness` allows that."""
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """Most weight versions that the oldest token of a trajectory may be behind the weights that train on it. 0 drops
    groups that are not complete when a step ends; above 0 they are carried, and are complete in time."""
    stale_tokens: Literal["correct", "mask"] = "correct"
    """Tokens that older weights generated are trained on, corrected by the loss's `mismatch`; or are context alone."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature of training rollouts."""
    max_turns: PositiveInt = 6
    """Most turns of a trajectory."""
    max_turn_tokens: PositiveInt = 32
    """Most tokens the policy may generate in one turn."""
    max_context: PositiveInt = 512
    """Most tokens of a trajectory, prompt included."""
    policy: Literal["group_pinned", "least_loaded", "divided", "context_aware", "longest_remaining"] = "least_loaded"
    """Which request runs next, and on which engine. Trajectories are the same whatever it is."""
    chunk_tokens: PositiveInt | None = None
    """Longest chunk of policies that divide; null is an eighth of max_turn_tokens, and at least 16."""
    kv_pool_mb: Annotated[int, Field(ge=0)] = 256
    """Host memory of each engine for KV that has lost its slot or may go to another engine (MiB); 0 keeps none."""
    speculation: SpeculationConfig = SpeculationConfig()
    """Grouped speculative decoding."""
    engine_restarts: Annotated[int, Field(ge=0)] = 2
    """Engines that died or hung and are started again, in a whole run; one more ends it."""
    deadline_s: Annotated[float, Field(gt=0)] = 300.0
    """An engine without a finished chunk for this long is hung: it is ended, and counts as one that died."""
    probe_tolerance: Annotated[float, Field(gt=0)] = 1e-4
    """Largest |engine - learner| log-prob on the probe batch after a publication (nats)."""

    @property
    def divides(self) -> bool:
        return self.policy in DIVIDING

    @property
    def longest_chunk(self) -> int | None:
        """Most tokens of a chunk; None: turns are not divided."""
        if not self.divides:
            return None
        return self.chunk_tokens or max(SHORTEST_CHUNK, self.max_turn_tokens // CHUNKS_PER_TURN)

    @property
    def most_generated(self) -> int:
        """Most tokens that a trajectory can generate."""
        return min(self.max_turns * self.max_turn_tokens, self.max_context)

    @property
    def prompts_in_flight(self) -> int:
        """Prompts, and so groups, that a step begins with."""
        return ceil(self.over_sampling * self.prompts_per_step)

    def conflicts(self) -> list[str]:
        """Keys that mean nothing beside others, one message each."""
        problems = self._partial_conflicts()
        if self.chunk_tokens is not None and not self.divides:
            problems.append(
                f"rollout.chunk_tokens = {self.chunk_tokens} has no effect with rollout.policy = {self.policy!r}, "
                f"which does not divide: leave it out, or set rollout.policy to one of {', '.join(DIVIDING)}")
        if self.chunk_tokens is not None and self.chunk_tokens > self.max_turn_tokens:
            problems.append(
                f"rollout.chunk_tokens = {self.chunk_tokens} divides nothing: turns have at most "
                f"rollout.max_turn_tokens = {self.max_turn_tokens}; the nearest valid value is {self.max_turn_tokens}")
        return problems + self._engine_conflicts()

    def _engine_conflicts(self) -> list[str]:
        if self.engine == "embedded":
            return [f"rollout.sglang.{name} has no effect with rollout.engine = 'embedded': leave it out, or set "
                    "rollout.engine to 'sglang'" for name, field in SGLangConfig.model_fields.items()
                    if getattr(self.sglang, name) != field.default]
        problems = []
        if self.sglang.python is None:
            problems.append("rollout.engine = 'sglang' needs rollout.sglang.python, the interpreter of the environment "
                            "that SGLang is installed in")
        if self.speculation.enabled:
            problems.append("rollout.speculation.enabled has no effect with rollout.engine = 'sglang', which drafts by "
                            "its own arguments (rollout.sglang.args.speculative_algorithm): leave it out")
        if self.sglang.port is not None and self.sglang.port + self.engines > 65536:
            problems.append(f"rollout.sglang.port = {self.sglang.port} leaves no ports for rollout.engines = "
                            f"{self.engines}; the nearest valid value is {65536 - self.engines}")
        return problems

    def _partial_conflicts(self) -> list[str]:
        problems = []
        if self.max_staleness and self.over_sampling == 1:
            problems.append(
                f"rollout.max_staleness = {self.max_staleness} has no effect with rollout.over_sampling = 1: every "
                "step waits for all of its groups and leaves none to carry; set over_sampling above 1, such as 1.5, "
                "or max_staleness to 0")
        if self.stale_tokens == "mask" and not self.max_staleness:
            problems.append(
                "rollout.stale_tokens = 'mask' has no effect with rollout.max_staleness = 0, under which no token is "
                "stale; set max_staleness to at least 1, or stale_tokens to 'correct'")
        return problems


class EnvironmentConfig(Section):
    name: Literal["search_qa"] = "search_qa"
    """Which environment."""
    retriever: Literal["bm25", "none"] = "bm25"
    """`none` returns nothing for any query: the control that shows answers come from the tool."""
    search_budget: PositiveInt = 4
    """Search calls per trajectory; further calls get an observation that says so."""
    observation_words: PositiveInt = 28
    """Passages are cut to this many words."""
    train_split: str = "train"
    """Split that training prompts are drawn from."""
    hops: tuple[Annotated[int, Field(ge=1, le=3)], ...] = (1, 2, 3)
    """Questions of these numbers of hops are asked."""


class EvaluationConfig(Section):
    every: Annotated[int, Field(ge=0)] = 10
    """Steps between evaluations; 0 evaluates only the first and the last policy."""
    split: str = "heldout"
    """Split that evaluation prompts come from."""
    prompts: PositiveInt = 200
    """Prompts per evaluation, one trajectory each."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Sampling temperature; 0 is greedy."""
    at_start: bool = True
    """Evaluate the policy before the first step too."""
