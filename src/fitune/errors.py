"""Defines every error that a user can cause, and the exit code of each.

FituneError                  1   the run failed
├── TooLongError             1   recording what is to be predicted takes too long
├── UnexpectedError          1   an unexpected exception of another library, or of fitune
├── UsageError               2   the command line, the configuration or the data is wrong
│   ├── ConfigError              faults of the configuration, all of them together
│   ├── DataError                faults of the training data
│   ├── ModelError               a model or tokenizer that cannot be read or does not fit the request
│   └── RunDirectoryError        a run directory that exists already, is missing, damaged or not writable
├── DoesNotFitError          3   no setting fits the memory budget
├── OutOfMemoryError         4   out of memory after all retries; the checkpoint is saved
├── RestartError            75   the process must be started again to go on
└── InterruptedRunError    130   stopped by the user; the checkpoint is saved

A message is one clear sentence that gives the value, the limit, and what the user can do. No
traceback is shown for these errors.
"""

from collections.abc import Sequence


class FituneError(Exception):
    exit_code = 1


class UnexpectedError(FituneError):
    pass


class TooLongError(FituneError):
    pass


class UsageError(FituneError):
    exit_code = 2


class ConfigError(UsageError):
    """Lists every fault of a configuration, one message each."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(faults))


class DataError(UsageError):
    pass


class ModelError(UsageError):
    pass


class RunDirectoryError(UsageError):
    pass


class DoesNotFitError(FituneError):
    exit_code = 3


class OutOfMemoryError(FituneError):
    exit_code = 4


class RestartError(FituneError):
    exit_code = 75


class InterruptedRunError(FituneError):
    exit_code = 130
