"""What coordinator, dispatcher and engine add to an SGLang server: the same requests through them and straight to it.

64 requests at a time, in groups of 8, prompts of 64 tokens, 96 greedy tokens each, to one server of a small Qwen3; in
turns, `ROUNDS` of each, all on this machine. `Coordinator.collect` is what `pbsd train` calls, and the engine has a
process of its own as there. Straight to the server: a thread for each request that sends the same body and decodes the
reply, and nothing else.

coordinator_overhead            (through us - straight) / straight, in seconds until all 64 are there; the median of the
                                rounds, which coordinator_overhead_rounds has one by one
coordinator_overhead_fastest    the same of the fastest of each
coordinator_overhead_processor  processor time of our processes, less the client's, over the same seconds: what is left
                                of it when other work on the machine makes both wait
coordinator_ms_per_request      the first, of one request
coordinator_generation_s        straight to the server, the median

Needs SGLang: SGLANG_PYTHON names the interpreter of its environment, else .venv-sglang is looked for. Without,
coordinator_overhead is null, and coordinator_overhead_reason says why.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_pbsd.components import start_sglang
from megatron_pbsd.config import RolloutConfig
from megatron_pbsd.controller.runtime import open_runtime
from megatron_pbsd.environments.protocol import Reply, Task
from megatron_pbsd.errors import UsageError
from megatron_pbsd.ports import is_free
from megatron_pbsd.rollout.coordinator import Coordinator, RolloutRequest
from megatron_pbsd.rollout.engines.host import EngineHost
from megatron_pbsd.rollout.engines.protocol import Chunk
from megatron_pbsd.rollout.engines.sglang.replies import generate_body
from megatron_pbsd.trajectory import Turn

ROOT = Path(__file__).parents[2]
BATCH, GROUP, PROMPT, TOKENS, ROUNDS = 64, 8, 64, 96, 7
VOCABULARY = 2048
ON_CPU: dict[str, Any] = {
    "args": {"device": "cpu", "attention_backend": "torch_native", "sampling_backend": "pytorch",
             "disable_cuda_graph": True, "dtype": "float32", "max_total_tokens": 2 * BATCH * (PROMPT + TOKENS)},
    "environment": {"PYTHONPATH": str(ROOT / "tests/sglang_server/stand_ins"), "SGLANG_USE_CPU_ENGINE": "1",
                    "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
                    "TORCH_COMPILE_DISABLE": "1"}}


class OneTurn:
    """An environment in which whatever is said first is the answer."""

    stop_token_ids: tuple[int, ...] = ()

    def prompt(self, task: Task) -> tuple[int, ...]:
        generator = torch.Generator().manual_seed(int(task.task_id))
        return tuple(torch.randint(VOCABULARY, (PROMPT,), generator=generator).tolist())

    def privileged_prompt(self, task: Task, answer: str) -> tuple[int, ...]:
        return self.prompt(task)

    def reply(self, task: Task, turns: Sequence[Turn], tokens: Sequence[int]) -> Reply:
        return Reply("answer", (), True)


class MeasuredHost(EngineHost):
    def processor_s(self) -> float:
        """Of this process, which the server is not a part of."""
        return time.process_time()


def run(overrides: Sequence[str] = ()) -> dict[str, Any]:
    if overrides:
        raise UsageError(f"the bench 'coordinator' reads no configuration, so {overrides[0]} means nothing to it")
    python = Path(os.environ.get("SGLANG_PYTHON", ROOT / ".venv-sglang/bin/python"))
    if not python.is_file():
        return {"coordinator_overhead": None, "coordinator_overhead_reason":
                f"there is no SGLang: {python} does not exist (SGLANG_PYTHON names another interpreter)"}
    return measure(str(python), ROUNDS)


def measure(python: str, rounds: int) -> dict[str, Any]:
    """RuntimeError when the two do not get the same tokens."""
    port = next(port for port in range(30_000, 40_000) if is_free(port))
    config = rollout_config(python, port)
    with tempfile.TemporaryDirectory() as folder, open_runtime("ray", Path(folder) / "logs") as runtime:
        save_model(folder)
        engine = runtime.spawn("engine-0", MeasuredHost, start_sglang, name="engine-0", model_path=folder,
                               config=config, logs=folder, load_weights=True, routed_experts=False)
        runtime.result(engine.ready())
        coordinator = Coordinator([engine], OneTurn(), config, runtime.client)

        def working() -> float:
            return time.process_time() + runtime.result(engine.call("processor_s"))

        ours, straight = [], []
        for step in range(rounds + 1):  # the first warms up
            flush(port)
            began, worked = time.perf_counter(), working()
            groups = coordinator.collect(requests(), step=step, seed=0, temperature=0.0)
            ours.append((time.perf_counter() - began, working() - worked))
            flush(port)
            began, worked = time.perf_counter(), time.process_time()
            replies = generate(port, bodies(step))
            straight.append((time.perf_counter() - began, time.process_time() - worked))
            if [t.turns[0].tokens for group in groups for t in group.trajectories] != [
                    tuple(reply["output_ids"]) for reply in replies]:
                raise RuntimeError("the server's tokens are others when it is asked directly")
        return summary(ours[1:], straight[1:])


def rollout_config(python: str, port: int) -> RolloutConfig:
    section = {} if torch.cuda.is_available() else ON_CPU
    return RolloutConfig(engine="sglang", slots=BATCH, max_turns=1, max_turn_tokens=TOKENS,
                         max_context=PROMPT + TOKENS, sglang={"python": python, "port": port, **section})


def save_model(folder: str) -> None:
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=32, tie_word_embeddings=True)).save_pretrained(folder)


def requests() -> list[RolloutRequest]:
    return [RolloutRequest(str(group), Task(str(group), "", ("",), 1), GROUP, "") for group in range(BATCH // GROUP)]


def bodies(step: int) -> list[dict[str, Any]]:
    """Of the requests that the engine makes for `requests`."""
    made = []
    for request in requests():
        for sample in range(request.samples):
            name = f"{step}/{request.group_id}/{sample}"
            chunk = Chunk(name, OneTurn().prompt(request.task), TOKENS, seed=0, temperature=0.0)
            made.append(generate_body(chunk, (), f"{name}#straight", TOKENS, None))
    return made


def generate(port: int, asked: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    def send(body: dict[str, Any]) -> dict[str, Any]:
        return json.loads(http(port, "POST", "/generate", json.dumps(body)))

    with ThreadPoolExecutor(len(asked)) as threads:
        return list(threads.map(send, asked))


def flush(port: int) -> None:
    """No request finds what another has read."""
    http(port, "GET", "/flush_cache?timeout=30")


def http(port: int, method: str, path: str, body: str | None = None) -> bytes:
    connection = HTTPConnection("127.0.0.1", port)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        content = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise RuntimeError(f"{method} {path}: status {response.status}: {content[:300]!r}")
    return content


Took = tuple[float, float]
"""Seconds, and processor time."""


def summary(ours: Sequence[Took], straight: Sequence[Took]) -> dict[str, Any]:
    rounds = [(through[0] - alone[0]) / alone[0] for through, alone in zip(ours, straight, strict=True)]
    working = [(through[1] - alone[1]) / alone[0] for through, alone in zip(ours, straight, strict=True)]
    seconds, fastest = median(alone[0] for alone in straight), min(straight)[0]
    return {
        "coordinator_overhead": round(median(rounds), 4),
        "coordinator_overhead_fastest": round((min(ours)[0] - fastest) / fastest, 4),
        "coordinator_overhead_processor": round(median(working), 4),
        "coordinator_ms_per_request": round(1e3 * median(rounds) * seconds / BATCH, 3),
        "coordinator_generation_s": round(seconds, 3),
        "coordinator_processor_s": round(median(through[1] for through in ours), 4),
        "client_processor_s": round(median(alone[1] for alone in straight), 4),
        "coordinator_overhead_rounds": [round(each, 4) for each in rounds]}
