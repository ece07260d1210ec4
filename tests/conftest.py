from contextlib import closing

import pytest


@pytest.fixture(scope="session")
def ray_runtime(tmp_path_factory):
    """One cluster for all tests."""
    from megatron_pbsd.controller.ray_cluster import RayRuntime

    with closing(RayRuntime(tmp_path_factory.mktemp("ray") / "logs")) as runtime:
        yield runtime


@pytest.fixture(params=["inline", "ray"])
def runtime(request):
    if request.param == "ray":
        return request.getfixturevalue("ray_runtime")
    from megatron_pbsd.controller.inline import InlineRuntime

    return InlineRuntime()
