import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from megatron_pbsd.rollout.policies.least_loaded import LeastLoaded
from megatron_pbsd.rollout.scheduler import Assignment, Scheduler, SchedulerError


class AnyEvents(RuleBasedStateMachine):
    """Drives the scheduler with any events that can happen, beside a plain account of who is where."""

    def __init__(self):
        super().__init__()
        self.scheduler = Scheduler(LeastLoaded(spread=2))
        self.slots: dict[str, int] = {}
        self.waiting: set[str] = set()
        self.at: dict[str, str] = {}
        self.between: set[str] = set()
        self.leaving: set[str] = set()
        self.count = 0

    def place(self):
        for made in self.scheduler.decisions():
            self.waiting.remove(made.request_id)
            assert made.request_id not in self.at and made.engine in self.slots
            self.at[made.request_id] = made.engine

    @rule(slots=st.integers(1, 4))
    def join(self, slots):
        self.count += 1
        self.slots[f"e{self.count}"] = slots
        self.scheduler.engine_joined(f"e{self.count}", slots)
        self.place()

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def lose(self, data):
        name = data.draw(st.sampled_from(sorted(self.slots)))
        lost = {request for request, at in self.at.items() if at == name}
        assert set(self.scheduler.engine_lost(name)) == lost
        del self.slots[name]
        for request in lost:
            del self.at[request]
        self.waiting |= lost
        self.place()

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def leave(self, data):
        name = data.draw(st.sampled_from(sorted(self.slots)))
        self.scheduler.engine_leaving(name)
        del self.slots[name]
        self.leaving.add(name)

    @precondition(lambda self: self.leaving)
    @rule(data=st.data())
    def lose_one_that_leaves(self, data):
        name = data.draw(st.sampled_from(sorted(self.leaving)))
        lost = {request for request, at in self.at.items() if at == name}
        assert set(self.scheduler.engine_lost(name)) == lost
        self.leaving.remove(name)
        self.at = {request: at for request, at in self.at.items() if at != name}
        self.waiting |= lost
        self.place()

    @rule()
    def begin(self):
        self.count += 1
        self.waiting.add(f"r{self.count}")
        self.scheduler.submitted(f"r{self.count}", "g", 10)
        self.place()

    @precondition(lambda self: self.at)
    @rule(data=st.data())
    def finish_chunk(self, data):
        request = data.draw(st.sampled_from(sorted(self.at)))
        self.scheduler.chunk_finished(request)
        del self.at[request]
        self.between.add(request)
        self.place()

    @precondition(lambda self: self.between)
    @rule(data=st.data(), over=st.booleans())
    def go_on_or_end(self, data, over):
        request = data.draw(st.sampled_from(sorted(self.between)))
        self.between.remove(request)
        if over:
            self.scheduler.request_finished(request)
        else:
            self.waiting.add(request)
            self.scheduler.submitted(request, "g", 20)
            self.place()

    @invariant()
    def no_engine_has_more_than_its_slots(self):
        for name, slots in self.slots.items():
            assert len(self.scheduler.in_flight(name)) <= slots

    @invariant()
    def nothing_is_lost_or_twice(self):
        in_flight = [request for name in (*self.slots, *self.leaving) for request in self.scheduler.in_flight(name)]
        assert sorted(in_flight) == sorted(self.at)
        assert set(self.scheduler.waiting) == self.waiting

    @invariant()
    def nothing_waits_beside_a_free_slot(self):
        assert not self.waiting or sum(at in self.slots for at in self.at.values()) == sum(self.slots.values())


AnyEvents.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_any_events = AnyEvents.TestCase


def running(spread: int, counts: dict[str, int], slots: int = 8) -> Scheduler:
    """Engines with so many requests in flight, named e.g. 'a0', 'a1'."""
    scheduler = Scheduler(LeastLoaded(spread))
    for engine, count in counts.items():
        scheduler.engine_joined(engine, slots)
        for i in range(count):
            scheduler.submitted(f"{engine}{i}", "g", 1)
        # The other engines have not joined yet or are full up to here: all go to this one.
        scheduler.decisions()
    return scheduler


def test_the_next_turn_stays_where_its_kv_is_while_the_spread_allows():
    scheduler = running(2, {"a": 3})
    scheduler.engine_joined("b", 8)
    scheduler.chunk_finished("a0")
    scheduler.submitted("a0", "g", 5)
    assert scheduler.decisions() == [Assignment("a0", "a")]


def test_beyond_the_spread_it_moves_to_the_least_loaded_and_leaves_its_kv():
    scheduler = running(1, {"a": 3})
    scheduler.engine_joined("b", 8)
    scheduler.chunk_finished("a0")
    scheduler.submitted("a0", "g", 5)
    assert scheduler.decisions() == [Assignment("a0", "b", leaves="a")]
    scheduler.chunk_finished("a0")
    assert scheduler.request_finished("a0") == "b"


def test_a_begun_request_goes_before_new_ones():
    scheduler = running(0, {"a": 1}, slots=1)
    scheduler.submitted("new", "g", 1)
    scheduler.chunk_finished("a0")
    scheduler.submitted("a0", "g", 5)
    assert scheduler.decisions() == [Assignment("a0", "a")]


def test_events_that_cannot_happen_are_refused():
    scheduler = running(0, {"a": 1})
    with pytest.raises(SchedulerError, match="'a0' has a chunk that is not finished"):
        scheduler.submitted("a0", "g", 1)
    with pytest.raises(SchedulerError, match="'x' finished a chunk but is not in flight"):
        scheduler.chunk_finished("x")
    with pytest.raises(SchedulerError, match="'b' is lost but never joined"):
        scheduler.engine_lost("b")
    with pytest.raises(SchedulerError, match="'a' has already joined"):
        scheduler.engine_joined("a", 2)


def test_what_ran_on_an_engine_that_leaves_goes_on_elsewhere():
    scheduler = running(9, {"a": 2})
    scheduler.engine_joined("b", 8)
    scheduler.engine_leaving("a")
    scheduler.chunk_finished("a0", 3)
    assert scheduler.in_flight("a") == ["a1"]
    scheduler.submitted("a0", "g", 1000)
    assert scheduler.decisions() == [Assignment("a0", "b")], "nothing is to be told to an engine that is gone"
    with pytest.raises(SchedulerError, match="'a' has already joined"):
        scheduler.engine_joined("a", 2)
    scheduler.chunk_finished("a1")
    assert scheduler.request_finished("a1") is None
    scheduler.engine_joined("a", 2)


@pytest.mark.parametrize(("above", "pulled"), [(99, 100), (100, 0)])
def test_how_much_kv_is_worth_moving(above, pulled):
    scheduler = Scheduler(LeastLoaded(spread=0), pull_above=above)
    scheduler.engine_joined("a", 2)
    for name in ("r", "s"):
        scheduler.submitted(name, "g", 1)
    scheduler.decisions()
    scheduler.engine_joined("b", 8)
    scheduler.chunk_finished("r")
    scheduler.submitted("r", "g", 100)
    assert scheduler.decisions() == [Assignment("r", "b", leaves="a", pull_tokens=pulled)]
