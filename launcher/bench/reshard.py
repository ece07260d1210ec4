"""Resharding: planning, and a publication through shared memory in buckets, between processes.

plan_1t_s            seconds to plan Kimi-K2 (1.03 · 10¹² parameters) from 256 GPUs to as many, the slowest of
                     `TRILLION`; plan_1t_processor_s of processor time, which other work on the machine prolongs less
bytes_over_min       bytes that leave their GPU over the fewest that must (resharding/minimum.py), the largest of
                     `PAIRS`
memcpy_ratio         bytes published per second over those that one thread's memcpy copies on this machine, the fastest
                     of `ROUNDS` each, in turns; memcpy_ratios has the rounds one by one
memcpy_ratio_processor  the same by processor time of the side that has more to do: the ratio where every process has a
                     core to itself, whatever else the machine is doing
extra_buckets        peak memory of all processes together beyond both models, in sizes of a bucket
max_abs_logprob_diff nats, on random tokens after a publication as in `pbsd train`, from a Megatron learner of two ranks
                     to two embedded engines; the larger of a dense model and a mixture of experts
coordinator_…        see `coordinator`: null without SGLang

The model that is published is a synthetic mixture of experts in float32 on two learner ranks (tp 2, ep 2), and one
engine that wants every tensor whole. What arrives is compared bit for bit.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from launcher.bench import coordinator
from launcher.overrides import load_config
from launcher.published_layouts import GPUS, KIMI_K2, PAIRS, SYNTHETIC, TINY_EXPERTS, TRILLION
from launcher.publishing import Publication
from megatron_pbsd.components import build_transport, start_engines, start_learner
from megatron_pbsd.controller.runtime import open_runtime
from megatron_pbsd.errors import UsageError
from megatron_pbsd.models import family
from megatron_pbsd.resharding.layouts import learner_layout, server_layout
from megatron_pbsd.resharding.minimum import learner_maps, minimum, server_maps
from megatron_pbsd.resharding.plan import make_plan
from megatron_pbsd.resharding.publication import Publisher
from megatron_pbsd.resharding.wire import stored_dtype, wire

ROOT = Path(__file__).parents[2]
QUICKSTART, BASE = Path("configs/quickstart.yaml"), Path("assets/search_qa_base")
ROUNDS = 7
BUCKET_BYTES = 8 << 20


def run(overrides: Sequence[str] = ()) -> dict[str, Any]:
    if overrides:
        raise UsageError(f"the bench 'reshard' reads no configuration, so {overrides[0]} means nothing to it")
    return {**planning(), **bytes_moved(), **publication(SYNTHETIC, BUCKET_BYTES, ROUNDS), **agreement(),
            **coordinator.run()}


def planning() -> dict[str, Any]:
    """Layouts included, bfloat16 to 8 bits."""
    decoder = family(KIMI_K2).decoder(KIMI_K2)
    seconds, working = {}, {}
    for name, (parallel, server) in TRILLION.items():
        started, worked = time.perf_counter(), time.process_time()
        make_plan(learner_layout(decoder, parallel), server_layout(decoder, server, GPUS // server.size),
                  source_dtype="bfloat16", target_dtype="float8_e4m3fn", devices_per_node=8, bucket_bytes=512 << 20)
        seconds[name] = round(time.perf_counter() - started, 2)
        working[name] = round(time.process_time() - worked, 2)
    return {"plan_1t_s": max(seconds.values()), "plan_1t_processor_s": max(working.values()),
            "plan_1t_s_by_layout": seconds}


def bytes_moved() -> dict[str, Any]:
    """bfloat16 on both sides."""
    ratios = {}
    for name, pair in PAIRS.items():
        decoder = family(pair.config).decoder(pair.config)
        offset = 0 if pair.colocated else pair.parallel.world_size
        plan = make_plan(
            learner_layout(decoder, pair.parallel), server_layout(decoder, pair.server, pair.servers, offset),
            source_dtype="bfloat16", target_dtype="bfloat16", devices_per_node=8, bucket_bytes=64 << 20)

        def nbytes(tensor, box):
            dtype = stored_dtype(tensor, tuple(s.stop - s.start for s in box), "bfloat16")
            return wire(dtype, dtype, False).nbytes(box)

        fewest = minimum(learner_maps(decoder, pair.parallel),
                         server_maps(decoder, pair.server, pair.servers, offset), nbytes)
        ratios[name] = plan.moved / fewest if fewest else float(plan.moved == 0)
    return {"bytes_over_min": max(ratios.values()), "bytes_over_min_by_pair": ratios}


def publication(config: dict[str, Any], bucket_bytes: int, rounds: int) -> dict[str, Any]:
    """RuntimeError when another byte arrives than was sent."""
    with Publication(config, bucket_bytes) as publishing:
        publishing.publish()
        copied, published = [], []
        for _ in range(rounds):
            copied.append(publishing.memcpy())
            published.append(publishing.publish())
        extra = publishing.extra_bytes()
        publishing.check()
        seconds, copy_s = (min(took.seconds for took in each) for each in (published, copied))
        working_s, copy_working_s = (min(took.processor_s for took in each) for each in (published, copied))
        return {
            "memcpy_ratio": round(copy_s / seconds, 3),
            "memcpy_ratio_processor": round(copy_working_s / working_s, 3),
            "extra_buckets": round(extra / publishing.bucket_bytes, 3),
            "published_gb": round(publishing.nbytes / 1e9, 3), "buckets": publishing.count,
            "bucket_mb": round(publishing.bucket_bytes / 2**20, 2),
            "publication_s": round(seconds, 3), "memcpy_gb_s": round(publishing.nbytes / copy_s / 1e9, 2),
            "memcpy_ratios": [
                round(copy.seconds / publish.seconds, 3) for copy, publish in zip(copied, published, strict=True)],
        }


def agreement() -> dict[str, float]:
    """Log-probs of engines and learner, both with random weights, from one seed."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        models = {"dense": (str(ROOT / BASE), ["--learner.parallel.tp", "2"]),
                  "moe": (_tiny_experts(Path(folder)), ["--learner.parallel.tp", "1", "--learner.parallel.ep", "2"])}
        for name, (path, layout) in models.items():
            config = load_config(ROOT / QUICKSTART, [
                "--model.path", path, "--model.initial_weights", "random", *layout])
            with ExitStack() as stack:
                runtime = stack.enter_context(open_runtime(config.runtime, Path(folder) / name))
                learner, engines = start_learner(runtime, config), start_engines(runtime, config, Path(folder))
                learner.ready()
                engines.ready()
                publisher = Publisher(
                    build_transport(config, learner, engines), learner, engines, _probe(), tolerance=1.0)
                stack.callback(publisher.close)
                found[name] = publisher.publish(0)["weights/probe_max_abs"]
    return {"max_abs_logprob_diff": max(found.values()), "max_abs_logprob_diff_by_model": found}


def _probe(sequences: int = 8, tokens: int = 64) -> list[list[int]]:
    return np.random.default_rng(0).integers(TINY_EXPERTS["vocab_size"], size=(sequences, tokens)).tolist()


def _tiny_experts(folder: Path) -> str:
    """A folder with a configuration and the tokenizer of the base policy."""
    (folder / "config.json").write_text(json.dumps(TINY_EXPERTS))
    shutil.copy(ROOT / BASE / "tokenizer.json", folder)
    return str(folder)
