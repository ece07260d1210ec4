"""Writes tests/rollout/sglang_engine/replies.json: what a real server answers to what an engine asks.

    PYTHONPATH=.:tests python tests/sglang_server/record_replies.py

Times and the names of machines are left out.
"""

from __future__ import annotations

import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sglang_server.servers import start
from tiny_models import make_tiny

from megatron_pbsd.rollout.engines.protocol import Chunk
from megatron_pbsd.rollout.engines.sglang.client import Refused
from megatron_pbsd.rollout.engines.sglang.replies import generate_body, score_body

RECORDED = Path(__file__).parents[1] / "rollout" / "sglang_engine" / "replies.json"
LEFT_OUT = ("time", "_ts", "latency", "throughput", "wait")
PROMPT = (3, 4, 5, 6, 7, 8)


def without_times(reply):
    if isinstance(reply, list):
        return [without_times(part) for part in reply]
    meta = {name: value for name, value in reply["meta_info"].items() if not any(part in name for part in LEFT_OUT)}
    return {"output_ids": reply["output_ids"], "meta_info": meta}


def record(folder: Path) -> dict:
    engine = start(make_tiny("qwen3_moe", folder / "moe", mlp_only_layers=[], eos_token_id=59), folder, slots=1,
                   routed_experts=True)
    server = engine._server

    def ask(body):
        return without_times(server.client.post("/generate", body))

    recorded = {"weights": str(server.weights)}
    chunk = Chunk("0/a/0", PROMPT, 6, seed=1, temperature=0.0, routed_from=0)
    recorded["length"] = ask(generate_body(chunk, (), "0/a/0#0", 6, 0))
    first = tuple(recorded["length"]["output_ids"])
    recorded["continued"] = ask(generate_body(chunk, first[:3], "0/a/0#1", 6, len(PROMPT) + 2))
    stopping = Chunk("0/a/1", PROMPT, 6, seed=1, temperature=0.0, stop_token_ids=(first[2],))
    recorded["stop"] = ask(generate_body(stopping, (), "0/a/1#0", 6, None))
    recorded["score"] = ask(score_body([PROMPT, PROMPT[:1]], "score#0"))
    with ThreadPoolExecutor(2) as threads:
        bodies = [generate_body(Chunk(f"0/b/{i}", PROMPT, 100, 1, 0.0), (), f"0/b/{i}#0", 100, None) for i in range(2)]
        calls = [threads.submit(ask, body) for body in bodies]
        while not all(call.done() for call in calls):
            for body in reversed(bodies):
                server.post("/abort_request", {"rid": body["rid"]})
        recorded["aborted"] = [call.result() for call in calls]
    refused = {"too_long": {"input_ids": [1] * 200, "sampling_params": {}},
               "unknown": {"input_ids": [1], "sampling_params": {"bogus": 1}}}
    for name, body in refused.items():
        try:
            ask(body)
        except Refused as error:
            recorded[name] = {"status": error.status, "message": error.message}
    recorded["metrics"] = "\n".join(line for line in server.get("/metrics").splitlines() if "passes_total" in line)
    engine.close()
    return recorded


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        RECORDED.write_text(json.dumps(record(Path(scratch)), indent=1) + "\n")
