from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PURE = ["trajectory.py", "batch.py", "config", "kl.py", "errors.py", "algorithms", "environments", "models",
        "boxes.py", "resharding", "planning"]


def test_import_contracts():
    """The layers of pyproject.toml, section importlinter."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()",
               "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("part", PURE)
def test_pure_parts_do_not_import_torch_distributed(part):
    path = ROOT / "megatron_pbsd" / part
    for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [
                alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module == "torch":
                names += [f"torch.{alias.name}" for alias in node.names]
            assert not any(name.startswith("torch.distributed") for name in names), f"{file}:{node.lineno}"


def test_every_package_is_installed():
    """A folder without __init__.py would be missing from the installed package."""
    for package in ("megatron_pbsd", "launcher"):
        for file in (ROOT / package).rglob("*.py"):
            assert (file.parent / "__init__.py").exists(), file.parent
