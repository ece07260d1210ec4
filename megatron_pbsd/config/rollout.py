"""Generation and measurement: engines, environment, evaluation."""

from __future__ import annotations

from math import ceil
from typing import Annotated, Any, Literal

from pydantic import Field

from megatron_pbsd.config.section import Positive, PositiveInt, Section

DIVIDING = ("divided", "context_aware", "longest_remaining")
"""Policies that run requests in chunks, any of which may run on any engine."""
CHUNKS_PER_TURN, SHORTEST_CHUNK = 8, 16
WITH_DRAFTS = {
    "pp_size": (1, "SGLang drafts in one stage"),
    "enable_dp_attention": (False, "SGLang does not draft with it"),
    "attn_dp_size": (1, "SGLang does not draft with it"),
    "enable_mixed_chunk": (False, "SGLang does not draft with it"),
    "disable_overlap_schedule": (True, "drafts follow the newest tokens, which overlapping passes do not know"),
}
"""Arguments of SGLang's → their only value with drafts, and why."""


class SpeculationConfig(Section):
    enabled: bool = False
    """Draft tokens from what siblings generated, where that is measured to pay; what is generated stays the same."""
    max_draft_tokens: Annotated[int, Field(ge=1, le=64)] = 8
    """Longest draft."""
    paths: Annotated[int, Field(ge=1, le=8)] = 1
    """Likely continuations that may be verified at once, as a tree where they begin alike."""


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


