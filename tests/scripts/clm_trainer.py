"""Trains a causal language model of transformers with its Trainer, on text files, as examples for it do.

clm_trainer.py --model_name_or_path DIR --train_file text.jsonl --block_size 128 --output_dir out ...
"""

from dataclasses import dataclass, field
from itertools import chain

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)


@dataclass
class Arguments:
    model_name_or_path: str = field()
    train_file: str = field()
    block_size: int = field(default=128)


def main() -> None:
    arguments, training = HfArgumentParser(
        (Arguments, TrainingArguments)
    ).parse_args_into_dataclasses()
    set_seed(training.seed)
    texts = load_dataset("json", data_files={"train": arguments.train_file})
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(arguments.model_name_or_path)
    size = sum({p.data_ptr(): p.numel() for p in model.parameters()}.values())
    print(f"{size / 1e6:.2f}M parameters")

    tokenised = texts.map(
        lambda rows: tokenizer(rows["text"]), batched=True, remove_columns=["text"]
    )

    def in_blocks(rows):
        joined = {key: list(chain(*rows[key])) for key in ("input_ids", "attention_mask")}
        total = len(joined["input_ids"]) // arguments.block_size * arguments.block_size
        blocks = {
            key: [
                value[i : i + arguments.block_size] for i in range(0, total, arguments.block_size)
            ]
            for key, value in joined.items()
        }
        return blocks | {"labels": [list(ids) for ids in blocks["input_ids"]]}

    blocks = tokenised.map(in_blocks, batched=True)
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=blocks["train"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
