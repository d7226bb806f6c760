"""List other trainers' arguments that have no key in fitune: refused, dropped or not needed.

An argument name means the same in every tool that has it, so the tools share one list.
"""

from collections.abc import Mapping


def _none_of(names: str) -> dict[str, tuple[object, ...]]:
    return dict.fromkeys(names.split(), ())


# An argument that is off or has one of the listed values is plain supervised fine-tuning. Any other
# value is a different training, which an import must not silently turn into this one.
_OTHER_TRAINING: dict[str, dict[str, tuple[object, ...]]] = {
    "only supervised fine-tuning, DPO, SimPO, ORPO and KTO are imported": {
        "stage": ("sft", "pt", "dpo", "kto"),
        "rl": ("sft",),
        "rlhf_type": (),
        "task_type": ("causal_lm", "CAUSAL_LM"),
        "lora_task_type": ("CAUSAL_LM",),
        "model_class": ("llm",),
        **_none_of(
            "reward_model process_reward_model ref_model num_labels problem_type teacher_model "
            "ebft qat "
            "diffusion kd_trainer sampler_type export_dir trainer_cls "
            "num_generations "
            "max_completion_length max_prompt_length reward_funcs reward_weights "
            "reward_model_path sft_model_path "
            "num_ppo_epochs kl_coef missing_eos_penalty center_rewards_coefficient "
            "desirable_weight "
            "undesirable_weight reference_free precompute_ref_log_probs sync_ref_model "
            "ref_model_mixup_alpha "
            "f_divergence_type rpo_alpha cpo_alpha simpo_gamma_beta_ratio "
            "teacher_model_name_or_path"
        ),
    },
    "fitune trains with the plain cross-entropy of all supervised tokens: take it out to train so": {
        "loss_type": ("nll", "chunked_nll", "cross_entropy", "causal_lm"),
        "loss_name": ("cross-entropy",),
        **_none_of(
            "use_dft_loss use_asft_loss use_eaft_loss use_eaft enable_dft_loss enable_channel_loss "
            "label_smoothing loss_scale_config_path use_loss_scale "
            "scaling_softmax"
        ),
    },
    "fitune trains all weights (full) or adapters (lora, qlora): take it out to train so": {
        **_none_of(
            "freeze_parameters freeze_parameters_ratio freeze_parameters_regex freeze_llm "
            "freeze_language_model "
            "trainable_parameters trainable_parameters_regex additional_trainable_parameters "
            "unfrozen_parameters "
            "use_llama_pro use_badam lisa_activated_layers lisa_n_layers relora reinit_weights "
            "layers_to_transform "
            "peft_layers_to_transform peft_layer_replication peft_trainable_token_indices "
            "lr_groups embedding_lr "
            "embedding_lr_scale"
        ),
    },
    "fitune's adapters are LoRA on linear layers of one rank: take it out to train so": {
        "bias": ("none",),
        "lora_bias": ("none",),
        "lora_bias_trainable": ("none",),
        **_none_of(
            "loftq_config loraplus_lr_ratio lorap_lr_ratio lora_lr_ratio rank_pattern "
            "alpha_pattern "
            "lora_rank_pattern lora_alpha_pattern lora_target_parameters target_parameters "
            "target_regex"
        ),
    },
    "fitune starts from a model, not from an adapter: merge the adapter first and give the merged model": _none_of(
        "adapter_name_or_path adapters lora_model_dir"
    ),
    "fitune adds tokens by their text alone (model.new_tokens): save the model with these and give that model": _none_of(
        "add_special_tokens new_special_tokens_config added_tokens_overrides"
    ),
    "fitune takes the model as its config.json describes it: change it there": _none_of(
        "rope_scaling shift_attn s2_attention mixture_of_depths use_pose max_model_len "
        "overrides_of_model_config "
        "model_init_kwargs"
    ),
    "fitune has the optimizers AdamW, Muon, APOLLO, Adafactor and SGD: take it out to train with AdamW": _none_of(
        "use_galore use_adam_mini optim_target_modules optim_config"
    ),
    "fitune takes all samples in random order, each counted the same: take it out to train so": _none_of(
        "curriculum_sampling loss_weights"
    ),
}
OTHER_TRAINING: Mapping[str, tuple[tuple[object, ...], str]] = {
    name: (plain, reason)
    for reason, names in _OTHER_TRAINING.items()
    for name, plain in names.items()
}

