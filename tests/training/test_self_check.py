"""A run compares its own prediction with what it took."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fitune.allocator.prediction import Prediction
from fitune.cli.app import main
from fitune.config import RunConfig, read_config
from fitune.machine.cards import Device
from fitune.machine.devices import cpu_device, find_device
from fitune.machine.nvml import CardProcess, CardState
from fitune.machine.process_memory import MemoryPeak
from fitune.model.load import load_tokenizer
from fitune.planning.past_errors import circumstances
from fitune.planning.predict import RunPrediction, predict, predict_run
from fitune.recovery import guard
from fitune.recovery.guard import Guard
from fitune.run.metrics import read_metrics, read_summary
from fitune.trace.own_step import Pass, pass_layouts
from fitune.training import self_check
from fitune.training.prepare import load_data
from fitune.training.self_check import SelfCheck, run_device
from fitune.units import GIB, MIB
from tiny_models import TINY
from tiny_run import WIDE_VOCABULARY, save_tiny_model, write_config, write_dialogues


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("model")
    TINY["llama"].save_pretrained(directory)
    return {
        "model": {"source": str(directory)},
        "data": {"train": "rows.jsonl", "max_length": 32},
        "batch": {"micro": 1, "accumulation": 1},
    }


@pytest.fixture(scope="module")
def prediction(tree: dict[str, Any]) -> Prediction:
    found = predict(tree, gpu="RTX 4090")
    return replace(found, peak_allocated_bytes=100 * MIB, peak_reserved_bytes=120 * MIB)


def test_on_a_card_a_difference_of_one_percent_agrees(prediction: Prediction) -> None:
    sentence, agrees = SelfCheck(prediction, None).compare(MemoryPeak(101 * MIB, 120 * MIB, GIB))
    assert agrees
    assert "allocated 100.0 MiB predicted, 101.0 MiB measured (-1.0%)" in sentence


def test_on_a_card_a_difference_of_three_percent_does_not(prediction: Prediction) -> None:
    assert not SelfCheck(prediction, None).compare(MemoryPeak(100 * MIB, 124 * MIB, GIB))[1]


def test_less_than_a_bound_agrees_and_more_does_not(prediction: Prediction) -> None:
    check = SelfCheck(prediction, None, is_bound=True)
    assert check.compare(MemoryPeak(60 * MIB, 80 * MIB, GIB))[1]
    assert not check.compare(MemoryPeak(100 * MIB, 124 * MIB, GIB))[1]


def test_on_a_cpu_the_program_is_taken_off(prediction: Prediction) -> None:
    check = SelfCheck(prediction, 400 * MIB)
    peak = MemoryPeak(None, None, 500 * MIB)
    assert check.measured(peak).reserved_bytes == 100 * MIB


@pytest.mark.parametrize(("predicted_bytes", "agreed"), [(20 * MIB, True), (200 * MIB, False)])
def test_a_model_that_takes_less_than_the_program_gives_back_was_not_measured(
    prediction: Prediction, predicted_bytes: int, agreed: bool
) -> None:
    check = SelfCheck(replace(prediction, peak_reserved_bytes=predicted_bytes), 400 * MIB)
    measured = check.measured(MemoryPeak(None, None, 390 * MIB))
    assert measured.reserved_bytes is None
    sentence, agrees = check.compare(measured)
    assert "predicted, nothing measured beside the program" in sentence
    assert agrees is agreed


@pytest.mark.parametrize(
    ("predicted_bytes", "told"), [(27 * MIB, "below 32.0 MiB"), (7 * MIB, "+0.0%")]
)
def test_a_difference_of_less_than_the_program_s_own_noise_raises_no_doubt(
    prediction: Prediction, predicted_bytes: int, told: str
) -> None:
    check = SelfCheck(replace(prediction, peak_reserved_bytes=predicted_bytes), 400 * MIB)
    sentence, agrees = check.compare(MemoryPeak(None, 7 * MIB, 407 * MIB))
    assert agrees
    assert told in sentence
    assert "+285" not in sentence


def test_a_difference_comes_with_the_reasons_of_the_interval(prediction: Prediction) -> None:
    assert prediction.device_interval is not None
    sentence, agrees = SelfCheck(prediction, 0).compare(MemoryPeak(None, 200 * MIB, GIB))
    assert not agrees
    assert sentence.endswith(prediction.device_interval.reasons[-1])


def test_the_outcome_is_kept_for_later_predictions(
    tree: dict[str, Any], prediction: Prediction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path))
    kept = circumstances(cpu_device(), tree["model"]["source"])
    SelfCheck(prediction, 0, kept).keep(MemoryPeak(None, 132 * MIB, GIB))
    interval = predict(tree, gpu="cpu").device_interval
    assert interval is not None
    assert (
        "an earlier run of this model here differed from its prediction by +10.0%"
        in interval.reasons
    )


def test_a_card_s_context_is_measured_once_and_then_expected(
    tree: dict[str, Any], prediction: Prediction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path))
    state = CardState(processes=(CardProcess(1, GIB), CardProcess(os.getpid(), 1000 * MIB)))
    monkeypatch.setattr(self_check, "read_cards", lambda: (state,))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 740 * MIB)
    card = replace(find_device("RTX 4090"), uuid="GPU-1")
    kept = circumstances(card, tree["model"]["source"])
    SelfCheck(prediction, None, kept).keep(MemoryPeak(100 * MIB, 120 * MIB, GIB))
    predicted = predict_run(read_config(tree).config, card)
    assert predicted.context_bytes == 260 * MIB
    assert predicted.training.device_bytes == predicted.training.peak_reserved_bytes + 260 * MIB


def test_a_card_that_is_only_planned_for_has_no_earlier_runs(
    tree: dict[str, Any], prediction: Prediction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path))
    kept = circumstances(find_device("RTX 4090"), tree["model"]["source"])
    SelfCheck(prediction, None, kept).keep(MemoryPeak(100 * MIB, 132 * MIB, GIB))
    interval = predict(tree, gpu="RTX 4090").device_interval
    assert interval is not None
    assert not any("earlier" in reason for reason in interval.reasons)


def test_the_card_is_the_one_that_torch_means(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = tuple(
        replace(find_device("RTX 4090"), uuid=f"GPU-{name}", free_bytes=GIB)
        for name in ("aa-1", "bb-2")
    )
    monkeypatch.setattr(self_check, "this_machine", lambda: cards)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="bb-2"))
    assert run_device(torch.device("cuda", 0)) is cards[1]


def test_without_nvml_what_is_free_is_asked_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        self_check, "this_machine", lambda: (replace(find_device("RTX 4090"), uuid="GPU-aa-1"),)
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="aa-1"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (20 * GIB, 23 * GIB))
    found = run_device(torch.device("cuda", 0))
    assert (found.kind, found.free_bytes, found.used_bytes) == ("cuda", 20 * GIB, 3 * GIB)


@pytest.mark.usefixtures("place")
def test_a_process_that_holds_memory_of_the_card_already_is_not_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fitune.training.prepare.reserved_before", lambda _: 300 * MIB)
    assert main(["train", "sft.yaml", "train.steps=2", "model.recompute=off"]) == 0
    assert (
        "memory is not checked: this process already holds 300.0 MiB of the card"
        in capsys.readouterr().err
    )
    assert not (Path("cache") / "residuals.jsonl").exists()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with all that a run needs and a cache of its own."""
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    save_tiny_model(
        tmp_path / "tiny", WIDE_VOCABULARY
    )  # whose step takes more than a program gives back meanwhile
    write_dialogues(tmp_path / "sft.jsonl")
    # with nothing left open, a plan looks at one candidate
    write_config(tmp_path / "sft.yaml", {"model": {"recompute": "off"}, "batch": {"micro": 8}})
    with (tmp_path / "sft.yaml").open("a") as file:
        file.write("loss: full\n")
    return tmp_path


