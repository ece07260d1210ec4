"""A run on fewer nodes than it asked for: less data parallelism and fewer engines. Pure."""

from __future__ import annotations

from pydantic import ValidationError

from megatron_pbsd.config import RunConfig


def overrides_for(config: RunConfig, nodes: int) -> dict[str, int]:
    """What is to be set for the run to fit `nodes` of its `cluster.nodes`: as many whole copies of the model, and as
    many engines, as have room in that share. ValueError when there is room for none."""
    asked, parallel = config.cluster.nodes, config.learner.parallel
    if nodes >= asked:
        return {}
    copy = parallel.tp * parallel.pp * parallel.cp
    ranks = parallel.world_size * nodes // asked // copy * copy
    engines = config.rollout.engines * nodes // asked
    if not ranks or not engines:
        what = f"a copy of the model on {copy} learner ranks" if not ranks else "an engine"
        raise ValueError(f"{nodes} of {asked} nodes have no room for {what}")
    return {"learner.parallel.world_size": ranks, "rollout.engines": engines}


def problems(config: RunConfig) -> list[str]:
    """Why the run cannot have as few nodes as `cluster.min_nodes` says, or some number above; one message."""
    least = config.cluster.min_nodes or config.cluster.nodes
    reasons: dict[int, str] = {}
    for nodes in range(config.cluster.nodes - 1, least - 1, -1):
        try:
            fitted(config, nodes)
        except ValidationError as error:
            reasons[nodes] = "; ".join(str(detail["msg"]) for detail in error.errors())
        except ValueError as error:
            reasons[nodes] = str(error)
    if not reasons:
        return []
    bad = max(reasons)
    return [f"cluster.min_nodes = {least}, but the run cannot have {bad} nodes: {reasons[bad]}; the nearest valid "
            f"value is {bad + 1}"]


def fitted(config: RunConfig, nodes: int) -> RunConfig:
    """The run as it is on so many nodes. ValueError (pydantic's too) when it cannot be."""
    data = config.model_dump()
    for key, value in overrides_for(config, nodes).items():
        *sections, name = key.split(".")
        inner = data
        for section in sections:
            inner = inner[section]
        inner[name] = value
    return RunConfig.model_validate(data)