#: Arguments of TRL's preference trainers whose names mean something else in other tools. TRL's
#: supervised fine-tuning does not have them.
PREFERENCE_OF_TRL = frozenset(
    ("beta", "num_iterations", "epsilon_high", "scale_rewards", "use_vllm", "vllm_mode")
)

#: What the importers of preferences read where a training is one of them.
READ_OF_PREFERENCES = frozenset(
    (
        *("stage", "rl", "rlhf_type", "beta", "rl_beta", "orpo_alpha", "loss_type"),
        *("label_smoothing", "simpo_gamma", "desirable_weight", "undesirable_weight"),
        *("reference_free", "precompute_ref_log_probs", "sync_ref_model", "f_divergence_type"),
        *("rpo_alpha", "cpo_alpha", "loss_weights"),
    )
)

ANSWERS = {
    "auto_find_batch_size": "fitune always picks batch.micro by the memory: drop it",
    "warmup_steps": "here it is 'optim.warmup', a share of the run",
    "group_by_length": "samples are packed instead (data.packing): drop it",
    "logging_steps": "every step is logged: drop it",
    "load_in_4bit": "set model.method to qlora",
    "load_in_8bit": "training in 8 bits is not offered",
    "quantization_bit": "4 bits are model.method: qlora, others are not offered",
    "quant_bits": "4 bits are model.method: qlora, others are not offered",
    "deepspeed": "DeepSpeed is not used: drop it",
    "fsdp": "here it is 'model.shard: full'",
    "fsdp_config": "here it is 'model.shard: full'",
    "resume_from_checkpoint": "it is a flag: fitune train --resume RUN",
    "from_resume": "it is a flag: fitune train --resume RUN",
    "overwrite_output_dir": "it is a flag: fitune train --overwrite",
    "do_train": "fitune train always trains: drop it",
    "stage": "fitune train is supervised fine-tuning: drop it",
    "neftune_noise_alpha": "no noise is added to the embeddings here",
    "noisy_embedding_alpha": "no noise is added to the embeddings here",
    "neftune_alpha": "no noise is added to the embeddings here",
    "early_stopping_patience": "here it is 'eval.patience', with held-out samples",
    "early_stopping_steps": "here it is 'eval.patience', with held-out samples",
    "early_stop_interval": "a run goes to its end; best/ holds the weights of the best evaluation",
    "system": "a system prompt stands in the samples themselves: add it to them",
    "default_system": "a system prompt stands in the samples themselves: add it to them",
    "default_system_message": "a system prompt stands in the samples themselves: add it to them",
    "enable_thinking": "the template is called without arguments",
    "preserve_thinking": "the template is called without arguments",
    "chat_template_kwargs": "the template is called without arguments",
    "tool_format": "tools are written as the tokenizer's template writes them",
    "agent_template": "tools are written as the tokenizer's template writes them",
    "streaming": "all samples are read before the first step, and shuffled in each epoch",
    "buffer_size": "all samples are read before the first step, and shuffled in each epoch",
    "mix_strategy": "each source's samples are seen data.train.weight times in an epoch",
    "interleave_probs": "each source's samples are seen data.train.weight times in an epoch",
    "interleave_prob": "each source's samples are seen data.train.weight times in an epoch",
    "disable_shuffling": "samples are shuffled in each epoch",
    "dataset_shuffle": "samples are shuffled in each epoch",
    "special_tokens": "the tokenizer's own special tokens are used",
    "eos_token": "the tokenizer's own special tokens are used",
    "pad_token": "the tokenizer's own special tokens are used",
    "model_name": "samples about the assistant's name are not rewritten",
    "model_author": "samples about the assistant's name are not rewritten",
    "model_revision": "the model of a hub id is its newest revision",
    "router_aux_loss_coef": "no loss that balances experts is added",
    "moe_aux_loss_coef": "no loss that balances experts is added",
    "lr_scheduler_config": "its schedule is a plugin's: set optim.schedule",
    "fp8": "training in 8 bits is not offered",
    "layer_offloading": "weights stay on the card",
    "sequence_parallel_size": "a sample is not divided over cards",
    "sequence_parallel_degree": "a sample is not divided over cards",
    "context_parallel_size": "a sample is not divided over cards",
}

