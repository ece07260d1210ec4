"""`pbsd reshard-plan`: which bytes a publication of weights moves, and how long that takes on given links."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

from launcher.explain import validated
from launcher.overrides import load_config
from launcher.sources import ConfigError, Problem, Settings, apply_overrides
from megatron_pbsd.config import RunConfig
from megatron_pbsd.config.section import Positive, PositiveInt, Section
from megatron_pbsd.models import family, sglang
from megatron_pbsd.models.decoder import Decoder, hf_tensors
from megatron_pbsd.models.errors import ModelError
from megatron_pbsd.models.sglang import ServerParallel
from megatron_pbsd.models.shape import config_of
from megatron_pbsd.resharding.layouts import Layout, embedded_layout, learner_layout, server_layout
from megatron_pbsd.resharding.plan import Link, Plan, make_plan
from megatron_pbsd.resharding.wire import FLOAT8, cut_blocks

SIZES = ("tp", "ep", "pp", "dp_attention")
"""Of a server's layout."""


class TargetConfig(Section):
    """The engines. What is null is as configured."""

    engine: Literal["embedded", "sglang"] | None = None
    """rollout.engine; `embedded` engines have every tensor whole."""
    engines: PositiveInt | None = None
    """How many; null: rollout.engines, and of SGLang servers on the learner's GPUs as many as there is room for."""
    tp: PositiveInt | None = None
    """SGLang's --tp-size; rollout.sglang.args.tp_size."""
    ep: PositiveInt | None = None
    """SGLang's --ep-size; rollout.sglang.args.ep_size."""
    pp: PositiveInt | None = None
    """SGLang's --pp-size; rollout.sglang.args.pp_size."""
    dp_attention: PositiveInt | None = None
    """SGLang's --attn-dp-size; rollout.sglang.args.attn_dp_size."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float8_e4m3fn"] = "auto"
    """Of weights in the engines; `auto` is the learner's, float8_e4m3fn has a scale for each block of 128 x 128."""
    colocated: bool = True
    """On the learner's GPUs, rank for rank, or on others, which follow these."""


class LinksConfig(Section):
    """Defaults are of a node of eight H100s with a 400 Gbit/s adapter for each; speeds in 10^9 bytes/s and GPU, in one
    direction."""

    devices_per_node: PositiveInt = 8
    """GPUs that NVLink connects."""
    device_gb_s: Positive = 1675.0
    """Copying within a GPU: half of HBM3's 3350 GB/s, since it reads and writes."""
    node_gb_s: Positive = 450.0
    """NVLink 4."""
    network_gb_s: Positive = 50.0
    """One adapter for each GPU."""
    bucket_mb: PositiveInt = 512
    """Size of a bucket (MiB), of which sender and receiver have two each."""


class PlanOptions(Section):
    target: TargetConfig = TargetConfig()
    links: LinksConfig = LinksConfig()


@dataclass(frozen=True)
class Asked:
    """What is to be planned."""

    config: RunConfig
    decoder: Decoder
    target: TargetConfig
    links: LinksConfig
    source_layout: Layout
    target_layout: Layout

    @property
    def source_dtype(self) -> str:
        precision = self.config.learner.precision
        return precision if precision != "auto" else "float32" if self.target.engine == "embedded" else "bfloat16"

    @property
    def target_dtype(self) -> str:
        return self.source_dtype if self.target.dtype == "auto" else self.target.dtype


def load(path: str | Path, overrides: Sequence[str] = ()) -> Asked:
    """ConfigError lists all problems: of the file, of overrides, of the model and of both layouts."""
    own, others = _divided(overrides)
    settings = Settings()
    apply_overrides(settings, own)
    options, problems = validated(PlanOptions, settings)
    config: RunConfig | None = None
    try:
        config = load_config(path, others, check_model=False)
    except ConfigError as error:
        problems += error.problems
    if config is None or options is None:
        raise ConfigError(path, problems)
    asked = _completed(options.target, config)
    decoder, source, target = None, None, None
    try:
        hf = config_of(config.model)
        found = family(hf)
        decoder = found.decoder(hf)
        messages = found.layout_problems(hf, config.learner.parallel)
        if not messages:
            source = learner_layout(decoder, config.learner.parallel)
        target, more = _target(decoder, config, asked)
        messages += more
    except ModelError as error:
        messages = [f"model.path = {config.model.path}: {error}"]
    problems += [Problem("", message, "", "") for message in messages]
    if problems or decoder is None or source is None or target is None:
        raise ConfigError(path, problems)
    return Asked(config, decoder, asked, options.links, source, target)


def _completed(target: TargetConfig, config: RunConfig) -> TargetConfig:
    engine = target.engine or config.rollout.engine
    configured = sglang.server_of(config.rollout.sglang.args if engine == "sglang" else {})
    return target.model_copy(update={
        "engine": engine, **{key: getattr(target, key) or getattr(configured, key) for key in SIZES}})


