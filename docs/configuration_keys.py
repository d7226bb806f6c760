"""The page of all configuration keys, in both languages, from the schema that reads the configuration.

python docs/configuration_keys.py     docs/configuration.md and docs/configuration.zh.md
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fitune.config import RunConfig
from fitune.config.aliases import ALIASES
from fitune.config.wording import describe_fault
from fitune.language import choose_language, translated

DOCS = Path(__file__).parent
PAGES = {"en": "configuration.md", "zh": "configuration.zh.md"}
HEADS = {
    "en": """# All configuration keys

Every key stands in a YAML file or, as `key.sub=value`, on the command line: `fitune train sft.yaml optim.lr=1e-5`.
Only `model.source` and `data.train` have no default. An unknown key is refused, with the one that was meant; `auto` is
decided by the plan. `fitune train sft.yaml --print-config` prints all of them with the origin of each value,
`fitune config schema` the JSON schema for an editor. `python docs/configuration_keys.py` writes this page.

""",
    "zh": """# 所有配置键

每个键都可以写在 YAML 文件里，或以 `key.sub=value` 写在命令行上：`fitune train sft.yaml optim.lr=1e-5`。
只有 `model.source` 和 `data.train` 没有默认值。不认识的键会被拒绝，并指出想写的可能是哪个；`auto` 由规划决定。
`fitune train sft.yaml --print-config` 打印所有键以及每个值的来源，
`fitune config schema` 打印供编辑器使用的 JSON schema。
本页由 `python docs/configuration_keys.py` 写成。

""",
}
OTHER_NAMES = {
    "en": (
        "## Other names",
        "",
        "The words of transformers and peft are accepted in place of the keys, in files and on the command line. A key",
        "and its other name beside each other are refused. `model.gradient_checkpointing` may be true (full) or false",
        "(off) too.",
        "",
        "| other name | key |",
        "|---|---|",
    ),
    "zh": (
        "## 其他名称",
        "",
        "transformers 和 peft 的叫法也可以代替这些键，写在文件里或命令行上。同时写一个键和它的其他名称会被拒绝。",
        "`model.gradient_checkpointing` 也可以是 true（即 full）或 false（即 off）。",
        "",
        "| 其他名称 | 键 |",
        "|---|---|",
    ),
}
COLUMNS = {"en": ("key", "default", "values", "what it is"), "zh": ("键", "默认值", "取值", "含义")}


def page(language: str) -> str:
    before = os.environ.get("FITUNE_LANG")
    os.environ["FITUNE_LANG"] = language
    try:
        return HEADS[language] + "\n".join(_tables(language)) + "\n"
    finally:
        if before is None:
            del os.environ["FITUNE_LANG"]
        else:
            os.environ["FITUNE_LANG"] = before


def _tables(language: str) -> Iterator[str]:
    schema = RunConfig.model_json_schema()
    head = [f"| {' | '.join(COLUMNS[language])} |", "|---|---|---|---|"]
    alone = []
    for name, content in schema["properties"].items():
        if "$ref" not in content:
            alone.append(_row(name, content, schema["$defs"]))
            continue
        definition = _definition(content, schema["$defs"])
        yield "\n".join([f"## {name}", "", *head, *_rows(name, definition, schema["$defs"]), ""])
    if alone:
        yield "\n".join([f"## {'Others' if language == 'en' else '其他'}", "", *head, *alone, ""])
    yield "\n".join(
        [*OTHER_NAMES[language], *(f"| `{alias}` | `{key}` |" for alias, key in ALIASES.items())]
    )


def _definition(content: Any, definitions: Any) -> Any:
    return definitions[content["$ref"].rpartition("/")[2]]


def _rows(prefix: str, section: Any, definitions: Any) -> Iterator[str]:
    for name, content in section["properties"].items():
        key = f"{prefix}.{name}"
        if "$ref" in content:
            yield from _rows(key, _definition(content, definitions), definitions)
        else:
            yield _row(key, content, definitions)


def _row(key: str, content: Any, definitions: Any) -> str:
    default = content.get("default")
    shown = "" if "default" not in content else f"`{_yaml(default)}`"
    return f"| `{key}` | {shown} | {_cell(_values(content, definitions))} | {_cell(content.get('description', ''))} |"


def _values(content: Any, definitions: Any) -> str:
    branches = content.get("anyOf", [content])
    items = [branch.get("items", {}) for branch in branches]
    if any("$ref" in branch for branch in (*branches, *items)):
        return "text or a list"  # the sources of data.train, as a path or with keys of their own
    return describe_fault(content)


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return str(value)


def _cell(text: str) -> str:
    told = translated(text)
    return told.replace(" or ", " 或 ") if choose_language() == "zh" else told


def main() -> None:
    for language, name in PAGES.items():
        (DOCS / name).write_text(page(language), encoding="utf-8")


if __name__ == "__main__":
    main()
