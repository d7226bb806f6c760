"""What is said is said in English here, whatever language this machine speaks; tiny models have one thread; Ctrl-C is
heard, although a shell that starts something in the background has it ignored."""

import gc
import os
import signal
from collections.abc import Iterator
from unittest import mock

import pytest
from hypothesis import settings

os.environ["FITUNE_LANG"] = "en"
# before torch is imported, and for the processes that tests start
os.environ.setdefault("OMP_NUM_THREADS", "1")
signal.signal(signal.SIGINT, signal.default_int_handler)
# a test that takes longer on a busy machine shows no fault of the code
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

pytest_plugins = ["nvml_stand_in", "disturbed_run"]


@pytest.fixture(scope="module", autouse=True)
def _older_objects_frozen() -> Iterator[None]:
    """Leave what was imported out of garbage collections, which took a third of the time of all tests.

    It stays frozen until the end: a look at all of it, once a module, took 0.3 s. Recordings freeze what is there, too,
    and would unfreeze all at their end.
    """
    gc.collect()
    gc.freeze()
    with mock.patch.object(gc, "unfreeze"):
        yield
