"""The documentation builds as a site, in two languages, without a warning, and needs nothing from elsewhere."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("mkdocs", "material", "mkdocs_static_i18n")
pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in PACKAGES),
    reason="mkdocs-material is not installed",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(directory),
    ]
    built = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return directory


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def test_every_page_is_there_in_both_languages(site: Path) -> None:
    names = {page.name.split(".")[0] for page in (ROOT / "docs").glob("*.md")} - {"index"}
    for directory in (site, site / "zh"):
        assert {page.parent.name for page in directory.glob("*/index.html")} - {"zh"} == names


def test_the_first_page_is_the_readme(site: Path) -> None:
    assert "make demo" in text(site / "index.html")
    assert "第一次运行" in text(site / "zh" / "index.html")
    assert 'href="memory/"' in text(site / "index.html")


def test_the_guide_from_other_tools_is_in_chinese_too(site: Path) -> None:
    assert "Coming from another tool</h1>" not in text(
        site / "zh" / "from_other_tools" / "index.html"
    )
    assert "从其他工具转来" in text(site / "zh" / "from_other_tools" / "index.html")


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    loaded = r'<(?:script|img|iframe)[^>]+src="(?:https?:)?//|<link[^>]+rel="(?:stylesheet|preconnect)"[^>]+href="http'
    assert not [page for page in site.rglob("*.html") if re.search(loaded, text(page))]
