"""Environments of their own, for tools whose bounds or builds are not those of the other tests."""

import os
import subprocess
import venv
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def environment(folder, *requirements, **variables):
    """Make one with torch, this package and what else is wanted; return its folder of commands."""
    venv.create(folder, with_pip=True)
    commands = folder / "bin"
    pip = [commands / "python", "-m", "pip", "install", "--quiet"]
    version = torch.__version__.split("+")[0]
    for wanted in ([f"torch=={version}"], requirements, ["--no-deps", ROOT]):
        subprocess.run([*pip, *wanted], check=True, env=os.environ | variables)
    return commands
