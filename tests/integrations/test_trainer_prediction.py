"""The prediction of a built Trainer: equal to its real run, without touching it."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import Trainer, TrainerCallback

import fitune
from fitune.allocator.prediction import Prediction
from fitune.cli.app import main
from fitune.errors import UsageError
from fitune.integrations import versions
from fitune.integrations.trainer_prediction import record_trainer
from fitune.integrations.transformers import weightless
from fitune.recorder.assumptions import Assumptions
from fitune.recorder.cuda_behaviour import CpuKernels
from fitune.recorder.events import MemoryTrace
from fitune.recorder.record import RecordSettings, _collected_at_step_ends, record_loop
from fitune.recorder.recorder import Recorder
from fitune.recorder.recording import to_trace
from fitune.recorder.shape_cache import ShapeMemory
from rehearsal.difference import first_difference
from tiny_models import TINY, TINY_GPT2
from tiny_run import save_tiny_model
from tiny_trainers import hf_trainer, needs_trl, rows, sft_trainer, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
Make = Callable[..., Trainer]
BOTH = pytest.mark.parametrize("make", [hf_trainer, pytest.param(sft_trainer, marks=needs_trl)])


def lora(directory: Path, **changes: Any) -> Trainer:
    return sft_trainer(
        directory, peft_config=LoraConfig(r=4, target_modules="all-linear"), **changes
    )


def gpt2(directory: Path, **changes: Any) -> Trainer:
    return hf_trainer(directory, model=tiny_model(TINY_GPT2), **changes)


class _Steps(TrainerCallback):
    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def on_step_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        self._recorder.begin_step(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        self._recorder.end_step(objects["model"])


def real_run(make: Make, directory: Path, **changes: Any) -> MemoryTrace:
    """All that the Trainer's own `.train()` allocates."""
    recorder = Recorder(CpuKernels(Assumptions("balanced", ShapeMemory()).call))
    trainer = make(directory, callbacks=[_Steps(recorder)], **changes)
    with _collected_at_step_ends():
        recorder.load(trainer.model)
        with recorder.hooks(), recorder:
            trainer.train()
    return to_trace(recorder.recording(()))


def sizes(trace: MemoryTrace) -> list[tuple[int, int]]:
    """(step, bytes) of each birth in the first three steps, but for inputs: the DataLoader makes them when it likes."""
    return [
        (event.step, event.num_bytes)
        for event in trace.events
        if event.num_bytes > 0 and 1 <= event.step <= 3 and event.category != "input"
    ]


@BOTH
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_real_run_allocates_what_was_recorded_before_it(
    make: Make, accumulation: int, tmp_path: Path
) -> None:
    data = rows((20,) * 32, masked=False)
    changes = {"gradient_accumulation_steps": accumulation, "data": data}
    recorded = record_trainer(make(tmp_path, **changes))
    predicted = record_loop(recorded.build, recorded.loop, RecordSettings(num_steps=3))
    assert sizes(predicted) == sizes(real_run(make, tmp_path, **changes))


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (hf_trainer, {}),
        (hf_trainer, {"bf16": True}),
        (gpt2, {"gradient_accumulation_steps": 4}),
        (hf_trainer, {"activation_checkpointing": True}),
        (hf_trainer, {"neftune_noise_alpha": 5.0}),
        (hf_trainer, {"label_smoothing_factor": 0.1}),
        pytest.param(sft_trainer, {}, marks=needs_trl),
        pytest.param(
            sft_trainer, {"bf16": True, "gradient_accumulation_steps": 2}, marks=needs_trl
        ),
        pytest.param(sft_trainer, {"padding_free": True, "max_length": None}, marks=needs_trl),
        pytest.param(sft_trainer, {"label_smoothing_factor": 0.1}, marks=needs_trl),
        pytest.param(lora, {}, marks=needs_trl),
    ],
    ids=lambda value: getattr(value, "__name__", None) or "-".join(value),
)
def test_fake_and_real_tensors_give_the_same_events(
    make: Make, changes: dict[str, Any], tmp_path: Path
) -> None:
    trainer = make(tmp_path, **changes)
    traces = []
    for mode in ("fake", "real"):
        recorded = record_trainer(trainer, mode=mode)  # type: ignore[arg-type]
        traces.append(
            record_loop(recorded.build, recorded.loop, RecordSettings(num_steps=2, mode=mode))
        )  # type: ignore[arg-type]
    assert first_difference(*traces) is None


