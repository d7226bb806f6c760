"""What pyproject.toml cannot say yet. The extension is optional: without a compiler the same loop runs in Python."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension("fitune.allocator._fast", ["src/fitune/allocator/_fast.c"], optional=True),
    ]
)
