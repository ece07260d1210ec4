from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from launcher.bench import coordinator
from megatron_pbsd.controller.inline import InlineHandle, InlineRuntime
from megatron_pbsd.rollout.coordinator import Coordinator
from megatron_pbsd.rollout.engines.protocol import EngineStatistics


def test_what_is_added_is_compared_with_the_same_round():
    numbers = coordinator.summary([(1.1, 0.5), (2.1, 0.3), (4.0, 0.4)], [(1.0, 0.2), (2.0, 0.2), (2.0, 0.2)])
    assert numbers["coordinator_overhead_rounds"] == [0.1, 0.05, 1.0] and numbers["coordinator_overhead"] == 0.1
    assert numbers["coordinator_overhead_processor"] == 0.1 and numbers["coordinator_generation_s"] == 2.0
    assert numbers["coordinator_overhead_fastest"] == pytest.approx(0.1)
    assert numbers["coordinator_ms_per_request"] == pytest.approx(1e3 * 0.1 * 2.0 / 64)


def test_without_sglang_there_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("SGLANG_PYTHON", str(tmp_path / "python"))
    found = coordinator.run()
    assert found["coordinator_overhead"] is None and str(tmp_path) in found["coordinator_overhead_reason"]


def test_the_client_asks_for_what_the_coordinator_asks_for():
    """Prompts, lengths, names; what the server makes of the rest is compared in the bench."""
    episodes = []

    class Recording:
        """An engine whose only answer is that it was asked."""

        name = "engine-0"

        def statistics(self):
            return EngineStatistics(0, 0, 0, 0, 0, 0, 0, 0, 0.0)

        def pump(self, chunks, releases, hand_overs):
            episodes.extend(chunks)
            raise ZeroDivisionError

    asked = Coordinator([InlineHandle("engine-0", Recording())], coordinator.OneTurn(),
                        coordinator.rollout_config("python", 30000), InlineRuntime())
    with pytest.raises(ZeroDivisionError):
        asked.collect(coordinator.requests(), step=3, seed=0, temperature=0.0)
    bodies = coordinator.bodies(3)
    assert len(episodes) == len(bodies) == coordinator.BATCH
    assert [(list(c.tokens), c.max_new_tokens, f"{c.request_id}#straight") for c in episodes] == [
        (b["input_ids"], b["sampling_params"]["max_new_tokens"], b["rid"]) for b in bodies]


def test_the_client_sends_all_at_once_and_says_what_is_refused():
    meeting = threading.Barrier(coordinator.BATCH, timeout=30)

    class Server(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            meeting.wait()
            reply = json.dumps({"output_ids": body["input_ids"][:2]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(reply)

        def do_GET(self):
            self.send_response(400)
            self.end_headers()
            self.wfile.write(b"not idle")

        def log_message(self, *arguments):
            pass

    class AtOnce(ThreadingHTTPServer):
        request_queue_size = coordinator.BATCH  # Who finds no place in it comes again seconds later.
        daemon_threads = True

    server = AtOnce(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    asked = coordinator.bodies(0)
    try:
        replies = coordinator.generate(server.server_port, asked)
        with pytest.raises(RuntimeError, match="flush_cache.*status 400.*not idle"):
            coordinator.flush(server.server_port)
    finally:
        server.shutdown()
        server.server_close()
    assert [reply["output_ids"] for reply in replies] == [body["input_ids"][:2] for body in asked]
