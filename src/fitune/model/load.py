"""Load the model and the tokenizer that `model.source` names.

The source is a preset, a directory, a hub id, a GGUF file or a .pth file. Every use takes the same
path: `load_config` needs no weights, `build_model` makes the modules (on the meta device too, which
is how a step is recorded without a GPU), and `load_model` fills them. Weights are memory-mapped,
not read into memory twice: a parameter whose dtype in the file is the wanted one remains a view of
the file until it is written to.

A local path never leads to network access. Hub ids go through huggingface_hub, which honours
HF_ENDPOINT and its cache.
"""

import copy
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from fitune.boundary import is_panic, raised_as
from fitune.config import ModelConfig
from fitune.data.hub import hub_is_known
from fitune.errors import ConfigError, ModelError
from fitune.model.adapted_model import describe, note_adapted
from fitune.model.experts import EXPERTS
from fitune.model.formats import check_format, unpacking, weights_format
from fitune.model.freeze import freeze
from fitune.model.fused import fuse_layers
from fitune.model.gguf import check_gguf, gguf_parts, gguf_read_once, read_gguf
from fitune.model.load_errors import brings_code, unreadable
from fitune.model.load_report import check_complete, listed, of_layers
from fitune.model.lora import apply_lora
from fitune.model.minimind import pth_config, read_pth
from fitune.model.new_tokens import NewTokens, add_tokens, grow, new_tokens
from fitune.model.own_code import drop_references, named_code, own_class
from fitune.model.packed_attention import attention_name, check_attention
from fitune.model.precision import Precision, device_precision, resolve_precision
from fitune.model.presets import preset_config
from fitune.model.quantise import num_weights, quantise, share_tables
from fitune.model.sizes import check_sizes
from fitune.model.source import Kind, check_source, check_tokenizer, source_kind
from fitune.model.untrusted_files import (
    check_cached_index,
    check_tokenizer_files,
    check_weight_index,
)

if TYPE_CHECKING:
    # The import takes half a second and is needed for adapters only.
    from peft import PeftModel

# transformers imports bitsandbytes, which then warns about kernels that it would take from the hub.
if not (logger := logging.getLogger("bitsandbytes")).level:
    logger.setLevel(logging.ERROR)

#: tensors in older files that a model computes itself: rotary frequencies and causal masks
_COMPUTED = re.compile(r"\.(inv_freq|masked_bias|attn\.bias|attention\.bias)$")
#: For a damaged file transformers, tokenizers, gguf and safetensors raise exceptions without a
#: common class.
_READ_ERRORS = (Exception,)


def check_length(model: ModelConfig, max_length: int) -> None:
    """Raise ConfigError if samples may exceed the positions that a model has learned."""
    positions = getattr(load_config(model).get_text_config(), "n_positions", None)
    if positions is not None and max_length > positions:
        raise ConfigError(
            [
                f"data.max_length {max_length:,} exceeds the {positions:,} positions "
                "of "
                f"{model.source}: set data.max_length={positions}"
            ]
        )


def load_config(model: ModelConfig) -> PretrainedConfig:
    """Return the model's configuration, without its weights, with room for model.new_tokens.

    Of a hub id config.json is fetched, of a file its header is read. Raises ModelError if it cannot
    be read or is no causal language model.
    """
    config = _config_of_files(model)
    if (new := _new_tokens(model)) is not None:
        config.get_text_config().vocab_size = new.vocab_size
    return config


def _new_tokens(model: ModelConfig) -> NewTokens | None:
    """Return the ids of model.new_tokens, which the tokenizer decides; None if there are none."""
    if not model.new_tokens:
        return None
    of_tokenizer = {"source", "tokenizer", "new_tokens", "shape", "trust_remote_code"}
    return _new_tokens_of(model.model_dump_json(include=of_tokenizer))


