"""The names that other trainers give to our keys: an unknown key is answered with the right one, and a whole file of
another trainer is read by them (`foreign_translate`).

Sources: the argument lists of transformers TrainingArguments, TRL SFTConfig and ModelConfig, LLaMA-Factory, axolotl,
Unsloth, torchtune, ms-swift and minimind as of 2026.
"""

_KEYS = {
    "HF, TRL, LLaMA-Factory": {
        "per_device_train_batch_size": "batch.micro",
        "per_device_eval_batch_size": "eval.micro",
        "num_train_epochs": "train.epochs",
        "model_name_or_path": "model.source",
        "lr_scheduler_type": "optim.schedule",
        "warmup_ratio": "optim.warmup",
        "optim": "optim.name",
        "adam_epsilon": "optim.eps",
        "adam_beta1": "optim.betas",
        "adam_beta2": "optim.betas",
        "max_grad_norm": "optim.clip",
        "eval_strategy": "train.eval_every",
        "save_strategy": "train.save_every",
        "torch_compile": "model.compile",
        "activation_checkpointing": "model.recompute",
    },
    "TRL": {
        "max_length": "data.max_length",
        "chat_template_path": "data.template",
        "activation_offloading": "model.offload_activations",
        "dataset_name": "data.train",
        "completion_only_loss": "data.mask",
        "assistant_only_loss": "data.mask",
        "attn_implementation": "model.attention",
        "use_peft": "model.method",
        "lora_target_modules": "model.lora.targets",
    },
    "LLaMA-Factory": {
        "cutoff_len": "data.max_length",
        "val_size": "data.eval_fraction",
        "dataset": "data.train",
        "eval_dataset": "data.eval",
        "max_samples": "data.max_rows",
        "finetuning_type": "model.method",
        "lora_rank": "model.lora.rank",
        "lora_target": "model.lora.targets",
        "flash_attn": "model.attention",
        "train_on_prompt": "data.mask",
        "mask_history": "data.mask",
    },
    "axolotl": {
        "micro_batch_size": "batch.micro",
        "sequence_len": "data.max_length",
        "num_epochs": "train.epochs",
        "val_set_size": "data.eval_fraction",
        "base_model": "model.source",
        "datasets": "data.train",
        "test_datasets": "data.eval",
        "adapter": "model.method",
        "lora_r": "model.lora.rank",
        "sample_packing": "data.packing",
        "train_on_inputs": "data.mask",
        "flash_attention": "model.attention",
        "lr_scheduler": "optim.schedule",
        "cosine_min_lr_ratio": "optim.final_lr_fraction",
        "tokenizer_config": "model.tokenizer",
        "eval_batch_size": "eval.micro",
        "optimizer": "optim.name",
        "bf16": "model.precision",
        "fp16": "model.precision",
    },
    "Unsloth": {
        "max_seq_length": "data.max_length",
        "local_dataset": "data.train",
        "model_name": "model.source",
        "eval_split": "data.eval_fraction",
        "train_on_completions": "data.mask",
        "use_gradient_checkpointing": "model.recompute",
        "target_modules": "model.lora.targets",
    },
    "torchtune": {
        "max_seq_len": "data.max_length",
        "enable_activation_checkpointing": "model.recompute",
        "max_steps_per_epoch": "train.steps",
        "checkpoint_dir": "model.source",
        "clip_grad_norm": "optim.clip",
        "dtype": "model.precision",
    },
    "ms-swift": {"split_dataset_ratio": "data.eval_fraction", "total_batch_size": "batch.effective"},
    "minimind": {
        "epochs": "train.epochs",
        "save_weight": "run.name",
        "use_compile": "model.compile",
        "accumulation_steps": "batch.accumulation",
        "from_weight": "model.source",
        "data_path": "data.train",
        "save_dir": "run.output",
        "grad_clip": "optim.clip",
        "save_interval": "train.save_every",
        "num_hidden_layers": "model.shape.num_layers",
        "use_moe": "model.shape.preset",
    },
    "other trainers": {
        "batch_size": "batch.micro",
        "weight_decay": "optim.weight_decay",
        "seed": "train.seed",
        "packing": "data.packing",
        "trust_remote_code": "model.trust_remote_code",
        "gradient_accumulation_steps": "batch.accumulation",
        "gradient_checkpointing": "model.recompute",
        "learning_rate": "optim.lr",
        "max_steps": "train.steps",
        "output_dir": "run.output",
        "run_name": "run.name",
        "eval_steps": "train.eval_every",
        "save_steps": "train.save_every",
        "lora_alpha": "model.lora.alpha",
        "lora_dropout": "model.lora.dropout",
        "torch_dtype": "model.precision",
        "mixed_precision": "model.precision",
        "chat_template": "data.template",
        "r": "model.lora.rank",
        "report_to": "run.trackers",
    },
}

