"""Translate the data of another tool's configuration: sources, columns, template and loss mask."""

import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from fitune.boundary import parse_json
from fitune.config.importers.draft import Draft, is_off, preference_kind, without
from fitune.config.text_files import decode, read_bounded
from fitune.config.wording import format_value
from fitune.config.yaml_lines import parse_yaml
from fitune.errors import ConfigError
from fitune.plain_files import read_plain

_TOO_LONG = {
    "drop": "drop", "delete": "drop", "truncate": "truncate", "right": "truncate", "truncation_right": "truncate",
    "split": "split",
}  # fmt: skip

# Options of an axolotl source whose values describe what fitune does anyway. A format (`type` as a
# single word) is not listed: fitune recognises it by the keys of the samples.
_KNOWN_SOURCE_OPTIONS: Mapping[str, tuple[object, ...]] = {
    "split": ("train",),
    "roles_to_train": (["assistant"], ["gpt"], ["assistant", "gpt"], ["gpt", "assistant"]),
    "train_on_eos": ("turn",),
    "field_messages": ("messages", "conversations"),
    "chat_template": ("tokenizer_default",),
}
#: axolotl's names for formats of preference and reward data.
_PREFERENCE_TYPES = re.compile(
    r"(bradley_terry|stepwise_supervised|reward|kto|orpo|ipo|dpo|grpo)\b|user_defined\.default|"
    r"(chatml|llama3|zephyr|passthrough)\.(argilla\w*|icr|intel|prompt_pairs|ultra|nectar|chat|default)"
)
#: Column names that fitune recognises without being told, by our name of the column.
_SAME_NAMES = {
    "messages": ("messages", "conversations"), "role": ("role", "from"), "content": ("content", "value"),
    "tools": ("tools",), "system": ("system",), "text": ("text",),
}  # fmt: skip
_ONLY_WHOLE_SOURCES = (
    "samples are read from a hub's split 'train' and default subset: "
    "save those samples to a file and give it with --data"
)


def put_data(draft: Draft) -> None:
    train = draft.value("data.train")
    if train is None or is_off(train):
        raise ConfigError([f"{draft.arguments.source} names no training data: give it with --data"])
    draft.argument("dataset_dir")
    max_rows = draft.value("data.max_rows")
    if max_rows is not None and (not isinstance(max_rows, int) or max_rows < 1):
        max_rows = None  # ms-swift 2 writes -1 for "all samples"
    given = draft.given_elsewhere.get("data.train")
    if given is None:
        _refuse_subsets(draft)
    else:
        parts = ("dataset_config", "dataset_train_split", "dataset_dir")
        draft.reasons |= dict.fromkeys(parts, "other data was given with the import")
    draft.write("data.train", _sources(draft, train, max_rows) if given is None else given)
    if given is None:
        _put_columns(draft)
    if given is None and max_rows is not None:
        draft.origin(str(draft.name("data.max_rows")))
    _held_out(draft, max_rows)
    _put_texts(draft)
    _put_too_long(draft)
    _put_template(draft)


def _put_columns(draft: Draft) -> None:
    """Write data.columns if all sources use the same column names, else report the difference."""
    all_columns = [columns for columns, _ in draft.columns]
    if not any(all_columns):
        return
    if all(columns == all_columns[0] for columns in all_columns):
        for ours, theirs in all_columns[0].items():
            draft.write(f"data.columns.{ours}", theirs, draft.columns[0][1])
        return
    for columns, where in draft.columns:
        words = ", ".join(f"{ours}={theirs}" for ours, theirs in columns.items())
        if words:
            draft.differs.append(
                f"{where}: columns {words}: data.columns is one for all sources: rename them there"
            )


def _refuse_subsets(draft: Draft) -> None:
    if draft.argument("dataset_train_split", "train") != "train":
        raise draft.refuse("dataset_train_split", _ONLY_WHOLE_SOURCES)
    if draft.argument("dataset_config", "default") != "default":
        raise draft.refuse("dataset_config", _ONLY_WHOLE_SOURCES)


