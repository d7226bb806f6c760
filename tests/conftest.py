"""What is said is said in English here, whatever language this machine speaks."""

import os

os.environ["FITUNE_LANG"] = "en"

pytest_plugins = ["nvml_stand_in"]
