"""Find what a conversation contains that has no effect on training, or an unexpected one.

Each kind becomes one warning with the number of samples, as in "12 samples hold ...".
"""

import re
from collections.abc import Iterator, Mapping

from fitune.config import DataConfig
from fitune.data.formats import Conversation
from fitune.data.lost_parts import NOT_SHOWN, writes_reasoning
from fitune.data.tokenise import Encoder

_IGNORED = "hold the key '{key}', which is ignored"
_IGNORED_PATTERN = re.compile(_IGNORED.format(key="(.*)"), re.DOTALL)
#: what the first 4096 characters of a plain text contain if it is an already rendered conversation
_WRITTEN_CHAT = re.compile(
    r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|(?:user|assistant)\|>|\[INST\]|"
    r"#{2,3} ?(?:Human|User|Assistant|Instruction|Response)\b|"
    r"^(?:USER|ASSISTANT|Human|Assistant): ",
    re.MULTILINE,
)
#: keys of a message that need no notice, whether or not the template reads them
_KNOWN_IN_A_MESSAGE = {
    "role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name", "id",
}  # fmt: skip


def notices_of(conversation: Conversation, encoder: Encoder, data: DataConfig) -> frozenset[str]:
    """Return the notices of one conversation, each as the rest of a message "12 samples ..."."""
    noticed = {_IGNORED.format(key=key) for key in conversation.ignored}
    if conversation.text is None:
        noticed.update(_of_template(conversation, encoder.finder_of(conversation).template.text))
    elif not is_pretraining(data) and _WRITTEN_CHAT.search(conversation.text, 0, 4096):
        noticed.add(
            "are texts in which a conversation is written out already: every token of them is "
            "learned, the questions "
            "too; samples in the messages format teach the answers alone"
        )
    pairs = zip(conversation.messages, conversation.weights, strict=True)
    if data.mask == "all":
        if any(weight is not None for weight in conversation.weights):
            noticed.add("hold loss weights, which data.mask=all leaves out")
    elif any(weight and message["role"] != "assistant" for message, weight in pairs):
        noticed.add(
            f"weigh messages that are not the assistant's, which data.mask={data.mask} never supervises"
        )
    return frozenset(noticed)


def is_pretraining(data: DataConfig) -> bool:
    """Return whether the texts are asked to be learned whole, whatever they contain."""
    return data.wrapped or data.too_long == "split"


def _of_template(conversation: Conversation, template: str) -> Iterator[str]:
    """Yield what a conversation has that the text of the template does not name."""
    keys = {key for message in conversation.messages for key in message}
    if "reasoning_content" in keys and not writes_reasoning(template):
        yield NOT_SHOWN.format(what="reasoning_content")
    if "tool_calls" in keys and "tool_calls" not in template:
        yield NOT_SHOWN.format(what="tool_calls")
    if conversation.tools and "tools" not in template:
        yield NOT_SHOWN.format(what="tools")
    for key in keys - _KNOWN_IN_A_MESSAGE:
        if key not in template:
            yield f"hold the key '{key}' in a message, which is ignored"
    for key in conversation.template_arguments or ():
        if key not in template:
            yield NOT_SHOWN.format(what=f"the template argument '{key}'")


def grouped_notices(noticed: Mapping[str, int]) -> Iterator[str]:
    """Yield one message for each kind of notice.

    If as many samples contain each of three or more ignored keys, one message lists those keys.
    """
    ignored: dict[int, list[str]] = {}
    for notice, count in sorted(noticed.items()):
        if match := _IGNORED_PATTERN.fullmatch(notice):
            ignored.setdefault(count, []).append(match[1])
        else:
            yield f"{count:,} samples {notice}"
    for count, keys in ignored.items():
        if len(keys) < 3:
            yield from (f"{count:,} samples {_IGNORED.format(key=key)}" for key in keys)
        else:
            yield f"{count:,} samples hold the keys {', '.join(keys)}, which are ignored"
