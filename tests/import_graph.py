"""Which of the project's Python files imports which, and what that breaks of the rules about it."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

#: What each room may import of other rooms. A room more is a line here, and its name where it may be imported.
ALLOWED: dict[str, set[str]] = {
    "kernels": set(),
    "steps/common": set(),
    "steps/data": {"steps/common", "kernels"},
    "steps/data/description": {"steps/data", "steps/common"},
    "steps/data/generators": set(),
    "steps/models": {"steps/data", "steps/common", "kernels"},
    "steps/models/rankers": {"steps/models", "steps/data", "steps/common", "kernels"},
    "steps/evaluation": {"steps/data", "steps/common", "kernels"},
    "steps/tasks": {
        "steps/models",
        "steps/models/rankers",
        "steps/evaluation",
        "steps/data",
        "steps/common",
        "kernels",
    },
    "steps/training": {"steps/tasks", "steps/models", "steps/evaluation", "steps/data", "steps/common", "kernels"},
    "steps/serving": {"steps/tasks", "steps/models", "steps/evaluation", "steps/data", "steps/common", "kernels"},
    "steps/cards": {"steps/common"},
    "steps/reporting": {"steps/evaluation", "steps/common"},
    "steps/tracking": {"steps/serving", "steps/reporting", "steps/evaluation", "steps/common"},
    "steps/crates": {"steps/reporting", "steps/common"},
    "steps/studies": {"steps/training", "steps/models", "steps/evaluation", "steps/data", "steps/common", "kernels"}
    | {"steps/data/generators", "steps/serving"},
}
ROOMS = frozenset(ALLOWED)
ALLOWED |= {"steps": set(ROOMS), "workflow": {"steps/common"}}  # `steps` are the steps themselves, each a command line
#: The studies of preprocessing time what two steps do.
EXCEPTIONS = {
    f"steps/studies/{name}.py": {"steps/validate.py", "steps/preprocess.py"}
    for name in ("preprocessing", "data_growth")
}
_TOP = ("kernels", "steps", "workflow", "tests")
_BY_NAME = ("import_module", "__import__")


def graph(root: Path) -> dict[str, set[str]]:
    """The files that each file of kernels/, steps/, workflow/ and tests/ imports, by their paths below `root`."""
    paths = [path for top in _TOP for path in sorted((root / top).rglob("*.py"))]
    return {path.relative_to(root).as_posix(): imports(path, root) for path in paths}


def imports(path: Path, root: Path) -> set[str]:
    """The project's files that a file imports anywhere in it, by statement or by a name in quotes."""
    found = set()
    package = path.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for parts, members in _names(node, package):
            # `from a import b` may mean a module: then it is that one, not the package around it.
            modules = [_file(root, (*parts, member)) for member in members]
            found |= {module for module in modules if module}
            if None in modules or not modules:
                found |= {_file(root, parts)} - {None}
    return found - {path.relative_to(root).as_posix()}


def _names(node: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """What a node imports: the parts of a module's name, and the names of what it takes from it."""
    match node:
        case ast.Import():
            for alias in node.names:
                yield tuple(alias.name.split(".")), []
        case ast.ImportFrom():
            above = package[: len(package) - node.level + 1] if node.level else ()
            yield (*above, *(node.module.split(".") if node.module else ())), [alias.name for alias in node.names]
        case ast.Call(func=ast.Name(id=called) | ast.Attribute(attr=called), args=[ast.Constant(value=str(name)), *_]):
            if called in _BY_NAME:
                level = len(name) - len(name.lstrip("."))
                above = package[: len(package) - level + 1] if level else ()
                yield (*above, *filter(None, name[level:].split("."))), []


def _file(root: Path, parts: tuple[str, ...]) -> str | None:
    """The file of a module or package of the project; the folder of a package that has no `__init__.py`."""
    if not parts or parts[0] not in _TOP:
        return None
    place = root.joinpath(*parts)
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if path.is_file():
            return path.relative_to(root).as_posix()
    return place.relative_to(root).as_posix() if place.is_dir() else None


def room(file: str) -> str:
    """The room of a file: the longest that it lies in, or its top folder."""
    rooms = [name for name in ROOMS if f"{file}/".startswith(f"{name}/")]
    return max(rooms, key=len, default=file.split("/")[0])


def is_step(file: str) -> bool:
    """Whether a file is a step, with a command line: those directly in steps/ are."""
    return file.startswith("steps/") and file.count("/") == 1 and not file.endswith("__init__.py")


def wrong_arrows(found: Mapping[str, set[str]]) -> list[str]:
    """The imports that no rule allows."""
    wrong = []
    for file, imported in found.items():
        ours = room(file)
        if ours == "tests":
            continue
        for other in sorted(imported - EXCEPTIONS.get(file, set())):
            theirs = room(other)
            if is_step(other) or (theirs != ours and theirs not in ALLOWED[ours]):
                wrong.append(f"{file} imports {other}")
    return wrong


def circles(found: Mapping[str, set[str]]) -> list[str]:
    """A circle of imports for each file that one leads back to, if any."""
    done: set[str] = set()
    wrong = []

    def follow(file: str, way: list[str]) -> None:
        if file in way:
            wrong.append(" -> ".join([*way[way.index(file) :], file]))
        elif file not in done:
            for other in sorted(found.get(file, ())):
                follow(other, [*way, file])
            done.add(file)

    for file in sorted(found):
        follow(file, [])
    return wrong


def reachable(file: str, found: Mapping[str, set[str]], without: set[str]) -> set[str]:
    """The files that a file imports, itself included, and those that they import; not beyond those of `without`."""
    seen: set[str] = set()
    queue = [file]
    while queue:
        one = queue.pop()
        if one not in seen | without:
            seen.add(one)
            queue += found.get(one, ())
    return seen