@lru_cache(maxsize=4)
def _new_tokens_of(model_json: str) -> NewTokens:
    # Cached, since every recording of a model asks for them.
    model = ModelConfig.model_validate_json(model_json)
    return new_tokens(load_tokenizer(model), model.new_tokens, _config_of_files(model))


def _config_of_files(model: ModelConfig) -> PretrainedConfig:
    kind = check_source(model.source)
    if kind == "preset":
        return preset_config(model.source)
    if kind == "pth":
        path = Path(model.source).expanduser()
        return pth_config(read_pth(path), model.shape, path=path)
    name, files = _location(model.source, kind)
    with quiet_transformers(), gguf_read_once():
        try:
            if kind == "gguf":
                check_gguf(Path(model.source).expanduser())
            config = AutoConfig.from_pretrained(
                name, trust_remote_code=model.trust_remote_code, **files
            )
        except _READ_ERRORS as error:
            raise unreadable(model, kind, error) from error
    _check_causal(config, model)
    if not model.trust_remote_code:
        drop_references(config)
    check_sizes(config, model.source)
    check_format(config, model)
    return config


def ignored_code(model: ModelConfig) -> list[str]:
    """Return the classes that come with the model as Python code and do not run."""
    kind = source_kind(model.source)
    if model.trust_remote_code or kind not in ("directory", "hub"):
        return []
    name, files = _location(model.source, kind)
    try:
        config, _ = PretrainedConfig.get_config_dict(name, **files)
        return named_code(config, get_tokenizer_config(name, **files))
    # Loading the model reports the error.
    except _READ_ERRORS:
        return []


