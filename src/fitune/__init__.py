"""fitune: fine-tune a language model inside the memory you have."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from fitune.memory.prediction import Prediction

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`fitune.predict`, which imports torch only when it is asked for."""
    if name == "predict":
        from fitune.plan.predict import predict

        return predict
    raise AttributeError(f"module 'fitune' has no attribute '{name}'")


def predict_loop(
    build: "Callable[[], torch.nn.Module]",
    loop: "Callable[[torch.nn.Module, torch.device], Callable[[], Any]]",
    *,
    gpu: str | None = None,
    num_steps: int = 3,
    attention: Literal["auto", "flash", "efficient", "math", "eager"] = "auto",
) -> "Prediction":
    """Predicts the memory of any training loop, without the card and without weights.

    build() returns the model (with adapters, recompute, dtype as it is trained). loop(model, device) sets up what it
    needs and returns a function that does one step. Both run for real, on tensors without data; what depends on data is
    answered by stated assumptions (`Prediction.assumptions`). gpu: a card's name, "cpu", or None for this machine's
    card. attention: "auto" follows PyTorch's choice of kernel for `scaled_dot_product_attention`.

    All figures are of the last of num_steps steps. Raises UsageError for an unknown card.
    """
    from fitune.memory.devices import cpu_device, find_device, this_machine
    from fitune.memory.prediction import PredictSettings, predict
    from fitune.trace.cuda_behaviour import CudaTarget
    from fitune.trace.fake import RecordSettings, record_loop

    device = find_device(gpu) if gpu is not None else next(iter(this_machine()), cpu_device())
    target = None
    if device.kind == "cuda":
        target = CudaTarget(device.compute_capability or (8, 0), attention)
    trace = record_loop(build, loop, RecordSettings(target=target, num_steps=num_steps))
    return predict(trace, PredictSettings(device=device))