def test_the_summary_compares_the_second_step_with_itself(place: Path) -> None:
    assert main(["train", "sft.yaml", "train.steps=3"]) == 0
    summary = read_summary(place / "runs" / "run" / "summary.json")
    steps = read_metrics(place / "runs" / "run" / "metrics.jsonl").steps
    assert (summary.measured_reserved_bytes, summary.measured_device_bytes) == (
        steps[1].peak_reserved_bytes, steps[1].device_used_bytes,
    )  # fmt: skip
    assert summary.peak_device_bytes is not None
    assert summary.peak_device_bytes >= max(step.device_used_bytes or 0 for step in steps)
    (kept,) = (place / "cache" / "residuals.jsonl").read_text().splitlines()
    assert json.loads(kept)["measured_bytes"] == summary.measured_reserved_bytes


@pytest.mark.usefixtures("place")
def test_freed_memory_is_given_back_before_the_program_is_counted_and_after_the_longest_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []

    def noting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def note(*arguments: Any, **options: Any) -> Any:
            done.append(name)
            return real(*arguments, **options)

        return note

    for module, names in (
        (self_check, ("trim_heap", "program_bytes")),
        (guard, ("try_pieces", "safe_step", "release_memory")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, noting(name, getattr(module, name)))
    assert main(["train", "sft.yaml", "train.steps=1"]) == 0
    assert done == ["trim_heap", "program_bytes", "try_pieces", "release_memory", "safe_step"]


@pytest.mark.usefixtures("place")
def test_a_run_checks_itself_with_tokens_spread_evenly_whatever_it_was_planned_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checked: list[str] = []

    def noting(config: RunConfig, *arguments: Any, **options: Any) -> RunPrediction:
        checked.append(config.memory.routing)
        return predict_run(config, *arguments, **options)

    monkeypatch.setattr(self_check, "predict_run", noting)
    assert main(["train", "sft.yaml", "train.steps=1", "memory.routing=worst"]) == 0
    assert checked == ["balanced"]


@pytest.mark.usefixtures("place")
def test_a_card_is_settled_between_what_is_tried_out_and_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []
    for name in ("start", "evaluate", "release_trial_memory", "train"):
        real = getattr(Guard, name)

        def noting(
            guard: Guard, *arguments: Any, name: str = name, real: Any = real, **options: Any
        ) -> Any:
            done.append(name)
            return real(guard, *arguments, **options)

        monkeypatch.setattr(Guard, name, noting)
    assert main(["train", "sft.yaml", "train.steps=2", "train.eval_every=2"]) == 0
    assert done[:5] == ["start", "evaluate", "release_trial_memory", "train", "train"]


@pytest.mark.parametrize(
    ("optimizer", "kinds"),
    [("adamw", ["state", "train", "train"]), ("adamw_8bit", ["train", "train"])],
)
def test_what_is_predicted_is_what_the_run_does_from_then_on(
    place: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, kinds: list[str]
) -> None:
    predicted: list[list[str]] = []

    def noting(
        config: RunConfig, device: Device, *, passes: list[Pass], num_shards: int
    ) -> RunPrediction:
        predicted.append([each.kind for each in passes])
        return predict_run(config, device, passes=passes, num_shards=num_shards)

    monkeypatch.setattr(self_check, "predict_run", noting)
    config = read_config(place / "sft.yaml", [f"optim.name={optimizer}"]).config
    train = load_data(config, load_tokenizer(config.model)).train
    self_check.predict_second_step(config, train, device=torch.device("cpu"))
    assert predicted == [kinds]


def test_every_micro_batch_of_the_first_steps_is_predicted(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples differ in length, and what an allocator reserves depends on each micro-batch."""
    recorded: list[int] = []

    def noting(
        config: RunConfig, device: Device, *, passes: list[Pass], num_shards: int
    ) -> RunPrediction:
        layouts = pass_layouts(config, torch.device("cpu"), packed=True)
        recorded.extend(len(layouts.group(each)) for each in passes)
        return predict_run(config, device, passes=passes, num_shards=num_shards)

    monkeypatch.setattr(self_check, "predict_run", noting)
    overrides = ["batch.effective=8", "batch.micro=2", "batch.accumulation=auto"]
    config = read_config(place / "sft.yaml", overrides).config
    train = load_data(config, load_tokenizer(config.model)).train
    self_check.predict_second_step(config, train, device=torch.device("cpu"))
    assert recorded == [0, 4, 4]
