"""Limit the time that a tokenizer may take.

A tokenizer runs regular expressions that came with the model. One that can match in many ways tries
them all, for hours, in the Rust code of the tokenizers library, which cannot be interrupted. The
tokenizer therefore runs in a thread of its own, while the calling thread waits for it: it still
receives Ctrl-C and can stop waiting.
"""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from fitune.boundary import cause_of, is_panic
from fitune.errors import ModelError

T = TypeVar("T")
#: seconds of processor time, in addition to those that the length of the text allows
MOST_SECONDS = 20.0
#: a tenth of the speed of a slow tokenizer
CHARS_PER_SECOND = 100_000
#: seconds between two checks of the processor time
_CHECK_SECONDS = 0.1
_WAY_OUT = "a regular expression of its tokenizer.json may match in too many ways: name another tokenizer with model.tokenizer"


def in_time(call: Callable[[], T], *, num_chars: int) -> T:
    """Return or raise what `call` returns or raises, within the time that so many characters allow.

    Raises ModelError if it takes longer, or if the tokenizers library panics. The thread of a call
    that took too long continues until it ends.
    """
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
    while not done.wait(_CHECK_SECONDS):
        if time.process_time() > until:
            raise ModelError(
                f"the tokenizer takes more than {limit:.0f} s of processor time for {num_chars:,} "
                "characters: "
                f"{_WAY_OUT}"
            )
    if not raised:
        return returned[0]
    if is_panic(raised[0]):
        raise ModelError(
            f"the tokenizer cannot split a text ({cause_of(raised[0])}): {_WAY_OUT}"
        ) from raised[0]
    raise raised[0]
