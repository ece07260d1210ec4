"""Runs on fewer nodes than they asked for."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from launcher.slurm.fewer import fitted, overrides_for, problems
from megatron_pbsd.config import RunConfig


def run(nodes: int, ranks: int, engines: int, min_nodes: int | None = None, **parallel: int) -> RunConfig:
    return RunConfig.model_validate({
        "name": "run", "steps": 1, "model": {"path": "models/base"},
        "learner": {"parallel": {"tp": 1} | parallel | {"world_size": ranks}}, "rollout": {"engines": engines},
        "cluster": {"nodes": nodes, "min_nodes": min_nodes}})


@given(st.integers(1, 8), st.integers(1, 4), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.integers(1, 8),
       st.integers(1, 8))
def test_a_smaller_run_keeps_whole_models_and_its_share(nodes, copies, tp, pp, engines, fewer):
    config = run(nodes, copies * tp * pp, engines, tp=tp, pp=pp)
    try:
        smaller = fitted(config, fewer)
    except ValueError as error:
        assert fewer < nodes and "no room" in str(error)
        return
    share = min(fewer, nodes) / nodes
    assert smaller.learner.parallel.dp == int(copies * share) >= 1
    assert smaller.rollout.engines == int(engines * share) >= 1
    if fewer >= nodes:
        assert smaller == config and not overrides_for(config, fewer)


@pytest.mark.parametrize(("config", "valid"), [(run(4, 8, 4, 2, tp=4), 2), (run(4, 8, 4, 1, tp=4), 2),
                                               (run(4, 4, 2, 1), 2), (run(4, 4, 4, 1), 1), (run(2, 2, 2), 2)])
def test_how_few_nodes_a_run_can_have_is_said(config, valid):
    found = problems(config)
    least = config.cluster.min_nodes or config.cluster.nodes
    assert bool(found) == (least < valid)
    if found:
        assert f"min_nodes = {least}" in found[0] and f"the nearest valid value is {valid}" in found[0]
