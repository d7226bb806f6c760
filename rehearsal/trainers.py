"""Trainers of transformers and TRL, as their users build them, on rows that are all as long as each other."""

import warnings
from typing import Any

import datasets
import transformers
from tokenizers import Tokenizer, models

from rehearsal.cases import TrainerCase
from rehearsal.history import History
from rehearsal.models import LORA, causal_model

QUIET: dict[str, Any] = {
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "logging_strategy": "no",
    "optim": "adamw_torch",
    # it asks the card whether the loss is a number, and no kernel has computed one
    "logging_nan_inf_filter": False,
}


def trainer_of(case: TrainerCase, directory: str, *, num_steps: int) -> Any:
    datasets.disable_progress_bars()
    trainer = _built(case, directory, num_steps=num_steps)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _built(case: TrainerCase, directory: str, *, num_steps: int) -> Any:
    arguments = {
        "output_dir": directory,
        "per_device_train_batch_size": case.batch,
        "max_steps": num_steps,
        **QUIET,
        **dict(case.arguments),
    }
    row = [1] * case.length
    number = case.batch * num_steps * int(arguments.get("gradient_accumulation_steps", 1))
    data = datasets.Dataset.from_dict(
        {"input_ids": [row] * number, "labels": [row] * number, "attention_mask": [row] * number}
    )
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # transformers 6 renames gradient checkpointing
        if case.trl:
            import trl
            from peft import LoraConfig

            return trl.SFTTrainer(
                model=causal_model(case.model, dtype=case.dtype),
                args=trl.SFTConfig(**{"max_length": case.length} | arguments),
                train_dataset=data,
                processing_class=word_tokenizer(),
                peft_config=LoraConfig(**LORA) if case.lora else None,
            )
        return transformers.Trainer(
            model=causal_model(case.model, dtype=case.dtype, lora=case.lora),
            args=transformers.TrainingArguments(**arguments),
            train_dataset=data,
            data_collator=transformers.default_data_collator,
        )


class StepEnds(transformers.TrainerCallback):  # type: ignore[misc]
    """Tells the history where the Trainer's steps end."""

    def __init__(self, history: History) -> None:
        self.history = history

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.history.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.history.end_step()


def word_tokenizer() -> Any:
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
