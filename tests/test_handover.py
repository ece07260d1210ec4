"""The order in which memory changes hands, and that two who share a device never want more of it than it has."""

from __future__ import annotations

import itertools

import pytest
from synthetic_run import run_config

from megatron_pbsd.handover import PUBLISHED, SAVED, HandOver

CATEGORIES = ("parameters", "gradients", "master_weights", "optimizer_state", "communicators")
TAGS = ("kv_cache", "weights")


class Device:
    """What learner and engines hold, and the most that they held at once: as a set of names."""

    def __init__(self):
        self.held = {*CATEGORIES, *TAGS}
        self.seen: list[frozenset[str]] = []

    def release(self, phase, keep=()):
        self._hold(self.held - (set(CATEGORIES) - set(keep)))

    def regain(self, categories=None):
        self._hold(self.held | set(CATEGORIES if categories is None else categories))

    def sleep(self, tags):
        self._hold(self.held - set(tags))

    def wake(self, tags):
        self._hold(self.held | set(tags))

    def _hold(self, names):
        self.held = names
        self.seen.append(frozenset(names))


def config(sleep, release):
    return run_config(rollout={"sleep": sleep}, learner={"release_memory": release})


HOLDS = {"train": {*CATEGORIES}, "publish": {*PUBLISHED, "weights"}, "rollout": {*TAGS}, "save": {*SAVED, "weights"}}


@pytest.mark.parametrize(("before", "phase"), itertools.product(HOLDS, HOLDS))
def test_nobody_takes_before_the_other_has_given(before, phase):
    device = Device()
    hand_over = HandOver(device, device, config("all", True))
    getattr(hand_over, before)()
    device.seen, had = [], frozenset(device.held)
    getattr(hand_over, phase)()
    # Saving takes nothing from the engines that they have, and gradients from nobody.
    spare = {"weights", "gradients"} if phase == "save" else set()
    assert device.held - spare == HOLDS[phase] - spare
    assert all(held <= had or held <= HOLDS[phase] for held in device.seen)


@pytest.mark.parametrize(("sleep", "release"), itertools.product(["none", "kv_cache", "all"], [False, True]))
def test_what_is_not_configured_stays_where_it_is(sleep, release):
    device = Device()
    hand_over = HandOver(device, device, config(sleep, release))
    for phase in ("publish", "rollout", "train", "publish", "rollout", "save", "rollout", "train"):
        getattr(hand_over, phase)()
        stays = set() if release else {*CATEGORIES}
        stays |= {"none": {*TAGS}, "kv_cache": {"weights"}, "all": set()}[sleep]
        assert stays <= device.held and HOLDS[phase] - {"weights"} <= device.held
    assert (device.seen == []) == (sleep == "none" and not release)


@pytest.mark.parametrize(("sleep", "lost"), [("none", False), ("kv_cache", False), ("all", True)])
def test_it_is_said_once_that_weights_are_to_be_given_back(sleep, lost):
    hand_over = HandOver(Device(), Device(), config(sleep, False))
    assert not hand_over.publish()
    hand_over.train()
    assert [hand_over.publish(), hand_over.publish()] == [lost, False]
