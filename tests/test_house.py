"""Limits of this house: how long files, classes and functions are, and which package may import which."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "safegrad_optim"
FILES = sorted(ROOT.rglob("*.py"))

FILE_LINES = 260
CLASS_LINES = 250
# Of code: a docstring states what callers rely on, and should not be cut for its length.
FUNCTION_LINES = 50
ARGUMENTS = 9

# Each room and the rooms it may import, from the bottom to the top; nobody imports integrations.
PRIVATE = {"_torch_private", "_peft_private", "progress"}
ROOMS = {
    "_torch_private": set(),
    "_peft_private": set(),
    "progress": set(),
    "parallel": PRIVATE,
    "batches": PRIVATE | {"parallel"},
    "divergence": PRIVATE | {"parallel", "batches"},
    "forward": PRIVATE | {"parallel", "batches", "divergence"},
    "reference": PRIVATE | {"parallel", "batches", "divergence", "forward"},
    "safety_data": PRIVATE | {"parallel", "batches", "forward", "reference"},
    "protection": PRIVATE | {"parallel", "batches", "forward", "reference", "safety_data"},
    "alignment": PRIVATE | {"parallel", "batches", "divergence", "forward", "reference"},
    "surgery": PRIVATE | {"parallel"},
    "optimizer": PRIVATE | {"parallel", "surgery"},
    "integrations": PRIVATE
    | {"parallel", "batches", "divergence", "forward", "reference", "safety_data"}
    | {"protection", "alignment", "surgery", "optimizer"},
    "__init__": {"divergence", "reference", "safety_data", "protection", "alignment", "surgery", "optimizer"}
    | {"parallel", "batches", "forward"},
}


def room_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def lines(node):
    return node.end_lineno - node.lineno + 1


def code_lines(function):
    docstring = function.body[0] if ast.get_docstring(function, clean=False) is not None else None
    return lines(function) - (lines(docstring) if docstring else 0)


def nodes(*kinds):
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, kinds):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def imported_rooms(path):
    """Rooms that a file imports, wherever in it and in whatever form."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: import by absolute names"
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            names = below if node.module == ROOT.name else [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            package, _, inside = name.partition(".")
            if package == ROOT.name:
                # What the package itself gives, as `from safegrad_optim import combine`, is of all rooms.
                room = inside.split(".")[0]
                yield room if room in ROOMS else "__init__"


def test_files_are_short():
    counts = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES
    }
    assert {name: count for name, count in counts.items() if count > FILE_LINES} == {}


def test_functions_are_short():
    found = {f"{place} {node.name}": code_lines(node) for place, node in nodes(ast.FunctionDef)}
    assert {name: count for name, count in found.items() if count > FUNCTION_LINES} == {}


def test_classes_are_short():
    found = {f"{place} {node.name}": lines(node) for place, node in nodes(ast.ClassDef)}
    assert {name: count for name, count in found.items() if count > CLASS_LINES} == {}


def test_callers_give_few_arguments():
    found = {}
    for place, node in nodes(ast.FunctionDef):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = sum(argument.arg not in ("self", "cls") for argument in arguments)
        if node.name == "__init__" or not node.name.startswith("_"):
            found[f"{place} {node.name}"] = count
    assert {name: count for name, count in found.items() if count > ARGUMENTS} == {}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_down(room):
    arrows = {found for path in FILES if room_of(path) == room for found in imported_rooms(path)}
    assert arrows - {room} - ROOMS[room] == set()


def test_every_file_is_in_a_room():
    assert {room_of(path) for path in FILES} == set(ROOMS)


def test_rooms_stand_in_order():
    below = set()
    for room, allowed in ROOMS.items():
        assert allowed <= below
        below.add(room)


def test_the_package_imports_no_framework():
    heavy = ["accelerate", "datasets", "peft", "safetensors", "transformers"]
    code = f"import sys, safegrad_optim; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert result.stdout.strip() == "[]", result.stderr
