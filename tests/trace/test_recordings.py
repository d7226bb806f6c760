"""Derives steps from a few layers, a few chunks and two micro-batches, and compares them with whole recordings."""

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import FalconConfig, GPTJConfig

import fitune.trace.library as recordings_room
from fitune.config import RunConfig, read_config
from fitune.recorder.cuda_target import CudaTarget
from fitune.trace.equal_layers import EqualLayers, find_layers
from fitune.trace.library import Recordings
from fitune.trace.own_step import (
    ColumnsOfStep,
    Pass,
    RecordedStep,
    longest_rows,
    record_step,
    steady_passes,
)
from products import some_of
from tiny_models import TINY, TINY_DBRX

FURTHER = {
    "dbrx": TINY_DBRX,
    "gptj": GPTJConfig(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
    "falcon": FalconConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    ),
}
AMPERE = CudaTarget((8, 0))
ON_HOST = ("model.recompute=full", "model.offload_activations=true", "optim.name=adamw_host")
SHORT, CHUNKED = 40, 512  # tokens of a row: three rows are one chunk of the loss, or six


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Return the configurations that were recorded, with one entry for each recording."""
    calls: list[RunConfig] = []
    record = recordings_room.record_columns_of_step

    def counted(config: RunConfig, *args: Any, **options: Any) -> ColumnsOfStep:
        calls.append(config)
        return record(config, *args, **options)

    monkeypatch.setattr(recordings_room, "record_columns_of_step", counted)
    return calls


def make_config(
    directory: Path,
    kind: str,
    *overrides: str,
    num_layers: int = 6,
    length: int = SHORT,
    rows: int = 3,
) -> RunConfig:
    config = copy.deepcopy(FURTHER[kind] if kind in FURTHER else TINY[kind])
    if hasattr(config, "layer_types"):
        kinds = (
            ["sliding_attention"] * 5 + ["full_attention"]
            if kind == "gemma3"
            else config.layer_types
        )
        config.layer_types = (kinds * num_layers)[:num_layers]
    config.num_hidden_layers = num_layers
    config.save_pretrained(directory)
    tree: dict[str, Any] = {
        "model": {"source": str(directory), "init": "random"},
        "data": {"train": "rows.jsonl", "max_length": length},
        "batch": {"micro": rows, "accumulation": 2},
    }
    return read_config(tree, overrides).config


def passes(config: RunConfig) -> list[Pass]:
    rows = longest_rows(config.data.max_length, num_rows=config.batch.rows_per_step)
    return around(config, Pass("train", rows))


def around(config: RunConfig, steady: Pass) -> list[Pass]:
    micro = steady.rows[: config.batch.micro]
    return steady_passes(
        config.optim,
        steady,
        evaluation=Pass("eval", micro, most_micro_batches=1),
    )


def facts(step: RecordedStep) -> tuple[object, ...]:
    work = sorted(step.work, key=repr)
    return (
        work,
        step.layout,
        step.notes,
        step.precision,
        step.num_parameters,
        step.num_trainable_parameters,
    )


def ask(
    recordings: Recordings,
    config: RunConfig,
    target: CudaTarget | None = AMPERE,
    asked: Callable[[RunConfig], list[Pass]] = passes,
) -> None:
    """Compare the step of `config` with the whole recording."""
    whole = record_step(config, asked(config), target=target)
    short = recordings.step(config, asked(config), target=target)
    assert len(short.trace.events) == len(whole.trace.events) > 500
    assert short.trace.events == whole.trace.events
    assert facts(short) == facts(whole)


@pytest.mark.parametrize(
    ("kind", "num_layers", "target", "overrides"),
    [
        ("llama", 7, AMPERE, ()),
        ("llama", 10, AMPERE, ("model.recompute=every_2",)),
        ("gpt2", 7, AMPERE, ("model.precision=autocast_float16", "loss=full")),
        ("qwen3_moe", 6, CudaTarget((9, 0)), ("optim.name=adafactor",)),
        ("gptj", 7, None, ("model.method=lora",)),
        *some_of(
            (
                ("llama", 7, None, ("model.precision=float32", "data.packing=false")),
                ("llama", 7, AMPERE, ("model.method=lora", "model.recompute=full")),
                ("llama", 7, AMPERE, ("model.recompute=selective", "optim.name=adamw_foreach")),
                ("llama", 7, AMPERE, ON_HOST),
                ("gemma2", 11, AMPERE, ("model.precision=bfloat16",)),
                ("gptj", 7, AMPERE, ("model.method=lora", "model.recompute=full")),
                ("falcon", 7, AMPERE, ("model.method=lora",)),
                ("gemma3", 22, AMPERE, ("model.method=lora",)),
            ),
            quick=(),
        ),
    ],
    ids=str,
)
def test_a_few_layers_stand_for_all(
    tmp_path: Path, recorded: list[RunConfig], kind: str, num_layers: int, target: CudaTarget | None,
    overrides: tuple[str, ...],
) -> None:  # fmt: skip
    config = make_config(tmp_path, kind, *overrides, num_layers=num_layers)
    ask(Recordings(), config, target)
    assert len(recorded) == 2  # with a few layers and with fewer, and never the whole


def test_four_chunks_of_a_loss_stand_for_all(tmp_path: Path, recorded: list[RunConfig]) -> None:
    config = make_config(tmp_path, "llama", num_layers=3, length=CHUNKED)
    ask(Recordings(), config)
    assert len(recorded) == 1


def test_two_micro_batches_give_all_others(tmp_path: Path, recorded: list[RunConfig]) -> None:
    recordings = Recordings()
    for rows in (3, 5, 4, 6):
        ask(recordings, make_config(tmp_path, "llama", length=CHUNKED, rows=rows))
    assert [config.batch.micro for config in recorded] == [3, 3, 5]


def test_answers_are_not_kept(tmp_path: Path) -> None:
    """Each is as large as the whole model's step is long, and a plan asks for no setting twice."""
    config, recordings = make_config(tmp_path, "llama"), Recordings()
    answer = weakref.ref(recordings.step(config, passes(config), target=AMPERE))
    gc.collect()
    assert answer() is None


