"""What the site shows otherwise than the files: the first page is the README, and what lies outside of docs/ is named
and not linked."""

import re
from pathlib import Path
from typing import Any

README = {"index.md": "README.md", "index.zh.md": "README_zh.md"}
LINK = re.compile(r"\[([^\]]+)\]\(([^)#:]+)\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    pages = Path(config.docs_dir)
    if page.file.src_uri in README:
        markdown = (pages.parent / README[page.file.src_uri]).read_text(encoding="utf-8")
        markdown = re.sub(r"\[(?:docs/)?([^\]]+)\]\(docs/", r"[\1](", markdown)

    def kept(link: re.Match[str]) -> str:
        file = (pages / link[2]).resolve()
        return link[0] if file.is_file() and file.is_relative_to(pages) else f"`{link[1]}`"

    return LINK.sub(kept, markdown)
