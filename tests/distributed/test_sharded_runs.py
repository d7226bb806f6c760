"""A run whose weights are dealt over two processes is the run of one, and what cannot be dealt is refused."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_ranks import (
    ONE,
    TWO,
    assert_close,
    assert_same,
    killed,
    told_to_end,
    train,
    without_memory,
    without_memory_twice,
)
from transformers import AutoModelForCausalLM

from disturbed_run import weights, write_run
from fitune.cli.app import main
from fitune.distributed import checkpoint as shard_checkpoint
from fitune.run.directory import RunDirectory
from fitune.run.metrics import read_events

SHARDED = ("sft.yaml", "model.shard=full")
STEPS = 6


def without_a_disk() -> None:
    """The first save of the process's part fails."""
    real, left = shard_checkpoint.FileSystemWriter.write_data, [1]

    def write_data(*arguments: Any, **options: Any) -> Any:
        if left:
            left.pop()
            raise OSError("No space left on device")
        return real(*arguments, **options)

    shard_checkpoint.FileSystemWriter.write_data = write_data  # type: ignore[method-assign]


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The current directory, with a run of two processes and one of one, both left alone."""
    directory = tmp_path_factory.mktemp("sharded")
    write_run(directory, steps=STEPS)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(directory)
        patched.setenv("FITUNE_CACHE", str(directory / "cache"))
        assert train(*SHARDED, "run.name=two") == [0, 0], (
            Path("0.err").read_text() + Path("1.err").read_text()
        )
        assert train("sft.yaml", "run.name=one", size=1) == [0]
        yield directory


def test_two_processes_have_the_losses_and_evaluations_of_one() -> None:
    assert_close(TWO, ONE)


@pytest.mark.thorough
def test_torchrun_starts_it() -> None:
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "fitune"]
    command = [sys.executable, *torchrun, "train", *SHARDED, "run.name=torchrun"]
    source = str(Path(__file__).parents[2] / "src")
    environment = os.environ | {"PYTHONPATH": source, "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert_close(RunDirectory(Path("runs/torchrun")), ONE)


def test_what_is_saved_is_read_by_plain_transformers_and_has_the_weights_of_one_process() -> None:
    for which in ("last", "best"):
        mine, theirs = (
            AutoModelForCausalLM.from_pretrained(run.path / which).state_dict()
            for run in (TWO, ONE)
        )
        assert mine.keys() == theirs.keys()
        assert all(torch.allclose(mine[name], theirs[name], rtol=1e-5, atol=1e-5) for name in mine)
    assert (TWO.last / "config.json").read_text() == (ONE.last / "config.json").read_text()


def test_what_is_saved_can_be_exported(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(TWO.path), "--to", "hf", "--output", "exported"]) == 0
    assert (
        load_file("exported/model.safetensors").keys()
        == load_file(TWO.last / "model.safetensors").keys()
    )


def test_the_weights_are_saved_in_a_file_of_each_process() -> None:
    newest = sorted(TWO.checkpoints.iterdir())[-1]
    assert len(list((newest / "shards").glob("*.distcp"))) == 2
    assert not (newest / "optimizer.safetensors").exists()


def test_a_process_that_is_killed_ends_all_and_the_run_goes_on_bit_for_bit() -> None:
    assert train(*SHARDED, "run.name=killed", fault=killed) == [75, -signal.SIGKILL]
    assert "error: rank 0: another of the 2 processes is gone" in Path("0.err").read_text()
    assert train("--resume", "runs/killed") == [0, 0], Path("0.err").read_text()
    assert_same(RunDirectory(Path("runs/killed")))


def test_a_process_that_runs_out_of_memory_twice_changes_nothing_but_the_events() -> None:
    assert train(*SHARDED, "run.name=twice", fault=without_memory_twice) == [0, 0], Path(
        "0.err"
    ).read_text()
    run = RunDirectory(Path("runs/twice"))
    assert_close(run, TWO)
    told = [event.message for event in read_events(run.events) if event.kind == "out_of_memory"]
    assert [message.startswith("rank 1: out of memory in the forward") for message in told] == [
        True,
        True,
    ]


def test_a_process_without_memory_for_a_row_ends_all_and_nothing_is_lost() -> None:
    assert train(*SHARDED, "run.name=full", fault=without_memory) == [4, 4]
    assert "the weights of step 4 are in" in Path("0.err").read_text()
    assert train("--resume", "runs/full") == [0, 0], Path("0.err").read_text()
    assert_same(RunDirectory(Path("runs/full")))


def test_a_signal_to_one_process_stops_all_and_one_alone_cannot_go_on() -> None:
    assert train(*SHARDED, "run.name=stopped", fault=told_to_end) == [143, 143]
    assert train("--resume", "runs/stopped", size=1) == [2]
    assert (
        "model.shard=full shards the weights over processes and this is one alone"
        in Path("0.err").read_text()
    )
    assert train("--resume", "runs/stopped", "model.shard=none", size=1) == [2]
    assert (
        "was saved by model.shard=full: go on with it under torchrun" in Path("0.err").read_text()
    )
    assert train("--resume", "runs/stopped") == [0, 0], Path("0.err").read_text()
    assert_same(RunDirectory(Path("runs/stopped")))


@pytest.mark.thorough
def test_three_go_on_with_what_two_have_saved() -> None:
    assert train(*SHARDED, "run.name=three", fault=told_to_end) == [143, 143]
    assert train("--resume", "runs/three", size=3) == [0, 0, 0], (
        Path("0.err").read_text() + Path("1.err").read_text()
    )
    run = RunDirectory(Path("runs/three"))
    assert len(list((sorted(run.checkpoints.iterdir())[-1] / "shards").glob("*.distcp"))) == 3
    assert_close(run, TWO)


@pytest.mark.thorough
def test_the_journal_of_two_processes_is_replayed_by_two() -> None:
    assert train("--replay", str(TWO.path)) == [0, 0], (
        Path("0.err").read_text() + Path("1.err").read_text()
    )
    (replayed,) = Path("runs").glob("two-replay-*")
    assert_same(RunDirectory(replayed))


def test_a_process_without_a_row_of_the_step_trains_along() -> None:
    words = ("batch.effective=1", "train.steps=2")
    assert train(*SHARDED, "run.name=sparse", *words) == [0, 0], Path("0.err").read_text()
    assert train("sft.yaml", "run.name=alone", *words, size=1) == [0]
    assert_close(RunDirectory(Path("runs/sparse")), RunDirectory(Path("runs/alone")))


def test_adapters_are_those_of_one_process() -> None:
    words = ("model.method=lora", "model.lora.rank=3", "train.steps=3")
    assert train(*SHARDED, "run.name=adapters", *words) == [0, 0], Path("0.err").read_text()
    assert train("sft.yaml", "run.name=one_adapters", *words, size=1) == [0]
    mine, theirs = (
        load_file(Path("runs", name, "last/adapter_model.safetensors"))
        for name in ("adapters", "one_adapters")
    )
    assert mine.keys() == theirs.keys()
    assert all(torch.allclose(mine[name], theirs[name], rtol=1e-5, atol=1e-5) for name in mine)


def test_a_save_that_fails_in_one_process_is_told_and_the_run_goes_on() -> None:
    assert train(*SHARDED, "run.name=no_disk", fault=without_a_disk) == [0, 0], Path(
        "0.err"
    ).read_text()
    run = RunDirectory(Path("runs/no_disk"))
    told = [event.message for event in read_events(run.events) if event.kind == "save_failed"]
    assert len(told) == 1
    assert "could not be saved: No space left on device; the run goes on" in told[0]
    assert weights(run) == weights(TWO)


REFUSED = {
    "model.method=qlora": "does not shard 4-bit weights: set model.method to lora",
    "optim.name=adafactor": "does not shard the state of optim.name adafactor: use adamw, adamw_foreach or sgd",
    "optim.name=adamw_host": "does not shard the state of optim.name adamw_host",
    "model.compile=true": "model.compile does not work with model.shard full: drop one of them",
    "model.offload_activations=true": "model.offload_activations does not work with model.shard full: drop one of them",
    "memory.on_oom=quarantine": "set memory.on_oom to stop, or drop model.shard",
    "train.probe=true": "train.probe works in one process and model.shard full needs several",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_dealt_is_refused_in_a_sentence(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = ("model.recompute=full", "train.steps=null", "train.save_every=auto")
    assert main(["train", *SHARDED, *rest, words]) == 2
    said = capsys.readouterr().err
    assert REFUSED[words] in said
    assert said.count("model.shard") == 1 + (words == "memory.on_oom=quarantine")


def test_one_process_alone_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *SHARDED]) == 2
    assert (
        "start two or more with torchrun --nproc_per_node 2, or drop it" in capsys.readouterr().err
    )
