"""What the documentation tells people to type works: commands are run, configurations are read."""

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml

import fitune
from disturbed_run import predict_nothing
from docs.configuration_keys import PAGES as PAGES_OF_KEYS
from docs.configuration_keys import page as keys_page
from docs.site_pages import with_tables
from fitune.cli.app import SCRIPT_VERB, app, main
from fitune.config import read_config
from fitune.run.sweep import read_sweep
from tiny_run import save_tiny_model, write_dialogues

ROOT = Path(__file__).parent.parent
READMES = [ROOT / "README.md", ROOT / "README_zh.md"]
PAGES = [*READMES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = {
    "fitune demo": "cli/test_demo.py",
    "fitune board": "board/test_access.py",
    "fitune chat runs/first": "cli/test_chat.py",
    "fitune chat first": "cli/test_chat.py",
    'fitune chat first --base --system "Answer briefly."': "cli/test_chat.py",
    "fitune export runs/first --to gguf --quantise q8_0 -o exported-gguf": "cli/test_chat.py",
    "fitune export first --to gguf --quantise q8_0 -o first-gguf": "cli/test_chat.py",
    "fitune sweep three.yaml": "training/test_sweep.py",
    "torchrun --nproc_per_node 2 -m fitune train sft.yaml": "distributed/test_ranks.py",
    "torchrun --nproc_per_node 2 -m fitune train sft.yaml model.shard=full": "distributed/test_sharded_runs.py",
}  # commands that are too slow for here, or need another tokenizer or a terminal, and the test that runs them


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def commands(page: Path) -> list[str]:
    return [line for block in blocks(page, "sh") for line in block.splitlines() if line]


def page_name(page: Path) -> str:
    return page.name


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("docs") / "my-model")


@pytest.fixture
def place(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a reader stands: their model, their data, their scripts, their active environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FITUNE_CACHE", str(model.parent / "cache"))  # of all pages
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    monkeypatch.setenv("PATH", path)
    for script in (ROOT / "tests" / "scripts").glob("*.py"):
        shutil.copy(script, tmp_path)
    (tmp_path / "train.log").write_text("CUDA out of memory. Tried to allocate 1.50 GiB.")
    (tmp_path / "my-model").symlink_to(model)
    for seed, name in enumerate(("sft.jsonl", "more.jsonl")):
        write_dialogues(tmp_path / name, seed=seed)
    return tmp_path


def in_chinese(page: Path) -> bool:
    return page.name.endswith(("_zh.md", ".zh.md"))


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page, marks=pytest.mark.thorough if in_chinese(page) else (), id=page_name(page)
        )
        for page in PAGES
        if page != READMES[1]
    ],
)
def test_every_command_works_in_the_order_in_which_it_is_read(
    page: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if page != READMES[0]:  # one page of runs that are planned is enough
        predict_nothing(monkeypatch)
    for block in [*blocks(page, "yaml"), *blocks(page, "yml")]:  # ours, and other tools'
        if match := re.match(r"# (\S+\.yaml)\n", block):
            (place / match[1]).write_text(block, encoding="utf-8")
    for command in commands(page):
        if command in ELSEWHERE:
            assert f'"{command.split()[1]}"' in (ROOT / "tests" / ELSEWHERE[command]).read_text()
            continue
        program, *arguments = shlex.split(command)
        assert program == "fitune", f"{page.name}: nothing runs '{command}'"
        assert main(arguments) == 0, command


def test_the_python_example_runs(place: Path) -> None:
    (config,) = blocks(READMES[0], "yaml")
    (place / "sft.yaml").write_text(config, encoding="utf-8")
    (code,) = blocks(READMES[0], "python")
    namespace: dict[str, object] = {}
    exec(code, namespace)
    assert namespace["fitune"] is fitune


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_configuration_is_valid(page: Path) -> None:
    for block in blocks(page, "yaml"):
        read_config(yaml.safe_load(block))


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.yaml")), ids=page_name)
def test_every_example_is_valid(path: Path) -> None:
    is_sweep = "sweep" in yaml.safe_load(path.read_text())
    configs = (
        [entry.config for entry in read_sweep(path).entries]
        if is_sweep
        else [read_config(path).config]
    )
    assert all(
        config.model.tokenizer is not None or config.model.source.endswith(".gguf")
        for config in configs
    )


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_make_target_exists(page: Path) -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert (
        set(re.findall(r"\bmake (\w+)\b(?=`|$)", page.read_text(encoding="utf-8"), re.MULTILINE))
        <= targets
    )


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_link_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_test_that_is_named_exists(page: Path) -> None:
    for file, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text(encoding="utf-8")):
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), test


