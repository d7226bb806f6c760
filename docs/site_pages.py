"""What the site shows otherwise than the files: the first page is the README, what lies outside of docs/ is named and
not linked, and a Chinese page shows the measured tables of the English one, which a benchmark writes."""

import re
from pathlib import Path
from typing import Any

README = {"index.md": "README.md", "index.zh.md": "README_zh.md"}
TABLE = re.compile(r"<!-- table of (\w+\.md): ([\w.]+) -->")
LINK = re.compile(r"\[([^\]]+)\]\(([^)#:]+)\)")


def with_tables(markdown: str, pages: Path) -> str:
    """`<!-- table of PAGE: NAME -->` becomes what stands in PAGE between `<!-- NAME: begin -->` and its end."""

    def table(asked: re.Match[str]) -> str:
        written = (pages / asked[1]).read_text(encoding="utf-8")
        found = re.search(
            rf"<!-- {asked[2]}:[^\n]*-->\n(.*?)\n<!-- (?:{asked[2]}: end|end of {asked[2]}) -->",
            written,
            re.S,
        )
        if found is None:
            raise ValueError(f"{asked[1]} has no table {asked[2]}")
        return found[1]

    return TABLE.sub(table, markdown)


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    pages = Path(config.docs_dir)
    if page.file.src_uri in README:
        markdown = (pages.parent / README[page.file.src_uri]).read_text(encoding="utf-8")
        markdown = re.sub(r"\[(?:docs/)?([^\]]+)\]\(docs/", r"[\1](", markdown)

    markdown = with_tables(markdown, pages)

    def kept(link: re.Match[str]) -> str:
        file = (pages / link[2]).resolve()
        return link[0] if file.is_file() and file.is_relative_to(pages) else f"`{link[1]}`"

    return LINK.sub(kept, markdown)