def _held_out(draft: Draft, max_rows: int | None) -> None:
    held_out, fraction = draft.value("data.eval"), draft.value("data.eval_fraction")
    if held_out and not is_off(held_out):
        draft.write("data.eval", _sources(draft, held_out, max_rows))
    elif isinstance(fraction, int) and fraction > 1:
        name = str(draft.name("data.eval_fraction"))
        draft.write("eval.max_rows", fraction, draft.quoted(name))
        draft.differs.append(
            f"{draft.quoted(name)} samples held out: here a share is; eval.max_rows keeps at most as many"
        )
    else:
        draft.write("data.eval_fraction", fraction)
    strategy = draft.argument("eval_strategy", "no")
    if draft.tool == "TRL" and not is_off(strategy) and "data.train" not in draft.given_elsewhere:
        draft.argument("dataset_test_split")
        draft.differs.append(
            f"{draft.quoted('eval_strategy')}: TRL evaluates on the split "
            f"{draft.arguments.values.get('dataset_test_split', 'test')} of the data; here give "
            "data.eval, or samples "
            "are held out with data.eval_fraction"
        )


def _sources(draft: Draft, named: object, max_rows: object) -> object:
    """Return the value of data.train or data.eval: a path, or a list of paths with sample limits.

    named: the other tool's value. Names of LLaMA-Factory's data sets are looked up in its
    dataset_info.json.
    """
    items: object = (
        [part.strip() for part in named.split(",")]
        if isinstance(named, str) and "," in named
        else named
    )
    items = items if isinstance(items, list) else [items]
    sources: list[object] = [path for item in items for path in _paths(draft, item)]
    if max_rows is not None:
        sources = [{"path": source, "max_rows": max_rows} for source in sources]
    return sources[0] if len(sources) == 1 and isinstance(sources[0], str) else sources


def _paths(draft: Draft, item: object) -> list[str]:
    """Return the paths of one entry of a tool's list of data.

    item: a path, the name of a LLaMA-Factory data set, or a mapping of axolotl or TRL.
    """
    if isinstance(item, Mapping):
        return _paths_of_mapping(draft, item)
    if not isinstance(item, str):
        raise ConfigError(
            [
                f"{draft.arguments.source}: {format_value(item)} is no path of data: give it with --data"
            ]
        )
    if draft.tool.startswith("ms-swift") and (
        match := re.fullmatch(r"(\w[^:\\]*):([^/#]+(?:/[^/#]+)*)(#\d+)?", item)
    ):
        if match[2] != "default":
            raise ConfigError([f"{draft.arguments.source}: the data {item}: {_ONLY_WHOLE_SOURCES}"])
        return [match[1] + (match[3] or "")]
    if draft.tool == "LLaMA-Factory v1" and item.endswith((".yaml", ".yml")):
        return _paths_from_v1_yaml(draft, Path(item))
    if draft.tool != "LLaMA-Factory" or PurePath(item).suffix:
        draft.columns.append(({}, item))
        return [item]
    return [_path_from_dataset_info(draft, item)]


def _paths_of_mapping(draft: Draft, item: Mapping[str, object]) -> list[str]:
    path, files = item.get("path"), item.get("data_files")
    options = without(item, "path", "data_files", "ds_type")
    options = {
        key: value for key, value in options.items() if value is not None and not is_off(value)
    }
    options = {
        key: value
        for key, value in options.items()
        if value not in _KNOWN_SOURCE_OPTIONS.get(key, ())
    }
    _refuse_axolotl_source(draft, path, item)
    columns = _pop_axolotl_columns(options)
    if isinstance(options.get("type"), str):
        draft.types.add(options.pop("type"))
    for key in ("split", "name", "shards", "shards_idx", "dataset_shard_num"):
        if key in options:
            raise ConfigError(
                [
                    f"{draft.arguments.source}: the data {path}, {key} {format_value(options[key])}: "
                    f"{_ONLY_WHOLE_SOURCES}"
                ]
            )
    if options:
        words = ", ".join(f"{key} {format_value(value)}" for key, value in options.items())
        draft.differs.append(
            f"data {path}: {words}: all samples are read and their format is told by their keys"
        )
    found = _paths_of_entry(draft, path, files)
    draft.columns[-len(found) :] = [(columns, f"data {path}")] * len(found)
    return found


