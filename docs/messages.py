"""The page of messages: each that the library raises, from its source."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import safegrad_optim

ROOT = Path(safegrad_optim.__file__).parent
HEAD = """# Every message

All that the library raises, by where it is raised; what stands in braces is filled in. Each says what was
found and what to do next. The commonest are explained under [Troubleshooting](troubleshooting.md).
"""


class Message(NamedTuple):
    """What one place in the source raises."""

    place: str
    error: str
    text: str


def messages() -> Iterator[Message]:
    """All messages of the library, file by file."""
    for path in sorted(ROOT.rglob("*.py")):
        place = str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                yield from (Message(place, *found) for found in _raised_in(function))


def _raised_in(function: ast.FunctionDef) -> Iterator[tuple[str, str]]:
    nodes = list(_own(function))
    texts = {
        node.targets[0].id: node.value
        for node in nodes
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    for node in nodes:
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            text = _text(node.exc.args[0], texts)
            yield ast.unparse(node.exc.func), " ".join(text.split())


def _own(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """The nodes of a function, but not of functions in it."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop(0)
        if not isinstance(node, ast.FunctionDef):
            yield node
            waiting = [*ast.iter_child_nodes(node), *waiting]


def _text(node: ast.expr, texts: dict[str, ast.expr]) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, texts) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        named = texts.get(node.value.id) if isinstance(node.value, ast.Name) else None
        if isinstance(named, ast.JoinedStr | ast.Constant):
            return _text(named, texts)
        return "{" + ast.unparse(node.value) + "}"
    if isinstance(node, ast.Name) and node.id in texts:
        return _text(texts[node.id], texts)
    if isinstance(node, ast.BinOp):
        return _text(node.left, texts) + _text(node.right, texts)
    return "{" + ast.unparse(node) + "}"


def write(page: Path) -> None:
    """Write the page."""
    lines = [HEAD]
    rooms: dict[str, list[Message]] = {}
    for message in messages():
        rooms.setdefault(message.place.split(".")[0].lstrip("_"), []).append(message)
    for room, found in rooms.items():
        lines.append(f"## {room}\n")
        lines += [f"- `{message.error}`: `` {message.text} ``" for message in found]
        lines.append("")
    page.write_text("\n".join(lines), encoding="utf-8")
