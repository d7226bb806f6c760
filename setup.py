"""What pyproject.toml cannot say yet. The extension is optional: without a compiler the same loop runs in Python."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension("fitune.memory._plain_replay", ["src/fitune/memory/_plain_replay.c"], optional=True),
    ]
)
