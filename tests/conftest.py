"""Fixtures that several files of tests use."""

pytest_plugins = ["nvml_stand_in"]
