"""What is rehearsed, as data: fitune's own step, plain loops around models of transformers, Trainers of transformers
and TRL. Nothing here imports torch; `compare` does what is written here.

Models are small, so that a row takes seconds, and not so small that their tensors would all lie in the allocator's pool
for small ones (1 MiB).
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Rows = tuple[tuple[int, int], ...]
"""(length, supervised tokens) of each row of an optimizer step."""

CARDS = ("4090", "A100", "H100", "T4")
"""As FAKE_CARD names them."""
WITH_BFLOAT16 = ("4090", "A100", "H100")
BY_ROUTING = "the router decides how many tokens an expert gets"


@dataclass(frozen=True, kw_only=True)
class StepCase:
    """fitune's own step. model: a preset, or a name of ARCHITECTURES. kinds: the passes, in order; the last is
    compared. depends_on_data: the clause that says why the peak does; such a row is bounded, not predicted."""

    name: str
    model: str
    rows: Rows
    options: tuple[str, ...] = ()
    accumulation: int = 1
    kinds: tuple[Literal["train", "eval", "reference"], ...] = ("train", "train")
    cards: tuple[str, ...] = ("4090",)
    depends_on_data: str = ""


@dataclass(frozen=True, kw_only=True)
class LoopCase:
    """Somebody's loop around a model of transformers. attention: as transformers names it; kernel: of PyTorch's
    scaled_dot_product_attention, any where left out. clip: 0 for none. padded: a quarter of each row is padding."""

    name: str
    model: str
    batch: int = 2
    length: int = 512
    dtype: str = "float32"
    autocast: str | None = None
    optimizer: Literal["foreach", "fused", "for", "sgd"] = "foreach"
    scaler: bool = False
    clip: float = 1.0
    accumulation: int = 1
    checkpoint: bool = False
    attention: str = "sdpa"
    kernel: str | None = None
    padded: bool = False
    evaluates: bool = False
    keeps_gradients: bool = False
    lora: bool = False
    cards: tuple[str, ...] = ("4090",)
    depends_on_data: str = ""


@dataclass(frozen=True, kw_only=True)
class TrainerCase:
    """A Trainer, as its user builds it. arguments: of TrainingArguments, or of SFTConfig for TRL's SFTTrainer. packed:
    whether rows lie behind each other in one."""

    name: str
    model: str
    trl: bool = False
    batch: int = 4
    length: int = 512
    dtype: str = "float32"
    lora: bool = False
    packed: bool = False
    arguments: tuple[tuple[str, Any], ...] = ()
    cards: tuple[str, ...] = ("4090",)
    depends_on_data: str = ""


Case = StepCase | LoopCase | TrainerCase

_LLAMA: dict[str, Any] = {
    "vocab_size": 16000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
_OF_PYTHIA: dict[str, Any] = {
    "vocab_size": 16000,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
}
_TINY: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_ENDS = {"bos_token_id": 0, "eos_token_id": 0}
_EXPERTS = {"num_experts_per_tok": 2, "hidden_size": 384, "num_attention_heads": 6}
ARCHITECTURES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("LlamaConfig", _LLAMA),
    "llama-wide": (
        "LlamaConfig",
        _LLAMA | {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816},
    ),
    "llama-all-heads": ("LlamaConfig", _LLAMA | {"num_key_value_heads": 8}),
    "llama-tied": ("LlamaConfig", _LLAMA | {"tie_word_embeddings": True, "vocab_size": 32000}),
    "qwen2": ("Qwen2Config", _LLAMA | {"num_key_value_heads": 4}),
    "mistral": ("MistralConfig", _LLAMA | {"sliding_window": 256}),
    "gemma2": (
        "Gemma2Config",
        _LLAMA | {"head_dim": 64, "sliding_window": 256, "num_key_value_heads": 4},
    ),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": 50257,
            "n_embd": 512,
            "n_layer": 4,
            "n_head": 8,
            "n_positions": 1024,
            **_ENDS,
        },
    ),
    "neox": ("GPTNeoXConfig", _OF_PYTHIA),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        _LLAMA | _EXPERTS | {"moe_intermediate_size": 512, "head_dim": 64, "num_experts": 8},
    ),
    "mixtral": (
        "MixtralConfig",
        _LLAMA | _EXPERTS | {"intermediate_size": 1024, "num_local_experts": 8},
    ),
    "tiny-llama": ("LlamaConfig", _TINY),
    "tiny-llama-tied": ("LlamaConfig", _TINY | {"tie_word_embeddings": True}),
    "tiny-qwen2": ("Qwen2Config", _TINY),
    "tiny-mistral": ("MistralConfig", _TINY | {"sliding_window": 64}),
    "tiny-gemma2": ("Gemma2Config", _TINY | {"head_dim": 64, "sliding_window": 64}),
    "tiny-gpt2": (
        "GPT2Config",
        {"vocab_size": 2048, "n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 512, **_ENDS},
    ),
}
"""Configurations of transformers: the class and its arguments."""


def same(number: int, length: int, supervised: int | None = None) -> Rows:
    return ((length, length - 1 if supervised is None else supervised),) * number


def varied(number: int, longest: int) -> Rows:
    """Rows of different lengths, half of whose tokens are supervised; one is as long as can be."""
    chosen = random.Random(0)
    lengths = [chosen.randrange(longest // 8, longest) for _ in range(number - 1)]
    return (*((length, length // 2) for length in lengths), (longest, longest - 1))


STEPS = (
    StepCase(name="full", model="llama", rows=same(4, 1024), cards=CARDS),
    StepCase(
        name="minimind2-small", model="minimind2-small", rows=same(8, 1024), cards=("4090", "T4")
    ),
    StepCase(
        name="float32",
        model="llama",
        rows=same(4, 1024),
        options=("model.precision=float32",),
        cards=CARDS,
    ),
    StepCase(
        name="float16",
        model="llama",
        rows=same(4, 1024),
        options=("model.precision=autocast_float16",),
        cards=CARDS,
    ),
    StepCase(
        name="bfloat16",
        model="llama",
        rows=same(4, 1024),
        options=("model.precision=bfloat16",),
        cards=WITH_BFLOAT16,
    ),
    StepCase(
        name="all-logits",
        model="llama",
        rows=same(4, 512),
        options=("loss=full",),
        cards=("4090", "T4"),
    ),
    StepCase(
        name="recompute",
        model="llama",
        rows=same(8, 1024),
        options=("model.recompute=full",),
        cards=CARDS,
    ),
    StepCase(
        name="recompute-every-2",
        model="llama",
        rows=same(8, 1024),
        options=("model.recompute=every_2",),
        cards=("4090", "A100", "T4"),
    ),
    StepCase(
        name="recompute-selective",
        model="llama",
        rows=same(8, 1024),
        options=("model.recompute=selective",),
        cards=("4090", "H100"),
    ),
    StepCase(
        name="offload",
        model="llama",
        rows=same(8, 1024),
        options=("model.recompute=full", "model.offload_activations=true"),
        cards=("4090", "A100"),
    ),
    StepCase(
        name="lora", model="llama", rows=same(4, 1024), options=("model.method=lora",), cards=CARDS
    ),
    StepCase(
        name="lora-dropout",
        model="llama",
        rows=same(4, 1024),
        options=("model.method=lora", "model.lora.dropout=0.1"),
    ),
    StepCase(
        name="dora",
        model="llama",
        rows=same(4, 1024),
        options=("model.method=lora", "model.lora.dora=true"),
    ),
    StepCase(
        name="pissa",
        model="llama",
        rows=same(4, 1024),
        options=("model.method=lora", "model.lora.init=pissa_niter_16"),
    ),
    StepCase(
        name="label-smoothing",
        model="llama",
        rows=same(4, 1024),
        options=("train.label_smoothing=0.1",),
        cards=("4090", "T4"),
    ),
    StepCase(
        name="freeze",
        model="llama",
        rows=same(4, 1024),
        options=("model.method=freeze",),
        cards=("4090", "T4"),
    ),
    StepCase(
        name="freeze-embedding-too",
        model="llama-tied",
        rows=same(6, 512),
        accumulation=2,
        options=(
            "model.method=freeze",
            "model.freeze.trained_layers=-1",
            "model.freeze.trained_modules=[mlp]",
            "model.freeze.extra_modules=[lm_head,norm]",
        ),
    ),
    StepCase(
        name="lora-head-too",
        model="llama",
        rows=same(4, 1024),
        options=("model.method=lora", "model.lora.modules_to_save=[embed_tokens,lm_head,norm]"),
        cards=("4090", "T4"),
    ),
    StepCase(
        name="lora-tied-embedding-too",
        model="llama-tied",
        rows=same(6, 512),
        accumulation=2,
        options=("model.method=lora", "model.lora.modules_to_save=[embed_tokens]"),
    ),
    StepCase(
        name="lora-new-tokens",
        model="llama",
        rows=same(4, 1024),
        options=("model.method=lora", "model.new_tokens=[<a>,<b>]"),
        cards=("4090", "T4"),
    ),
    StepCase(
        name="lora-new-tokens-tied",
        model="llama-tied",
        rows=same(6, 512),
        accumulation=2,
        options=("model.method=lora", "model.new_tokens=[<a>,<b>]"),
    ),
    StepCase(
        name="qlora",
        model="llama",
        rows=same(4, 1024),
        options=("model.method=qlora",),
        cards=("4090", "T4"),
    ),
    StepCase(
        name="dpo",
        model="llama",
        rows=same(4, 1024),
        options=("objective=dpo",),
        kinds=("train", "train", "eval"),
        cards=("4090", "A100", "T4"),
    ),
    StepCase(
        name="dpo-train",
        model="llama",
        rows=same(6, 1024),
        accumulation=2,
        options=("objective=dpo",),
        cards=("4090", "H100"),
    ),
    StepCase(
        name="dpo-lora",
        model="llama",
        rows=same(4, 1024),
        options=("objective=dpo", "model.method=lora"),
        cards=("4090", "T4"),
    ),
    StepCase(
        name="dpo-reference",
        model="llama",
        rows=same(4, 1024),
        options=("objective=dpo", "data.packing=false"),
        kinds=("reference",),
        cards=("4090", "A100"),
    ),
    StepCase(
        name="dpo-frozen-copy",
        model="llama",
        rows=same(6, 1024),
        accumulation=2,
        options=("objective=dpo", "preference.reference=frozen_copy"),
        cards=("4090", "T4"),
    ),
    StepCase(
        name="dpo-frozen-copy-eval",
        model="llama",
        rows=same(4, 1024),
        options=("objective=dpo", "preference.reference=frozen_copy", "model.recompute=full"),
        kinds=("train", "train", "eval"),
        cards=("4090", "H100"),
    ),
    StepCase(
        name="dpo-adapter-off",
        model="llama",
        rows=same(4, 1024),
        options=(
            "objective=dpo",
            "model.method=lora",
            "preference.reference=adapter_off",
            "model.recompute=full",
        ),
        cards=("4090", "A100"),
    ),
    StepCase(
        name="kto",
        model="llama",
        rows=same(6, 1024),
        accumulation=2,
        options=("objective=kto",),
        cards=("4090", "T4"),
    ),
    StepCase(
        name="kto-frozen-copy",
        model="llama",
        rows=same(4, 1024),
        options=("objective=kto", "preference.reference=frozen_copy"),
        kinds=("train", "train", "eval"),
    ),
    StepCase(
        name="kto-lora",
        model="llama",
        rows=same(4, 1024),
        options=(
            "objective=kto",
            "model.method=lora",
            "preference.reference=adapter_off",
            "data.packing=false",
        ),
        cards=("A100",),
    ),
    StepCase(
        name="orpo-all-logits",
        model="llama",
        rows=same(4, 512),
        options=("objective=orpo", "loss=full", "data.packing=false"),
    ),
    StepCase(name="packed", model="llama", rows=varied(8, 1024), cards=("4090", "H100")),
    StepCase(
        name="padded",
        model="llama",
        rows=varied(8, 1024),
        options=("data.packing=false",),
        cards=("4090", "T4"),
    ),
    StepCase(
        name="accumulation",
        model="llama",
        rows=same(9, 512),
        accumulation=3,
        cards=("4090", "A100"),
    ),
    StepCase(
        name="evaluation",
        model="llama",
        rows=same(4, 1024),
        kinds=("train", "train", "eval"),
        cards=CARDS,
    ),
    StepCase(
        name="evaluation-first", model="llama", rows=same(4, 1024), kinds=("eval", "train", "train")
    ),
    StepCase(
        name="adamw-foreach",
        model="llama",
        rows=same(4, 512),
        options=("optim.name=adamw_foreach",),
    ),
    StepCase(
        name="adamw-8bit",
        model="llama",
        rows=same(4, 512),
        options=("optim.name=adamw_8bit",),
        cards=("4090", "A100"),
    ),
    StepCase(
        name="adamw-host", model="llama", rows=same(4, 512), options=("optim.name=adamw_host",)
    ),
    StepCase(name="adafactor", model="llama", rows=same(4, 512), options=("optim.name=adafactor",)),
    StepCase(name="muon", model="llama", rows=same(4, 512), options=("optim.name=muon",)),
    StepCase(name="apollo", model="llama", rows=same(4, 512), options=("optim.name=apollo",)),
    StepCase(
        name="apollo-mini", model="llama", rows=same(4, 512), options=("optim.name=apollo_mini",)
    ),
    StepCase(name="sgd", model="llama", rows=same(4, 512), options=("optim.name=sgd",)),
    StepCase(name="no-clipping", model="llama", rows=same(4, 512), options=("optim.clip=0",)),
    StepCase(
        name="expandable-segments",
        model="llama",
        rows=same(4, 1024),
        options=("memory.allocator=expandable_segments:True",),
        cards=("4090", "A100"),
    ),
    StepCase(name="math", model="llama", rows=same(4, 512), options=("model.attention=math",)),
    StepCase(name="eager", model="llama", rows=same(4, 512), options=("model.attention=eager",)),
    StepCase(name="tied", model="llama-tied", rows=same(4, 512), cards=("4090", "T4")),
    StepCase(name="gpt2", model="gpt2", rows=same(4, 512), cards=("4090", "T4")),
    StepCase(name="gpt2-lora", model="gpt2", rows=varied(4, 500), options=("model.method=lora",)),
    StepCase(name="neox", model="neox", rows=same(4, 512), cards=("4090", "H100")),
    StepCase(name="qwen2", model="qwen2", rows=same(4, 1024, 300)),
    StepCase(name="mistral", model="mistral", rows=same(4, 1024), cards=("4090", "H100")),
    StepCase(name="gemma2", model="gemma2", rows=same(4, 1024), cards=("4090", "A100")),
    StepCase(name="qwen3-moe", model="qwen3-moe", rows=same(4, 512), depends_on_data=BY_ROUTING),
    StepCase(name="mixtral", model="mixtral", rows=same(4, 512), depends_on_data=BY_ROUTING),
    StepCase(
        name="minimind-3-moe", model="minimind-3-moe", rows=same(4, 512), depends_on_data=BY_ROUTING
    ),
)

LOOPS = (
    LoopCase(name="loop-float32", model="llama", cards=CARDS),
    LoopCase(name="loop-float32-odd", model="llama", batch=3, length=333),
    LoopCase(
        name="loop-bfloat16", model="llama", dtype="bfloat16", length=1024, cards=WITH_BFLOAT16
    ),
    LoopCase(
        name="loop-autocast", model="llama", autocast="bfloat16", length=1024, cards=WITH_BFLOAT16
    ),
    LoopCase(
        name="loop-scaler", model="llama", autocast="float16", scaler=True, cards=("4090", "T4")
    ),
    LoopCase(name="loop-fused", model="llama", autocast="bfloat16", optimizer="fused"),
    LoopCase(name="loop-for", model="llama", autocast="bfloat16", optimizer="for"),
    LoopCase(name="loop-sgd", model="llama", dtype="bfloat16", optimizer="sgd"),
    LoopCase(name="loop-accumulation", model="llama", autocast="bfloat16", accumulation=3, clip=0),
    LoopCase(name="loop-keeps-gradients", model="llama", autocast="bfloat16", keeps_gradients=True),
    LoopCase(
        name="loop-checkpoint",
        model="llama",
        autocast="bfloat16",
        length=1024,
        checkpoint=True,
        cards=WITH_BFLOAT16,
    ),
    LoopCase(
        name="loop-padded",
        model="llama",
        dtype="bfloat16",
        length=1024,
        padded=True,
        cards=("4090", "A100"),
    ),
    LoopCase(name="loop-math", model="llama", dtype="bfloat16", kernel="MATH"),
    LoopCase(name="loop-efficient", model="llama", dtype="bfloat16", kernel="EFFICIENT_ATTENTION"),
    LoopCase(name="loop-flash", model="llama", dtype="bfloat16", kernel="FLASH_ATTENTION"),
    LoopCase(
        name="loop-cudnn",
        model="llama",
        dtype="bfloat16",
        kernel="CUDNN_ATTENTION",
        cards=("H100",),
    ),
    LoopCase(name="loop-eager", model="llama", dtype="bfloat16", attention="eager"),
    LoopCase(name="loop-evaluates", model="llama", dtype="bfloat16", evaluates=True),
    LoopCase(
        name="loop-tied-autocast", model="llama-tied", autocast="bfloat16", cards=("4090", "A100")
    ),
    LoopCase(name="loop-wide", model="llama-wide", dtype="bfloat16"),
    LoopCase(name="loop-lora-dropout", model="llama", dtype="bfloat16", length=1024, lora=True),
    LoopCase(name="loop-gpt2-dropout", model="gpt2", batch=4, cards=("4090", "T4")),
    LoopCase(name="loop-gpt2-dropout-autocast", model="gpt2", batch=4, autocast="bfloat16"),
    LoopCase(name="loop-qwen2", model="qwen2", autocast="bfloat16"),
    LoopCase(name="loop-mistral", model="mistral", dtype="bfloat16", length=1024),
    LoopCase(name="loop-gemma2", model="gemma2", dtype="bfloat16", length=512, attention="eager"),
    LoopCase(name="loop-mixtral", model="mixtral", dtype="bfloat16", depends_on_data=BY_ROUTING),
    LoopCase(
        name="loop-qwen3-moe", model="qwen3-moe", dtype="bfloat16", depends_on_data=BY_ROUTING
    ),
)

TRAINERS = (
    TrainerCase(name="trainer", model="llama", cards=CARDS),
    TrainerCase(
        name="trainer-bf16", model="llama", arguments=(("bf16", True),), cards=("4090", "H100")
    ),
    TrainerCase(
        name="trainer-fp16", model="llama", arguments=(("fp16", True),), cards=("4090", "T4")
    ),
    TrainerCase(
        name="trainer-checkpointing",
        model="llama",
        arguments=(("bf16", True), ("gradient_checkpointing", True)),
    ),
    TrainerCase(
        name="trainer-accumulation",
        model="llama",
        batch=2,
        arguments=(("bf16", True), ("gradient_accumulation_steps", 3)),
    ),
    TrainerCase(
        name="trainer-lora", model="llama", dtype="bfloat16", lora=True, arguments=(("bf16", True),)
    ),
    TrainerCase(
        name="sft",
        model="llama",
        trl=True,
        arguments=(("bf16", True),),
        cards=("4090", "A100", "H100"),
    ),
    TrainerCase(
        name="sft-no-checkpointing",
        model="llama",
        trl=True,
        arguments=(("bf16", True), ("gradient_checkpointing", False)),
    ),
    TrainerCase(
        name="sft-lora",
        model="llama",
        trl=True,
        dtype="bfloat16",
        lora=True,
        arguments=(("bf16", True),),
    ),
    TrainerCase(
        name="sft-padding-free",
        model="llama",
        trl=True,
        packed=True,
        arguments=(
            ("bf16", True),
            ("padding_free", True),
            ("max_length", None),
            ("gradient_checkpointing", False),
        ),
    ),
)

CASES: tuple[Case, ...] = (*STEPS, *LOOPS, *TRAINERS)
BY_NAME: Mapping[str, Case] = {case.name: case for case in CASES}
assert len(BY_NAME) == len(CASES), "two cases have one name"


# ---- golden steps: what `tests/trace/test_golden_steps.py` records again in seconds, with models of two layers -------------

GOLDEN_LENGTH = 256
_OTHER_CARDS = (
    "full",
    "float32",
    "recompute",
    "lora",
    "loop-float32",
    "loop-scaler",
    "loop-autocast",
)
"""Cases whose steps are kept of other cards than the first too."""
_SAME_STEPS = ("expandable-segments", "evaluation-first")
"""Cases that ask for the same as `full`, of another allocator or after an evaluation."""
_NO_STEPS = ("dpo-reference",)
"""Cases of a pass that is done once, before the first step."""


def golden_cases() -> list[tuple[StepCase | LoopCase, str]]:
    """Every step and loop whose memory does not depend on data, with a tiny model, and its cards."""
    chosen: list[tuple[StepCase | LoopCase, str]] = []
    for case in (*STEPS, *LOOPS):
        model = f"tiny-{case.model}"
        if model not in ARCHITECTURES or case.name in (*_SAME_STEPS, *_NO_STEPS):
            continue
        cards = [card for card in case.cards if card in _cards_of(case)]
        chosen += [(_shrunk(case, model), card) for card in cards]
    return chosen


def _cards_of(case: Case) -> tuple[str, ...]:
    """An A100 takes the kernels that the first card takes: one file shows it."""
    if case.name == "full":
        return CARDS
    return (
        tuple(card for card in CARDS if card != "A100")
        if case.name in _OTHER_CARDS
        else case.cards[:1]
    )


def _shrunk(case: StepCase | LoopCase, model: str) -> StepCase | LoopCase:
    """The same setting in small, with two steps more or less alike at the end."""
    if isinstance(case, LoopCase):
        return replace(
            case,
            model=model,
            batch=min(case.batch, 2),
            length=min(case.length, GOLDEN_LENGTH),
            cards=(),
        )
    rows = tuple(
        (length * GOLDEN_LENGTH // 1024, n * GOLDEN_LENGTH // 1024) for length, n in case.rows
    )
    kinds = ("train", *case.kinds) if case.kinds[-1] == "train" else case.kinds
    return replace(case, model=model, rows=rows, kinds=kinds, cards=())
