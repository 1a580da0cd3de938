"""The package as it is found: installed, or a copy on the path."""

import doctest
import importlib
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import safegrad_optim

ROOT = Path(__file__).parent.parent


def test_the_version_is_that_of_the_installed_package():
    assert version("safegrad_optim") == safegrad_optim.__version__


def test_a_copy_on_the_path_imports_without_installed_metadata(tmp_path):
    source = Path(safegrad_optim.__file__).parent
    shutil.copytree(source, tmp_path / "safegrad_optim", ignore=shutil.ignore_patterns("__pycache__"))
    # This environment has the metadata, so they are hidden.
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import importlib.metadata\n"
        "found = importlib.metadata.distribution\n"
        "def distribution(name):\n"
        "    if name == 'safegrad_optim': raise importlib.metadata.PackageNotFoundError(name)\n"
        "    return found(name)\n"
        "importlib.metadata.distribution = distribution\n"
        "import safegrad_optim; print(safegrad_optim.__file__, safegrad_optim.__version__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    path, found = result.stdout.split()
    assert Path(path).is_relative_to(tmp_path)
    assert found == safegrad_optim.__version__


def test_what_is_run_as_oldest_are_the_lower_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    imported = [Requirement(line) for line in [*project["dependencies"], *extras["transformers"]]]
    others = [Requirement(line) for extra in extras.values() for line in extra]
    bounds = {
        requirement.name: Version(bound.version)
        for requirement in [*others, *imported]
        for bound in requirement.specifier
        if bound.operator == ">="
    }
    pins = {}
    for line in (ROOT / ".ci/oldest.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, pin = line.partition("==")
            pins[name] = Version(pin)
    assert pins == {name: bounds.get(name) for name in pins}
    assert {requirement.name for requirement in imported} <= set(pins)


@pytest.mark.parametrize(
    "package",
    ["alignment", "optimizer", "parallel", "protection", "reference", "safety_data", "surgery"],
)
def test_the_example_of_each_package_runs(package):
    found = doctest.testmod(importlib.import_module(f"safegrad_optim.{package}"))
    assert found.attempted > 0
    assert found.failed == 0
