"""What is sampled beside a run: the right numbers, in time, at next to no cost, and never at the run's expense."""

import time
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import psutil
import pytest
import torch

from disturbed_run import predict_nothing
from fitune.cli.app import main
from fitune.cli.progress import TrainingProgress
from fitune.cli.watch_screen import watch_screen
from fitune.config import RunConfig, read_config
from fitune.errors import RunDirectoryError
from fitune.machine.cards import context_prior
from fitune.model.load import load_model
from fitune.run.directory import RunDirectory, create_run
from fitune.run.files import write_json
from fitune.run.follow import RunFollower
from fitune.run.memory import MemorySample, read_run_memory
from fitune.run.metrics import append_line, read_events
from fitune.step.assemble import assemble, choose_precision
from fitune.units import GIB, MIB
from fitune.watch.monitor import Watchers, run_monitor
from fitune.watch.sampler import Sampler
from tiny_run import save_tiny_model, write_config, write_dialogues
from watched_run import step_metrics

CPU = torch.device("cpu")
CARD = torch.device("cuda", 0)
RUN = RunDirectory(Path("runs/run"))
ALARMS = {
    "headroom",
    "spill",
    "retry",
    "disk",
    "leak",
    "fragmentation",
    "prediction",
    "loss_spike",
    "clipping",
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("monitored")
    save_tiny_model(directory / "tiny")
    return directory


@pytest.fixture
def place(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    predict_nothing(monkeypatch)
    monkeypatch.setenv("FITUNE_CACHE", str(shared / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(shared / "tiny")
    write_dialogues(tmp_path / "sft.jsonl")
    return write_config(tmp_path / "sft.yaml", {"optim": {"clip": 0}})


@pytest.fixture
def monitored(place: Path) -> tuple[RunConfig, Any, RunDirectory]:
    config = read_config(place).config
    precision = choose_precision(config.model, CPU)
    setup = assemble(
        load_model(config.model, CPU, precision=precision), config, device=CPU, precision=precision
    )
    return config, setup, create_run(Path("runs"), "run")


def train(*arguments: str) -> None:
    assert main(["train", "sft.yaml", *arguments]) == 0


@pytest.fixture(scope="module")
def clean(shared: Path) -> RunDirectory:
    """A run of a few seconds."""
    write_dialogues(shared / "sft.jsonl")
    sections = {
        "model": {"source": str(shared / "tiny")},
        "data": {"train": str(shared / "sft.jsonl")},
        "optim": {"clip": 0},
        "run": {"output": str(shared / "runs"), "name": "clean"},
    }
    write_config(shared / "sft.yaml", sections)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FITUNE_CACHE", str(shared / "cache"))
        assert main(["train", str(shared / "sft.yaml"), "train.steps=60"]) == 0
    return RunDirectory(shared / "runs" / "clean")


def test_a_run_leaves_its_memory_over_time(clean: RunDirectory) -> None:
    samples = read_run_memory(clean.memory)
    assert samples[0].step == 0
    assert (samples[-1].step, samples[-1].progress_fraction) == (60, 1.0)
    for sample in samples:
        assert sample.process_bytes is not None
        assert sample.device_total_bytes is not None
        assert 0 < sample.process_bytes <= sample.device_total_bytes


def test_a_clean_run_rings_no_alarm(clean: RunDirectory) -> None:
    assert not {event.kind for event in read_events(clean.events)} & ALARMS


def test_samples_are_half_a_second_apart(clean: RunDirectory) -> None:
    times = [sample.time for sample in read_run_memory(clean.memory)][
        :-1
    ]  # the last one is the end's
    assert times  # a fast machine is done in a second
    assert all(later - earlier > 0.4 for earlier, later in pairwise(times))


@pytest.mark.usefixtures("place")
def test_an_alarm_is_said_and_kept_as_an_event(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=5 * MIB, total=GIB))
    train("train.steps=2")
    assert [event.kind for event in read_events(RUN.events)].count("disk") == 1
    assert "warning: 5.0 MiB are free where the run is kept" in capsys.readouterr().err


def test_a_sampler_that_breaks_does_not_end_the_run(
    monitored: tuple[RunConfig, Any, RunDirectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> NoReturn:
        raise RunDirectoryError("no space left")

    monkeypatch.setattr("fitune.watch.monitor.PatientFiles.append", full)
    said: list[str] = []
    with run_monitor(*monitored, notify=said.append) as monitor:
        monitor.step(step_metrics(1), progress=0.1)
    assert said == ["warning: memory is no longer recorded: no space left"]


def test_sampling_costs_less_than_half_a_percent(
    monitored: tuple[RunConfig, Any, RunDirectory],
) -> None:
    """Two samples a second may take 5 ms of processor time."""
    monitor = run_monitor(*monitored, notify=lambda _: None)
    monitor.sample()
    start = time.thread_time()
    for _ in range(40):
        monitor.sample()
    assert (time.thread_time() - start) / 40 < 0.0025


def test_the_state_of_a_run_grows_by_gradients_and_optimizer(
    monitored: tuple[RunConfig, Any, RunDirectory],
) -> None:
    config, setup, run = monitored
    monitor = run_monitor(config, setup, run, notify=lambda _: None)
    parameter_bytes = sum(parameter.nbytes for parameter in setup.model.parameters())
    assert monitor.sample().state_bytes == parameter_bytes
    for parameter in setup.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    setup.optimizer.step()
    monitor.step(step_metrics(1), progress=0.1)
    assert 4 * parameter_bytes <= (monitor.sample().state_bytes or 0) < 4.1 * parameter_bytes


def test_the_peak_of_a_step_between_two_samples_is_kept(
    monitored: tuple[RunConfig, Any, RunDirectory],
) -> None:
    monitor = run_monitor(*monitored, notify=lambda _: None)
    monitor.step(replace(step_metrics(1), device_used_bytes=10**15), progress=0.1)
    assert monitor.sample().peak_process_bytes == 10**15
    assert (monitor.sample().peak_process_bytes or 0) < 10**15


def test_the_plan_of_the_run_is_what_its_peaks_are_held_against(
    monitored: tuple[RunConfig, Any, RunDirectory],
) -> None:
    run = monitored[2]
    write_json(run.plan, {"chosen": 1, "candidates": [{}, {"predicted_reserved_bytes": 10 * GIB}]})
    said: list[str] = []
    with run_monitor(*monitored, notify=said.append) as monitor:
        monitor.step(step_metrics(7), progress=0.1)
    assert said == ["warning: step 7 took 15.9 GiB, 59.0% more than the 10.0 GiB of the plan"]


def test_prometheus_finds_the_present_numbers(place: Path, tmp_path: Path) -> None:
    train("train.steps=2", f"run.prometheus={tmp_path / 'fitune.prom'}")
    lines = (tmp_path / "fitune.prom").read_text().splitlines()
    values = {line.split("{")[0]: line for line in lines if not line.startswith("#")}
    assert values["fitune_step"] == 'fitune_step{run="run"} 2'
    assert float(values["fitune_loss"].split()[-1]) > 0
    assert all(f"# TYPE {name} gauge" in lines for name in values)


def test_a_file_for_prometheus_that_cannot_be_written_is_said_once(
    monitored: tuple[RunConfig, Any, RunDirectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fitune.watch.monitor.PROMETHEUS_SECONDS", 0.0)
    config, setup, run = monitored
    config = config.model_copy(
        update={"run": config.run.model_copy(update={"prometheus": "nowhere/fitune.prom"})}
    )
    said: list[str] = []
    with run_monitor(config, setup, run, notify=said.append) as monitor:
        monitor.sample()
        monitor.sample()
    assert said == [
        "warning: run.prometheus nowhere/fitune.prom cannot be written: it is tried again every 0 s"
    ]


def test_a_disk_that_does_not_answer_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> NoReturn:
        raise OSError("stale file handle")

    monkeypatch.setattr("shutil.disk_usage", fail)
    sampler = Sampler(CPU, place=Path(), parameter_bytes=0)
    assert sampler.read(step=0, progress=None, state_bytes=0).disk_free_bytes is None


@pytest.fixture
def card(stand_in: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """PyTorch as it is on the stand-in's first card, of which this process holds 16,900 MiB."""
    counters = {
        "allocated_bytes": {"all": {"current": 12_000 * MIB, "peak": 15_000 * MIB}},
        "reserved_bytes": {"all": {"current": 16_500 * MIB, "peak": 16_500 * MIB}},
        "num_alloc_retries": 2,
        "num_ooms": 1,
    }
    stand_in.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda _: counters)
    stand_in.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="11111111-aaaa")
    )
    stand_in.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    stand_in.setenv("STAND_IN_PID", str(psutil.Process().pid))
    stand_in.setenv("STAND_IN_OWN_MIB", "16900")
    return stand_in


def read_card() -> MemorySample:
    sampler = Sampler(CARD, place=Path(), parameter_bytes=0)
    try:
        return sampler.read(step=1, progress=0.5, state_bytes=1_700 * MIB)
    finally:
        sampler.close()


def test_a_card_is_sampled_with_its_own_and_with_pytorchs_numbers(card: pytest.MonkeyPatch) -> None:
    sample = asdict(read_card())
    assert {name: sample[name] for name in ("allocated_bytes", "peak_allocated_bytes", "reserved_bytes")} == {
        "allocated_bytes": 12_000 * MIB, "peak_allocated_bytes": 15_000 * MIB, "reserved_bytes": 16_500 * MIB,
    }  # fmt: skip
    assert (sample["device_total_bytes"], sample["device_used_bytes"]) == (
        (24564 - 400) * MIB,
        18_224 * MIB,
    )
    assert (sample["other_processes_bytes"], sample["spill_bytes"]) == (1_324 * MIB, 0)
    assert (sample["num_retries"], sample["num_ooms"]) == (2, 1)
    assert (sample["utilisation_fraction"], sample["power_watts"], sample["throttled"]) == (
        0.97, 382.0, "power limit, heat",
    )  # fmt: skip


def test_where_memory_by_process_is_not_told_it_is_the_rest(card: pytest.MonkeyPatch) -> None:
    card.setenv("STAND_IN_NVML", "wsl")
    context_bytes = context_prior((8, 9)).expected_bytes
    assert read_card().other_processes_bytes == (18_224 - 16_500) * MIB - context_bytes


def test_more_than_the_card_holds_is_spilled(card: pytest.MonkeyPatch) -> None:
    """WSL: PyTorch holds 16,500 MiB, and the card says that 3,000 are in use."""
    card.setenv("STAND_IN_NVML", "wsl")
    card.setenv("STAND_IN_OWN_MIB", "1676")
    assert read_card().spill_bytes == 13_500 * MIB


def test_a_card_that_is_lost_leaves_pytorchs_numbers(card: pytest.MonkeyPatch) -> None:
    card.setenv("STAND_IN_NVML", "lost")
    card.setattr(torch.cuda, "mem_get_info", lambda _: (6 * GIB, 24 * GIB))
    sample = read_card()
    assert (sample.device_used_bytes, sample.allocated_bytes, sample.power_watts) == (
        18 * GIB,
        12_000 * MIB,
        None,
    )


def test_watch_shows_the_cards_numbers(card: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = create_run(tmp_path, "run")
    append_line(run.memory, read_card(), leave_out_unknown=True)
    lines = watch_screen(
        RunFollower(run).read(), width=100, height=None, now=time.time()
    ).plain.splitlines()
    shown = {line[:29].strip(): line[29:46].split() for line in lines}
    assert shown["activations, temporaries"] == ["10.06", "12.99"]
    assert shown["CUDA context"] == ["0.39", "0.39"]
    assert shown["other processes"] == ["1.29", "1.29"]
    assert lines[-1].startswith(
        "GPU 97% · 71 °C · 382 W · slowed down by power limit, heat · 2 retries"
    )


def test_amds_card_is_asked_through_pytorch(card: pytest.MonkeyPatch) -> None:
    card.setenv("STAND_IN_NVML", "no_driver")
    card.setattr(torch.version, "hip", "7.0")
    card.setattr(torch.cuda, "mem_get_info", lambda _: (6 * GIB, 24 * GIB))
    for name, answer in (("utilization", 88), ("power_draw", 300_000), ("temperature", 66)):
        card.setattr(torch.cuda, name, lambda _, answer=answer: answer)
    sample = read_card()
    assert (sample.utilisation_fraction, sample.power_watts, sample.temperature_celsius) == (
        0.88,
        300.0,
        66.0,
    )


def test_apples_memory_is_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, answer in (
        ("driver_allocated_memory", 5), ("current_allocated_memory", 4), ("recommended_max_memory", 12),
    ):  # fmt: skip
        monkeypatch.setattr(torch.mps, name, lambda answer=answer: answer * GIB)
    sample = Sampler(torch.device("mps"), place=Path(), parameter_bytes=0).read(
        step=0, progress=None, state_bytes=0
    )
    assert (sample.allocated_bytes, sample.reserved_bytes, sample.device_total_bytes) == (
        4 * GIB,
        5 * GIB,
        12 * GIB,
    )


def test_progress_is_one_watcher_of_many(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingProgress(quiet=False) as first, TrainingProgress(quiet=False) as second:
        Watchers((first, second)).note("said twice")
    assert capsys.readouterr().err.count("said twice") == 2
