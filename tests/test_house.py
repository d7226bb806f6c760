"""The order of the house: imports point down, rooms own their nouns, and measures of the code may only fall."""

import ast
import io
import json
import subprocess
import sys
import tokenize
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "fitune"
MODULES = sorted(SOURCE.rglob("*.py"))
#: A room may import the rooms of lower floors alone.
FLOORS = {
    "errors": 0, "units": 0,
    "boundary": 1, "display": 1, "importing": 1, "language": 1, "optimizers": 1, "plain_files": 1,
    "recorder": 2,
    "config": 3, "machine": 3,
    "data": 4, "run": 4,
    "model": 5,
    "distributed": 6, "objectives": 6,
    "batch_size": 7,
    "step": 8,
    "trace": 9,
    "allocator": 10,
    "planning": 11, "recovery": 11, "watch": 11,
    "training": 12,
    "integrations": 13, "report": 13,
    "board": 14,
    "cli": 15,
}  # fmt: skip
#: What stands outside of the rooms: the public verbs, and `python -m fitune`.
OUTSIDE = {"__init__", "__main__"}
#: They are imported before anything is known to be worth the seconds that torch takes.
WITHOUT_TORCH = (
    "allocator/", "boundary.py", "config/", "errors.py", "importing.py", "machine/cards.py", "machine/cuda_driver.py",
    "machine/devices.py", "machine/environment.py", "machine/libc.py", "machine/nvml.py", "machine/threads.py",
    "planning/plan.py", "report/", "run/", "recorder/events.py", "training/session.py", "units.py",
)  # fmt: skip
HEAVY = {"torch", "transformers", "datasets", "peft", "accelerate"}
FORBIDDEN_NAMES = {"utils", "common", "helpers", "misc", "base", "core", "manager"}
#: The allocator's rules stand in one file, which is read as a whole.
MOST_LINES, LONG_FILES = 500, {"allocator/rules.py"}
CEILINGS = ROOT / "tests" / "house.toml"


