"""`fitune train`: train by a configuration."""

from typing import Annotated

from cyclopts import Parameter

from fitune.cli.arguments import ConfigArguments, ConfigFlags, read_arguments
from fitune.cli.output import Format, print_json
from fitune.config import ResolvedConfig, format_config
from fitune.errors import FituneError


def train(
    *words: ConfigArguments,
    flags: ConfigFlags = ConfigFlags(),  # noqa: B008 (frozen)
    overwrite: Annotated[bool, Parameter(help="replace an existing run of this name")] = False,
    print_config: Annotated[bool, Parameter(help="print the resolved configuration, and stop")] = False,
    output_format: Format = "auto",
) -> None:
    """Train by a configuration. An existing run is refused unless --overwrite."""
    resolved = read_arguments(words, flags)
    if print_config:
        _print_config(resolved, output_format)
        return
    raise FituneError("this version reads configurations but does not train yet")


def _print_config(resolved: ResolvedConfig, output_format: str) -> None:
    if output_format == "json":
        print_json({"config": resolved.config.model_dump(mode="json"), "origins": dict(resolved.origins)})
    else:
        print(format_config(resolved), end="")
