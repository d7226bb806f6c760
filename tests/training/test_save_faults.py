"""Memory or the disk fails while a run is saved, goes on or loads its model: it goes on, or ends in one sentence with a
whole checkpoint, and comes to the bits of a run that was left alone."""

import re
from collections.abc import Callable

import pytest

from disturbed_run import RUN, assert_same, error_of, newest_step, train
from faults import failing_call, out_of_memory
from fitune.errors import OutOfMemoryError
from fitune.run.metrics import read_events, read_metrics, read_summary
from fitune.training.checkpoint.read import newest_checkpoint

pytestmark = pytest.mark.usefixtures("disturbed")

Error = Callable[[], BaseException]
MANY = 1000
TRAIN = "fitune.training."
RECOVERY = "fitune.recovery."


def no_space() -> OSError:
    return OSError(28, "No space left on device")


def unreadable() -> OSError:
    return OSError(5, "Input/output error")


def no_memory_on_the_host() -> RuntimeError:
    return RuntimeError(
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4194304 bytes."
    )


SAVING: dict[
    str, tuple[str, int, Error, str]
] = {  # function, its first call that fails, how, what is said of it
    "state gathered": (
        "checkpoint.content.saved_tensors",
        3,
        out_of_memory,
        "found no memory (20.0 MiB at once)",
    ),
    "tensors written": (
        "checkpoint.content.write_tensors",
        2,
        no_memory_on_the_host,
        "out of memory, 4.0 MiB at once",
    ),
    "state written": ("checkpoint.write.write_json", 1, no_space, "No space left on device"),
    "logs flushed": ("checkpoint.write.flush", 4, no_space, "No space left on device"),
    "manifest written": ("checkpoint.write.write_manifest", 1, MemoryError, "out of memory"),
    "renamed": ("checkpoint.files.Path.rename", 1, no_space, "No space left on device"),
    "directory flushed": (
        "checkpoint.write.sync_directory",
        1,
        no_space,
        "No space left on device",
    ),
    "last and best exported": (
        "checkpoint.write.link_model",
        2,
        out_of_memory,
        "out of memory, 20.0 MiB at once",
    ),
    "older ones removed": ("checkpoint.write.remove_old", 1, no_space, "No space left on device"),
}


def failed_saves() -> list[str]:
    events = read_events(RUN.events) if RUN.events.exists() else ()
    return [event.message for event in events if event.kind == "save_failed"]


@pytest.mark.parametrize("place", SAVING)
def test_a_save_that_fails_is_said_in_a_line_and_changes_nothing_else(place: str) -> None:
    target, first, error, cause = SAVING[place]
    with failing_call(TRAIN + target, first, first + 1, error=error):
        train("sft.yaml")
    assert_same()
    assert cause in failed_saves()[0]
    for said in failed_saves():
        assert re.fullmatch(r"warning: step \d could not be saved: [^\n]+; the run goes on", said)
    assert not list(RUN.checkpoints.glob(".*"))


