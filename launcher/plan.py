"""`pbsd plan`: what a configuration takes on given GPUs, and which layout it should have."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from launcher.overrides import load_config
from megatron_pbsd.config import RunConfig
from megatron_pbsd.credit import plan_of
from megatron_pbsd.errors import UsageError
from megatron_pbsd.learner.cost import Cost
from megatron_pbsd.memory_account import engine_bytes, has_value_head
from megatron_pbsd.models import family, sglang
from megatron_pbsd.models.decoder import hf_tensors
from megatron_pbsd.models.footprint import server_kv
from megatron_pbsd.models.shape import config_of
from megatron_pbsd.planning import memory, rollout_time
from megatron_pbsd.planning.activations import Kernels
from megatron_pbsd.planning.hardware import Cluster, gpu
from megatron_pbsd.planning.rollout_time import Fleet
from megatron_pbsd.planning.search import Candidate, Question, evaluate, more_gpus, remedies, search
from megatron_pbsd.planning.step_time import Work, operations
from megatron_pbsd.platform.cpu import Cpu

ON_GPUS, ON_CPUS = memory.Numerics(), memory.Numerics(parameter=4, master=0, divided=False, kernels=Kernels(4, False))
SIZES = ("tp", "pp", "vpp", "cp", "dp", "ep", "etp")
WORTH_SAYING, AS_GOOD = 0.9, 1.02
"""Other engines are advised if rollouts take at most this part of the time; the smallest change that is as good to
within this factor."""


@dataclass(frozen=True)
class Options:
    """gpus: all of them, None: what the configuration asks for. mean_tokens: that a trajectory generates, None: half
    of what it may. runners_up: how many are shown."""

    gpus: int | None = None
    gpu: str | None = None
    per_node: int | None = None
    mean_tokens: int | None = None
    runners_up: int = 3


@dataclass(frozen=True)
class Row:
    """name: what is said of this layout. publish_s: None of runners-up, whose plans of transfers are not made."""

    name: str
    candidate: Candidate
    rollout_s: float | None = None
    publish_s: float | None = None

    @property
    def step_s(self) -> float | None:
        parts = (self.candidate.seconds, self.rollout_s, self.publish_s)
        return None if not self.candidate.fits or None in parts else sum(parts)


@dataclass(frozen=True)
class Found:
    question: Question
    fleet: Fleet | None
    rows: tuple[Row, ...]
    problems: tuple[str, ...]
    advice: tuple[str, ...]
    fitting: int
    tried: int
    seconds: float


def plan(path: str | Path, overrides: Sequence[str], options: Options) -> Found:
    """UsageError when the configuration, the model or what is asked for is wrong."""
    started = time.perf_counter()
    config = load_config(path, overrides, check_model=False)
    hf = config_of(config.model)
    decoder = family(hf).decoder(hf)
    on_gpus = options.gpu != "cpu" and bool(
        options.gpu or config.cluster.gpu or config.cluster.gpus_per_node or config.rollout.engine == "sglang")
    name = options.gpu or config.cluster.gpu or ("h100-80g" if on_gpus else "cpu")
    numerics = ON_GPUS if on_gpus else ON_CPUS
    cluster = Cluster(gpu(name), 1, options.per_node or config.cluster.gpus_per_node or 8)
    server = sglang.server_of(config.rollout.sglang.args) if config.rollout.engine == "sglang" else None
    problems = [f"rollout.sglang.args: {message}" for message in (sglang.problems(decoder, server) if server else [])]
    engine = None if problems else _engine(config, hf, cluster, numerics)
    total = options.gpus or config.cluster.nodes * config.cluster.gpus_per_node or config.learner.parallel.world_size
    colocated, learners, engines = _divided(config, total, engine.gpus if engine else 1, options.gpus is not None)
    prompt, generated = rollout_time.lengths(config.rollout, options.mean_tokens)
    count = config.rollout.prompts_per_step * config.rollout.group_size
    question = Question(
        config, decoder, replace(cluster, count=learners), numerics,
        Work(count * (prompt + generated), prompt + generated, _scored(config), config.learner.updates_per_step),
        engine if on_gpus else None, colocated and on_gpus, config.rollout.max_context - 1,
        memory.bucket_bytes(decoder, config, numerics.parameter), has_value_head(config))
    fleet = engine and Fleet(engines, engine, server, numerics.parameter, colocated)
    candidates = search(question)
    fitting = [one for one in candidates if one.fits]
    rows = [Row("recommended", fitting[0])] if fitting else []
    rows += [Row(f"{place}.", one) for place, one in enumerate(fitting[1:options.runners_up + 1], 2)]
    if not fitting and candidates:
        rows.append(Row("lacks least", candidates[0]))
    problems += _engine_problems(question, engine)
    if learners == config.learner.parallel.world_size:
        configured = Row("configured", evaluate(question, _configured(config, decoder, on_gpus)))
        rows.insert(0, configured)
        problems += _lacking(question, configured)
    if not fitting:
        problems += _nothing_fits(question, candidates)
    timed = _timed(rows, question, fleet, generated)
    advice = _more_replicas(question, fleet, timed[0], generated) if timed else []
    return Found(question, fleet, tuple(timed), tuple(problems), tuple(advice), len(fitting), len(candidates),
                 time.perf_counter() - started)


def _engine(config: RunConfig, hf: dict[str, Any], cluster: Cluster, numerics: memory.Numerics) -> memory.Engine:
    rollout, decoder = config.rollout, family(hf).decoder(hf)
    if rollout.engine == "sglang":
        return memory.sglang_engine(decoder, sglang.server_of(rollout.sglang.args), rollout.sglang.args, cluster.gpu,
                                    rollout.slots, numerics.parameter)
    held, _ = engine_bytes(hf, config, Cpu())
    return memory.Engine(1, held, 0, rollout.slots * rollout.max_context)


def _divided(config: RunConfig, total: int, size: int, scaled: bool) -> tuple[bool, int, int]:
    """Whether engines share the learner's GPUs; ranks of the learner; engines. They have GPUs of their own where there
    are enough and neither gives memory away; other numbers of GPUs than the configuration's are divided as its are."""
    rollout, ranks = config.rollout, config.learner.parallel.world_size
    theirs = rollout.engines * size
    apart = not config.learner.release_memory and rollout.engine == "sglang" and (
        config.cluster.nodes * config.cluster.gpus_per_node >= ranks + theirs)
    if not scaled:
        return not apart, ranks, rollout.engines
    if apart:
        engines = max(1, round(total * theirs / (ranks + theirs) / size))
        if engines * size >= total:
            raise UsageError(f"--gpus {total} leaves the learner none beside an engine of {size} GPUs")
        return False, total - engines * size, engines
    return True, total, max(1, total // size)


def _scored(config: RunConfig) -> int:
    """Forward passes of the learner before the update."""
    if config.algorithm.name == "sft":
        return 0
    on_policy = (config.learner.recompute_log_probs == "auto" and config.learner.updates_per_step == 1
                 and config.rollout.max_staleness == 0)
    made = plan_of(config, on_policy)
    return sum(1 + (made.top > 0 and model == "teacher") for model in made.passes if model != "reference")


def _configured(config: RunConfig, decoder: Any, on_gpus: bool) -> memory.Layout:
    learner, parallel = config.learner, config.learner.parallel
    needed = on_gpus or decoder.experts is not None or decoder.latent is not None
    sequence = parallel.tp > 1 and (needed if parallel.sequence_parallel is None else parallel.sequence_parallel)
    return memory.Layout(parallel, learner.micro_batch_tokens, learner.recompute, learner.logits_tokens, sequence)


def _timed(rows: Sequence[Row], question: Question, fleet: Fleet | None, mean: int) -> list[Row]:
    """With the seconds of rollouts, which do not depend on the learner's layout, and of publications."""
    config, decoder, cluster = question.config, question.decoder, question.cluster
    if fleet is None or fleet.engine.kv_tokens < config.rollout.max_context:
        return list(rows)
    rollout_s = rollout_time.rollout_seconds(config.rollout, decoder, fleet, cluster, mean)
    bucket = config.rollout.transport.bucket_mb * memory.MIB
    return [replace(
        row, rollout_s=rollout_s,
        publish_s=rollout_time.publication_seconds(decoder, row.candidate.layout.parallel, fleet, cluster, bucket)
        if row.name in ("configured", "recommended") and row.candidate.fits else None) for row in rows]


def _engine_problems(question: Question, engine: memory.Engine | None) -> list[str]:
    if engine is None:
        return []
    room, longest = question.cluster.available, question.config.rollout.max_context
    if engine.kv_tokens >= longest:
        return []
    each = " in each replica of attention" if engine.replicas > 1 else ""
    return [f"an engine of {engine.gpus} GPUs has room for KV of {engine.kv_tokens:,.0f} tokens{each}, and "
            f"rollout.max_context is {longest:,}: its weights take {_gb(engine.held['weights'])} of {_gb(room)} GB on "
            "each; raise rollout.sglang.args.tp_size or mem_fraction_static"]


def _other_engines(question: Question, candidate: Candidate) -> list[str]:
    """Arguments of SGLang's that would make a layout fit."""
    rollout, cluster = question.config.rollout, question.cluster
    if rollout.engine != "sglang" or question.engine is None:
        return []

    def fits(**changed: Any) -> bool:
        args = rollout.sglang.args | changed
        server = sglang.server_of(args)
        if sglang.problems(question.decoder, server) or cluster.count % server.size:
            return False
        engine = memory.sglang_engine(question.decoder, server, args, cluster.gpu, rollout.slots,
                                      question.numerics.parameter)
        return engine.kv_tokens >= rollout.max_context and evaluate(
            replace(question, engine=engine), candidate.layout).fits

    server, found = sglang.server_of(rollout.sglang.args), []
    for times in (2, 4, 8):
        larger = {"tp_size": times * server.tp} | (
            {"ep_size": times * server.ep} if server.ep == server.tp > 1 else {})
        if fits(**larger):
            found.append("rollout.sglang.args " + ", ".join(f"{key}: {value}" for key, value in larger.items()))
            break
    share = memory.static_share(cluster.gpu, server, rollout.sglang.args, question.engine.graphs)
    smaller = int(100 * (share - candidate.over / cluster.gpu.memory)) / 100
    if smaller > 0 and fits(mem_fraction_static=smaller):
        found.append(f"rollout.sglang.args mem_fraction_static: {smaller:g}")
    return found


def _more_replicas(question: Question, fleet: Fleet | None, row: Row, mean: int) -> list[str]:
    """Replicas of attention that would make rollouts faster, where KV of a token is on several ranks."""
    rollout, decoder = question.config.rollout, question.decoder
    if fleet is None or fleet.server is None or row.rollout_s is None or rollout.speculation.enabled:
        return []
    seconds: dict[int, float] = {}
    for times in (2, 4, 8, 16):
        server = replace(fleet.server, dp_attention=times * fleet.server.dp_attention)
        if sglang.problems(decoder, server) or server_kv(decoder, server) > server_kv(decoder, fleet.server):
            break
        engine = memory.sglang_engine(decoder, server, rollout.sglang.args, question.cluster.gpu, rollout.slots,
                                      question.numerics.parameter)
        if engine.kv_tokens >= rollout.max_context and evaluate(
                replace(question, engine=engine), row.candidate.layout).fits:
            seconds[server.dp_attention] = rollout_time.rollout_seconds(
                rollout, decoder, replace(fleet, engine=engine, server=server), question.cluster, mean)
    enough = next((replicas for replicas, took in seconds.items() if took <= AS_GOOD * min(seconds.values())), None)
    if enough is None or seconds[enough] > WORTH_SAYING * row.rollout_s:
        return []
    return [f"rollouts would take {seconds[enough]:,.1f} s in place of {row.rollout_s:,.1f} with rollout.sglang.args "
            f"attn_dp_size: {enough}, and the {row.name} layout fit: KV of a token would be on fewer ranks"]


def _lacking(question: Question, row: Row) -> list[str]:
    if row.candidate.fits:
        return []
    phase, nbytes = max(row.candidate.excess.items(), key=lambda item: item[1])
    room = question.cluster.available
    return [f"the {row.name} layout needs {nbytes / (room + nbytes):.0%} less memory in the phase {phase!r}: "
            f"{_gb(room + nbytes)} GB of {_gb(room)} GB" + _one_of(
                remedies(question, row.candidate) + _other_engines(question, row.candidate))]


def _nothing_fits(question: Question, candidates: Sequence[Candidate]) -> list[str]:
    if not candidates:
        return [f"no layout of this model has {question.cluster.count} ranks"]
    best = candidates[0]
    changes = remedies(question, best) + _other_engines(question, best)
    if count := more_gpus(question):
        changes = [change for change in changes if " GPUs instead" not in change]
        changes.append(f"{count} GPUs instead of {question.cluster.count}")
    phase, nbytes = max(best.excess.items(), key=lambda item: item[1])
    owners = sorted(best.phases[phase].items(), key=lambda item: -item[1])[:2]
    return [f"no layout on {question.cluster.count} GPUs fits: the one that lacks least needs "
            f"{nbytes / (nbytes + question.cluster.available):.0%} less in the phase {phase!r}, where "
            + " and ".join(f"{name} takes {_gb(size)} GB" for name, size in owners) + _one_of(changes)]


def _one_of(changes: Sequence[str]) -> str:
    return f"; any of these would do: {'; '.join(changes)}" if changes else "; no single change would do"


def as_json(found: Found) -> dict[str, Any]:
    """Of the recommended layout; `configured` has the same of the configuration's own."""
    named = {row.name: row for row in found.rows}
    configured = named.get("configured")
    return {
        "seconds": round(found.seconds, 3), "problems": list(found.problems), "advice": list(found.advice),
        "gpus": found.question.cluster.count, "gpu_gb": found.question.cluster.gpu.memory / 1e9,
        "room_gb": found.question.cluster.available / 1e9, "colocated": found.question.colocated,
        "tried": found.tried, "fitting": found.fitting,
        **(_row(found, named["recommended"]) if "recommended" in named else {
            "layout": None, "memory_gb_by_phase": None, "step_s": None}),
        "configured": configured and _row(found, configured),
        "runners_up": [_row(found, row) for row in found.rows if row.name[0].isdigit()]}


def _row(found: Found, row: Row) -> dict[str, Any]:
    candidate = row.candidate
    return {
        "layout": _sizes(candidate), "fits": candidate.fits,
        "memory_gb_by_phase": {phase: sum(owners.values()) / 1e9 for phase, owners in candidate.phases.items()},
        "memory_gb_by_owner": {phase: {name: nbytes / 1e9 for name, nbytes in owners.items()}
                               for phase, owners in candidate.phases.items()},
        "step_s": row.step_s,
        "step_s_by_part": {f"learner {name}": seconds for name, seconds in candidate.learner_s.items()} | {
            "rollout": row.rollout_s, "publish": row.publish_s},
        "micro_batches": candidate.micro_batches, "mfu": _mfu(found, candidate)}


def _sizes(candidate: Candidate) -> dict[str, Any]:
    layout = candidate.layout
    return {"world_size": layout.parallel.world_size} | {name: getattr(layout.parallel, name) for name in SIZES} | {
        "micro_batch_tokens": layout.micro_batch_tokens, "recompute": layout.recompute}


def _mfu(found: Found, candidate: Candidate) -> float | None:
    """Share of the GPUs' peak in the learner's part of a step; forward passes before the update count."""
    if not candidate.fits:
        return None
    question = found.question
    done = operations(question.decoder, question.work) * (1 + question.work.scored / 3)
    return done / candidate.seconds / question.cluster.count / question.cluster.gpu.flops


def print_plan(found: Found) -> None:
    """Problems first, then one table."""
    question, cluster = found.question, found.question.cluster
    for problem in found.problems:
        print(f"problem: {problem}")
    numbers = sum(map(prod, hf_tensors(question.decoder).values()))
    print(f"{numbers / 1e9:,.1f} · 10⁹ parameters, {Cost.of(question.decoder).linear / 6e9:,.1f} · 10⁹ for each token; "
          f"{cluster.count} GPUs of the learner with room for {_gb(cluster.available)} GB each"
          + (", which engines share" if question.colocated else "") + f"; {question.work.tokens:,} tokens a step")
    phases = ("train", "publish", "rollout", "save")
    table = [("", *SIZES, "tokens", "recompute", *(f"{phase} GB" for phase in phases), "learner s", "MFU", "rollout s",
              "publish s", "step s")]
    for row in found.rows:
        one = row.candidate
        table.append((
            row.name, *(str(getattr(one.layout.parallel, size)) for size in SIZES),
            str(one.layout.micro_batch_tokens), one.layout.recompute,
            *(_gb(sum(one.phases[phase].values())) + ("!" if phase in one.excess else "") for phase in phases),
            f"{one.seconds:,.1f}" if one.fits else "–", f"{_mfu(found, one):.0%}" if one.fits else "–",
            *("–" if value is None else f"{value:,.1f}" for value in (row.rollout_s, row.publish_s, row.step_s))))
    widths = [max(len(cells[column]) for cells in table) for column in range(len(table[0]))]
    for first, *others in table:
        print("  ".join((first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:])))))
    print(_why(found))
    for advice in found.advice:
        print(f"advice: {advice}")


def _why(found: Found) -> str:
    tried = f"{found.fitting} of {found.tried} layouts fit, looked at in {found.seconds:.1f} s"
    best = next((row.candidate for row in found.rows if row.name == "recommended"), None)
    if best is None:
        return tried
    parts = sorted(best.learner_s.items(), key=lambda item: -item[1])[:4]
    phase, owners = max(best.phases.items(), key=lambda item: sum(item[1].values()))
    largest = sorted(owners.items(), key=lambda item: -item[1])[:3]
    return (f"{tried}; the recommended one has the fastest learner: "
            + ", ".join(f"{name} {seconds / best.seconds:.0%}" for name, seconds in parts)
            + f". Its memory is fullest in the phase {phase!r}: "
            + ", ".join(f"{name} {_gb(nbytes)} GB" for name, nbytes in largest))


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:,.1f}"
