"""The data of another tool's configuration: where the rows are, how they are written out, what of them is learned."""

import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any, get_args

from fitune.boundary import parse_json
from fitune.config.importers.draft import Draft, is_off, without
from fitune.config.read import decode, read_bounded
from fitune.config.sections import DataConfig
from fitune.config.wording import shown
from fitune.config.yaml_lines import parse_yaml
from fitune.errors import ConfigError
from fitune.plain_files import read_plain

_TOO_LONG = {
    "drop": "drop", "delete": "drop", "truncate": "truncate", "right": "truncate", "truncation_right": "truncate",
}  # fmt: skip
_LOSS_SCALES = {"default": "assistant", "last_round": "last", "all": "all"}

# What axolotl says of a source and is so here; a format (`type` in one word) is told by the rows' keys.
_SOURCE_AS_HERE: Mapping[str, tuple[Any, ...]] = {
    "split": ("train",),
    "roles_to_train": (["assistant"], ["gpt"], ["assistant", "gpt"], ["gpt", "assistant"]),
    "train_on_eos": ("turn",),
    "field_messages": ("messages", "conversations"),
    "chat_template": ("tokenizer_default",),
}
_OTHER_TYPES = re.compile(
    r"(bradley_terry|stepwise_supervised|reward|kto|orpo|ipo|dpo|grpo)\b|user_defined\.default|"
    r"(chatml|llama3|zephyr|passthrough)\.(argilla\w*|icr|intel|prompt_pairs|ultra|nectar|chat|default)"
)
"""What axolotl calls the formats of preferences and rewards."""
_SAME_NAMES = {
    "messages": ("messages", "conversations"), "role": ("role", "from"), "content": ("content", "value"),
    "tools": ("tools",), "system": ("system",), "text": ("text",),
}  # fmt: skip
_PART = (
    "samples are read from a hub's split 'train' and default subset: "
    "save those samples to a file and give it with --data"
)


def put_data(draft: Draft) -> None:
    train = draft.take("data.train")
    if train is None or is_off(train):
        raise ConfigError([f"{draft.arguments.source} names no training data: give it with --data"])
    draft.raw("dataset_dir")
    max_rows = draft.take("data.max_rows")
    if max_rows is not None and (not isinstance(max_rows, int) or max_rows < 1):
        max_rows = None  # as ms-swift 2 writes all of them
    given = draft.given_elsewhere.get("data.train")
    if given is None:
        _refuse_parts(draft)
    else:
        parts = ("dataset_config", "dataset_train_split", "dataset_dir")
        draft.reasons |= dict.fromkeys(parts, "other data was given with the import")
    draft.put("data.train", _sources(draft, train, max_rows) if given is None else given)
    if given is None:
        _put_columns(draft)
    if given is None and max_rows is not None:
        draft.origin(str(draft.name("data.max_rows")))
    _held_out(draft, max_rows)
    _put_too_long(draft)
    _put_template(draft)


def _put_columns(draft: Draft) -> None:
    """What the rows call their columns, where all sources call them alike."""
    told = [columns for columns, _ in draft.columns]
    if not any(told):
        return
    if all(columns == told[0] for columns in told):
        for ours, theirs in told[0].items():
            draft.put(f"data.columns.{ours}", theirs, draft.columns[0][1])
        return
    for columns, where in draft.columns:
        words = ", ".join(f"{ours}={theirs}" for ours, theirs in columns.items())
        if words:
            draft.differs.append(
                f"{where}: columns {words}: data.columns is one for all sources: rename them there"
            )


def _refuse_parts(draft: Draft) -> None:
    if draft.raw("dataset_train_split", "train") != "train":
        raise draft.refuse("dataset_train_split", _PART)
    if draft.raw("dataset_config", "default") != "default":
        raise draft.refuse("dataset_config", _PART)