class TransportConfig(Section):
    kind: Literal["segment", "buckets", "ipc", "collective", "disk"] = "segment"
    """How new weights get from the learner to the engines: one copy of all in shared memory, two buckets there, two
    buckets in learner rank 0's own memory, which engines map, a torch.distributed group, or files."""
    bucket_mb: PositiveInt = 512
    """Size of a bucket (MiB), of which there are two; one that a larger tensor has to itself is as large as that. Of
    all kinds but `segment`."""
    folder: str | None = None
    """Of kind `disk`: where the files are, which learner and engines see; null is `weights` in the run's folder."""
    deltas: Annotated[int, Field(ge=0)] = 0
    """Of kind `disk`: after files of all tensors so many publications write only those that have changed."""


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
    sleep: Literal["none", "kv_cache", "all"] = "none"
    """Memory that engines give away while the learner computes: nothing, the KV cache, or weights too, which then come
    back with the next publication. For engines that share devices with the learner (learner.release_memory)."""
    speculation: SpeculationConfig = SpeculationConfig()
    """Grouped speculative decoding."""
    engine_restarts: Annotated[int, Field(ge=0)] = 2
    """Engines that died or hung and are started again, in a whole run; one more ends it."""
    deadline_s: Annotated[float, Field(gt=0)] = 300.0
    """An engine without a finished chunk for this long is hung: it is ended, and counts as one that died."""
    transport: TransportConfig = TransportConfig()
    """How new weights get to the engines."""
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
        if self.speculation.paths > 1 and not self.speculation.enabled:
            problems.append(f"rollout.speculation.paths = {self.speculation.paths} has no effect with "
                            "rollout.speculation.enabled = false: set enabled to true, or leave paths out")
        return problems + self._engine_conflicts() + self._transport_conflicts()

    def _transport_conflicts(self) -> list[str]:
        kind, given = self.transport.kind, self.transport.model_fields_set
        used = {"segment": (), "disk": ("bucket_mb", "folder", "deltas")}.get(kind, ("bucket_mb",))
        problems = [f"rollout.transport.{name} has no effect with rollout.transport.kind = {kind!r}: leave it out"
                    for name, field in TransportConfig.model_fields.items()
                    if name in given and name not in ("kind", *used)
                    and getattr(self.transport, name) != field.default]
        if kind == "collective" and self.sglang.args.get("pp_size", 1) != 1:
            problems.append(f"rollout.transport.kind = 'collective' with rollout.sglang.args.pp_size = "
                            f"{self.sglang.args['pp_size']!r}: ranks of one stage alone can join SGLang's groups for "
                            "weights; set the kind to one of segment, buckets, disk")
        return problems

    def _engine_conflicts(self) -> list[str]:
        if self.engine == "embedded":
            return [f"rollout.sglang.{name} has no effect with rollout.engine = 'embedded': leave it out, or set "
                    "rollout.engine to 'sglang'" for name, field in SGLangConfig.model_fields.items()
                    if getattr(self.sglang, name) != field.default]
        problems = []
        if self.sglang.python is None:
            problems.append("rollout.engine = 'sglang' needs rollout.sglang.python, the interpreter of the environment "
                            "that SGLang is installed in")
        problems += self._drafting_conflicts() + self._machine_conflicts()
        if self.sleep == "all" and (draft := self.sglang.args.get("speculative_draft_model_path")):
            problems.append(f"rollout.sleep = 'all' would lose the draft model {draft!r} "
                            "(rollout.sglang.args.speculative_draft_model_path), whose weights nobody publishes; the "
                            "nearest valid value is 'kv_cache'")
        if self.sglang.port is not None and self.sglang.port + self.engines > 65536:
            problems.append(f"rollout.sglang.port = {self.sglang.port} leaves no ports for rollout.engines = "
                            f"{self.engines}; the nearest valid value is {65536 - self.engines}")
        return problems

    def _machine_conflicts(self) -> list[str]:
        """Of `nnodes`, machines of each server, which its ranks fill in order. What is no number is named elsewhere."""
        machines, tp, pp = (self.sglang.args.get(key, 1) for key in ("nnodes", "tp_size", "pp_size"))
        if not all(type(size) is int and size > 0 for size in (tp, pp)):
            return []
        valid = [n for n in range(1, tp * pp + 1) if tp * pp % n == 0 and (n % pp == 0 or pp % n == 0)]
        if type(machines) is int and machines in valid:
            return []
        nearest = min(valid, key=lambda n: abs(n - machines)) if type(machines) is int else 1
        return [f"rollout.sglang.args.nnodes = {machines!r} machines cannot have equal parts of tp_size * pp_size = "
                f"{tp} * {pp}; valid: {', '.join(map(str, valid))}; the nearest is {nearest}"]

    def _drafting_conflicts(self) -> list[str]:
        """Arguments of SGLang's that do not go with drafts."""
        args, key = self.sglang.args, "rollout.sglang.args"
        if not self.speculation.enabled:
            if args.get("speculative_algorithm") is None or args.get("device") != "cpu":
                return []
            return [f"{key}.speculative_algorithm = {args['speculative_algorithm']!r}: on CPUs SGLang's own algorithms "
                    "take the likeliest token at any temperature; leave it out, and set rollout.speculation.enabled"]
        problems = []
        if self.speculation.paths != SpeculationConfig().paths:
            problems.append(f"rollout.speculation.paths = {self.speculation.paths} has no effect with rollout.engine = "
                            "'sglang', whose drafts are trees of the likeliest tokens of several paths: leave it out")
        problems += [f"{key}.{name} has no effect with rollout.speculation.enabled, by which drafts are made: leave it "
                    "out, or disable rollout.speculation" for name in args if name.startswith("speculative_")]
        for name, (allowed, reason) in WITH_DRAFTS.items():
            if args.get(name, allowed) != allowed:
                problems.append(f"{key}.{name} = {args[name]!r} cannot be had with rollout.speculation.enabled: "
                                f"{reason}; the only valid value is {allowed!r}")
        if args.get("page_size", 1) != 1 and args.get("attention_backend") != "flashinfer":
            problems.append(f"{key}.page_size = {args['page_size']!r} cannot be had with rollout.speculation.enabled: "
                            f"SGLang verifies trees of drafts in pages of 1, or with {key}.attention_backend = "
                            "'flashinfer'")
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
