"""What the chat templates in tests/templates are: written after the public families, each with what its answers begin
and end with when nothing is said but their texts."""

from dataclasses import dataclass
from pathlib import Path

TEMPLATES = Path(__file__).parent / "templates"
EOS = "<eos>"
TOKENS = (
    *(
        "<bos>",
        EOS,
        "<pad>",
        "<|im_start|>",
        "<|im_end|>",
        "<|im_sep|>",
        "<|endoftext|>",
        "<|user|>",
        "<|assistant|>",
    ),
    *(
        "<|system|>",
        "<|observation|>",
        "<|end|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "[INST]",
    ),
    *(
        "[/INST]",
        "[SYSTEM_PROMPT]",
        "[/SYSTEM_PROMPT]",
        "[TOOL_CALLS]",
        "<start_of_turn>",
        "<end_of_turn>",
    ),
    *(
        "<｜User｜>",
        "<｜Assistant｜>",
        "<｜tool｜>",
        "[gMASK]",
        "<sop>",
        "<think>",
        "</think>",
        "<tool_call>",
    ),
    *(
        "</tool_call>",
        "<|START_OF_TURN_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>",
        "<|USER_TOKEN|>",
        "<|CHATBOT_TOKEN|>",
    ),
    *(
        "<|SYSTEM_TOKEN|>",
        "<|START_RESPONSE|>",
        "<|END_RESPONSE|>",
        "<|start|>",
        "<|message|>",
        "<|channel|>",
    ),
    *(
        "<|return|>",
        "<|call|>",
        "<reserved_106>",
        "<reserved_107>",
        "<|start_of_role|>",
        "<|end_of_role|>",
    ),
    *("<|end_of_turn|>", "[|endofturn|]", "<AI>"),
)
_THOUGHTLESS = "<think>\n\n</think>\n\n"


@dataclass(frozen=True)
class Family:
    """end: of an answer that others follow. last: of the last one, where that is another. before, before_last: what the
    template writes for the model to say before its text, whose leading newlines it then cuts. is_strict: user and
    assistant must take turns. starts_with: the roles that a conversation may begin with. trims: white space around
    texts is cut."""

    end: str
    last: str | None = None
    before: str = ""
    before_last: str | None = None
    is_strict: bool = False
    starts_with: tuple[str, ...] = ("user", "assistant", "system")
    trims: bool = False

    def answer(self, text: str, *, is_last: bool) -> str:
        text = text.strip() if self.trims else text
        before = self.before
        if is_last and self.before_last is not None:
            before, text = self.before_last, text.lstrip("\n")
        return before + text + (self.last if is_last and self.last is not None else self.end)


_NO_SYSTEM = ("user", "assistant")
_CHATML = Family("<|im_end|>\n")
FAMILIES = {
    "alpaca": Family(f"{EOS}\n\n"),
    "amber_end_at_last": Family("<|user|>", last=EOS),
    "baichuan2": Family(EOS),
    "chatglm2": Family("\n\n", last=f"\n\n{EOS}", before=" ", starts_with=("user", "system")),
    "chatml": _CHATML,
    "chatml_without_prompt": _CHATML,
    "command_a": Family(
        "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", before="<|START_RESPONSE|>", trims=True
    ),
    "command_r": Family("<|END_OF_TURN_TOKEN|>", trims=True),
    "deepseek_r1": Family(EOS),
    "deepseek_v2": Family(EOS, before=" "),
    "deepseek_v3": Family(EOS),
    "end_between_turns": Family("<|im_end|>", last="<|im_end|>"),
    "exaone": Family("[|endofturn|]\n", trims=True),
    "falcon3": Family(EOS),
    "falcon_instruct": Family("", last=EOS, before=" ", trims=True),
    "gemma": Family("<end_of_turn>\n", is_strict=True, starts_with=("user",), trims=True),
    "gemma3": Family("<end_of_turn>\n", trims=True),
    "generation": Family("<|im_end|>"),
    "glm4": Family("<|user|>", before="\n"),
    "glm45": Family("<|user|>", before="\n<think></think>\n"),
    "granite": Family(f"{EOS}\n"),
    "harmony": Family("<|end|>", last="<|return|>", before="<|channel|>final<|message|>"),
    "internlm2": _CHATML,
    "llama2": Family(
        f" {EOS}", before=" ", is_strict=True, starts_with=("user", "system"), trims=True
    ),
    "llama3": Family("<|eot_id|>", trims=True),
    "llama31": Family("<|eot_id|>", trims=True),
    "minicpm": Family(EOS, starts_with=("user", "system"), trims=True),
    "minimind": _CHATML,
    "mistral_nemo": Family(EOS),
    "mistral_tekken": Family(EOS),
    "mistral_v1": Family(EOS, before=" ", is_strict=True, starts_with=("user",)),
    "mistral_v3": Family(EOS, before=" ", starts_with=("user", "system"), trims=True),
    "no_end_of_turn": Family("<|user|>"),
    "no_system": Family("<end_of_turn>\n", starts_with=_NO_SYSTEM),
    "olmo": Family(EOS, last=EOS),
    "openchat": Family("<|end_of_turn|>", before=" "),
    "opens_after_user": Family("<|end|>\n", starts_with=("user",)),
    "parts": Family("<|end|>\n"),
    "phi2": Family("\n", last=f"\n{EOS}"),
    "phi3": Family("<|end|>\n", last=f"<|end|>\n{EOS}"),
    "phi3_mini_4k_old": Family("<|end|>\n", starts_with=("user",)),
    "phi4": Family("<|im_end|>"),
    "prompt_always": Family("<|end|>\n"),
    "qwen2": _CHATML,
    "qwen25": _CHATML,
    "qwen3": Family("<|im_end|>\n", before_last=_THOUGHTLESS),
    "qwen3_thinking": Family("<|im_end|>\n", before_last="\n</think>\n\n"),
    "smollm": _CHATML,
    "smollm3": Family("<|im_end|>\n", before="<think>\n\n</think>\n"),
    "solar": Family("\n\n", last=f"\n\n{EOS}"),
    "stablelm": Family("<|endoftext|>\n"),
    "starchat": Family("<|end|>\n", before="\n"),
    "string_arguments": Family(EOS, starts_with=_NO_SYSTEM),
    "system_at_last_user": Family(EOS, before=" ", starts_with=("user", "system")),
    "tulu": Family(f"{EOS}\n"),
    "vicuna": Family(EOS, before=" "),
    "yi": _CHATML,
    "zephyr": Family(f"{EOS}\n"),
}
