"""Runs the command line for `python -m fitune`."""

import sys

from fitune.cli.app import main

sys.exit(main())