def _refuse_axolotl_source(draft: Draft, path: object, item: Mapping[str, object]) -> None:
    """Raise ConfigError if a source is not supervised data, or has a loss mask of its own."""
    kind = item.get("type")
    roles = item.get("roles_to_train")
    key = item.get("message_field_training")
    where = f"{draft.arguments.source}: the data {path}"
    trained = preference_kind(draft.arguments)
    if isinstance(kind, str) and _PREFERENCE_TYPES.match(kind) and trained is not None:
        if kind.startswith("user_defined"):
            raise ConfigError(
                [
                    f"{where}, type {format_value(kind)}: give samples with prompt, chosen and rejected"
                ]
            )
        draft.differs.append(
            f"data {path}, type {kind}: the samples' own keys are read, through the model's chat template"
        )
    elif isinstance(kind, str) and _PREFERENCE_TYPES.match(kind):
        raise ConfigError(
            [
                f"{where}, type {format_value(kind)}: only supervised fine-tuning, DPO, SimPO, ORPO and KTO are imported"
            ]
        )
    if kind == "input_output":
        raise ConfigError(
            [
                f"{where}, type {format_value(kind)}: segments with labels of their own: give samples "
                "in the messages format"
            ]
        )
    if roles is not None and roles not in _KNOWN_SOURCE_OPTIONS["roles_to_train"]:
        raise ConfigError(
            [
                f"{where}, roles_to_train {format_value(roles)}: here the assistant's messages are "
                "learned, "
                "or all with data.mask"
            ]
        )
    if key not in (None, "train", "training", "weight"):
        raise ConfigError(
            [
                f"{where}, message_field_training {format_value(key)}: call that key 'train' in the samples"
            ]
        )


def _pop_axolotl_columns(options: dict[str, Any]) -> dict[str, str]:
    """Remove the column names of a source from `options`; return {our name: its name}."""
    kind = options.get("type")
    named: dict[str, object] = {}
    if isinstance(kind, dict):
        names = {
            "field_instruction": "prompt",
            "field_output": "completion",
            "field_input": "input",
        }
        named = {
            ours: kind[theirs]
            for theirs, ours in {**names, "field_system": "system"}.items()
            if kind.get(theirs)
        }
        rest = without(kind, *names, "field_system")
        options["type"] = {key: value for key, value in rest.items() if value}
        if not options["type"]:
            del options["type"]
    else:
        mappings = options.pop("message_property_mappings", None) or {}
        fields = {
            "field_messages": "messages",
            "field_tools": "tools",
            "field_system": "system",
            "field": "text",
            "text_column": "text",
        }
        fields |= {"message_field_role": "role", "message_field_content": "content"}
        named = {ours: options.pop(theirs) for theirs, ours in fields.items() if theirs in options}
        named |= {key: value for key, value in mappings.items() if key in ("role", "content")}
    return {
        ours: theirs
        for ours, theirs in named.items()
        if isinstance(theirs, str) and theirs not in _SAME_NAMES.get(ours, ())
    }


def _paths_of_entry(draft: Draft, path: object, files: object) -> list[str]:
    if files and path in ("json", "csv", "parquet", None):
        found = [str(file) for file in files] if isinstance(files, list) else [str(files)]
        draft.columns += [({}, file) for file in found]
        return found
    if not isinstance(path, str):
        raise ConfigError(
            [
                f"{draft.arguments.source}: an entry of the data has no path: give the data with --data"
            ]
        )
    return _paths(draft, path)