ANSWERS = {
    "auto_find_batch_size": "fitune always picks batch.micro by the memory: drop it",
    "warmup_steps": "here it is 'optim.warmup', a share of the run",
    "group_by_length": "rows are packed instead (data.packing): drop it",
    "logging_steps": "every step is logged: drop it",
    "load_in_4bit": "set model.method to qlora",
    "load_in_8bit": "training in 8 bits is not offered",
    "quantization_bit": "4 bits are model.method: qlora, others are not offered",
    "deepspeed": "DeepSpeed is not used: drop it",
    "resume_from_checkpoint": "it is a flag: fitune train --resume RUN",
    "from_resume": "it is a flag: fitune train --resume RUN",
    "overwrite_output_dir": "it is a flag: fitune train --overwrite",
    "do_train": "fitune train always trains: drop it",
    "stage": "fitune train is supervised fine-tuning: drop it",
}

# What changes neither the model that comes out nor how it is trained, and passwords, whose values are never shown.
_NOT_NEEDED = """
accelerator_config auto_find_batch_size average_tokens_across_devices bf16_full_eval bias bnb_4bit_quant_type
cache_dir dataloader_in_order dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor dataset_kwargs
dataset_num_proc dataset_prepared_path dataset_processes dataset_text_field ddp_backend ddp_find_unused_parameters
ddp_timeout debug device device_map disable_tqdm do_eval do_predict do_train double_quantization enable_liger_kernel
eval_accumulation_steps eval_do_concat_batches eval_packing eval_sample_packing evals_per_epoch fp16_full_eval
from_resume gradient_checkpointing_kwargs greater_is_better group_by_length hf_hub_token hub_model_id hub_private_repo
hub_strategy hub_token include_num_input_tokens_seen include_tokens_per_second infer_backend inference_mode
is_llama_derived_model length_column_name load_best_model_at_end local_rank log_interval log_level log_level_replica
log_on_each_node logging_dir logging_first_step logging_nan_inf_filter logging_steps logging_strategy lora_task_type
low_cpu_mem_usage metric_for_best_model model_type ms_hub_token num_workers om_hub_token overwrite_cache
overwrite_output_dir packing_strategy pad_to_multiple_of pad_to_sequence_len padding_free peft_type plot_loss
preprocessing_batch_size preprocessing_num_workers project push_to_hub quantization_method quantization_type
ray_run_name remove_unused_columns run_name s2_attention save_only_model save_safetensors save_total_limit
saves_per_epoch shuffle_dataset skip_memory_metrics stage strict swanlab_api_key swanlab_lark_secret
swanlab_lark_webhook_url swanlab_logdir swanlab_mode swanlab_project swanlab_run_name swanlab_workspace task_type tf32
tokenized_path tokenizer_type train_sampling_strategy upcast_layernorm use_bnb_nested_quant use_cache use_cpu
use_fast_tokenizer use_kv_cache use_liger_kernel use_reentrant_gc use_unsloth use_unsloth_gc wandb_entity
wandb_log_model wandb_name wandb_run_id wandb_watch xformers_attention
"""
NOT_NEEDED = frozenset(_NOT_NEEDED.split())

FOREIGN_KEYS = {name: (tools, key) for tools, names in _KEYS.items() for name, key in names.items()}
FOREIGN_NAMES = (*FOREIGN_KEYS, *ANSWERS)


def foreign_hint(name: str) -> str | None:
    """'cutoff_len' -> "the name in LLaMA-Factory; here it is 'data.max_length'"; None for a name of no other tool."""
    plain = name.lstrip("-").replace("-", "_").lower()
    if plain in ANSWERS:
        return ANSWERS[plain]
    if plain not in FOREIGN_KEYS:
        return None
    tools, key = FOREIGN_KEYS[plain]
    return f"the name in {tools}; here it is '{key}'"
