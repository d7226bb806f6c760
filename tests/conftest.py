"""What is said is said in English here, whatever language this machine speaks; tiny models have one thread."""

import os

os.environ["FITUNE_LANG"] = "en"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes that tests start

pytest_plugins = ["nvml_stand_in"]
