"""The Chinese of what `say` is given, by its English. One part for each command, so that they grow apart."""

_PLAN: dict[str, str] = {}

_REPORT: dict[str, str] = {}

_WATCH: dict[str, str] = {}

CHINESE: dict[str, str] = {**_PLAN, **_REPORT, **_WATCH}