def _held_out(draft: Draft, max_rows: int | None) -> None:
    held_out, fraction = draft.take("data.eval"), draft.take("data.eval_fraction")
    if held_out and not is_off(held_out):
        draft.put("data.eval", _sources(draft, held_out, max_rows))
    elif isinstance(fraction, int) and fraction > 1:
        name = str(draft.name("data.eval_fraction"))
        draft.put("eval.max_rows", fraction, draft.said(name))
        draft.differs.append(
            f"{draft.said(name)} samples held out: here a share is; eval.max_rows keeps at most as many"
        )
    else:
        draft.put("data.eval_fraction", fraction)
    strategy = draft.raw("eval_strategy", "no")
    if draft.tool == "TRL" and not is_off(strategy) and "data.train" not in draft.given_elsewhere:
        draft.raw("dataset_test_split")
        draft.differs.append(
            f"{draft.said('eval_strategy')}: TRL evaluates on the split "
            f"{draft.arguments.values.get('dataset_test_split', 'test')} of the data; here give data.eval, or samples "
            "are held out with data.eval_fraction"
        )


def _sources(draft: Draft, named: Any, max_rows: Any) -> Any:
    """A path, or a list of paths with their limits; LLaMA-Factory's names are looked up in its dataset_info.json."""
    items: Any = (
        [part.strip() for part in named.split(",")]
        if isinstance(named, str) and "," in named
        else named
    )
    items = items if isinstance(items, list) else [items]
    sources: list[Any] = [path for item in items for path in _paths(draft, item)]
    if max_rows is not None:
        sources = [{"path": source, "max_rows": max_rows} for source in sources]
    return sources[0] if len(sources) == 1 and isinstance(sources[0], str) else sources


def _paths(draft: Draft, item: Any) -> list[str]:
    """One entry of a tool's list of data: a path, a name of LLaMA-Factory, or axolotl's and TRL's mapping."""
    if isinstance(item, Mapping):
        return _paths_of_mapping(draft, item)
    if not isinstance(item, str):
        raise ConfigError(
            [f"{draft.arguments.source}: {shown(item)} is no path of data: give it with --data"]
        )
    if draft.tool.startswith("ms-swift") and (
        match := re.fullmatch(r"(\w[^:\\]*):([^/#]+(?:/[^/#]+)*)(#\d+)?", item)
    ):
        if match[2] != "default":
            raise ConfigError([f"{draft.arguments.source}: the data {item}: {_PART}"])
        return [match[1] + (match[3] or "")]
    if draft.tool == "LLaMA-Factory v1" and item.endswith((".yaml", ".yml")):
        return _listed_in_yaml(draft, Path(item))
    if draft.tool != "LLaMA-Factory" or PurePath(item).suffix:
        draft.columns.append(({}, item))
        return [item]
    return [_listed(draft, item)]


def _paths_of_mapping(draft: Draft, item: Mapping[str, Any]) -> list[str]:
    path, files = item.get("path"), item.get("data_files")
    told = without(item, "path", "data_files", "ds_type")
    told = {key: value for key, value in told.items() if value is not None and not is_off(value)}
    told = {key: value for key, value in told.items() if value not in _SOURCE_AS_HERE.get(key, ())}
    _refuse_of_axolotl(draft, path, item)
    columns = _columns_of_axolotl(told)
    if isinstance(told.get("type"), str):
        del told["type"]
    for key in ("split", "name", "shards", "shards_idx", "dataset_shard_num"):
        if key in told:
            raise ConfigError(
                [f"{draft.arguments.source}: the data {path}, {key} {shown(told[key])}: {_PART}"]
            )
    if told:
        words = ", ".join(f"{key} {shown(value)}" for key, value in told.items())
        draft.differs.append(
            f"data {path}: {words}: all samples are read and their format is told by their keys"
        )
    found = _paths_of_entry(draft, path, files)
    draft.columns[-len(found) :] = [(columns, f"data {path}")] * len(found)
    return found


def _refuse_of_axolotl(draft: Draft, path: Any, item: Mapping[str, Any]) -> None:
    """Raises ConfigError for rows that are no answers to imitate, or of which other parts are learned."""
    kind, roles, key = (
        item.get("type"),
        item.get("roles_to_train"),
        item.get("message_field_training"),
    )
    where = f"{draft.arguments.source}: the data {path}"
    if isinstance(kind, str) and _OTHER_TYPES.match(kind):
        raise ConfigError(
            [f"{where}, type {shown(kind)}: fitune is for supervised fine-tuning alone"]
        )
    if kind == "input_output":
        raise ConfigError(
            [
                f"{where}, type {shown(kind)}: segments with labels of their own: give samples in the messages format"
            ]
        )
    if roles is not None and roles not in _SOURCE_AS_HERE["roles_to_train"]:
        raise ConfigError(
            [
                f"{where}, roles_to_train {shown(roles)}: here the assistant's messages are learned, "
                "or all with data.mask"
            ]
        )
    if key not in (None, "train", "training", "weight"):
        raise ConfigError(
            [f"{where}, message_field_training {shown(key)}: call that key 'train' in the samples"]
        )


