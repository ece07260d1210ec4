"""Conversion between Hugging Face folders and Megatron's checkpoints, beside `cp` of the same bytes on the same disk.

Two models: `small`, SmolLM2-135M from a package, and `moe`, a mixture of experts of more than 4 GB with random bits for
weights; both bfloat16. Everything is synced to disk, cp's copies too, and read from the page cache. A page that a
virtual machine has not used for a while comes from its host, which was measured to be six times slower than using one
again: before each measurement what it will read is read, and as much as it will write is written, and removed when it
begins.

The seconds of a conversion are those of `convert` with the start of its processes and the check of every tensor that
it wrote; importing torch before, `startup_s`, is not in them. A ratio is that of a conversion to the mean of the copies
just before and just after it, and the median of several: what else the machine does concerns both.

import_over_cp, export_over_cp, reshard_over_cp   bytes per second over those of cp, of the model where it is less
peak_gb          proportional set size of all processes together, pages of mapped files and libraries included,
                 where it is most; allowed_gb is 1 GB and the largest tensor for each process
MODEL_…          the same for each model; …_with_startup counts the seconds of the whole command
cp_gb_per_s      of MODEL; cp_unsynced_gb_per_s without the sync
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from launcher.processes import PeakMemory
from launcher.smollm2 import make_smollm2
from megatron_pbsd.errors import UsageError

MOE = {
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "initializer_range": 0.02, "max_position_embeddings": 8192,
    "rope_theta": 1e5, "dtype": "bfloat16", "vocab_size": 49152,
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048,
    "intermediate_size": 6144, "num_hidden_layers": 12, "num_attention_heads": 16, "num_key_value_heads": 4,
    "head_dim": 128, "tie_word_embeddings": False, "num_experts": 32, "num_experts_per_tok": 4,
    "moe_intermediate_size": 768, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
SAMPLE_S = 0.05


@dataclass(frozen=True)
class Cost:
    """seconds of the conversion, and of the process that ran it from its start on."""

    seconds: float
    whole_seconds: float
    peak_bytes: int
    processes: int


def run(overrides: Sequence[str] = ()) -> dict[str, Any]:
    if overrides:
        raise UsageError(f"the bench 'convert' reads no configuration, so {overrides[0]} means nothing to it")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="bench_convert_") as folder:
        for name, (write, rounds) in MODELS.items():
            results |= {f"{name}_{key}": value for key, value in of_model(write, Path(folder), rounds).items()}
    least = {f"{kind}_over_cp": min(results[f"{name}_{kind}_over_cp"] for name in MODELS) for kind in KINDS}
    return least | {"peak_gb": max(results[f"{name}_peak_gb"] for name in MODELS), "cores": os.cpu_count()} | results


def of_model(write: Callable[[Path], Any], folder: Path, rounds: int) -> dict[str, Any]:
    """Figures of the model that `write` makes, in a folder that is left empty."""
    write(folder / "hf")
    largest = largest_tensor(folder / "hf")
    nbytes = sum(path.stat().st_size for path in (folder / "hf").glob("*.safetensors"))
    costs: dict[str, list[Cost]] = {kind: [] for kind in KINDS}
    copies: list[tuple[float, float]] = []
    ratios: dict[str, list[float]] = {kind: [] for kind in KINDS}
    wholes: dict[str, list[float]] = {kind: [] for kind in KINDS}
    same, before = True, copied(folder)
    copies.append(before)
    for _ in range(rounds):
        for kind, (make, source, target) in KINDS.items():
            cost = converted(make, folder / source, folder / target)
            same &= kind != "export" or same_weights(folder / "hf", folder / target)
            if kind != "import":
                shutil.rmtree(folder / target)
            after = copied(folder)
            copies.append(after)
            costs[kind].append(cost)
            ratios[kind].append((before[1] + after[1]) / 2 / cost.seconds)
            wholes[kind].append((before[1] + after[1]) / 2 / cost.whole_seconds)
            before = after
        shutil.rmtree(folder / "megatron")
    shutil.rmtree(folder / "hf")
    every = [cost for found in costs.values() for cost in found]
    processes = max(cost.processes for cost in every)
    figures: dict[str, Any] = {"gb": round(nbytes / 1e9, 3)}
    for kind in KINDS:
        figures[f"{kind}_over_cp"] = round(median(ratios[kind]), 3)
        figures[f"{kind}_over_cp_with_startup"] = round(median(wholes[kind]), 3)
        figures[f"{kind}_s"] = round(median(cost.seconds for cost in costs[kind]), 2)
    return figures | {
        "startup_s": round(median(cost.whole_seconds - cost.seconds for cost in every), 2),
        "peak_gb": round(max(cost.peak_bytes for cost in every) / 1e9, 3),
        "allowed_gb": round(1 + processes * largest / 1e9, 3), "processes": processes,
        "round_trip_identical": same,
        "cp_gb_per_s": round(nbytes / median(copy[1] for copy in copies) / 1e9, 3),
        "cp_unsynced_gb_per_s": round(nbytes / median(copy[0] for copy in copies) / 1e9, 3)}


def same_weights(a: Path, b: Path) -> bool:
    """Bit by bit; who wrote a file may have put its tensors in another order."""
    from megatron_pbsd.checkpointing.conversion.compare import differences

    return not differences(a, b)[0]


def largest_tensor(folder: Path) -> int:
    """Bytes."""
    from megatron_pbsd.checkpointing.hf_folder import HfFolder

    return max(tensor.nbytes for tensor in HfFolder(folder).tensors.values())


def write_mixture(folder: Path, config: dict[str, Any] = MOE) -> None:
    """A Hugging Face folder in files of 4 GB at most."""
    import json

    import torch

    from megatron_pbsd.checkpointing.conversion.plan import balanced
    from megatron_pbsd.checkpointing.hf_folder import HfFile, shard_names, write_index
    from megatron_pbsd.models import family

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = family(config).hf_tensors(config)
    sizes = {name: 2 * torch.Size(shape).numel() for name, shape in shapes.items()}
    bits = torch.randint(0, 256, (max(sizes.values()) + 8192,), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(0))
    groups = balanced(list(shapes), list(sizes.values()), 4 << 30)
    plan = dict(zip(shard_names(len(groups)), groups, strict=True))
    for number, (file, names) in enumerate(plan.items()):
        written = HfFile(folder / file, {name: (torch.bfloat16, shapes[name]) for name in names})
        for i, name in enumerate(names):
            start = (i * 37 + number) % 4096
            written.write(bits[start : start + sizes[name]])
        written.close()
    write_index(folder, plan, sum(sizes.values()), {})


MODELS: dict[str, tuple[Callable[[Path], Any], int]] = {"small": (make_smollm2, 5), "moe": (write_mixture, 3)}
"""What writes it, and how often everything is measured."""


def spare(folder: Path, source: str) -> Path:
    """Files whose pages a measurement is to use again; what it will read is in the page cache."""
    for path in (path for path in (folder / source).rglob("*") if path.is_file()):
        with path.open("rb") as opened:
            while opened.read(16 << 20):
                pass
    subprocess.run(["cp", "-r", folder / "hf", folder / "spare"], check=True)
    os.sync()
    return folder / "spare"


def copied(folder: Path) -> tuple[float, float]:
    """Seconds of `cp` of the Hugging Face folder, without and with a sync of the copy."""
    shutil.rmtree(spare(folder, "hf"))
    started = time.perf_counter()
    subprocess.run(["cp", "-r", folder / "hf", folder / "copy"], check=True)
    unsynced = time.perf_counter() - started
    subprocess.run(["sync", *(folder / "copy").iterdir()], check=True)
    synced = time.perf_counter() - started
    shutil.rmtree(folder / "copy")
    return unsynced, synced


def importing(source: Path) -> Any:
    from megatron_pbsd.checkpointing.conversion.to_megatron import ToMegatron

    return ToMegatron(source)


def exporting(source: Path) -> Any:
    from megatron_pbsd.checkpointing.conversion.to_hf import ToHf

    return ToHf(source)


def resharding(source: Path) -> Any:
    """For four ranks: two pipeline stages, of two ranks each that divide the tensors or the experts."""
    from megatron_pbsd.checkpointing.conversion.locate import locate, model_config
    from megatron_pbsd.checkpointing.conversion.reshard import Reshard
    from megatron_pbsd.config import ParallelConfig

    experts = "num_experts" in model_config(locate(source), None)[0]
    return Reshard(source, ParallelConfig(world_size=4, pp=2, **({"tp": 2, "ep": 2} if experts else {"tp": 1})))


KINDS: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "import": (importing, "hf", "megatron"), "export": (exporting, "megatron", "back"),
    "reshard": (resharding, "megatron", "resharded")}
"""What is converted: how, from which folder, to which."""


def converted(make: Callable[[Path], Any], source: Path, target: Path) -> Cost:
    used = spare(source.parent, source.name)
    started = time.perf_counter()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        future = pool.submit(_convert, make, source, target, used)
        pid = next(iter(pool._processes))
        memory = PeakMemory(lambda: pid, SAMPLE_S)
        memory.start()
        try:
            seconds, processes = future.result()
        finally:
            peak = memory.stop()
        whole = time.perf_counter() - started
    return Cost(seconds, whole, peak, processes)


def _convert(make: Callable[[Path], Any], source: Path, target: Path, used: Path) -> tuple[float, int]:
    from megatron_pbsd.checkpointing.conversion.driver import convert

    conversion = make(source)
    shutil.rmtree(used)
    started = time.perf_counter()
    done = convert(conversion, target)
    return time.perf_counter() - started, done.processes