def test_make_test_holds_every_promise() -> None:
    """A test of which only some cases are marked `thorough` runs in `make test`, too."""
    promises = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", promises)
    assert len(named) > 30
    left_out = "@pytest.mark.thorough\n(?:@.*\n)*"
    assert [
        test
        for file, test in named
        if re.search(rf"{left_out}def {test}\(", (ROOT / file).read_text(encoding="utf-8"))
    ] == []


def test_both_readmes_say_the_same() -> None:
    english, chinese = READMES
    assert commands(english) == commands(chinese)
    assert blocks(english, "python") == blocks(chinese, "python")
    shapes = [
        re.findall(r"^(#+ |\||    (?=\S)|- )", page.read_text(encoding="utf-8"), re.MULTILINE)
        for page in READMES
    ]
    assert shapes[0] == shapes[1]
    configurations = [[yaml.safe_load(block) for block in blocks(page, "yaml")] for page in READMES]
    assert configurations[0] == configurations[1]


@pytest.mark.parametrize("chinese", sorted((ROOT / "docs").glob("*.zh.md")), ids=page_name)
def test_a_chinese_page_has_the_commands_and_the_shape_of_the_english_one(chinese: Path) -> None:
    english = chinese.with_name(chinese.name.replace(".zh.md", ".md"))
    assert commands(chinese) == commands(english)
    assert blocks(chinese, "yml") == blocks(english, "yml")
    pages = [
        with_tables(page.read_text(encoding="utf-8"), ROOT / "docs") for page in (chinese, english)
    ]
    shapes = [re.findall(r"^(#+ |\||- )", page, re.MULTILINE) for page in pages]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("language", PAGES_OF_KEYS)
def test_the_page_of_configuration_keys_is_that_of_the_schema(language: str) -> None:
    written = (ROOT / "docs" / PAGES_OF_KEYS[language]).read_text(encoding="utf-8")
    assert written == keys_page(language), "python docs/configuration_keys.py writes it"
    missing = [
        line for line in written.splitlines() if line.startswith("| `") and line.endswith("|  |")
    ]
    assert missing == []


def test_the_readme_names_every_verb() -> None:
    shown = {shlex.split(command)[1] for command in commands(READMES[0])}
    assert shown | {SCRIPT_VERB} == {verb for verb in app if not verb.startswith("-")}


def test_the_documentation_speaks_of_nothing_but_fitune() -> None:
    for page in PAGES:
        assert not re.search(r"/(?:work|root|tmp)/", page.read_text(encoding="utf-8")), page.name


@pytest.mark.parametrize(
    ("page", "language"),
    [
        pytest.param(READMES[0], "en", id="en"),
        pytest.param(READMES[1], "zh", id="zh", marks=pytest.mark.thorough),
    ],
)
@pytest.mark.parametrize(
    "words", [[], ["batch.effective=16", "batch.micro=6"]], ids=["open", "own"]
)
def test_the_plans_that_readme_shows_are_those_that_are_made(
    page: Path,
    language: str,
    words: list[str],
    planned: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(planned))
    monkeypatch.setenv("FITUNE_LANG", language)
    assert main(["plan", "minimind2", "--gpu", "RTX 4090", *words]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    told = [lines[0], *(line for line in lines if re.match(r"\d[* ]", line))]
    shown = {" ".join(line.split()) for line in page.read_text(encoding="utf-8").splitlines()}
    assert len(told) >= 3  # the answer, the fastest and the leanest
    assert [line for line in told if line not in shown] == []


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of plans, which both languages share."""
    return tmp_path_factory.mktemp("planned")


def test_the_pictures_of_readme_are_small_and_there() -> None:
    for page in READMES:
        pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
        assert pictures == ["docs/plan.png", "docs/report.png"]
        assert all(0 < (ROOT / picture).stat().st_size < 200_000 for picture in pictures)
