"""Failures of the learner."""

from __future__ import annotations

from megatron_pbsd.errors import PbsdError


class LearnerError(PbsdError):
    """The learner cannot do what it was asked, or cannot go on; the message says why."""

    component = "learner"
