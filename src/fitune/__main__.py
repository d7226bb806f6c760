"""`python -m fitune` is `fitune`."""

import sys

from fitune.cli.app import main

sys.exit(main())
