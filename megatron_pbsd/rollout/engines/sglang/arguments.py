"""What a server is started with: the user's arguments, checked against the ServerArgs that are installed, and ours."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any

from megatron_pbsd.config import RolloutConfig, SGLangConfig
from megatron_pbsd.errors import did_you_mean
from megatron_pbsd.models.sglang import server_of
from megatron_pbsd.rollout.engines.protocol import EngineError
from megatron_pbsd.rollout.engines.sglang.processes import INSIDE

LOADERS = [f"pbsd_weights.{name}" for name in ("place", "load", "take", "receive", "finish", "read", "sums")]
DRAFTING = {"speculative_algorithm": "PBSD_GROUP", "disable_overlap_schedule": True}
"""`inside/pbsd_drafting.py`. Drafts follow the newest tokens: a pass is scheduled when the one before has ended."""
CONTEXT_MARGIN = 8
"""Tokens of context that the server keeps for itself."""
DESCRIBE_S = 300.0
OURS = {
    "model_path": "model.path", "host": "nothing: it is this machine's own", "port": "rollout.sglang.port",
    "max_running_requests": "rollout.slots", "context_length": "rollout.max_context", "skip_tokenizer_init": "nothing",
    "custom_weight_loader": "nothing", "weight_version": "nothing", "enable_metrics": "nothing",
    "load_format": "model.initial_weights", "enable_return_routed_experts": "learner.moe.routing_replay",
    "base_gpu_id": "the engines' numbers", "skip_server_warmup": "nothing",
    "node_rank": "the engine's machines", "dist_init_addr": "the engine's machines",
    "enable_memory_saver": "rollout.sleep", "schedule_low_priority_values_first": "nothing",
}
"""Argument → what it is set by."""

Described = Mapping[str, Mapping[str, Any]]
"""As `inside/describe.py` prints it."""


def server_arguments(
    config: RolloutConfig, model_path: str, *, number: int, load_weights: bool, routed_experts: bool,
    device: int | None = None
) -> dict[str, Any]:
    """All fields of ServerArgs that are not to have their defaults, those of one server left out. number: the engine's.

    device: the first of its machine's GPUs that it takes; None for engines that are all on one machine, and take as
    many each, one after the other.
    """
    given = config.sglang.args
    replicas = server_of(given).dp_attention
    arguments = given | {
        # Of which each replica has an equal part.
        "model_path": model_path, "max_running_requests": ceil(config.slots / replicas) * replicas,
        "context_length": config.max_context + CONTEXT_MARGIN, "skip_tokenizer_init": True,
        "custom_weight_loader": LOADERS, "enable_metrics": True, "skip_server_warmup": True,
        "load_format": "auto" if load_weights else "dummy", "enable_return_routed_experts": routed_experts}
    if config.speculation.enabled:
        arguments |= DRAFTING | {"speculative_num_draft_tokens": config.speculation.max_draft_tokens + 1}
    if given.get("device") != "cpu":
        first = number * ranks(config.sglang) if device is None else device
        arguments |= {"base_gpu_id": first, "enable_memory_saver": config.sleep != "none"}
    return arguments


def ranks(config: SGLangConfig) -> int:
    """Processes of a server that hold a part of the weights."""
    return server_of(config.args).size


def problems(config: SGLangConfig) -> list[str]:
    """What is wrong with `rollout.sglang`, one message each: the interpreter, or arguments by name, type and choice."""
    found = [f"rollout.sglang.args.{name} is set by {OURS[name]}: leave it out"
             for name in config.args if name in OURS]
    if config.args.get("dp_size", 1) != 1 and not config.args.get("enable_dp_attention"):
        found.append(f"rollout.sglang.args.dp_size = {config.args['dp_size']!r}: SGLang cannot be given weights with "
                     "replicas inside a server; leave it out and raise rollout.engines, or set attn_dp_size for "
                     "replicas of attention alone")
    if config.python is None:
        return found
    try:
        described = installed(config)
    except EngineError as error:
        return [*found, str(error)]
    return found + [problem for name, value in config.args.items() if name not in OURS
                    for problem in argument_problems(name, value, described)]


def argument_problems(name: str, value: Any, described: Described) -> list[str]:
    key = f"rollout.sglang.args.{name}"
    if name not in described:
        written = name.replace("-", "_").lstrip("_")
        return [f"{key} is not an argument of the SGLang that is installed" + did_you_mean(written, described)]
    kinds, choices = described[name]["type"], described[name]["choices"]
    kind = "null" if value is None else type(value).__name__
    fits = kind in kinds or (kind == "int" and "float" in kinds)
    if kinds and not fits:
        return [f"{key} = {value!r} is {kind}, expected {' or '.join(kinds)}"]
    if choices and value is not None and value not in choices and not isinstance(value, (list, dict)):
        return [f"{key} = {value!r} is not one of {', '.join(map(str, choices))}" + did_you_mean(
            str(value), map(str, choices))]
    return []


def installed(config: SGLangConfig) -> Described:
    """The ServerArgs of the environment that `config.python` is in. The first time that takes some ten seconds.

    EngineError when there is no such interpreter, or no SGLang.
    """
    python = Path(config.python or "")
    if not (python.is_file() and os.access(python, os.X_OK)):
        raise EngineError(f"rollout.sglang.python = {config.python!r} is no interpreter: expected the path of the "
                          "`python` of an environment that SGLang is installed in")
    code = "import importlib.metadata as m; d = m.distribution('sglang'); print(d.version, d.locate_file(''))"
    release = _asked(config, [str(python), "-c", code])
    cache = cache_of(f"{python.absolute()} {release}").with_suffix(".json")
    try:
        return json.loads(cache.read_text())
    except (OSError, ValueError):
        described = _asked(config, [str(python), "-W", "ignore", str(INSIDE / "describe.py")]).splitlines()[-1]
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        written = cache.with_suffix(f".{os.getpid()}")
        written.write_text(described)
        written.replace(cache)
    except OSError:
        pass  # It is asked again next time.
    return json.loads(described)


def cache_of(what: str) -> Path:
    """Where something about an environment is kept between runs."""
    key = hashlib.blake2b(what.encode(), digest_size=8).hexdigest()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_pbsd" / f"sglang-{key}"


def server_environment(config: SGLangConfig) -> dict[str, str]:
    """Variables of processes in SGLang's environment: this process's, without what leads to its own packages."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    # Its numba is another, and two versions would take turns in replacing what the other has compiled.
    compiled = {"NUMBA_CACHE_DIR": str(cache_of(str(Path(config.python or "").absolute())))}
    return compiled | inherited | config.environment


def _asked(config: SGLangConfig, command: list[str]) -> str:
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=DESCRIBE_S, env=server_environment(config))
    if result.returncode:
        last = result.stderr.strip().splitlines()[-5:]
        raise EngineError(f"rollout.sglang.python = {config.python!r}: SGLang cannot be asked for its arguments: "
                          + "\n  ".join(last))
    return result.stdout.strip()