@BOTH
def test_the_trainer_trains_afterwards_as_if_nothing_had_been_predicted(
    make: Make, tmp_path: Path
) -> None:
    plain = make(tmp_path)
    plain.train()
    trainer = make(tmp_path)
    before = {name: id(value) for name, value in vars(trainer).items()}
    stream = torch.get_rng_state()
    fitune.predict_trainer(trainer, gpu="A100 80GB", num_steps=1)
    assert {name: id(value) for name, value in vars(trainer).items()} == before
    assert torch.equal(torch.get_rng_state(), stream)
    trainer.train()
    assert weights(trainer) == weights(plain)
    ours, theirs = (
        [log.get("loss") for log in each.state.log_history] for each in (trainer, plain)
    )
    assert ours == theirs


def weights(trainer: Trainer) -> dict[str, list[float]]:
    assert trainer.model is not None
    return {name: tensor.flatten().tolist() for name, tensor in trainer.model.state_dict().items()}


def test_an_optimizer_that_was_given_is_the_one_predicted(tmp_path: Path) -> None:
    def peak(optimizer: Callable[[Any], torch.optim.Optimizer]) -> int:
        model = tiny_model()
        trainer = hf_trainer(
            tmp_path, model=model, optimizers=(optimizer(model.parameters()), None)
        )
        return fitune.predict_trainer(trainer, gpu="cpu", num_steps=2).categories["optimizer_state"]

    assert peak(lambda parameters: torch.optim.SGD(parameters, lr=0.1)) == 0
    assert peak(torch.optim.Adam) > 2 * 4 * sum(p.numel() for p in tiny_model().parameters())


def test_a_trainer_that_has_trained_is_predicted_the_same(tmp_path: Path) -> None:
    trainer = hf_trainer(tmp_path)
    before = fitune.predict_trainer(trainer, gpu="cpu", num_steps=2)
    trainer.train()
    assert fitune.predict_trainer(trainer, gpu="cpu", num_steps=2).categories == before.categories


def test_the_longest_rows_decide(tmp_path: Path) -> None:
    short, long = (
        fitune.predict_trainer(
            hf_trainer(tmp_path, data=rows((6,) * 8 + last)), gpu="cpu", num_steps=1
        )
        for last in ((6,), (48,))
    )
    assert long.peak_allocated_bytes > 2 * short.peak_allocated_bytes
    assert "the longest of 48 tokens" in long.assumptions[0]


@needs_trl
def test_the_loss_of_trl_works_in_place_on_a_card(tmp_path: Path) -> None:
    prediction = fitune.predict_trainer(sft_trainer(tmp_path), gpu="RTX 4090", num_steps=2)
    from trl.kernels import chunked_logprob

    tile = 4 * min(4 * 29, chunked_logprob.TOKEN_CHUNK_SIZE) * _chunk_size()
    assert (
        prediction.categories["temporary"] < 1.5 * tile
    )  # torch's own operators make about five of them
    assert not chunked_logprob._use_triton(torch.device("cpu"))


def _chunk_size() -> int:
    from trl.trainer import utils

    return int(utils._CHUNKED_LOGPROB_CHUNK_SIZE)


