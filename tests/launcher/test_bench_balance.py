"""The bench of micro-batch planning, made small: its rows are complete and ours lead them."""

from __future__ import annotations

import pytest

from launcher.bench import balance
from megatron_pbsd.errors import UsageError


def test_rows_hold_every_case_and_nobody_beats_the_plans():
    results = balance.run(ranks=(2, 4), seeds=1)
    cases: dict[tuple, dict[str, dict]] = {}
    for row in results["rows"]:
        cases.setdefault((row["lengths"], row["batching"], row["dp"]), {})[row["method"]] = row
    assert len(cases) == 3 * 2 * 2
    for methods in cases.values():
        assert set(methods) == {"ours", "ours_synchronised", "karmarkar_karp", "first_fit"}
        for baseline in ("karmarkar_karp", "first_fit"):
            assert 1 <= methods["ours"]["makespan"] <= methods[baseline]["makespan"]
            assert 1 <= methods["ours_synchronised"]["synchronised"] <= methods[baseline]["synchronised"]
    assert results["balance_over_bound"] == pytest.approx(
        sum(m["ours"]["makespan"] for (_, batching, _), m in cases.items() if batching == "packed") / 6, abs=1e-4)


def test_overrides_are_refused():
    with pytest.raises(UsageError, match="--steps"):
        balance.run(["--steps", "3"])
