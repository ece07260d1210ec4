from __future__ import annotations

from hypothesis import given, strategies as st

from megatron_pbsd.rollout.engines.embedded.kv_cache import SlotTable, common_prefix


@given(st.lists(st.integers(0, 2), max_size=8), st.lists(st.integers(0, 2), max_size=8))
def test_common_prefix(a, b):
    n = common_prefix(a, b)
    assert a[:n] == b[:n] and (n == min(len(a), len(b)) or a[n] != b[n])


EVENTS = st.tuples(st.sampled_from(["acquire", "retire", "release", "clear"]), st.integers(0, 6))


@given(slots=st.integers(1, 4), events=st.lists(EVENTS, max_size=60))
def test_every_slot_has_one_owner_and_the_oldest_goes_first(slots, events):
    table, running, kept = SlotTable(slots), {}, []
    for event, number in events:
        name = f"r{number}"
        if event == "acquire" and name not in running:
            place = table.acquire(name, [number, 0, 0], wanted=())
            assert (place is None) == (len(running) == slots)
            if place:
                slot, computed = place
                assert slot not in running.values() and 0 <= slot < slots
                assert computed == (2 if name in kept else 0)
                running[name] = slot
                if name in kept:
                    kept.remove(name)
                elif len(running) + len(kept) > slots:
                    kept.pop(0)
        elif event == "retire" and name in running:
            table.retire(name, running.pop(name), [number, 0])
            kept.append(name)
        elif event == "release":
            table.release(name)
            kept = [other for other in kept if other != name]
        elif event == "clear":
            table.clear()
            kept = []
        assert len(table) == len(kept)


def test_eviction_spares_requests_that_wait():
    table = SlotTable(2)
    for name in ("old", "new"):
        slot, _ = table.acquire(name, [1, 2], wanted=())
        table.retire(name, slot, [1])
    table.acquire("guest", [1, 2], wanted={"old", "guest"})
    assert table.acquire("old", [1, 2], wanted={"old"}) == (0, 1)
