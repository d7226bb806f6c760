"""Runs the command line for `python -m fitune`."""

import os
import sys

from fitune.cli.app import main

code = main()
if os.environ.get("WORLD_SIZE", "1") != "1":
    # Threads of several processes' libraries may abort one while Python ends, and torchrun would
    # call a finished run failed. What was printed is flushed by now.
    os._exit(code)
sys.exit(code)