def test_a_size_is_recorded_afresh_where_cuda_takes_another_path(
    tmp_path: Path, recorded: list[RunConfig]
) -> None:
    """From 3,072 tokens on the embedding's gradient is sorted."""
    recordings = Recordings()
    for rows in (3, 5, 7):
        ask(recordings, make_config(tmp_path, "llama", num_layers=3, length=CHUNKED, rows=rows))
    assert [config.batch.micro for config in recorded] == [3, 5, 7]


def test_one_row_is_no_sample(tmp_path: Path, recorded: list[RunConfig]) -> None:
    recordings = Recordings()
    for rows in (1, 2, 3):
        ask(
            recordings,
            make_config(tmp_path, "llama", "data.packing=false", num_layers=2, rows=rows),
        )
    assert [config.batch.micro for config in recorded] == [1, 2, 3]


@pytest.mark.parametrize(
    ("kind", "recompute", "overrides"),
    [
        ("llama", "full", ()),
        *some_of(
            (
                ("llama", "selective", ("optim.name=adamw_foreach",)),
                ("llama", "every_2", ("model.method=lora",)),
                ("qwen3", "full", ("model.precision=bfloat16",)),
                ("gpt2", "full", ("data.packing=false", "model.precision=autocast_float16")),
            ),
            quick=(),
        ),
    ],
)
def test_one_row_follows_from_several_where_it_did_without_recomputing(
    tmp_path: Path, recorded: list[RunConfig], kind: str, recompute: str, overrides: tuple[str, ...]
) -> None:
    recordings = Recordings()
    for way in ("off", recompute):
        for rows in (2, 5, 1):
            config = make_config(tmp_path, kind, f"model.recompute={way}", *overrides, rows=rows)
            before = [each.batch.micro for each in recorded]
            ask(recordings, config)
            new = [each.batch.micro for each in recorded[len(before) :]]
            assert (1 in new) == (rows == 1 and way == "off")


@pytest.mark.thorough
def test_one_row_is_recorded_where_it_was_something_else_without_recomputing(
    tmp_path: Path, recorded: list[RunConfig]
) -> None:
    recordings = Recordings()
    for way in ("off", "full"):  # on a CPU each packed row is an operator call
        for rows in (2, 5, 1):
            ask(
                recordings,
                make_config(tmp_path, "llama", f"model.recompute={way}", rows=rows),
                None,
            )
    assert [each.model.recompute for each in recorded if each.batch.micro == 1].count("full") > 0


def test_how_a_step_grows_with_its_layers_is_recorded_once(
    tmp_path: Path, recorded: list[RunConfig]
) -> None:
    """A step of one micro-batch takes over what was found for one of two."""
    recordings = Recordings()
    ask(recordings, make_config(tmp_path, "llama", "model.method=lora", rows=2))
    ask(
        recordings,
        make_config(tmp_path, "llama", "model.method=lora", "batch.accumulation=1", rows=4),
    )
    assert [config.batch.micro for config in recorded] == [2, 2, 4]