def _path_from_dataset_info(draft: Draft, item: str) -> str:
    """Return the path of a data set that LLaMA-Factory's dataset_info.json lists by name.

    Returns the name itself if the list cannot be read, and adds a message to `draft.differs`.
    """
    directory = Path(str(draft.argument("dataset_dir", "data")))
    try:
        entry = parse_json(read_plain(directory / "dataset_info.json", follow=True))[item]
        path = (
            str(directory / entry["file_name"])
            if "file_name" in entry
            else str(entry["hf_hub_url"])
        )
    except (OSError, ValueError, LookupError, TypeError):
        draft.differs.append(
            f"dataset {item} is a name in {directory}/dataset_info.json, which does not tell it "
            "here: replace it in "
            "data.train by the path of the file"
        )
        return item
    where = f"{directory}/dataset_info.json, {item}"
    if entry.get("ranking") and preference_kind(draft.arguments) is None:
        raise ConfigError(
            [
                f"{where}: ranking: preferred and rejected answers are no data of supervised fine-tuning"
            ]
        )
    if entry.get("subset") or entry.get("split", "train") != "train":
        raise ConfigError([f"{where}: {_ONLY_WHOLE_SOURCES}"])
    draft.columns.append(
        (_columns_of_dataset_info(entry, where, preference_kind(draft.arguments)), where)
    )
    if others := {
        key: value for key, value in (entry.get("tags") or {}).items() if value not in _KNOWN_TAGS
    }:
        words = ", ".join(
            f"{key} {format_value(value)}"
            for key, value in others.items()
            if not key.endswith("_tag")
        )
        names = ", ".join(
            f"{key} {format_value(value)}" for key, value in others.items() if key in _ROLE_TAGS
        )
        if words or names:
            draft.differs.append(
                f"{where}: {words or names}: roles have the names that 'fitune check' knows"
            )
    sample = entry.get("num_samples")
    return f"{path}#{sample}" if isinstance(sample, int) and sample > 0 else path


_ROLE_TAGS = ("user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag")
_KNOWN_TAGS = (
    *("user", "human", "assistant", "gpt", "observation", "tool", "function_call", "system"),
    *("role", "from", "content", "value"),
)


def _columns_of_dataset_info(
    entry: Mapping[str, Any], where: str, training: str | None = None
) -> dict[str, str]:
    """Return {our name: its name} for the columns of an entry of LLaMA-Factory's list.

    training: the training on preferences, which reads chosen and rejected answers or kto_tag

    Raises ConfigError if the entry has columns that the training does not read.
    """
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    read = {None: (), "kto": ("kto_tag",)}.get(training, ("chosen", "rejected"))
    for key in ("kto_tag", "chosen", "rejected", "images", "videos", "audios"):
        if columns.get(key) and key not in read:
            way_out = "give other data with --data"
            raise ConfigError(
                [
                    f"{where}: columns: {key}: fitune trains on text and answers to imitate: {way_out}"
                ]
            )
    if entry.get("formatting") in ("sharegpt", "openai"):
        named = {
            "messages": columns.get("messages"),
            "system": columns.get("system"),
            "tools": columns.get("tools"),
        }
        named |= _judged_columns(columns)
        named |= {"role": tags.get("role_tag"), "content": tags.get("content_tag")}
        return {
            ours: theirs
            for ours, theirs in named.items()
            if theirs and theirs not in _SAME_NAMES.get(ours, (ours,))
        }
    names = {
        "prompt": ("prompt", "instruction"),
        "completion": ("response", "output"),
        "input": ("query", "input"),
    }
    named = {ours: columns.get(theirs) for ours, (theirs, _) in names.items()}
    if all(theirs in (None, names[ours][1]) for ours, theirs in named.items()):
        named = {}
    elif not columns.get("response") and not columns.get("chosen"):  # plain text
        named = {"text": columns["prompt"]} if columns.get("prompt") not in (None, "text") else {}
    named |= {ours: columns.get(ours) for ours in ("system", "history", "tools")}
    named |= _judged_columns(columns)
    return {ours: theirs for ours, theirs in named.items() if theirs and theirs != ours}


