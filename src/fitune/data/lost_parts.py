"""Notices about what a chat template leaves out of messages, or adds to them, for the data report.

Each text is the rest of a message "12 samples ...".
"""

import re

#: the thinking at the beginning of an answer, up to the answer itself
THINKING = re.compile(r"\A\s*(?:<think>)?(.*)</think>\s*(?=\S)", re.DOTALL)

NOT_SHOWN = "hold {what}, which the chat template does not show to the model"
LOST_THOUGHT = "hold thinking in earlier turns, which the chat template leaves out there: those turns are not learned"
REWRITTEN = "hold earlier answers that the chat template rewrites or leaves out: those turns are not learned"
ADDED_END = (
    "end in an answer that the chat template does not end: {token} is added after it, and learned"
)
NO_END_BEFORE = "hold earlier answers that the chat template ends with nothing: the model learns to stop from the last one alone"
NO_END = "end in an answer that nothing ends, and the tokenizer has no end-of-text token: the model learns no end"
TEXT_END = "end their answers with {text}, which is no token of its own here: generation needs it as a stop string"


def writes_reasoning(template: str) -> bool:
    """Return whether a template may write the reasoning of a message."""
    return re.search("reasoning_content|thinking", template) is not None


def loses_thought(content: str, rendered: str) -> bool:
    """Return whether a rendered turn lacks the thinking at the beginning of its message.

    content: the message's content.
    """
    thought = THINKING.match(content)
    return thought is not None and thought[1].strip() not in rendered