@pytest.mark.parametrize("place", ["state gathered", "renamed", "last and best exported"])
def test_when_nothing_more_can_be_saved_the_run_ends_with_what_is_whole(
    place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target, first, error, cause = SAVING[place]
    with failing_call(TRAIN + target, *range(first, MANY), error=error):
        said = error_of(capsys, "sft.yaml")
    assert re.match(
        r"error: step 9 could not be saved: [^\n]+; the checkpoint before it is whole", said
    )
    assert cause in said
    found, faults = newest_checkpoint(RUN)
    assert found is not None
    assert faults == []
    train("--resume", "runs/run")
    assert_same()


def test_a_copy_that_finds_no_memory_once_is_made_the_second_time() -> None:
    with failing_call(TRAIN + "checkpoint.content.saved_tensors", 3, error=out_of_memory):
        train("sft.yaml")
    assert_same()
    assert failed_saves() == []


def test_best_weights_that_could_not_be_saved_are_not_called_the_best() -> None:
    """Of a run whose first evaluation is its best one."""
    worse = ("sft.yaml", "optim.lr=3.0", "optim.warmup=0.9", "train.save_every=9")
    train(*worse)
    losses = {line.step: line.eval_loss for line in read_metrics(RUN.metrics).evals if line.step}
    assert read_summary(RUN.summary).best_eval_loss == losses[3] < losses[6]
    with failing_call(TRAIN + "checkpoint.content.write_tensors", 0, error=no_space):
        train(*worse, "--overwrite")
    assert read_summary(RUN.summary).best_eval_loss == min(losses[6], losses[9])
    found, _ = newest_checkpoint(RUN)
    assert found is not None
    best = RUN.checkpoints / f"step-{found.state.best_step:08d}/model/model.safetensors"
    assert (RUN.best / "model.safetensors").read_bytes() == best.read_bytes()


def test_a_run_that_ends_for_want_of_memory_saves_again_what_could_not_be_saved(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The save of step 4 fails, then step 5 finds no memory: its sentence must be true."""
    with (
        failing_call(TRAIN + "checkpoint.write.write_manifest", 2, error=no_space),
        failing_call(RECOVERY + "guard.safe_step", *range(4, MANY), error=out_of_memory_for_good),
    ):
        said = error_of(capsys, "sft.yaml", exit_code=4)
    assert "the weights of step 4 are in runs/run/last" in said
    assert newest_step() == 4
    train("--resume", "runs/run")
    assert_same()


def out_of_memory_for_good() -> BaseException:
    return OutOfMemoryError("row 3 does not fit")


def test_a_last_save_that_fails_too_is_said_beside_what_ended_the_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with (
        failing_call(TRAIN + "checkpoint.write.write_manifest", *range(2, MANY), error=no_space),
        failing_call(RECOVERY + "guard.safe_step", *range(4, MANY), error=out_of_memory_for_good),
    ):
        said = error_of(capsys, "sft.yaml", exit_code=4)
    assert said.startswith(
        "error: row 3 does not fit; step 4 could not be saved: [Errno 28] No space left on device"
    )
    train("--resume", "runs/run")
    assert_same()


LOADING: dict[str, tuple[str, Error]] = {
    "weights read": (TRAIN + "checkpoint.read.live_tensors", MemoryError),
    "optimizer state read": (TRAIN + "checkpoint.read._restore_optimizer", out_of_memory),
    "model read": ("transformers.AutoModelForCausalLM.from_pretrained", no_memory_on_the_host),
    "model put on the device": ("transformers.PreTrainedModel.to", out_of_memory),
    "optimizer state made": (RECOVERY + "guard.create_state", out_of_memory),
}


@pytest.mark.parametrize("place", LOADING)
def test_memory_that_is_short_once_while_a_run_loads_changes_nothing(
    place: str, crashed: None
) -> None:
    target, error = LOADING[place]
    with failing_call(target, 0, error=error) as fault:
        train("--resume", "runs/run")
    assert next(fault.counter) >= 2
    assert_same()


def test_memory_that_stays_short_while_a_run_loads_is_one_sentence(
    capsys: pytest.CaptureFixture[str], crashed: None
) -> None:
    for target, said in (
        (
            "transformers.PreTrainedModel.to",
            "the model tiny found no memory (20.0 MiB at once): close other programs",
        ),
        (
            TRAIN + "checkpoint.read._restore_optimizer",
            "step-00000004 holds found no memory (20.0 MiB at once)",
        ),
    ):
        with failing_call(target, *range(MANY)):
            assert said in error_of(capsys, "--resume", "runs/run", exit_code=4)
    train("--resume", "runs/run")
    assert_same()


def test_a_disk_that_does_not_read_is_one_sentence_and_nothing_is_lost(
    capsys: pytest.CaptureFixture[str], crashed: None
) -> None:
    with failing_call(TRAIN + "checkpoint.read.safe_open", *range(MANY), error=unreadable):
        said = error_of(capsys, "--resume", "runs/run")
    assert said.startswith(
        "error: runs/run/checkpoints/step-00000004 cannot be read: [Errno 5] Input/output error"
    )
    train("--resume", "runs/run")
    assert_same()


def test_memory_that_is_short_beside_the_steps_is_one_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with failing_call(TRAIN + "loop.NormRecorder", 5):
        said = error_of(capsys, "sft.yaml", exit_code=4)
    assert said.startswith(
        "error: out of memory, 20.0 MiB at once were missing beside the steps: close other programs"
    )
    assert newest_step() == 4
    train("--resume", "runs/run")
    assert_same()