def _judged_columns(columns: Mapping[str, str]) -> dict[str, str | None]:
    """Return the columns of chosen and rejected answers and of labels, by our names."""
    label = columns.get("kto_tag")
    named = {ours: columns.get(ours) for ours in ("chosen", "rejected")}
    return named | {"label": None if label in ("kto_tag", "label") else label}


def _paths_from_v1_yaml(draft: Draft, path: Path) -> list[str]:
    """Return the paths in the YAML file with which LLaMA-Factory v1 describes its data."""
    try:
        tree = parse_yaml(decode(read_bounded(path)), str(path)).tree
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            [
                f"{draft.arguments.source} names the data in {path}, which cannot be read from here: give it with --data"
            ]
        ) from error
    entries = (
        [entry for entry in tree.values() if isinstance(entry, dict)]
        if isinstance(tree, dict)
        else []
    )
    found = []
    for entry in entries:
        source = entry.get("path")
        if not isinstance(source, str):
            raise ConfigError([f"{path}: an entry has no path of data: give the data with --data"])
        size = entry.get("size")
        found.append(f"{source}#{size}" if isinstance(size, int) and size > 0 else source)
    if not found:
        raise ConfigError([f"{path} lists no data: give it with --data"])
    return found


def _put_texts(draft: Draft) -> None:
    """Write how plain texts of another tool's pre-training become samples."""
    packing, strategy = draft.argument("packing"), draft.argument("packing_strategy")
    if draft.argument("stage") == "pt" and packing is not False:
        name = "stage" if packing is None else "packing"
        draft.write("data.wrapped", True, f"{draft.quoted(name)}: texts joined and cut")
    if packing and strategy in ("wrapped", "bfd_split", "bfd-requeue"):
        key = "data.wrapped=true" if strategy == "wrapped" else "data.too_long=split"
        draft.differs.append(
            f"{draft.quoted('packing_strategy')}: {key} does that with plain texts; conversations "
            "are not cut into several samples here"
        )
    if draft.types == {"completion"}:
        draft.write("data.too_long", "split", "type completion")
    elif "completion" in draft.types:
        draft.differs.append(
            "axolotl cuts texts of the type completion into several samples: here "
            "data.too_long=split does, in data of plain texts alone"
        )
    if "pretraining_dataset" in draft.arguments.values:
        draft.write("data.too_long", "truncate", "axolotl cuts the texts of pretraining_dataset")
        draft.differs.append(
            "axolotl joins texts up to sequence_len, and pads; here each text is a sample, packed "
            "without padding, and none sees another; data.wrapped=true joins them"
        )


def _put_too_long(draft: Draft) -> None:
    if "data.too_long" in draft.written or "data.wrapped" in draft.written:
        return
    asked = draft.value("data.too_long")
    if asked is None:
        return
    if asked in _TOO_LONG:
        draft.write("data.too_long", _TOO_LONG[asked])
    else:
        name = str(draft.name("data.too_long"))
        draft.differs.append(
            f"{draft.quoted(name)}: here longer samples are cut at their end, or dropped (data.too_long)"
        )


def _put_template(draft: Draft) -> None:
    for name in (
        "template",
        "template_type",
        "chat_template",
        "chat_template_path",
        "chat_template_jinja",
    ):
        value = draft.argument(name)
        if value is None or str(value).startswith("tokenizer_default"):
            continue
        if str(value).endswith((".jinja", ".jinja2")):
            draft.write("data.template", value, f"{draft.origin(name)} {name}")
        elif name == "chat_template_path":
            draft.differs.append(
                f"{draft.quoted(name)}: a tokenizer's directory; set data.template to a Jinja file with its template"
            )
        else:
            draft.differs.append(
                f"{draft.quoted(name)} is {draft.tool}'s own; here the tokenizer's template is "
                "used, or the Jinja file "
                "data.template: look at two samples with 'fitune check FILE --show 2'"
            )