def _target(decoder: Decoder, config: RunConfig, target: TargetConfig) -> tuple[Layout | None, list[str]]:
    ranks = config.learner.parallel.world_size
    offset = 0 if target.colocated else ranks
    if target.engine == "embedded":
        divided = [f"target.{key} = {getattr(target, key)}: embedded engines have every tensor whole; set it to 1, or "
                   "target.engine to sglang" for key in SIZES if getattr(target, key) > 1]
        if target.dtype == FLOAT8:
            divided.append(f"target.dtype = {FLOAT8}: embedded engines have no weights in 8 bits; set target.engine to "
                           "sglang")
        return None if divided else embedded_layout(decoder, target.engines or config.rollout.engines, offset), divided
    server = ServerParallel(target.tp, target.ep, target.pp, target.dp_attention)
    problems = [f"target.{message}" for message in sglang.problems(decoder, server)]
    servers = target.engines or (ranks // server.size if target.colocated else config.rollout.engines)
    if target.colocated and servers * server.size != ranks:
        valid = [n for n in range(1, ranks + 1) if ranks % n == 0]
        problems.append(
            f"target.engines * tp * pp = {servers} * {target.tp} * {target.pp} = {servers * server.size} is not "
            f"learner.parallel.world_size = {ranks}; tp * pp may be one of {valid}, or set target.colocated to false")
    if problems:
        return None, problems
    layout = server_layout(decoder, server, servers, offset)
    if target.dtype == FLOAT8:
        problems = [f"target.dtype = {FLOAT8}: {message}" for message in cut_blocks(layout)]
    return layout, problems


def _divided(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides of `PlanOptions`, and those of the configuration."""
    own: list[str] = []
    others: list[str] = []
    current = others
    for token in overrides:
        if token.startswith("--"):
            current = own if token[2:].partition("=")[0].partition(".")[0] in PlanOptions.model_fields else others
        current.append(token)
    return own, others


def summary(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Bytes and seconds by link, buckets, and what is done to tensors on the way."""
    asked = load(path, overrides)
    started = time.perf_counter()
    plan = make_plan(
        asked.source_layout, asked.target_layout, source_dtype=asked.source_dtype, target_dtype=asked.target_dtype,
        devices_per_node=asked.links.devices_per_node, bucket_bytes=asked.links.bucket_mb << 20)
    seconds = time.perf_counter() - started
    speeds = {Link.DEVICE: asked.links.device_gb_s, Link.NODE: asked.links.node_gb_s,
              Link.NETWORK: asked.links.network_gb_s}
    links = {link.name.lower(): _link(plan, link, speed) for link, speed in speeds.items()}
    buckets = [plan.bucket_count(rank) for rank in range(asked.target_layout.ranks)]
    return {
        "parameters": sum(map(prod, hf_tensors(asked.decoder).values())),
        "source_ranks": asked.source_layout.ranks, "target_ranks": asked.target_layout.ranks,
        "source_dtype": asked.source_dtype, "target_dtype": asked.target_dtype,
        "transfers": plan.transfer_count, "plan_s": round(seconds, 3), "moved_bytes": plan.moved,
        "links": links, "predicted_s": max(found["seconds"] for found in links.values()),
        "bucket_bytes": plan.bucket_bytes, "buckets": _spread(buckets), "transforms": _transforms(plan),
    }


def _link(plan: Plan, link: Link, speed: float) -> dict[str, Any]:
    """seconds: of the rank that sends or receives most."""
    sent, received = plan.sent(link), plan.received(link)
    return {"bytes": int(sent.sum()), "sent": _spread(sent), "received": _spread(received), "gb_s": speed,
            "seconds": float(max(sent.max(), received.max())) / (speed * 1e9)}


def _spread(numbers: Any) -> dict[str, float]:
    values = [int(n) for n in numbers]
    return {"min": min(values), "mean": sum(values) / len(values), "max": max(values)}


def _transforms(plan: Plan) -> dict[str, int]:
    """Bytes that are sent with each transform."""
    found: dict[str, int] = {}
    for cell, nbytes in zip(plan.cell.tolist(), plan.nbytes.tolist(), strict=True):
        wire = plan.cells[cell].wire
        name = f"{wire.transform}, sent as {wire.dtype}"
        found[name] = found.get(name, 0) + nbytes
    return found


def print_summary(found: dict[str, Any]) -> None:
    print(f"{found['parameters'] / 1e9:,.3f} · 10⁹ parameters, {found['source_ranks']} ranks ({found['source_dtype']}) "
          f"→ {found['target_ranks']} ranks ({found['target_dtype']}): {found['transfers']:,} transfers, planned in "
          f"{found['plan_s']:.2f} s")
    rows = [("link", "GB", "sent per rank: min", "mean", "max", "received: min", "mean", "max", "GB/s", "seconds")]
    for name, link in found["links"].items():
        spreads = [f"{link[side][key] / 1e9:,.3f}" for side in ("sent", "received") for key in ("min", "mean", "max")]
        rows.append((name, f"{link['bytes'] / 1e9:,.3f}", *spreads, f"{link['gb_s']:g}", f"{link['seconds']:.4f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for first, *others in rows:
        print("  ".join((first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(others, widths[1:])))))
    print(f"leaves its GPU: {found['moved_bytes'] / 1e9:,.3f} GB; predicted: {found['predicted_s']:.3f} s, that of the "
          "busiest link")
    buckets = found["buckets"]
    print(f"buckets per receiving rank: {buckets['min']} … {buckets['max']} of {found['bucket_bytes'] >> 20} MiB")
    for name, nbytes in found["transforms"].items():
        print(f"{name}: {nbytes / 1e9:,.3f} GB")