@contextlib.contextmanager
def version_of(package: str, found: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        real = versions.version
        patch.setattr(versions, "version", lambda name: found if name == package else real(name))
        yield


@pytest.mark.parametrize("found", ["5.22.0", "6.0.0"])
def test_another_transformers_is_refused(found: str, tmp_path: Path) -> None:
    trainer = hf_trainer(tmp_path)
    with (
        version_of("transformers", found),
        pytest.raises(UsageError, match=f"transformers {found} is not supported"),
    ):
        fitune.predict_trainer(trainer, gpu="cpu")


@needs_trl
def test_another_trl_is_refused_for_its_trainers_alone(tmp_path: Path) -> None:
    with version_of("trl", "0.9.0"):
        fitune.predict_trainer(hf_trainer(tmp_path), gpu="cpu", num_steps=1)
        with pytest.raises(UsageError, match=r"trl 0\.9\.0 is not supported"):
            fitune.predict_trainer(sft_trainer(tmp_path), gpu="cpu")


def test_a_second_model_is_refused(tmp_path: Path) -> None:
    trainer: Any = hf_trainer(tmp_path)
    trainer.ref_model = torch.nn.Linear(2, 2)
    with pytest.raises(UsageError, match="second model"):
        fitune.predict_trainer(trainer, gpu="cpu")


def test_what_is_no_trainer_is_refused() -> None:
    with pytest.raises(UsageError, match=r"not a transformers\.Trainer"):
        fitune.predict_trainer(torch.nn.Linear(2, 2), gpu="cpu")  # type: ignore[arg-type]


# ---- fitune plan --trainer ----


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_training.py").write_text(
        "from pathlib import Path\nfrom tiny_trainers import hf_trainer\n\n"
        "def build():\n    return hf_trainer(Path('out'))\n\nnothing = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    return "my_training"


def test_plan_shows_what_a_trainer_needs(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["plan", "--trainer", f"{module}:build", "--gpu", "RTX 4090", "--format", "json"]) == 0
    )
    prediction = json.loads(capsys.readouterr().out)["prediction"]
    assert prediction["fits"]
    assert sum(prediction["categories"].values()) == prediction["peak_allocated_bytes"]


def test_plan_shows_a_trainer_as_a_table(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--trainer", f"{module}:build", "--gpu", "RTX 4090"]) == 0
    assert "optimizer_state" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["my_training:nothing", "my_training", "no_such_module:build"])
def test_a_function_that_is_not_there_is_said(
    name: str, module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--trainer", name]) == 2
    assert f"--trainer {name}" in capsys.readouterr().err


def test_a_trainer_that_cannot_be_built_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "refusing.py").write_text("def build():\n    raise ValueError('no bf16\\nhere')\n")
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--trainer", "refusing:build"]) == 2
    assert (
        "--trainer refusing:build built no Trainer: ValueError: no bf16 here"
        in capsys.readouterr().err
    )


# ---- without weights ----


@BOTH
def test_a_trainer_without_weights_is_predicted_the_same(make: Make, tmp_path: Path) -> None:
    with_weights = make(tmp_path)
    with weightless():
        without = make(tmp_path)
    assert without.model is not None
    assert all(parameter.is_meta for parameter in without.model.parameters())
    one, other = (
        fitune.predict_trainer(each, gpu="A100 80GB", num_steps=2)
        for each in (with_weights, without)
    )
    assert one == other


def test_a_trainer_of_a_model_named_by_path_with_its_defaults_for_a_card_is_predicted(
    tmp_path: Path,
) -> None:
    """TRL's own arguments ask for bfloat16, which this machine without a card would refuse."""
    trl = pytest.importorskip("trl")
    save_tiny_model(tmp_path / "tiny")
    data = Dataset.from_dict(
        {
            "messages": 8
            * [[{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c " * 40}]]
        }
    )

    def build(**options: Any) -> Any:
        arguments = trl.SFTConfig(str(tmp_path / "out"), report_to="none", **options)
        return trl.SFTTrainer(str(tmp_path / "tiny"), arguments, train_dataset=data)

    with weightless():
        without = build()
    assert without.args.bf16
    assert all(parameter.is_meta for parameter in without.model.parameters())
    one, other = (
        fitune.predict_trainer(each, gpu="A100 80GB", num_steps=2)
        for each in (build(use_cpu=True), without)
    )
    assert one == other


def test_a_trainer_of_experts_is_predicted_between_even_and_worst_routing(tmp_path: Path) -> None:
    def predict(**options: Any) -> Prediction:
        model = tiny_model(TINY["mixtral"], intermediate_size=4096)
        model.config._experts_implementation = "eager"
        trainer = hf_trainer(tmp_path, model=model, data=rows((60,) * 8))
        return fitune.predict_trainer(trainer, gpu="A100 80GB", num_steps=2, **options)

    even, worst = predict(), predict(routing="worst")
    assert even.peak_allocated_bytes < worst.peak_allocated_bytes
    assert even.device_interval is not None
    assert even.device_interval == worst.device_interval
    assert even.device_interval.high_bytes > (worst.device_bytes or 0)
    assert even.device_interval.reasons[-1].startswith(
        "tokens go to the experts evenly or all to the same"
    )