def _columns_of_axolotl(told: dict[str, Any]) -> dict[str, str]:
    """What is said of the columns of a source, which is taken out of `told`."""
    kind = told.get("type")
    named: dict[str, Any] = {}
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
        told["type"] = {key: value for key, value in rest.items() if value}
        if not told["type"]:
            del told["type"]
    else:
        mappings = told.pop("message_property_mappings", None) or {}
        fields = {
            "field_messages": "messages",
            "field_tools": "tools",
            "field_system": "system",
            "field": "text",
        }
        fields |= {"message_field_role": "role", "message_field_content": "content"}
        named = {ours: told.pop(theirs) for theirs, ours in fields.items() if theirs in told}
        named |= {key: value for key, value in mappings.items() if key in ("role", "content")}
    return {
        ours: theirs
        for ours, theirs in named.items()
        if isinstance(theirs, str) and theirs not in _SAME_NAMES.get(ours, ())
    }


def _paths_of_entry(draft: Draft, path: Any, files: Any) -> list[str]:
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


def _listed(draft: Draft, item: str) -> str:
    """The path of a name in LLaMA-Factory's list of data sets."""
    directory = Path(str(draft.raw("dataset_dir", "data")))
    try:
        entry = parse_json(read_plain(directory / "dataset_info.json", follow=True))[item]
        path = (
            str(directory / entry["file_name"])
            if "file_name" in entry
            else str(entry["hf_hub_url"])
        )
    except (OSError, ValueError, LookupError, TypeError):
        draft.differs.append(
            f"dataset {item} is a name in {directory}/dataset_info.json, which does not tell it here: replace it in "
            "data.train by the path of the file"
        )
        return item
    where = f"{directory}/dataset_info.json, {item}"
    if entry.get("ranking"):
        raise ConfigError(
            [
                f"{where}: ranking: preferred and rejected answers are no data of supervised fine-tuning"
            ]
        )
    if entry.get("subset") or entry.get("split", "train") != "train":
        raise ConfigError([f"{where}: {_PART}"])
    draft.columns.append((_columns_of_list(entry, where), where))
    if others := {
        key: value for key, value in (entry.get("tags") or {}).items() if value not in _TAGS_AS_HERE
    }:
        words = ", ".join(
            f"{key} {shown(value)}" for key, value in others.items() if not key.endswith("_tag")
        )
        names = ", ".join(
            f"{key} {shown(value)}" for key, value in others.items() if key in _ROLE_TAGS
        )
        if words or names:
            draft.differs.append(
                f"{where}: {words or names}: roles have the names that 'fitune check' knows"
            )
    sample = entry.get("num_samples")
    return f"{path}#{sample}" if isinstance(sample, int) and sample > 0 else path


_ROLE_TAGS = ("user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag")
_TAGS_AS_HERE = (
    *(
        "user",
        "human",
        "assistant",
        "gpt",
        "observation",
        "tool",
        "function_call",
        "system",
        "role",
        "from",
    ),
    *("content", "value"),
)


def _columns_of_list(entry: Mapping[str, Any], where: str) -> dict[str, str]:
    """What LLaMA-Factory's list says of a data set's columns. Raises ConfigError for those of other training."""
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    for key in ("kto_tag", "chosen", "rejected", "images", "videos", "audios"):
        if columns.get(key):
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
        named |= {"role": tags.get("role_tag"), "content": tags.get("content_tag")}
        return {
            ours: theirs
            for ours, theirs in named.items()
            if theirs and theirs not in _SAME_NAMES[ours]
        }
    names = {
        "prompt": ("prompt", "instruction"),
        "completion": ("response", "output"),
        "input": ("query", "input"),
    }
    named = {ours: columns.get(theirs) for ours, (theirs, _) in names.items()}
    if all(theirs in (None, names[ours][1]) for ours, theirs in named.items()):
        named = {}
    elif not columns.get("response"):  # text alone
        named = {"text": columns["prompt"]} if columns.get("prompt") not in (None, "text") else {}
    named |= {ours: columns.get(ours) for ours in ("system", "history", "tools")}
    return {ours: theirs for ours, theirs in named.items() if theirs and theirs != ours}


