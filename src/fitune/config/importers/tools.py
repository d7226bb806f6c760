"""One table for each other trainer: what it calls our keys, and what it does where its file is silent.

A table's rows stand under the file of the tool that says so, and read `its name: (our key, its default)`; None is no
default, and a default that depends on what is trained is a mapping of the method. A row without a name of the tool is a
thing that it does by itself. `base` is the table of the tool that it stands on, whose rows hold where it has none.

`own` are names of arguments that no other tool of these has, as far as their argument lists were compared; a file is
told by them. Names that several share (`lora_rank`, `template`, `dataset`) tell nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

Rows = Mapping[str, Mapping[str, tuple[str, Any]]]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


@dataclass(frozen=True)
class Default:
    """source: the tool with its version, and the file that says so."""

    value: Any
    source: str


@dataclass(frozen=True)
class Tool:
    """release: the one that the rows are of. programs: what its training is started with; they are words of a command,
    such as 'swift' in `swift sft`."""

    name: str
    release: str
    rows: Rows
    own: frozenset[str]
    silent: Rows = field(default_factory=dict)
    base: "Tool | None" = None
    programs: tuple[str, ...] = ()

    @cached_property
    def keys(self) -> Mapping[str, str]:
        """Its names, and those of its base, -> our key."""
        inherited = dict(self.base.keys) if self.base else {}
        return inherited | {
            name: row[0] for names in self.rows.values() for name, row in names.items()
        }

    @cached_property
    def defaults(self) -> Mapping[str, Default]:
        """Our key -> what it does where the file is silent."""
        found = dict(self.base.defaults) if self.base else {}
        for rows in (self.rows, self.silent):
            for file, names in rows.items():
                for key, value in names.values():
                    found.pop(key, None)
                    if value is not None:
                        found[key] = Default(value, f"{self.release}, {file}")
        return found


TRANSFORMERS = Tool(
    name="transformers",
    release="transformers 5.23",
    own=frozenset(),  # what it has, the tools that stand on it have too
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
        },
    },
    silent={"trainer.py": {"": ("data.eval_fraction", 0.0)}},
)

TRL = Tool(
    name="TRL",
    release="TRL 1.16",
    base=TRANSFORMERS,
    programs=("trl", "trl.scripts.sft"),
    own=_names(
        "dataset_name dataset_config dataset_train_split dataset_test_split dataset_streaming use_peft max_seq_length "
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
    own=_names(
        "finetuning_type dataset_dir lora_target val_size max_samples stage train_on_prompt mask_history "
        "neat_packing pure_bf16 plot_loss additional_target mix_strategy "
        "interleave_probs default_system use_llama_pro freeze_trainable_layers shift_attn upcast_layernorm "
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
        },
        "hparams/finetuning_args.py": {
            "finetuning_type": ("model.method", "lora"),
            "lora_rank": ("model.lora.rank", 8),
            "lora_alpha": ("model.lora.alpha", None),  # twice the rank
            "lora_dropout": ("model.lora.dropout", 0.0),
            "lora_target": ("model.lora.targets", "all"),
        },
    },
    silent={
        "model/patcher.py and model/adapter.py": {
            "frozen": ("model.precision", {"full": False, "lora": True, "qlora": True}),
        },
    },
)

LLAMA_FACTORY_V1 = Tool(
    name="LLaMA-Factory v1",
    release="v1 of LLaMA-Factory 0.9.5",
    own=_names("train_dataset model_class dist_config optim_config lr_scheduler_config kernel_config "
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
    silent={
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
    own=_names(
        "base_model sequence_len num_epochs adapter sample_packing val_set_size test_datasets train_on_inputs "
        "lora_target_linear flash_attention sdp_attention xformers_attention special_tokens pad_to_sequence_len "
        "dataset_prepared_path is_llama_derived_model saves_per_epoch evals_per_epoch "
        "lora_model_dir"
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
    programs=("swift", "swift.cli.sft", "swift.cli.pt"),
    own=_names(
        "tuner_type train_type split_dataset_ratio val_dataset attn_impl model_author agent_template loss_scale "
        "quant_bits quant_method cached_dataset tuner_backend lazy_tokenize use_hf custom_register_path "
        "external_plugins freeze_vit freeze_llm freeze_aligner load_from_cache_file truncation_strategy add_version "
        "custom_dataset_info dataset_shuffle rlhf_type"
    ),
    rows={
        "arguments/base_args/model_args.py": {
            "model": ("model.source", None),
            "torch_dtype": ("model.precision", "auto"),  # the model's own
            "attn_impl": ("model.attention", None),
        },
        "arguments/base_args/base_args.py": {
            "tuner_type": ("model.method", "lora"),
            "train_type": ("model.method", "lora"),  # its name in version 3
            "packing": ("data.packing", None),
        },
        "arguments/base_args/data_args.py": {
            "dataset": ("data.train", None),
            "val_dataset": ("data.eval", None),
            "split_dataset_ratio": ("data.eval_fraction", 0.0),
        },
        "arguments/base_args/template_args.py": {
            "max_length": ("data.max_length", None),  # the model's longest
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
            "gradient_accumulation_steps": (
                "batch.accumulation",
                None,
            ),  # as many as make 16 rows of all devices
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
    own=_names(
        "model_id_or_path sft_type template_type dataset_test_ratio check_dataset_strategy train_dataset_sample "
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
    own=_names(
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
    silent={
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
    own=MINIMIND.own,
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
    own=MINIMIND.own,
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