def name(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def room(path: Path) -> str:
    return name(path).split("/")[0].removesuffix(".py")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Dotted names that the module imports, those that it gives to `import_module` among them."""
    for node in tree(path).body if top_level_only else ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (word.value for word in node.args if isinstance(word, ast.Constant))


def mentioned(path: Path) -> Iterator[str]:
    """Dotted names of modules of fitune that stand in the module as text."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            words = node.value.split(".")
            if (
                words[0] == "fitune"
                and len(words) > 2
                and node.value.replace(".", "").isidentifier()
            ):
                yield node.value


def test_every_room_has_its_floor() -> None:
    assert {room(path) for path in MODULES} - OUTSIDE == set(FLOORS)


def test_imports_point_down() -> None:
    """Those inside of functions, by `import_module` and by a name in quotes too."""
    wrong = [
        f"{name(path)} imports {imported}"
        for path in MODULES
        if room(path) not in OUTSIDE
        for imported in {*imports(path), *mentioned(path)}
        if imported.startswith("fitune.")
        and (target := imported.split(".")[1]) in FLOORS
        and target != room(path)
        if FLOORS[target] >= FLOORS[room(path)]
    ]
    assert wrong == []


def test_no_circles_between_modules() -> None:
    graph = {}
    for path in MODULES:
        if room(path) in OUTSIDE:
            continue
        own = name(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        targets = {
            imported.removeprefix("fitune.")
            for imported in imports(path)
            if imported.startswith("fitune.")
        }
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


def test_no_public_noun_is_defined_in_two_rooms() -> None:
    """A command of the command line has the name of what it does, which is defined where it is done."""
    homes = defaultdict(set)
    for path in MODULES:
        for node in tree(path).body if room(path) != "cli" else ():
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                homes[node.name].add(room(path))
    assert {
        noun: rooms for noun, rooms in homes.items() if len(rooms) > 1 and not rooms & OUTSIDE
    } == {}


def test_some_modules_import_nothing_heavy() -> None:
    wrong = [
        (name(path), imported)
        for path in MODULES
        if name(path).startswith(WITHOUT_TORCH)
        for imported in imports(path, top_level_only=True)
        if imported.split(".")[0] in HEAVY
    ]
    assert wrong == []


def test_the_commands_import_nothing_heavy_at_their_top() -> None:
    commands = [path for path in MODULES if room(path) == "cli"]
    assert [
        name(p)
        for p in commands
        if HEAVY & {i.split(".")[0] for i in imports(p, top_level_only=True)}
    ] == []


def test_what_measures_fitune_is_no_part_of_it() -> None:
    assert [
        name(p)
        for p in MODULES
        if {"rehearsal", "benchmarks"} & {i.split(".")[0] for i in imports(p)}
    ] == []


def test_only_the_commands_show_text_and_by_way_of_output_alone() -> None:
    """Which makes text from outside printable: control characters in it never reach a terminal."""
    wrong = []
    for path in MODULES:
        calls = {
            getattr(node.func, "id", "")
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Call)
        }
        consoles = [each for each in imports(path) if each.endswith(".Console")]
        if name(path) != "cli/output.py" and ("print" in calls or consoles):
            wrong.append(name(path))
    assert wrong == []


def test_no_module_is_named_after_nothing() -> None:
    assert [name(path) for path in MODULES if path.stem in FORBIDDEN_NAMES] == []


def test_no_file_is_too_long_to_be_read() -> None:
    long = {
        name(path): lines
        for path in MODULES
        if (lines := len(path.read_text().splitlines())) > MOST_LINES
    }
    assert {file: lines for file, lines in long.items() if file not in LONG_FILES} == {}


def test_the_measures_of_the_code_only_fall() -> None:
    """tests/house.toml has the ceilings. `python tests/test_house.py` writes today's measures there, where they are
    lower."""
    ceilings = tomllib.loads(CEILINGS.read_text())
    assert {key: value for key, value in measures().items() if value > ceilings[key]} == {}


def measures() -> dict[str, int]:
    texts = [path.read_text(encoding="utf-8") for path in MODULES]
    found = _ruff()
    return {
        "tokens_of_code": sum(map(_num_tokens, MODULES)),
        "lines_over_100_columns": sum(
            len(line) > 100 for text in texts for line in text.splitlines()
        ),
        "functions_with_mccabe_over_10": found["C901"],
        "functions_with_more_than_6_parameters": found["PLR0913"],
        "imports_inside_functions": found["PLC0415"],
        "functions_that_take_the_configuration": sum(map(_takes_configuration, _functions())),
        "modules_that_know_the_configuration": sum(
            "RunConfig" in path.read_text(encoding="utf-8")
            for path in MODULES
            if not name(path).startswith("config/")
        ),
        "any_in_annotations": sum(
            isinstance(node, ast.Name) and node.id == "Any"
            for path in MODULES
            for node in ast.walk(tree(path))
        ),
    }


def _functions() -> Iterator[ast.FunctionDef]:
    for path in MODULES:
        yield from (node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef))


def _takes_configuration(function: ast.FunctionDef) -> bool:
    """Whether it takes a whole RunConfig, where most functions need one section or two values of it."""
    arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    return any("RunConfig" in ast.unparse(each.annotation) for each in arguments if each.annotation)


def _num_tokens(path: Path) -> int:
    """Of the code, without comments and docstrings."""
    docstrings = set()
    for node in ast.walk(tree(path)):
        for statement in (
            getattr(node, "body", None) or []
            if not isinstance(node, ast.Lambda | ast.IfExp)
            else []
        ):
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                docstrings.update(range(statement.lineno, (statement.end_lineno or 0) + 1))
    skipped = {
        tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
    }  # fmt: skip
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    return sum(token.type not in skipped and token.start[0] not in docstrings for token in tokens)


def _ruff() -> Counter[str]:
    options = ["--config", "lint.mccabe.max-complexity=10", "--config", "lint.pylint.max-args=6"]
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--select",
        "C901,PLR0913,PLC0415",
        "--output-format",
        "json",
    ]
    done = subprocess.run(
        [*command, *options, str(SOURCE)], capture_output=True, text=True, cwd=ROOT
    )
    return Counter(each["code"] for each in json.loads(done.stdout))


if __name__ == "__main__":
    now = measures()
    before = now | (tomllib.loads(CEILINGS.read_text()) if CEILINGS.exists() else {})
    lines = [f"{key} = {min(value, before[key])}" for key, value in now.items()]
    CEILINGS.write_text(
        "# What tests/test_house.py measures; each may only fall.\n" + "\n".join(lines) + "\n"
    )
