"""A bound on the time that a tokenizer takes, which runs regular expressions that came with somebody's model.

One that can match in many ways tries them all, for hours, in the Rust code of the tokenizers library, which nothing
interrupts. So it runs in a thread beside the one that waits for it: whoever waits hears Ctrl-C and can stop waiting.
"""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from fitune.boundary import cause_of, is_panic
from fitune.errors import ModelError

T = TypeVar("T")
MOST_SECONDS = 20.0
"""Of the processor, beside those that the text may take."""
CHARS_PER_SECOND = 100_000
"""A tenth of what a slow tokenizer does."""
_LOOK_SECONDS = 0.1
_WAY_OUT = "a regular expression of its tokenizer.json may match in too many ways: name another tokenizer with model.tokenizer"


def in_time(call: Callable[[], T], *, num_chars: int) -> T:
    """What `call` returns or raises. Raises ModelError where it takes too long for a text of so many characters, or
    the tokenizers library gives up in a panic. The thread of a call that took too long goes on until it ends."""
    returned: list[T] = []
    raised: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            returned.append(call())
        except BaseException as error:
            raised.append(error)
        finally:
            done.set()

    limit = MOST_SECONDS + num_chars / CHARS_PER_SECOND
    until = time.process_time() + limit
    threading.Thread(target=run, name="tokenizer", daemon=True).start()
    while not done.wait(_LOOK_SECONDS):
        if time.process_time() > until:
            raise ModelError(
                f"the tokenizer takes more than {limit:.0f} s of processor time for {num_chars:,} characters: "
                f"{_WAY_OUT}"
            )
    if not raised:
        return returned[0]
    if is_panic(raised[0]):
        raise ModelError(
            f"the tokenizer cannot split a text ({cause_of(raised[0])}): {_WAY_OUT}"
        ) from raised[0]
    raise raised[0]
