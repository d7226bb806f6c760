"""Reading and writing a configuration."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fitune.config import RunConfig, config_hash, format_config, json_schema, read_config
from fitune.config.importers.names import KEYS_OF_OTHER_TOOLS
from fitune.config.importers.read import read_tool_file
from fitune.config.yaml_lines import parse_scalar
from fitune.errors import ConfigError

NEEDED = ["model.source=minimind2", "data.train=a.jsonl"]


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "sft.yaml"
    path.write_text(text)
    return path


def faults(source: Any, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        read_config(source, overrides)
    return caught.value.faults


def import_faults(path: Path) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        read_tool_file(path)
    return caught.value.faults


def test_a_number_without_a_point_is_a_number(tmp_path: Path) -> None:
    path = write(
        tmp_path, "model: {source: minimind2}\ndata: {train: a.jsonl}\noptim: {lr: 5e-7}\n"
    )
    assert read_config(path).config.optim.lr == 5e-7


@pytest.mark.parametrize("name", ["sft.jsonl", "sft.parquet", "sft.csv", "sft.json"])
def test_data_in_the_place_of_a_configuration_is_pointed_to_its_flag(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text('[{"messages": []},\n{"messages": []}]\n')
    for sentences in (faults(tmp_path / name), import_faults(tmp_path / name)):
        assert len(sentences) == 1
        assert "--data (data.train)" in sentences[0]


def test_a_run_in_the_place_of_a_configuration_is_offered_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "first" / "checkpoints").mkdir(parents=True)
    (tmp_path / "first" / "config.yaml").touch()
    for sentences in (faults(tmp_path / "first"), import_faults(tmp_path / "first")):
        assert f"fitune train --resume {tmp_path}/first" in sentences[0]
        assert f"{tmp_path}/first/config.yaml is its configuration" in sentences[0]


def test_the_file_replaces_the_defaults_and_the_command_line_both(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "model: {source: minimind2}\ndata:\n  train: a.jsonl\n  max_length: 512\noptim: {lr: 1e-4}\n",
    )
    resolved = read_config(path, ["optim.lr=3e-5"])
    assert (
        resolved.config.data.max_length,
        resolved.config.optim.lr,
        resolved.config.train.seed,
    ) == (512, 3e-5, 0)
    assert resolved.origins["data.max_length"] == f"{path}:4"
    assert resolved.origins["optim.lr"] == "command line"
    assert resolved.origins["train.seed"] == "default"


def test_every_key_has_an_origin() -> None:
    resolved = read_config(None, NEEDED)

    def keys(tree: dict[str, Any], prefix: str) -> set[str]:
        return {
            key
            for name, value in tree.items()
            for key in (
                keys(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}"}
            )
        }

    assert set(resolved.origins) == keys(resolved.config.model_dump(), "")


def test_a_mapping_is_read_like_a_file() -> None:
    resolved = read_config(
        {"model": {"source": "minimind2"}, "data": {"train": [Path("a").name, {"path": "b"}]}}
    )
    assert [source.path for source in resolved.config.data.train_sources] == ["a", "b"]
    assert resolved.origins["model.source"] == "Python"


def test_a_mapping_is_left_as_it_was() -> None:
    given_mapping: dict[str, Any] = {"model": {"source": "m"}, "data": {"train": ["a"]}}
    read_config(given_mapping, ["model.source=n", "optim.lr=1e-3"])
    assert given_mapping == {"model": {"source": "m"}, "data": {"train": ["a"]}}


@pytest.mark.parametrize(
    "text", ["off", "007", "1:30", "2026-01-01", "1e3", "0x10", "no", "=", "a b", "ü", "~"]
)
def test_text_may_look_like_anything(text: str, tmp_path: Path) -> None:
    resolved = read_config(None, [*NEEDED, f"run.name='{text}'"])
    assert resolved.config.run.name == text
    assert read_config(write(tmp_path, format_config(resolved))).config == resolved.config


def test_a_bare_number_is_text_where_text_is_wanted() -> None:
    assert read_config(None, [*NEEDED, "run.name=007"]).config.run.name == "007"


def test_recompute_off_is_not_false(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {source: m, recompute: off}\ndata: {train: a}\n")
    assert read_config(path).config.model.recompute == "off"


def test_a_round_float_is_a_count() -> None:
    assert read_config(None, [*NEEDED, "train.tokens=1e9"]).config.train.tokens == 10**9


@pytest.mark.parametrize(
    "override",
    [
        "optim.lr=1e300", "optim.lr=1e-300", "optim.eps=1e300", "optim.eps=1e-300", "optim.clip=1e300",
        "optim.weight_decay=1e300", "optim.noise_scale=1e300", "optim.reference_batch=1e30",
        "model.lora.alpha=1e300", "model.lora.rank=1e30", "model.shape.hidden_size=1e30",
        "train.steps=12345678901234567890123", "train.tokens=1e30", "train.epochs=1e300",
        "train.eval_every=1e30", "train.save_every=1e30", "train.stop_after=99999999999999h",
        "batch.effective=1e9", "batch.micro=1e9", "batch.micro_tokens=1e30", "batch.accumulation=1e9",
        "data.max_length=1e30", "data.max_rows=1e30", "data.train=[{path: a, max_rows: 1e30}]",
        "eval.max_rows=1e30", "eval.micro=1e30", "memory.budget=99999999999999999GiB",
    ],
)  # fmt: skip
def test_a_number_without_sense_is_refused_with_its_limits(override: str) -> None:
    with pytest.raises(ConfigError, match=r"of at most|at least|must be at most") as caught:
        read_config(
            {"model": {"source": "minimind2"}, "data": {"train": "a"}},
            ["model.method=lora", override],
        )
    assert override.partition("=")[0] in str(caught.value)


def test_every_number_of_the_schema_has_a_largest_value() -> None:
    numbers = {
        key: branch
        for name, section in read_config(None, NEEDED).config.model_json_schema()["$defs"].items()
        for key, schema in section["properties"].items()
        for branch in schema.get("anyOf", [schema])
        if branch.get("type") in ("integer", "number") and (name, key) != ("MemoryConfig", "budget")
    }
    assert len(numbers) > 20
    assert not [
        key for key, schema in numbers.items() if not {"maximum", "exclusiveMaximum"} & set(schema)
    ]


def test_the_home_directory_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = read_config(
        None, ["model.source=~/m", "data.train=[~/a, {path: ~/b}]", "run.output=~/runs"]
    ).config
    assert config.model.source == "/home/me/m"
    assert [source.path for source in config.data.train_sources] == ["/home/me/a", "/home/me/b"]
    assert config.run.output == Path("/home/me/runs")


def test_an_item_of_a_list_can_be_replaced() -> None:
    config = read_config(
        None, ["model.source=m", "data.train=[{path: a}]", "data.train.0.max_rows=7"]
    ).config
    assert config.data.train_sources[0].max_rows == 7


def test_a_length_on_the_command_line_replaces_that_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {source: m}\ndata: {train: a}\ntrain: {epochs: 3}\n")
    resolved = read_config(path, ["train.steps=20"])
    assert (resolved.config.train.steps, resolved.config.train.epochs) == (20, None)
    assert resolved.origins["train.epochs"] == "default"
    assert read_config(path, ["train.steps=null"]).config.train.epochs == 3
    with pytest.raises(ConfigError, match=r"epochs and train\.steps exclude each other"):
        read_config(path, ["train.steps=20", "train.epochs=2"])


def test_all_faults_are_reported_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "data:\n  train: a\n  packing: 3\n  cutoff_len: 4\nmodel:\n  sorce: m\noptim: {lr: -1}\n",
    )
    lines = [fault.split(":")[1] for fault in faults(path)[1:]]
    assert lines == ["3", "4", "6", "7"]
    assert "model.source is missing" in faults(path)[0]


@pytest.mark.parametrize(("tools_and_key"), KEYS_OF_OTHER_TOOLS.items(), ids=lambda item: item[0])
def test_the_names_of_other_tools_lead_to_a_key_of_ours(
    tools_and_key: tuple[str, tuple[str, str]],
) -> None:
    name, (_, key) = tools_and_key
    known = read_config(None, NEEDED).origins
    assert key in known
    assert any(f"'{key}'" in fault for fault in faults({name: 1}))


def test_the_text_of_a_configuration_reads_back_as_the_same(tmp_path: Path) -> None:
    overrides = [
        "model.method=lora",
        "optim.eps=1e-12",
        "data.eval=[{path: b c, weight: 0.5}, d]",
        "batch.effective=24",
    ]
    resolved = read_config(None, [*NEEDED, *overrides])
    text = format_config(resolved)
    assert read_config(write(tmp_path, text)).config == resolved.config


def test_the_text_means_the_same_to_readers_of_older_yaml(tmp_path: Path) -> None:
    resolved = read_config(None, [*NEEDED, "optim.lr=5e-7", "model.recompute=off"])
    assert yaml.safe_load(format_config(resolved)) == resolved.config.model_dump(mode="json")


def test_the_text_names_the_origin_of_each_value() -> None:
    lines = format_config(read_config(None, NEEDED)).splitlines()
    assert next(line for line in lines if "source:" in line).endswith("# command line")
    assert next(line for line in lines if "seed:" in line).endswith("# default")


def test_the_hash_changes_with_what_is_trained_and_not_with_where_it_is_kept() -> None:
    config = read_config(None, NEEDED).config
    assert config_hash(config) == config_hash(read_config(None, [*NEEDED, "run.name=other"]).config)
    assert config_hash(config) != config_hash(read_config(None, [*NEEDED, "train.seed=1"]).config)


def test_the_schema_for_editors_says_what_the_sections_hold() -> None:
    schema = json_schema()
    optim = schema["$defs"]["OptimConfig"]["properties"]
    assert optim["lr"]["default"] == "auto"
    assert optim["clip"]["description"]
    assert set(schema["properties"]) == set(RunConfig.model_fields)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-7", 5e-7), ("1_000", 1000), ("010", 10), (".5", 0.5), ("-3", -3), ("true", True), ("", None), ("~", None),
        ("yes", "yes"), ("1:30", "1:30"), ("1__0", "1__0"), ("e5", "e5"), ("1e", "1e"), (".", "."),
        ("9" * 5000, float("inf")),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    assert parse_scalar(text) == value


TEXT = st.text("ab019.,:#-=+_[]{}'\"\\ \n\t*&!ü", max_size=9)
TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=9,
)
SECTIONS = st.sampled_from(
    ["model", "data", "optim", "batch", "train", "memory", "eval", "run", "loss", "x"]
)


@given(
    st.dictionaries(
        SECTIONS, TREES | st.dictionaries(st.sampled_from(["lr", "train", "source", "lora"]), TREES)
    )
)
def test_no_mapping_ends_in_anything_but_faults(tree: dict[str, Any]) -> None:
    with suppress(ConfigError):
        read_config(tree)


@given(TEXT)
def test_no_override_ends_in_anything_but_faults(text: str) -> None:
    for override in (text, f"data.train={text}", f"optim.lr={text}"):
        with suppress(ConfigError):
            read_config(None, [override])


def test_an_override_may_give_several_keys_of_a_section() -> None:
    data = read_config(None, [*NEEDED, "data.columns={prompt: ask, completion: '7'}"]).config.data
    assert data.columns.named == {"prompt": "ask", "completion": "7"}
