"""The directions of the house: imports point down, floors do not circle, and some rooms stay free of torch."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "fitune"
FLOORS = {
    "errors": 0,
    "optimizers": 1, "boundary": 1, "units": 1, "hub": 1, "importing": 1, "language": 1, "threads": 1,
    "config": 2,
    "model": 3, "data": 3, "run": 3,
    "step": 4, "recovery": 5, "trace": 5, "memory": 6, "plan": 7,
    "train": 8, "report": 8, "integrations": 9,
    "cli": 10,
}  # fmt: skip
WITHOUT_TORCH = (
    "memory/",
    "report/",
    "run/",
    "plan/plan.py",
    "trace/events.py",
    "config/",
    "errors.py",
    "boundary.py",
    "units.py",
    "hub.py",
    "importing.py",
    "threads.py",
)
HEAVY = {"torch", "transformers", "datasets", "peft", "accelerate"}
FORBIDDEN_NAMES = {"utils", "common", "helpers", "misc", "base", "core", "manager"}
MODULES = sorted(SOURCE.rglob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(path: Path) -> str:
    return name(path).split("/")[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_point_down(path: Path) -> None:
    if room(path) not in FLOORS:  # fitune/__init__.py and __main__.py stand outside the house
        assert room(path) in {"__init__", "__main__"}
        return
    for imported in imports(path):
        parts = imported.split(".")
        if parts[0] != "fitune" or len(parts) < 2 or parts[1] not in FLOORS or parts[1] == room(path):
            continue
        assert FLOORS[parts[1]] < FLOORS[room(path)], f"{name(path)} imports {imported}"


@pytest.mark.parametrize("path", [p for p in MODULES if name(p).startswith(WITHOUT_TORCH)], ids=name)
def test_some_rooms_import_no_torch(path: Path) -> None:
    assert not {imported.split(".")[0] for imported in imports(path)} & HEAVY


@pytest.mark.parametrize("path", [p for p in MODULES if name(p).startswith("cli/")], ids=name)
def test_the_commands_import_nothing_heavy_at_their_top(path: Path) -> None:
    top = {imported.split(".")[0] for imported in imports(path, top_level_only=True)}
    assert not top & HEAVY


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_what_measures_fitune_is_no_part_of_it(path: Path) -> None:
    assert not {imported.split(".")[0] for imported in imports(path)} & {"rehearsal", "benchmarks"}


def test_no_circles_between_modules() -> None:
    graph = {}
    for path in MODULES:
        own = name(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        targets = {imported.removeprefix("fitune.") for imported in imports(path) if imported.startswith("fitune.")}
        graph[own] = targets | {target.rpartition(".")[0] for target in targets}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"circle: {' -> '.join((*trail, module))}"
        if module in done or module not in graph:
            return
        for target in graph[module] - {module}:
            visit(target, (*trail, module))
        done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", [p for p in MODULES if not name(p).startswith("cli/")], ids=name)
def test_only_the_commands_print(path: Path) -> None:
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not [call.id for call in calls if isinstance(call, ast.Name) and call.id == "print"]


@pytest.mark.parametrize(
    "path", [p for p in MODULES if name(p).startswith("cli/") and name(p) != "cli/output.py"], ids=name
)
def test_the_commands_show_text_by_way_of_output_alone(path: Path) -> None:
    """Which makes text from outside printable: control characters in it never reach a terminal."""
    assert not [imported for imported in imports(path) if imported.endswith(".Console")]
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not [call.id for call in calls if isinstance(call, ast.Name) and call.id == "print"]


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_a_module_says_what_it_is(path: Path) -> None:
    assert path.stem not in FORBIDDEN_NAMES
