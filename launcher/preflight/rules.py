"""From what was observed to everything that is wrong. Pure."""

from __future__ import annotations

from launcher.preflight import gpu_rules, host_rules, network_rules
from launcher.preflight.facts import Observed
from launcher.preflight.findings import CHECKS, Expected, Finding

RULES = (*network_rules.RULES, *host_rules.RULES, *gpu_rules.RULES)


def diagnose(observed: Observed, expected: Expected) -> list[Finding]:
    """Errors first, then by check and node."""
    found = [finding for rule in RULES for finding in rule(observed, expected)]
    return sorted(found, key=lambda one: (one.severity != "error", CHECKS.index(one.check),
                                          -1 if one.rank is None else one.rank))


def to_exclude(observed: Observed, findings: list[Finding]) -> list[str]:
    """Names of nodes that errors are blamed on, in the order of their ranks. What more than half of the nodes have is
    no reason: then what they have in common is at fault, and others in their place would be no better."""
    blamed: dict[str, set[int]] = {}
    for one in findings:
        if one.severity == "error" and one.blames_node and one.rank is not None:
            blamed.setdefault(one.check, set()).add(one.rank)
    rare = [ranks for ranks in blamed.values() if 2 * len(ranks) <= observed.expected_nodes]
    known = {node.rank: node.name for node in observed.nodes} | dict(observed.missing)
    return [known[rank] for rank in sorted(set().union(*rare)) if known.get(rank)]
