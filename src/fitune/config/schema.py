"""Define the schema of a run's configuration, which `read_config` reads from YAML and overrides.

The schema is the only place where a key, its default and its allowed values are written down. The
JSON schema for editors, the error messages and the documentation are generated from it. It holds
no value that this version does not implement, and rejects a key that has no effect in combination
with the other keys, so that no key is silently ignored.

Paths are relative to the current directory, not to the configuration file; a leading ~ is the home
directory.
"""

from collections.abc import Iterator
from typing import Self

from pydantic import Field, model_validator

from fitune.config.sections import (
    BatchConfig,
    DataConfig,
    EvalConfig,
    MemoryConfig,
    ModelConfig,
    OptimConfig,
    OutputConfig,
    PreferenceConfig,
    TrainConfig,
)
from fitune.config.trained_parts import Section
from fitune.config.values import Auto, Loss, ObjectiveName, ReferenceKind, SampleKind
from fitune.optimizers.table import OPTIMIZERS

#: the objectives that compare with the model before the training
WITH_REFERENCE: tuple[ObjectiveName, ...] = ("dpo", "kto")


class RunConfig(Section):
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    batch: BatchConfig = BatchConfig()
    loss: Loss | Auto = Field(
        "auto",
        description="chunked: logits of a part of the tokens at a time; the result is the same",
    )
    objective: ObjectiveName = Field(
        "sft",
        description=(
            "sft: imitate answers; dpo, simpo, orpo: prefer the chosen answer of a pair to the "
            "rejected one; kto: learn from answers that are desirable or not"
        ),
    )
    preference: PreferenceConfig = PreferenceConfig()
    memory: MemoryConfig = MemoryConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    run: OutputConfig = OutputConfig()

    @property
    def sample_kind(self) -> SampleKind:
        """What a sample is for the objective."""
        if self.objective == "kto":
            return "labelled"
        return "answer" if self.objective == "sft" else "pair"

    @property
    def reference(self) -> ReferenceKind | None:
        """Where the log-probabilities under the reference come from; None if there is none.

        auto takes what needs the least memory: two numbers a sample instead of a second model.
        """
        if self.objective not in WITH_REFERENCE:
            return None
        return "kept" if self.preference.reference == "auto" else self.preference.reference

    @property
    def sample_tokens(self) -> int:
        """The tokens of the longest sample that data.max_length, of one sequence, allows."""
        return self.data.max_length * (2 if self.sample_kind == "pair" else 1)

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> Self:
        faults = []
        if not self.model.has_adapters:
            faults += [
                f"model.lora.{key} has no effect while model.method is {self.model.method}: "
                "set model.method to lora, or drop it"
                for key in self.model.lora.model_dump(exclude_defaults=True)
            ]
        if self.model.method != "freeze":
            faults += [
                f"model.freeze.{key} has no effect while model.method is {self.model.method}: "
                "set model.method to freeze, or drop it"
                for key in self.model.freeze.model_dump(exclude_defaults=True)
            ]
        if self.model.offload_activations and self.model.recompute in ("off", "auto"):
            faults.append(
                "model.offload_activations has no effect while model.recompute is "
                f"{self.model.recompute}: "
                "set model.recompute to full, selective, every_2 or every_4"
            )
        faults += self._data_without_effect()
        faults += self._prompts_without_effect()
        if self.optim.schedule == "constant" and self.optim.final_lr_fraction != 0:
            faults.append(
                "optim.final_lr_fraction has no effect while optim.schedule is constant: drop one of them"
            )
        faults += self._scaling_without_effect()
        if self.train.batch_mode != "advise" and self.train.steps is not None:
            faults.append(
                f"train.batch_mode {self.train.batch_mode} makes steps larger, so train.steps "
                "says nothing of the "
                "run's length: give train.epochs or train.tokens"
            )
        if self.train.batch_mode == "anneal" and self.optim.schedule == "constant":
            faults.append(
                "train.batch_mode anneal has no effect while optim.schedule is constant: drop one of them"
            )
        faults += self._probe_without_effect()
        faults += self._not_sharded()
        faults += self._trained_part_faults()
        faults += self._adapter_faults()
        faults += self._preference_faults()
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def _prompts_without_effect(self) -> Iterator[str]:
        if not self.eval.prompts:
            if self.eval.new_tokens != EvalConfig.model_fields["new_tokens"].default:
                yield "eval.new_tokens has no effect without eval.prompts: give some, or drop it"
        elif not self.data.is_evaluated:
            yield (
                "eval.prompts are answered at evaluations, and data.eval_fraction is 0: give "
                "evaluation data, or drop them"
            )

    def _data_without_effect(self) -> Iterator[str]:
        data, default = self.data, DataConfig.model_fields["eval_fraction"].default
        if data.eval is not None and data.eval_fraction != default:
            yield "data.eval_fraction has no effect beside data.eval: drop one of them"
        for key, value in (
            (
                "train.eval_every",
                None if self.train.eval_every == "auto" else self.train.eval_every,
            ),
            ("eval.patience", self.eval.patience),
        ):
            if value is not None and not data.is_evaluated:
                yield (
                    f"{key} {value} has no effect while data.eval_fraction is 0 and data.eval is "
                    "not given: give evaluation data, or drop it"
                )
        if data.wrapped and data.too_long != "truncate":
            yield (
                f"data.too_long {data.too_long} has no effect while data.wrapped is true: drop "
                "one of them"
            )

    def _not_sharded(self) -> Iterator[str]:
        model = self.model
        if model.shard == "none":
            return
        if model.method == "freeze":
            yield "model.method freeze does not work with model.shard full: drop one of them"
        if model.method == "qlora":
            yield (
                "model.shard full does not shard 4-bit weights: set model.method to lora, or drop it"
            )
        if not OPTIMIZERS[self.optim.name].can_shard:
            *others, last = (name for name, kind in OPTIMIZERS.items() if kind.can_shard)
            listed = f"{', '.join(others)} or {last}"
            yield (
                f"model.shard full does not shard the state of optim.name {self.optim.name}: use {listed}, or drop it"
            )
        for key, is_set in (
            ("compile", model.compile),
            ("offload_activations", model.offload_activations),
        ):
            if is_set:
                yield f"model.{key} does not work with model.shard full: drop one of them"
        if self.memory.on_oom == "quarantine":
            yield (
                "memory.on_oom quarantine leaves out a sample of one process and with "
                "model.shard full every pass is "
                "one of all: set memory.on_oom to stop, or drop model.shard"
            )
        if self.eval.prompts:
            yield "eval.prompts does not work with model.shard full: drop one of them"
        if self.train.probe:
            yield (
                "train.probe works in one process and model.shard full needs several: drop one of them"
            )

    def _trained_part_faults(self) -> Iterator[str]:
        if len(set(self.model.new_tokens)) < len(self.model.new_tokens):
            yield "model.new_tokens names a token twice: keep one"
        freeze = self.model.freeze
        if freeze.trained_layers == 0 and not freeze.extra_modules:
            yield "model.freeze.trained_layers 0 trains nothing: name model.freeze.extra_modules"

    def _adapter_faults(self) -> Iterator[str]:
        lora = self.model.lora
        if not self.model.has_adapters:
            return
        if self.model.shard != "none":
            for key, is_set in (
                ("new_tokens", self.model.new_tokens),
                ("lora.modules_to_save", lora.modules_to_save),
            ):
                if is_set:
                    yield f"model.{key} does not work with model.shard full: drop one of them"
        reads_weight = {
            "dora true": lora.dora,
            f"init {lora.init}": lora.init == "orthogonal" or lora.changes_base,
        }
        for key in (key for key, is_set in reads_weight.items() if is_set):
            if self.model.method == "qlora":
                yield (
                    f"model.lora.{key} needs weights that are not in 4 bits: set model.method to "
                    "lora, or drop it"
                )
            if self.model.shard != "none":
                yield f"model.lora.{key} does not work with model.shard full: drop one of them"
        if lora.init == "orthogonal" and lora.rank % 2:
            yield f"model.lora.init orthogonal needs an even model.lora.rank, not {lora.rank}"

    def _preference_faults(self) -> Iterator[str]:
        given = self.preference.model_dump(exclude_defaults=True)
        uses: dict[str, tuple[ObjectiveName, ...]] = {
            "beta": ("dpo", "simpo", "orpo", "kto"),
            "loss_type": ("dpo",),
            "label_smoothing": ("dpo", "simpo"),
            "simpo_gamma": ("simpo",),
            "desirable_weight": ("kto",),
            "undesirable_weight": ("kto",),
            "reference": WITH_REFERENCE,
        }
        for key in given:
            if self.objective not in uses[key]:
                yield (
                    f"preference.{key} has no effect while objective is {self.objective}: "
                    f"set objective to {' or '.join(uses[key])}, or drop it"
                )
        loss_type = self.preference.loss_type
        if "label_smoothing" in given and loss_type in ("hinge", "ipo"):
            yield (
                f"preference.label_smoothing has no effect while preference.loss_type is {loss_type}: "
                "set it to sigmoid or robust, or drop one of them"
            )
        yield from self._reference_faults()
        if self.objective == "sft":
            return
        if self.train.label_smoothing:
            yield (
                f"train.label_smoothing has no effect while objective is {self.objective}: set "
                "objective to sft, or drop it"
            )
        if self.model.shard != "none":
            yield (
                f"objective {self.objective} does not work with model.shard full: drop one of them"
            )
        if self.data.mask == "all":
            yield (
                f"data.mask all makes objective {self.objective} judge the question too, which no "
                "answer has written: set it to assistant, or drop it"
            )

    def _reference_faults(self) -> Iterator[str]:
        model, kind = self.model, self.reference
        if kind == "adapter_off" and not model.has_adapters:
            yield (
                "preference.reference adapter_off is the model under its adapters, and model.method "
                f"{model.method} has none: use kept or frozen_copy"
            )
        elif kind == "adapter_off" and (model.new_tokens or model.lora.modules_to_save):
            yield (
                "preference.reference adapter_off is the model under its adapters, and new tokens or "
                "whole layers are trained too: use kept"
            )
        elif kind == "adapter_off" and model.lora.changes_base:
            yield (
                f"model.lora.init {model.lora.init} moves a part of the weights into the adapters, so "
                "the model without them is no reference: set preference.reference to kept"
            )
        elif kind == "frozen_copy" and model.has_adapters:
            yield (
                "preference.reference frozen_copy is a second model, and with model.method "
                f"{model.method} the frozen weights are there already: use kept or adapter_off"
            )

    def _probe_without_effect(self) -> Iterator[str]:
        train, optim = self.train, self.optim
        if not train.probe:
            if train.probe_fraction != TrainConfig.model_fields["probe_fraction"].default:
                yield (
                    "train.probe_fraction has no effect while train.probe is false: set the one or drop the other"
                )
            return
        if train.steps is not None:
            yield (
                "train.probe tries twice the batch, so train.steps says nothing of the run's "
                "length: give train.epochs "
                "or train.tokens"
            )
        if optim.warmup >= train.probe_fraction:
            yield (
                f"train.probe_fraction {train.probe_fraction:g} ends within optim.warmup "
                f"{optim.warmup:g}, before any "
                "rate is tried at its height: raise the first or lower the second"
            )
        if self.data.eval is None and self.data.eval_fraction == 0:
            yield (
                "train.probe compares on held-out samples: give data.eval, or a data.eval_fraction above 0"
            )

    def _scaling_without_effect(self) -> list[str]:
        optim = self.optim
        if optim.scaling == "none":
            given = [
                key for key in ("reference_batch", "noise_scale") if getattr(optim, key) is not None
            ]
            return [
                f"optim.{key} has no effect while optim.scaling is none: set it to sqrt_gain"
                for key in given
            ]
        faults = []
        if optim.reference_batch is None:
            faults.append(
                f"optim.scaling {optim.scaling} needs optim.reference_batch, the samples that lr was chosen for"
            )
        if optim.noise_scale is not None and optim.scaling != "sqrt_gain":
            faults.append(
                f"optim.noise_scale has no effect while optim.scaling is {optim.scaling}: drop one of them"
            )
        return faults
