from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from megatron_pbsd.rollout.engines.sglang.replicas import replica_for


@given(st.integers(1, 6), st.integers(1, 4), st.data())
def test_no_chunk_waits_beside_a_free_slot_and_kv_is_found_again(replicas, slots, data):
    """Chunks come and go; each has the KV of its last one where that ran."""
    homes: dict[int, int] = {}
    running: dict[int, int] = {}
    for chunk in data.draw(st.lists(st.integers(0, replicas * slots + 3), max_size=40)):
        if chunk in running:
            del running[chunk]
            continue
        loads = [sum(at == replica for at in running.values()) for replica in range(replicas)]
        at = replica_for(loads, slots, homes.get(chunk))
        assert loads[at] < slots or min(loads) >= slots
        if chunk in homes and loads[homes[chunk]] < slots:
            assert at == homes[chunk]
        if chunk not in homes:
            assert loads[at] == min(loads)
        running[chunk] = homes[chunk] = at
