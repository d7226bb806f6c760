"""Hold a table for each other trainer, with its names for our keys and its default values.

A row reads `its name: (our key, its default)`, and rows are grouped by the file of the tool that
defines them. None means no default. A default that depends on the method is a mapping from the
method. A row with an empty name is something that the tool does without an argument.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

Rows = Mapping[str, Mapping[str, tuple[str, object]]]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


@dataclass(frozen=True)
class Default:
    """Holds a default value of another trainer."""

    value: Any
    #: The tool with its version, and the file that defines the default.
    source: str


@dataclass(frozen=True)
class Tool:
    """Holds the argument names and the defaults of another trainer."""

    name: str
    #: The version that the rows describe.
    release: str
    #: File of the tool -> {its name: (our key, its default)}.
    rows: Rows
    #: Names that no other tool has, as far as the argument lists were compared. They identify the
    #: tool of a file. Names that several tools share (`lora_rank`, `template`, `dataset`) do not.
    unique_names: frozenset[str]
    #: What the tool does without an argument: file -> {any text: (our key, its value)}.
    implied: Rows = field(default_factory=dict)
    #: The tool whose arguments this tool extends.
    base: "Tool | None" = None
    #: Words of a command that start its training, such as 'swift' in `swift sft`.
    programs: tuple[str, ...] = ()

    @cached_property
    def keys(self) -> Mapping[str, str]:
        """Return {its name: our key}, including the names of its base."""
        inherited = dict(self.base.keys) if self.base else {}
        return inherited | {
            name: row[0] for names in self.rows.values() for name, row in names.items()
        }

    @cached_property
    def defaults(self) -> Mapping[str, Default]:
        """Return {our key: what the tool does if the configuration does not set it}."""
        found = dict(self.base.defaults) if self.base else {}
        for rows in (self.rows, self.implied):
            for file, names in rows.items():
                for key, value in names.values():
                    found.pop(key, None)
                    if value is not None:
                        found[key] = Default(value, f"{self.release}, {file}")
        return found


TRANSFORMERS = Tool(
    name="transformers",
    release="transformers 5.23",
    unique_names=frozenset(),  # the tools that extend transformers accept all of its arguments
    rows={
        "training_args.py": {
            "per_device_train_batch_size": ("batch.micro", 8),
            "per_device_eval_batch_size": ("eval.micro", None),
            "gradient_accumulation_steps": ("batch.accumulation", 1),
            "learning_rate": ("optim.lr", 5e-5),
            "lr_scheduler_type": ("optim.schedule", "linear"),
            "warmup_ratio": ("optim.warmup", 0.0),
            "weight_decay": ("optim.weight_decay", 0.0),
            "max_grad_norm": ("optim.clip", 1.0),
            "optim": ("optim.name", "adamw_torch_fused"),
            "adam_epsilon": ("optim.eps", None),
            "num_train_epochs": ("train.epochs", 3.0),
            "max_steps": ("train.steps", None),
            "seed": ("train.seed", 42),
            "label_smoothing_factor": ("train.label_smoothing", None),
            "output_dir": ("run.output", None),
            "report_to": ("run.trackers", None),
            "bf16": ("model.precision", False),
            "fp16": ("model.precision", False),
            "torch_compile": ("model.compile", None),
            "gradient_checkpointing": ("model.recompute", None),
            "activation_checkpointing": ("model.recompute", None),
        },
        "peft's tuners/lora/config.py": {
            "peft_type": ("model.method", None),
            "r": ("model.lora.rank", 8),
            "lora_alpha": ("model.lora.alpha", 8),
            "lora_dropout": ("model.lora.dropout", 0.0),
            "target_modules": ("model.lora.targets", None),
            "modules_to_save": ("model.lora.modules_to_save", None),
        },
    },
    implied={"trainer.py": {"": ("data.eval_fraction", 0.0)}},
)

TRL = Tool(
    name="TRL",
    release="TRL 1.16",
    base=TRANSFORMERS,
    programs=("trl", "trl.scripts.sft", "trl.scripts.dpo", "trl.scripts.kto"),
    unique_names=_names(
        "dataset_name dataset_config dataset_train_split dataset_test_split dataset_streaming "
        "use_peft max_seq_length "
        "completion_only_loss assistant_only_loss dataset_text_field chat_template_path "
        "truncation_mode lora_task_type use_bnb_nested_quant"
    ),
    rows={
        "trainer/sft_config.py": {
            "learning_rate": ("optim.lr", 2e-5),
            "max_length": ("data.max_length", 1024),
            "max_seq_length": ("data.max_length", 1024),
            "packing": ("data.packing", None),
            "chat_template_path": ("data.template", None),
            "assistant_only_loss": ("data.mask", None),
            "completion_only_loss": ("data.mask", None),
            "activation_offloading": ("model.offload_activations", None),
            "bf16": ("model.precision", True),
        },
        "trainer/model_config.py": {
            "model_name_or_path": ("model.source", None),
            "trust_remote_code": ("model.trust_remote_code", None),
            "attn_implementation": ("model.attention", None),
            "use_peft": ("model.method", None),
            "lora_r": ("model.lora.rank", 16),
            "lora_alpha": ("model.lora.alpha", 32),
            "lora_dropout": ("model.lora.dropout", 0.05),
            "lora_target_modules": ("model.lora.targets", None),
            "lora_modules_to_save": ("model.lora.modules_to_save", None),
        },
        "scripts/utils.py": {
            "dataset_name": ("data.train", None),
            "datasets": ("data.train", None),
        },
    },
)

LLAMA_FACTORY = Tool(
    name="LLaMA-Factory",
    release="LLaMA-Factory 0.9.5",
    base=TRANSFORMERS,
    programs=("llamafactory-cli", "lmf", "llamafactory.cli", "train_bash.py"),
    unique_names=_names(
        "finetuning_type dataset_dir lora_target val_size max_samples stage train_on_prompt "
        "mask_history "
        "neat_packing pure_bf16 plot_loss additional_target mix_strategy "
        "interleave_probs default_system use_llama_pro freeze_trainable_layers shift_attn "
        "upcast_layernorm "
        "disable_gradient_checkpointing double_quantization media_dir"
    ),
    rows={
        "hparams/data_args.py": {
            "dataset": ("data.train", None),
            "eval_dataset": ("data.eval", None),
            "cutoff_len": ("data.max_length", 2048),
            "val_size": ("data.eval_fraction", 0.0),
            "max_samples": ("data.max_rows", None),
            "packing": ("data.packing", None),
            "train_on_prompt": ("data.mask", None),
            "mask_history": ("data.mask", None),
        },
        "hparams/model_args.py": {
            "model_name_or_path": ("model.source", None),
            "flash_attn": ("model.attention", None),
            "trust_remote_code": ("model.trust_remote_code", None),
            "add_tokens": ("model.new_tokens", None),
            "new_special_tokens": ("model.new_tokens", None),
        },
        "hparams/finetuning_args.py": {
            "finetuning_type": ("model.method", "lora"),
            "lora_rank": ("model.lora.rank", 8),
            "lora_alpha": ("model.lora.alpha", None),  # twice the rank
            "lora_dropout": ("model.lora.dropout", 0.0),
            "lora_target": ("model.lora.targets", "all"),
            "additional_target": ("model.lora.modules_to_save", None),
            "freeze_trainable_layers": ("model.freeze.trained_layers", 2),
            "freeze_trainable_modules": ("model.freeze.trained_modules", None),
            "freeze_extra_modules": ("model.freeze.extra_modules", None),
        },
    },
    implied={
        "model/patcher.py and model/adapter.py": {
            "frozen": (
                "model.precision",
                {"full": False, "freeze": True, "lora": True, "qlora": True},
            ),
        },
    },
)

LLAMA_FACTORY_V1 = Tool(
    name="LLaMA-Factory v1",
    release="v1 of LLaMA-Factory 0.9.5",
    unique_names=_names("train_dataset model_class dist_config optim_config lr_scheduler_config kernel_config "
                  "init_config quant_config batching_strategy custom_chat_template sample_backend"),
    rows={
        "config/training_args.py": {
            "micro_batch_size": ("batch.micro", 1),
            "global_batch_size": ("batch.effective", None),
            "cutoff_len": ("data.max_length", 2048),
            "learning_rate": ("optim.lr", 1e-4),
            "num_train_epochs": ("train.epochs", 3),
            "max_steps": ("train.steps", None),
            "max_grad_norm": ("optim.clip", 1.0),
            "bf16": ("model.precision", True),
            "enable_activation_checkpointing": ("model.recompute", None),
            "seed": ("train.seed", 42),
            "output_dir": ("run.output", None),
        },
        "config/data_args.py": {
            "train_dataset": ("data.train", None),
            "eval_dataset": ("data.eval", None),
        },
        "config/model_args.py": {
            "model": ("model.source", None),
            "flash_attn": ("model.attention", None),
            "trust_remote_code": ("model.trust_remote_code", None),
        },
        "plugins/model_plugins/peft.py": {
            "peft_config.name": ("model.method", "full"),
            "r": ("model.lora.rank", 8),
            "lora_alpha": ("model.lora.alpha", 16),
            "lora_dropout": ("model.lora.dropout", 0.05),
            "target_modules": ("model.lora.targets", "all"),
        },
    },
    implied={
        "core/base_trainer.py": {
            "schedule": ("optim.schedule", "constant"),
            "accumulation": ("batch.accumulation", 1),
            "evaluation": ("data.eval_fraction", 0.0),
        },
        "core/base_trainer.py with torch.optim.AdamW": {"decay": ("optim.weight_decay", 0.01)},
    },
)  # fmt: skip

AXOLOTL = Tool(
    name="axolotl",
    release="axolotl 0.18",
    base=TRANSFORMERS,
    programs=("axolotl", "axolotl.cli.train"),
    unique_names=_names(
        "base_model sequence_len num_epochs adapter sample_packing val_set_size test_datasets "
        "train_on_inputs "
        "lora_target_linear flash_attention sdp_attention xformers_attention special_tokens "
        "pad_to_sequence_len "
        "dataset_prepared_path is_llama_derived_model saves_per_epoch evals_per_epoch "
        "lora_model_dir pretraining_dataset"
    ),
    rows={
        "utils/schemas/training.py": {
            "micro_batch_size": ("batch.micro", 1),
            "batch_size": ("batch.effective", None),
            "eval_batch_size": ("eval.micro", None),
            "train_on_inputs": ("data.mask", None),
            "learning_rate": ("optim.lr", None),
            "lr_scheduler": ("optim.schedule", "cosine"),
            "cosine_min_lr_ratio": ("optim.final_lr_fraction", None),
            "optimizer": ("optim.name", "adamw_torch_fused"),
            "num_epochs": ("train.epochs", 1.0),
        },
        "utils/schemas/config.py": {
            "datasets": ("data.train", None),
            "pretraining_dataset": ("data.train", None),
            "test_datasets": ("data.eval", None),
            "sequence_len": ("data.max_length", 512),
            "val_set_size": ("data.eval_fraction", 0.0),
            "sample_packing": ("data.packing", None),
            "bf16": ("model.precision", "auto"),
            "flash_attention": ("model.attention", None),
            "sdp_attention": ("model.attention", None),
            "xformers_attention": ("model.attention", None),
            "eager_attention": ("model.attention", None),
            "attn_implementation": ("model.attention", None),
            "activation_offloading": ("model.offload_activations", None),
        },
        "utils/data/utils.py": {"excess_length_strategy": ("data.too_long", "drop")},
        "core/builders/base.py": {"warmup_ratio": ("optim.warmup", 0.03)},
        "utils/schemas/peft.py": {
            "adapter": ("model.method", "full"),
            "lora_r": ("model.lora.rank", None),
            "lora_alpha": ("model.lora.alpha", None),
            "lora_dropout": ("model.lora.dropout", 0.0),
            "lora_target_modules": ("model.lora.targets", None),
            "lora_modules_to_save": ("model.lora.modules_to_save", None),
        },
        "utils/schemas/model.py": {
            "base_model": ("model.source", None),
            "tokenizer_config": ("model.tokenizer", None),
            "trust_remote_code": ("model.trust_remote_code", None),
        },
    },
)

MS_SWIFT = Tool(
    name="ms-swift",
    release="ms-swift 4.4",
    base=TRANSFORMERS,
    programs=("swift", "swift.cli.sft", "swift.cli.pt", "swift.cli.rlhf"),
    unique_names=_names(
        "tuner_type train_type split_dataset_ratio val_dataset attn_impl model_author "
        "agent_template loss_scale "
        "quant_bits quant_method cached_dataset tuner_backend lazy_tokenize use_hf "
        "custom_register_path "
        "external_plugins freeze_vit freeze_llm freeze_aligner load_from_cache_file "
        "truncation_strategy add_version "
        "custom_dataset_info dataset_shuffle rlhf_type"
    ),
    rows={
        "arguments/base_args/model_args.py": {
            "model": ("model.source", None),
            "torch_dtype": ("model.precision", "auto"),  # the precision of the checkpoint
            "attn_impl": ("model.attention", None),
            "new_special_tokens": ("model.new_tokens", None),
        },
        "arguments/base_args/base_args.py": {
            "tuner_type": ("model.method", "lora"),
            "train_type": ("model.method", "lora"),  # the name of tuner_type in version 3
            "packing": ("data.packing", None),
        },
        "arguments/base_args/data_args.py": {
            "dataset": ("data.train", None),
            "val_dataset": ("data.eval", None),
            "split_dataset_ratio": ("data.eval_fraction", 0.0),
        },
        "arguments/base_args/template_args.py": {
            "max_length": ("data.max_length", None),  # the longest that the model supports
            "truncation_strategy": ("data.too_long", "delete"),
            "loss_scale": ("data.mask", "default"),
        },
        "arguments/tuner_args.py": {
            "target_modules": ("model.lora.targets", "all-linear"),
            "lora_rank": ("model.lora.rank", 8),
            "lora_alpha": ("model.lora.alpha", 32),
            "lora_dropout": ("model.lora.dropout", 0.05),
        },
        "trainers/arguments.py": {
            "per_device_train_batch_size": ("batch.micro", 1),
            # By default, all devices together reach 16 samples.
            "gradient_accumulation_steps": ("batch.accumulation", None),
            "weight_decay": ("optim.weight_decay", 0.1),
            "adam_beta2": ("optim.betas", [0.9, 0.95]),
            "lr_scheduler_type": ("optim.schedule", "cosine"),
            "optimizer": ("optim.name", "adamw_torch_fused"),
        },
        "arguments/sft_args.py": {
            "learning_rate": ("optim.lr", {"full": 1e-5, "lora": 1e-4, "qlora": 1e-4})
        },
    },
)

MS_SWIFT_2 = Tool(
    name="ms-swift 2",
    release="ms-swift 2.6",
    base=MS_SWIFT,
    unique_names=_names(
        "model_id_or_path sft_type template_type dataset_test_ratio check_dataset_strategy "
        "train_dataset_sample "
        "custom_train_dataset_path self_cognition_sample "
        "add_output_dir_suffix model_cache_dir"
    ),
    rows={
        "llm/utils/argument.py": {
            "model_id_or_path": ("model.source", None),
            "sft_type": ("model.method", "lora"),
            "dtype": ("model.precision", "auto"),
            "custom_train_dataset_path": ("data.train", None),
            "dataset_test_ratio": ("data.eval_fraction", 0.01),
            "train_dataset_sample": ("data.max_rows", None),
            "max_length": ("data.max_length", 2048),
            "target_modules": ("model.lora.targets", None),  # chosen by the architecture
            "lora_target_modules": ("model.lora.targets", None),
            "batch_size": ("batch.micro", 1),
            "eval_batch_size": ("eval.micro", None),
            "num_train_epochs": ("train.epochs", 1),
            "warmup_ratio": ("optim.warmup", 0.05),
        },
    },
)

MINIMIND = Tool(
    name="minimind",
    release="minimind of August 2026",
    unique_names=_names(
        "accumulation_steps from_weight save_weight use_moe grad_clip lora_name from_resume"
    ),
    rows={
        "trainer/train_full_sft.py": {
            "epochs": ("train.epochs", 2),
            "batch_size": ("batch.micro", 16),
            "accumulation_steps": ("batch.accumulation", 1),
            "learning_rate": ("optim.lr", 1e-5),
            "grad_clip": ("optim.clip", 1.0),
            "max_seq_len": ("data.max_length", 768),
            "data_path": ("data.train", "../dataset/sft_t2t_mini.jsonl"),
            "from_weight": ("model.source", "pretrain"),
            "save_dir": ("run.output", "../out"),
            "save_weight": ("run.name", "full_sft"),
            "use_compile": ("model.compile", None),
            "dtype": ("model.precision", "bfloat16"),
        },
    },
    implied={
        "trainer/trainer_utils.py": {
            "schedule": ("optim.schedule", "cosine"),
            "warmup": ("optim.warmup", 0.0),
            "final": ("optim.final_lr_fraction", 0.1),
            "seed": ("train.seed", 42),
            "evaluation": ("data.eval_fraction", 0.0),
        },
        "trainer/train_full_sft.py with torch.optim.AdamW": {"decay": ("optim.weight_decay", 0.01)},
        "model/model_lora.py": {
            "rank": ("model.lora.rank", 16),
            "alpha": ("model.lora.alpha", 16),
            "dropout": ("model.lora.dropout", 0.0),
            "targets": ("model.lora.targets", ["q_proj", "o_proj"]),
        },
    },
)
MINIMIND_LORA = Tool(
    name="minimind",
    release=MINIMIND.release,
    base=MINIMIND,
    unique_names=MINIMIND.unique_names,
    programs=("train_lora.py",),
    rows={
        "trainer/train_lora.py": {
            "epochs": ("train.epochs", 10),
            "batch_size": ("batch.micro", 32),
            "learning_rate": ("optim.lr", 1e-4),
            "max_seq_len": ("data.max_length", 340),
            "data_path": ("data.train", "../dataset/lora_medical.jsonl"),
            "from_weight": ("model.source", "full_sft"),
            "lora_name": ("run.name", "lora_medical"),
        },
    },
)
MINIMIND_PRETRAIN = Tool(
    name="minimind",
    release=MINIMIND.release,
    base=MINIMIND,
    unique_names=MINIMIND.unique_names,
    programs=("train_pretrain.py",),
    rows={
        "trainer/train_pretrain.py": {
            "batch_size": ("batch.micro", 32),
            "accumulation_steps": ("batch.accumulation", 8),
            "learning_rate": ("optim.lr", 5e-4),
            "max_seq_len": ("data.max_length", 340),
            "data_path": ("data.train", "../dataset/pretrain_t2t_mini.jsonl"),
            "from_weight": ("model.source", "none"),
            "save_weight": ("run.name", "pretrain"),
        },
    },
)
MINIMIND_SCRIPTS = {
    "train_full_sft.py": MINIMIND,
    "train_lora.py": MINIMIND_LORA,
    "train_pretrain.py": MINIMIND_PRETRAIN,
}

TOOLS = {
    tool.name: tool
    for tool in (
        LLAMA_FACTORY,
        LLAMA_FACTORY_V1,
        MS_SWIFT,
        MS_SWIFT_2,
        AXOLOTL,
        TRL,
        TRANSFORMERS,
        MINIMIND,
    )
}
