from __future__ import annotations

import os
import sys

import pytest
from hypothesis import settings

# How long an example takes says more about what else the machine is doing than about the code.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """File by file, but one after the other what needs many processes: two pools of ranks, or two whole runs that
    compute, would only wait for each other. Runs that something happens to wait for it: they have queues of their own.
    """
    from xdist.scheduler import LoadScopeScheduling

    queues = ("tests/distributed/", "tests/end_to_end/test_failures.py", "tests/end_to_end/test_nodes.py",
              "tests/end_to_end/")

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return next((queue for queue in queues if file.startswith(queue)), file)

    return ByFile(config, log)


@pytest.fixture(scope="session")
def ray_runtime(tmp_path_factory):
    """One cluster for all tests."""
    from megatron_pbsd.controller.ray_cluster import RayRuntime, variables

    # Components import what tests define.
    with (variables({"PYTHONPATH": os.pathsep.join(sys.path)}),
          RayRuntime(tmp_path_factory.mktemp("ray") / "logs") as runtime):
        yield runtime


@pytest.fixture(params=["inline", "ray"])
def runtime(request):
    if request.param == "ray":
        return request.getfixturevalue("ray_runtime")
    from megatron_pbsd.controller.inline import InlineRuntime

    return InlineRuntime()


@pytest.fixture
def publish():
    """Write tensors into a new shared-memory segment; the manifest says where."""
    from megatron_pbsd.resharding.manifest import layout
    from megatron_pbsd.resharding.shared_memory import Segment, attach

    segments = []

    def write(tensors):
        described = {n: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items()}
        segment = Segment(layout("", described).nbytes)
        segments.append(segment)
        manifest = layout(segment.name, described)
        for name, tensor in attach(manifest).items():
            tensor.copy_(tensors[name])
        return manifest

    yield write
    for segment in segments:
        segment.close()