# Reason -> arguments that change neither the trained model nor how it is trained. Some are
# passwords, so the values of these arguments are never shown.
_NOT_NEEDED = {
    "every step is logged, and trackers are run.trackers": """
        comet_api_key comet_mode comet_project_name comet_workspace disable_tqdm
        include_effective_tokens_per_second include_num_input_tokens_seen include_tkps include_tokens_per_second
        log_interval log_level log_level_replica log_on_each_node logger_name logging_dir logging_first_step
        logging_nan_inf_filter logging_steps logging_strategy mlflow_experiment_name mlflow_run_name
        mlflow_tracking_uri plot_loss print_param_status project ray_run_name run_name skip_memory_metrics
        swanlab_api_key swanlab_exp_name swanlab_lark_secret swanlab_lark_webhook_url swanlab_logdir
        swanlab_mode swanlab_project swanlab_run_name swanlab_token swanlab_workspace trackio_space_id
        use_mlflow use_tensorboard use_trackio wandb_entity wandb_log_model wandb_mode wandb_name wandb_project
        wandb_run_id wandb_watch""",
    "fitune keeps the best, the last and the newest checkpoints": """
        add_version add_output_dir_suffix create_checkpoint_symlink enable_jit_checkpoint greater_is_better
        load_best_model_at_end max_shard_size metric_for_best_model overwrite_output_dir safe_serialization
        save_ckpt_as_hf save_on_each_node save_only_model save_safetensors save_total_limit save_first_step
        save_epochs saves_per_epoch only_save_model""",
    "nothing is uploaded, and hub accounts are those of the machine": """
        hf_hub_token hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token
        ms_hub_token om_hub_token push_to_hub hf_use_auth_token use_hf""",
    "how the samples are read changes none of them": """
        cache_dir check_dataset_strategy data_shared_file_system dataloader_drop_last dataloader_in_order
        dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor
        dataset_kwargs dataset_num_proc dataset_prepared_path dataset_processes dataset_text_field download_mode
        ignore_data_skip ignore_pad_token_for_loss label_names lazy_tokenize load_from_cache_file media_dir
        num_workers overwrite_cache preprocess_num_proc preprocessing_batch_size preprocessing_num_workers
        remove_unused_columns shuffle_buffer_size shuffle_dataset shuffle_merged_datasets skip_prepare_dataset
        strict tokenized_path data_seed dataset_seed accelerator_config batching_workers load_args
        load_data_args custom_dataset_info""",
    "samples are packed or padded without a change of the result (data.packing)": """
        batch_flattening eval_packing eval_sample_packing group_by_length length_column_name sample_packing_eff_est
        multipack_real_batches packing_length packing_num_proc packing_strategy pad_to_multiple_of
        pad_to_sequence_len padding_free padding_side sample_packing_bin_size sample_packing_group_size
        sample_packing_sequentially train_sampling_strategy batching_strategy""",
    "it makes the same computation faster or smaller, which fitune does by its plan": """
        activation_checkpointing_kwargs auto_find_batch_size average_tokens_across_devices chunked_cross_entropy
        ddp ddp_backend ddp_bucket_cap_mb ddp_find_unused_parameters ddp_timeout debug device device_map
        dist_config dist_timeout enable_liger_kernel experts_implementation flash_attn_cross_entropy
        flash_attn_fuse_mlp full_determinism gc_steps gradient_checkpointing_kwargs infer_backend kernel_config
        liger_kernel_config local_rank lora_embedding_kernel lora_mlp_kernel lora_o_kernel lora_on_cpu
        lora_qkv_kernel low_cpu_mem_usage max_memory plugins ray_num_workers selective_checkpointing tf32
        torch_compile_backend torch_compile_mode torch_empty_cache_steps tuner_backend upcast_layernorm
        upcast_lmhead_output use_cache use_cpu use_kv_cache use_liger use_liger_kernel use_logits_to_keep
        use_ray use_reentrant_gc use_unsloth use_unsloth_gc vit_gradient_checkpointing world_size cp_size
        dp_size cp_mode use_flash_attn""",
    "it is of how the model and its tokenizer are loaded, which fitune tells by itself": """
        inference_mode init_config is_falcon_derived_model is_llama_derived_model is_mistral_derived_model
        is_qwen_derived_model local_repo_path model_cache_dir model_type peft_autocast_adapter_dtype peft_type
        processor_type tokenizer_legacy tokenizer_type tokenizer_use_fast type_of_model use_fast_tokenizer""",
    "a vocabulary that grows here gets a multiple of 64 rows": "resize_token_embeddings_to_32x",
    "it is a field of LLaMA Board's page": "top.model_name top.lang",
    "4-bit weights are NF4 with double quantization here": """
        bnb_4bit_quant_storage bnb_4bit_quant_type bnb_4bit_use_double_quant double_quantization quant_method
        quantization_device_map quantization_method quantization_type use_bnb_nested_quant
        bnb_4bit_compute_dtype bnb_4bit_comp_dtype bnb_config_kwargs""",
    "it is of images, sound or video, which fitune does not train on": """
        audio_sampling_rate crop_to_patches freeze_aligner freeze_mm_modules freeze_multi_modal_projector
        freeze_vision_tower freeze_vit image_do_pan_and_scan image_max_pixels image_min_pixels
        image_resize_algorithm image_size max_pixels use_audio_in_video video_fps video_max_pixels video_maxlen
        video_min_pixels""",
    "it is of generating, or of an evaluation other than the loss": """
        batch_eval_metrics bf16_full_eval compute_accuracy do_eval do_predict do_sample eval_accumulation_steps
        eval_do_concat_batches eval_num_beams eval_on_each_dataset eval_on_start eval_table_size evals_per_epoch
        fp16_full_eval infer_dtype max_new_tokens num_beams predict_with_generate prediction_loss_only
        response_prefix sample_backend temperature top_k top_p""",
    "it is a flag of fitune train": "do_train from_resume",
}
# An argument -> the arguments that have an effect only together with it.
_ONLY_WITH = {
    "finetuning_type: freeze": "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules",
    "use_galore": "galore_rank galore_update_interval galore_scale galore_target galore_target_modules",
    "use_apollo": "apollo_rank apollo_update_interval apollo_scale apollo_target",
    "use_badam": "badam_mode badam_switch_mode badam_switch_interval badam_update_ratio",
    "use_swanlab": "swanlab_notification_method swanlab_secret",
    "loraplus_lr_ratio": "loraplus_lr_embedding",
    "use_eaft_loss": "eaft_alpha",
    "preference training": """pref_beta reward_model_type pref_loss pref_ftx dpo_label_smoothing simpo_gamma beta
        rl_beta""",
    "lisa_activated_layers": "lisa_step_interval",
    "pissa_init": "pissa_iter",
}
NOT_NEEDED: Mapping[str, str] = {
    **{name: reason for reason, names in _NOT_NEEDED.items() for name in names.split()},
    **{
        name: f"it has an effect only with {other}"
        for other, names in _ONLY_WITH.items()
        for name in names.split()
    },
    **{
        name: ANSWERS[name]
        for name in ("group_by_length", "logging_steps", "auto_find_batch_size", "do_train")
    },
}