@pytest.mark.thorough
def test_how_a_step_grows_is_recorded_once_for_all_ways_to_recompute(
    tmp_path: Path, recorded: list[RunConfig]
) -> None:
    recordings = Recordings()
    for recompute in ("off", "every_2", "selective", "full"):
        overrides = ("model.method=lora", f"model.recompute={recompute}")
        ask(recordings, make_config(tmp_path, "llama", *overrides, num_layers=10))
    assert [config.model.recompute for config in recorded] == [
        "off",
        "off",
        "every_2",
        "selective",
        "full",
    ]


def test_a_second_size_needs_one_micro_batch_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    micro_batches: list[int] = []
    record = recordings_room.record_columns_of_step

    def counted(config: RunConfig, passes: list[Pass], **options: Any) -> ColumnsOfStep:
        micro_batches.append(passes[-1].most_micro_batches)
        return record(config, passes, **options)

    monkeypatch.setattr(recordings_room, "record_columns_of_step", counted)
    recordings = Recordings()
    for rows in (
        3,
        5,
    ):  # of so few adapters that their update is taken back where it fails, state and all
        overrides = (
            "model.method=lora",
            "model.recompute=full",
            "model.lora.rank=1",
            "model.lora.targets=[q_proj]",
        )
        ask(recordings, make_config(tmp_path, "llama", *overrides, rows=rows))
    assert micro_batches == [2, 2, 1]


def test_a_step_that_leaves_something_is_not_repeated(
    tmp_path: Path, recorded: list[RunConfig]
) -> None:
    """The optimizer allocates its state in the first update, so the second step differs."""

    def two_steps(config: RunConfig) -> list[Pass]:
        rows = longest_rows(config.data.max_length, num_rows=config.batch.rows_per_step)
        return [Pass("state"), Pass("train", rows), Pass("train", rows)]

    for name, times in (("adamw_8bit", 2), ("adamw", 1)):
        recorded.clear()
        config = make_config(tmp_path, "llama", f"optim.name={name}", num_layers=2)
        ask(Recordings(), config, asked=two_steps)
        assert len(recorded) == times


def test_two_sizes_with_last_chunks_of_one_length_need_a_third(
    tmp_path: Path, recorded: list[RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    # so small a model's loss would be one chunk on a card
    monkeypatch.setattr("fitune.objectives.logits.CHUNK_BYTES", 0)
    recordings = Recordings()
    for rows in (8, 10, 9, 11):
        ask(
            recordings,
            make_config(tmp_path, "llama", num_layers=3, length=129, rows=rows),
            target=CudaTarget((9, 0)),
        )
    assert [config.batch.micro for config in recorded] == [8, 10, 9]


def test_a_recording_of_one_routing_is_no_answer_for_the_other(tmp_path: Path) -> None:
    recordings = Recordings()
    for routing in ("balanced", "worst"):
        ask(
            recordings,
            make_config(tmp_path, "dbrx", f"memory.routing={routing}", num_layers=2, rows=2),
        )


def test_an_odd_layer_leaves_nothing_to_repeat(tmp_path: Path) -> None:
    config = make_config(tmp_path, "gemma2", num_layers=12)
    layer_types = ["sliding_attention", "full_attention"] * 6
    layer_types[5] = "sliding_attention"
    tiny = copy.deepcopy(TINY["gemma2"])
    tiny.num_hidden_layers, tiny.layer_types = 12, layer_types
    tiny.save_pretrained(tmp_path)
    assert equal_layers(config) is None
    recordings = Recordings()
    ask(recordings, config)


def equal_layers(config: RunConfig) -> EqualLayers | None:
    found = find_layers(config.model)
    return None if found is None else found.find_equal(config.model.recompute)


def test_alternating_layers_have_a_period_of_two(tmp_path: Path) -> None:
    layers = equal_layers(make_config(tmp_path, "gemma2", num_layers=12))
    assert layers is not None
    assert (layers.num_layers, layers.period) == (12, 2)


def test_layers_recomputed_by_turns_have_their_period(tmp_path: Path) -> None:
    layers = equal_layers(make_config(tmp_path, "llama", "model.recompute=every_4", num_layers=12))
    assert layers is not None
    assert layers.period == 4


def test_the_work_of_a_step_is_that_of_its_matrix_products(tmp_path: Path) -> None:
    """There are 6 floating-point operations for each token and parameter of the layers (2 forward, 4 backward), as in
    Kaplan et al. 2020 (arXiv 2001.08361)."""
    config = make_config(tmp_path, "llama")
    step = Recordings().step(config, passes(config), target=AMPERE)
    flops = sum(
        work.flops
        for work in step.work
        if work.step == 3 and work.micro_batch == 1 and work.op in ("aten.mm", "aten.addmm")
    )
    per_layer = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 48
    assert 3 * SHORT * 6 * (6 * per_layer) <= flops <= 3 * SHORT * 6 * (6 * per_layer + 32 * 64)