def build_model(
    config: PretrainedConfig,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Build the modules with random weights on the current default device.

    Under torch.device('meta') they take no memory. On a real device the weights are a function of
    `seed` alone: they are drawn on the CPU in float32, and the global random state does not change.

    attention: a name in transformers' attention registry.
    trust_remote_code: build the class that the configuration names in the model's own code, if any.
    """
    meta = torch.get_default_device().type == "meta"
    with torch.random.fork_rng(devices=[], enabled=not meta), quiet_transformers():
        if not meta:
            torch.default_generator.manual_seed(seed)
        own = own_class(config) if trust_remote_code else None
        options: dict[str, object] = {
            "dtype": dtype if meta else torch.float32,
            "attn_implementation": attention,
        }
        options |= {"experts_implementation": EXPERTS}
        if own is not None:
            model = own._from_config(config, **options)
        else:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
    if not meta and dtype != torch.float32:
        # Not the buffers: rotary frequencies need float32.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    return cast(PreTrainedModel, model)


def load_model(
    model: ModelConfig,
    device: torch.device,
    *,
    precision: Precision | None = None,
    seed: int = 0,
    config: PretrainedConfig | None = None,
    stay_on_host: bool = False,
    notify: Callable[[str], None] | None = None,
    new: NewTokens | None = None,
) -> "PreTrainedModel | PeftModel":
    """Return the model that `model` describes on `device`, in training mode, with any adapters.

    On the meta device only the configuration is read; the planner and the recorder use that model.

    precision: the result of `resolve_precision`; if None it is resolved for `device` (for meta as
        on a CPU).
    config: another architecture than the one that `model` names, on the meta device only.
    stay_on_host: leave the model in host memory, for a caller who moves it to `device` in parts.
    notify: called with a message about tensors in the files that the model has no place for.
    new: tokens that the vocabulary got in an earlier run; those of model.new_tokens if None.
    """
    precision = precision or resolve_precision(model, *device_precision(device))
    config = config or load_config(model)
    check_attention(model.attention, device=device, dtype=precision.matmul_dtype)
    attention = attention_name(config, model.attention)
    meta = device.type == "meta"
    new = new or _new_tokens(model)
    if not meta and new is not None:
        config = _config_of_files(model)
    if meta or model.init == "random" or source_kind(model.source) == "preset":
        with (
            raised_as(
                ModelError,
                f"{model.source} cannot be built from its configuration",
                "mend its config.json",
            ),
            torch.device("meta" if meta else "cpu"),
        ):
            built = build_model(
                config,
                dtype=precision.parameter_dtype,
                attention=attention,
                seed=seed,
                trust_remote_code=model.trust_remote_code,
            )
    else:
        built = load_weights(
            model, config, dtype=precision.parameter_dtype, attention=attention, notify=notify
        )
    if not meta and new is not None:
        grow(built, new)
    if model.method == "freeze":
        freeze(built, model.freeze)
    is_noted = model.has_adapters and not meta
    noted = describe(model, built, seed=seed, new=new) if is_noted else None
    if model.method == "qlora":
        built = quantise(built)
    adapted: PreTrainedModel | PeftModel = built
    # A card's decomposition of a weight depends on the card, and a resumed run needs the same one.
    # And a layer is copied without leaving a hole in the card's memory.
    is_on_host = model.has_adapters and bool(model.lora.changes_base or model.lora.modules_to_save)
    new_ids = () if new is None else new.ids
    if is_on_host:
        adapted = apply_lora(built, model.lora, seed=seed, new_ids=new_ids)
    if not stay_on_host:
        built.to(device)
    share_tables(built)
    if model.has_adapters and not is_on_host:
        adapted = apply_lora(built, model.lora, seed=seed, new_ids=new_ids)
    if noted is not None:
        note_adapted(adapted, noted)
    fuse_layers(adapted)
    return adapted.train()


def load_weights(
    model: ModelConfig,
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    attention: str | None = None,
    notify: Callable[[str], None] | None = None,
) -> PreTrainedModel:
    """Return the model with the weights of `model.source`, on the CPU.

    Raises ModelError if weights are missing, do not fit `config`, or cannot be read: no weight ever
    stays random, and no weight of a layer is ignored.

    notify: as in `load_model`.
    """
    kind = source_kind(model.source)
    assert kind != "preset", "a preset has no weights"
    name, files = _location(model.source, kind)
    options: dict[str, object] = {"config": config, "dtype": dtype, "output_loading_info": True}
    options |= {
        "attn_implementation": attention,
        "experts_implementation": EXPERTS,
        "ignore_mismatched_sizes": True,
    }
    with quiet_transformers(), gguf_read_once():
        try:
            if kind in ("pth", "gguf"):
                if kind == "pth":
                    tensors = read_pth(Path(name))
                else:
                    tensors, report = read_gguf(
                        config, dtype, pretrained_model_name_or_path=name, **files
                    )
                    # Only this report names missing tensors; `tensors` has random ones for them.
                    check_complete(model, report)
                model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
                built, report = model_class.from_pretrained(None, state_dict=tensors, **options)
            else:
                own = own_class(config) if model.trust_remote_code else None
                load = AutoModelForCausalLM if own is None else own
                if kind == "directory":
                    check_weight_index(Path(name))
                elif kind == "hub":
                    check_cached_index(name)
                if (unpacked := unpacking(config)) is not None:
                    options["quantization_config"] = unpacked
                built, report = load.from_pretrained(
                    name,
                    trust_remote_code=model.trust_remote_code,
                    adapter_kwargs=dict(files),
                    **files,
                    **options,
                )
        except _READ_ERRORS as error:
            raise unreadable(model, kind, error) from error
    surplus = sorted(
        name for name in report["unexpected_keys"] if kind == "pth" or not _COMPUTED.search(name)
    )
    if weights_format(config) is not None:
        built = _without_format(built, config, options)
    check_complete(model, report, surplus if kind == "pth" else of_layers(built, surplus))
    if surplus and notify is not None:
        notify(
            f"{model.source} holds {listed('tensors that its architecture has no place for', surplus)}: left out"
        )
    return cast(PreTrainedModel, built)


def _without_format(
    built: PreTrainedModel, config: PretrainedConfig, options: Mapping[str, object]
) -> PreTrainedModel:
    """Return a plain model with the tensors of one that transformers unpacked.

    The unpacked model records its packed format and would be saved under the names of that format,
    although its tensors are ordinary.
    """
    plain = copy.deepcopy(config)
    del plain.quantization_config
    others = {
        name: value
        for name, value in options.items()
        if name not in ("quantization_config", "output_loading_info")
    }
    tensors = built.state_dict()
    return cast(
        PreTrainedModel,
        type(built).from_pretrained(None, state_dict=tensors, **(others | {"config": plain})),
    )


def load_tokenizer(model: ModelConfig, *, new: NewTokens | None = None) -> Tokenizer:
    """Return the tokenizer with model.new_tokens, and a padding token that is in the vocabulary.

    It is that of `model.tokenizer`, else the model's own. Padding needs no token of its own:
    positions decide which tokens are trained on, never ids, so an existing special token is used.
    Raises ModelError if there is no tokenizer or its ids exceed the model's vocabulary.

    new: the tokens that the vocabulary got before, which this tokenizer has.
    """
    source = model.tokenizer or model.source
    kind = source_kind(source)
    check_tokenizer(model)
    name, files = _location(source, kind)
    if kind == "pth":
        name = str(Path(name).parent)
    with quiet_transformers(), gguf_read_once():
        try:
            if kind == "hub":
                fetched = cached_file(
                    name, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **files
                )
                check_tokenizer_files(Path(name if fetched is None else fetched).parent)
            elif kind != "gguf":
                check_tokenizer_files(Path(name))
            tokenizer = AutoTokenizer.from_pretrained(
                name, trust_remote_code=model.trust_remote_code, **files
            )
        # The tokenizers library raises no narrower class for a damaged file.
        except BaseException as error:
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            raise unreadable(model.model_copy(update={"source": source}), kind, error) from error
    own_size = _config_of_files(model).get_text_config().vocab_size
    vocab_size = own_size if new is None else new.vocab_size
    needed = 1 + max(tokenizer.get_vocab().values(), default=-1)
    if not 0 < needed <= vocab_size:
        raise ModelError(
            f"the tokenizer of {source} has ids up to {needed - 1:,}, but {model.source} has an "
            "embedding of "
            f"{vocab_size:,} rows: set model.tokenizer to the one that the model was trained with"
        )
    if not model.trust_remote_code:
        tokenizer.init_kwargs.pop("auto_map", None)
        tokenizer._auto_map = None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = (
            tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
        )
    if model.new_tokens:
        add_tokens(tokenizer, model.new_tokens, source=source)
    return cast(Tokenizer, tokenizer)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the numbers of all and of trainable parameters; tied ones count once."""
    sizes = [(num_weights(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trainable in sizes if trainable)


def _location(source: str, kind: Kind) -> tuple[str, dict[str, object]]:
    """Return the name that transformers takes, and the arguments that keep a local path local."""
    if kind == "hub":
        return source, {} if hub_is_known() else {"local_files_only": True}
    path = Path(source).expanduser()
    if kind == "gguf":
        path = gguf_parts(path)[0]
        return str(path.parent), {"gguf_file": path.name, "local_files_only": True}
    return str(path), {"local_files_only": True}


def _check_causal(config: PretrainedConfig, model: ModelConfig) -> None:
    kind = config.model_type
    remote = model.trust_remote_code and getattr(config, "auto_map", None)
    encoder = getattr(config, "is_encoder_decoder", False) or (
        kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    )
    if (
        not remote
        and not encoder
        and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and getattr(config, "auto_map", None)
    ):
        raise brings_code(model)
    if encoder or (kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not remote):
        what = "an encoder" if encoder else "no causal language model that this transformers knows"
        raise ModelError(
            f"{model.source} is '{kind}', {what}: fitune trains decoder-only models like llama, qwen3 or gemma"
        )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress the progress bars and warnings of transformers; its errors become ModelErrors."""
    bars, level = (
        transformers_logging.is_progress_bar_enabled(),
        transformers_logging.get_verbosity(),
    )
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