def _listed_in_yaml(draft: Draft, path: Path) -> list[str]:
    """The paths in the YAML that LLaMA-Factory v1 describes its data with."""
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
        told = entry.get("path")
        if not isinstance(told, str):
            raise ConfigError([f"{path}: an entry has no path of data: give the data with --data"])
        size = entry.get("size")
        found.append(f"{told}#{size}" if isinstance(size, int) and size > 0 else told)
    if not found:
        raise ConfigError([f"{path} lists no data: give it with --data"])
    return found


def _put_too_long(draft: Draft) -> None:
    asked = draft.take("data.too_long")
    if asked is None:
        return
    if asked in _TOO_LONG:
        draft.put("data.too_long", _TOO_LONG[asked])
    else:
        name = str(draft.name("data.too_long"))
        draft.differs.append(
            f"{draft.said(name)}: here longer samples are cut at their end, or dropped (data.too_long)"
        )


def _put_template(draft: Draft) -> None:
    for name in (
        "template",
        "template_type",
        "chat_template",
        "chat_template_path",
        "chat_template_jinja",
    ):
        value = draft.raw(name)
        if value is None or str(value).startswith("tokenizer_default"):
            continue
        if str(value).endswith((".jinja", ".jinja2")):
            draft.put("data.template", value, f"{draft.origin(name)} {name}")
        elif name == "chat_template_path":
            draft.differs.append(
                f"{draft.said(name)}: a tokenizer's directory; set data.template to a Jinja file with its template"
            )
        else:
            draft.differs.append(
                f"{draft.said(name)} is {draft.tool}'s own; here the tokenizer's template is used, or the Jinja file "
                "data.template: look at two samples with 'fitune check FILE --show 2'"
            )


def put_mask(draft: Draft) -> None:
    name = draft.name("data.mask")
    if draft.tool in ("TRL", "transformers"):
        mask = _mask_of_trl(draft)
    elif draft.tool.startswith("ms-swift"):
        mask, name = _mask_of_swift(draft)
    else:
        everything = draft.raw("train_on_prompt") or draft.raw("train_on_inputs")
        is_text = draft.raw("stage") == "pt"
        mask, name = "all" if everything or is_text else "assistant", "stage" if is_text else name
        if draft.raw("mask_history"):
            mask, name = "last", "mask_history"
        if mask == "assistant" and name is None:
            return
    if mask == "last" and "last" not in get_args(DataConfig.model_fields["mask"].annotation):
        draft.differs.append(
            f"{draft.said(str(name))}: there the last answer alone is trained on; here every answer of a sample is"
        )
        mask, name = "assistant", None
    draft.put("data.mask", mask, draft.said(name) if name else None)


def _mask_of_trl(draft: Draft) -> str:
    answers, prompts = draft.raw("assistant_only_loss"), draft.raw("completion_only_loss")
    if draft.tool == "transformers":
        draft.differs.append(
            "transformers leaves the labels to the script: data.mask: all, or assistant?"
        )
    elif not answers and prompts is None:
        draft.differs.append(
            "TRL trains on every token of a conversation (data.mask: all), but of samples with prompt and "
            "completion on the completion alone: for those set data.mask to assistant"
        )
    return "assistant" if answers or prompts else "all"


def _mask_of_swift(draft: Draft) -> tuple[str, str | None]:
    """ms-swift weighs parts of a row by strategies joined with '+': one says whose tokens, the others how much."""
    name = draft.name("data.mask")
    asked = draft.take("data.mask") or "default"
    if draft.arguments.is_text and name is None:
        draft.differs.append("swift pt trains on every token of the samples' text")
        return "all", None
    parts = str(asked).split("+")
    others = [part for part in parts if part not in _LOSS_SCALES]
    if any(not part.startswith("ignore_") for part in others):
        raise draft.refuse(
            str(name), "fitune trains with the plain cross-entropy of all supervised tokens"
        )
    if others:
        draft.differs.append(f"{draft.said(str(name))}: here no part of an answer is left out")
    return _LOSS_SCALES[next((part for part in parts if part in _LOSS_SCALES), "default")], name
