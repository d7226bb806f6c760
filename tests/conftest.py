"""What is said is said in English here, whatever language this machine speaks; tiny models have one thread; Ctrl-C is
heard, although a shell that starts something in the background has it ignored."""

import os
import signal

from hypothesis import settings

os.environ["FITUNE_LANG"] = "en"
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch is imported, and for the processes that tests start
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("untimed", deadline=None)  # a busy machine is no fault of the code
settings.load_profile("untimed")

pytest_plugins = ["nvml_stand_in", "disturbed_run"]
