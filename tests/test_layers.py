"""The layering of the package is kept by import-linter; these tests keep import-linter at it."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYPROJECT = ROOT / "pyproject.toml"


def lint_imports(config: Path) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("lint-imports"), "--config", config, "--no-cache"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)


def test_every_contract_is_kept() -> None:
    done = lint_imports(PYPROJECT)
    assert done.returncode == 0, done.stdout + done.stderr
    contracts = tomllib.loads(PYPROJECT.read_text())["tool"]["importlinter"]["contracts"]
    assert f"Contracts: {len(contracts)} kept, 0 broken." in done.stdout


def test_a_broken_contract_is_noticed(tmp_path: Path) -> None:
    config = tmp_path / "contracts.toml"
    config.write_text("""
[tool.importlinter]
root_package = "onnxlr"

[[tool.importlinter.contracts]]
name = "Upside down"
type = "layers"
layers = ["onnxlr.errors", "onnxlr.files"]
""")
    done = lint_imports(config)
    assert done.returncode == 1
    assert "Upside down BROKEN" in done.stdout
    assert "onnxlr.files -> onnxlr.errors" in done.stdout


def test_every_module_has_its_layer() -> None:
    # import-linter passes over a module that no layer names
    contracts = tomllib.loads(PYPROJECT.read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    named = [name.strip() for name in itertools.chain(*(layer.split(":") for layer in layers))]
    modules = {
        path.stem for path in (ROOT / "onnxlr").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert sorted(named) == sorted(f"onnxlr.{module}" for module in modules - {"__init__", "__main__"})
