"""The recipes' servers, as the installed SGLang would be asked for them."""

from __future__ import annotations

from pathlib import Path

import pytest
from sglang_server.servers import section

from launcher.overrides import load_config
from megatron_pbsd.rollout.engines.sglang.arguments import problems

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*_h100x*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_knows_all_arguments(path):
    config = load_config(path, ["--rollout.sglang.python", section()["python"]], check_model=False)
    assert config.rollout.sglang.args and problems(config.rollout.sglang) == []
