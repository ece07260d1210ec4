"""A component whose own process lives, but which cannot go on."""

from __future__ import annotations

import pytest

from megatron_pbsd.controller.failures import ComponentDied
from megatron_pbsd.controller.gather import gather
from megatron_pbsd.rollout.engines.protocol import EngineDied


class Broken:
    def work(self):
        raise EngineDied("engine-0", "its server ended with status 137", ("line 1", "line 2"))


def test_it_counts_as_dead(runtime):
    handle = runtime.spawn("engine-0", Broken)
    for _ in range(2):
        with pytest.raises(ComponentDied) as caught:
            gather(runtime.client, [handle.call("work")], phase="work", deadline_s=30)
    assert (caught.value.name, caught.value.cause) == ("engine-0", "its server ended with status 137")
    assert str(caught.value).splitlines()[-1] == "  engine-0 | line 2"
