"""From a configuration to the components that a loop is handed, started in order and stopped in reverse."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatron_pbsd import losses, summary
from megatron_pbsd.checkpointing.store import CheckpointStore
from megatron_pbsd.config import RunConfig
from megatron_pbsd.controller import open_runtime
from megatron_pbsd.controller.groups import EngineGroup, LearnerGroup
from megatron_pbsd.controller.runtime import Runtime
from megatron_pbsd.environments import Environment, build_environment
from megatron_pbsd.errors import PbsdError
from megatron_pbsd.observability.recorder import Recorder
from megatron_pbsd.prompts import evaluation_requests
from megatron_pbsd.resharding.publication import Publisher
from megatron_pbsd.rollout.coordinator import RolloutRequest
from megatron_pbsd.rollout.session import RolloutSession
from megatron_pbsd.trajectory import Group

PROBE_SEQUENCES = 4
