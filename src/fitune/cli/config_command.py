"""`fitune config`: about configuration files."""

import json

from cyclopts import App

from fitune.config import json_schema

app = App(name="config")


@app.command
def schema() -> None:
    """JSON schema of the configuration file, for editors: every key with its default and allowed values.

    In VS Code and others with the YAML language server: save it as fitune.schema.json and start the file with
    `# yaml-language-server: $schema=fitune.schema.json`.
    """
    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
