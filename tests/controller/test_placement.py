"""Every component has a place, no GPU two, and who belongs together is together."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import assume, given, strategies as st

from megatron_pbsd.controller.placement import Demand, Node, Place, engine_of, part_name, place
from megatron_pbsd.errors import UsageError


def machines(*gpus: int) -> list[Node]:
    return [Node(f"id{i}", f"node{i}", f"10.0.0.{i}", count) for i, count in enumerate(gpus)]


demands = st.builds(
    lambda tp, groups, engines, size, colocated: Demand(
        tp * groups, tp, {f"engine-{i}": size for i in range(engines)}, colocated),
    st.sampled_from([1, 2, 4, 8]), st.integers(1, 8), st.integers(0, 8), st.sampled_from([1, 2, 4, 8, 16]),
    st.booleans())


@given(demands, st.lists(st.sampled_from([0, 4, 8]), min_size=1, max_size=16).filter(any))
def test_no_gpu_is_given_twice(demand, gpus):
    try:
        places = place(demand, machines(*gpus))
    except UsageError:
        assume(False)
    learner = Counter((places[f"learner-{rank}"].node.id, places[f"learner-{rank}"].device)
                      for rank in range(demand.ranks))
    parts = {name: [part for part in places if engine_of(part) == name] for name in demand.engines}
    engines = Counter((places[part].node.id, places[part].device + i) for name, size in demand.engines.items()
                      for part in parts[name] for i in range(size // len(parts[name])))
    assert len(places) == demand.ranks + sum(map(len, parts.values()))
    for name, size in demand.engines.items():
        machines_of = [places[part].node for part in parts[name]]
        assert len(set(machines_of)) == len(machines_of) and size % len(machines_of) == 0
        assert parts[name] == [part_name(name, i) for i in range(len(machines_of))]
        # On one if one has room for as many at all, else on whole ones.
        assert len(machines_of) == max(1, size // max(gpus))
    for used in [learner, engines] if demand.colocated else [learner + engines]:
        assert max(used.values(), default=0) <= 1
        assert all(device < gpus[int(node.removeprefix("id"))] for node, device in used)


@given(demands, st.integers(1, 8), st.sampled_from([0, 8]))
def test_tensor_parallel_groups_are_whole_and_ranks_in_order(demand, count, gpus):
    try:
        places = place(demand, machines(*[gpus] * count))
    except UsageError:
        assert gpus  # machines without GPUs take whatever comes
        return
    order = [int(places[f"learner-{rank}"].node.id.removeprefix("id")) for rank in range(demand.ranks)]
    assert order == sorted(order)
    for first in range(0, demand.ranks, demand.tp):
        assert len(set(order[first : first + demand.tp])) == 1


@given(demands, st.integers(1, 8))
def test_what_fits_by_count_alone_is_placed_where_sizes_divide_machines(demand, count):
    engines = sum(demand.engines.values())
    needed = max(demand.ranks, engines) if demand.colocated else demand.ranks + engines
    sizes = {demand.tp, *demand.engines.values()}
    if needed <= 8 * count and len(sizes) == 1:
        place(demand, machines(*[8] * count))
    elif needed > 8 * count:
        with pytest.raises(UsageError, match="no machine has room for"):
            place(demand, machines(*[8] * count))


@pytest.mark.parametrize(("count", "expected"), [
    (1, [0, 0, 0, 0]), (2, [0, 0, 1, 1]), (3, [0, 0, 1, 2])])
def test_the_quickstart_on_machines_without_gpus(count, expected):
    places = place(Demand(2, 2, {"engine-0": 1, "engine-1": 1}), machines(*[0] * count))
    names = ("learner-0", "learner-1", "engine-0", "engine-1")
    assert [int(places[name].node.id.removeprefix("id")) for name in names] == expected


def test_too_few_gpus_are_said_with_those_that_there_are():
    with pytest.raises(UsageError, match=r"no machine has room for engine-0: .*\(node0: 8, node1: 0\)"):
        place(Demand(8, 8, {"engine-0": 4}), machines(8, 0))


def test_an_engine_of_more_gpus_than_a_machine_has_takes_whole_ones():
    places = place(Demand(32, 8, {"engine-0": 16, "engine-1": 16}, colocated=True), machines(8, 8, 8, 8))
    assert {name: (at.node.host, at.device) for name, at in places.items() if name.startswith("engine")} == {
        "engine-0": ("node0", 0), "engine-0.node1": ("node1", 0),
        "engine-1": ("node2", 0), "engine-1.node1": ("node3", 0)}


@pytest.mark.parametrize("gpus", [0, 8])
def test_an_engine_is_on_as_many_machines_as_is_asked(gpus):
    engines = {"engine-0": 4, "engine-1": 4}
    places = place(Demand(0, 1, engines, machines=dict.fromkeys(engines, 2)), machines(gpus, gpus))
    parts = {name: (at.node.host, at.device) for name, at in places.items()}
    second = 2 if gpus else 0
    assert parts == {"engine-0": ("node0", 0), "engine-0.node1": ("node1", 0),
                     "engine-1": ("node0", second), "engine-1.node1": ("node1", second)}


@pytest.mark.parametrize(("size", "asked", "gpus", "message"), [
    (12, None, (8, 8), "does not fill machines of 8: the nearest valid sizes are 8 and 16"),
    (24, None, (8, 8), "whose 24 GPUs are those of 3 machines, and there are 2: .*of at most 16"),
    (16, None, (8, 4), "a part of engine-0, which is 8 GPUs of each of 2 machines"),
    (6, 3, (0, 0), "engine-0 is to be on 3 machines, and there are 2: .*nnodes to 2"),
    (16, 1, (8, 8), "no machine has room for engine-0"),
])
def test_engines_that_do_not_divide_over_machines(size, asked, gpus, message):
    with pytest.raises(UsageError, match=message):
        place(Demand(1, 1, {"engine-0": size}, True, {"engine-0": asked} if asked else {}), machines(*gpus))


def test_who_has_a_place_keeps_it():
    """An engine that has lost a machine leaves its other one, and takes no GPU of those that go on."""
    nodes = machines(8, 8, 8)
    engines = {"engine-0": 8, "engine-1": 8}
    demand = Demand(0, 1, engines, machines=dict.fromkeys(engines, 2))
    kept = {"engine-1": Place(nodes[1], 4), "engine-1.node1": Place(nodes[2], 0)}
    places = place(demand, nodes[1:], kept)
    assert {name: places[name] for name in kept} == kept
    assert (places["engine-0"], places["engine-0.node1"]) == (Place(nodes[1], 0), Place(nodes[2], 4))
