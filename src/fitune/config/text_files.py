"""Read the text of a configuration file, of fitune's or another tool's."""

import codecs
from pathlib import Path

from fitune.errors import ConfigError

MAX_FILE_BYTES = 1_000_000
#: Suffixes that no configuration has. A configuration may be written in JSON, so .json is missing.
DATA_SUFFIXES = (".jsonl", ".parquet", ".csv")
DATA_WAY = "if it is the data, give it with --data (data.train)"


def check_is_configuration(path: Path) -> None:
    """Raise ConfigError if the path is a directory or has the suffix of a data file."""
    if path.is_dir():
        own = path / "config.yaml"
        if not (own.is_file() and (path / "checkpoints").is_dir()):
            raise ConfigError([f"{path} is a directory, not a configuration file"])
        goes_on = f"'fitune train --resume {path}' goes on with it"
        raise ConfigError(
            [f"{path} is the directory of a run: {goes_on}, and {own} is its configuration"]
        )
    if path.suffix in DATA_SUFFIXES and path.is_file():
        raise ConfigError(
            [f"{path} is data by its name, not a configuration: give it with --data (data.train)"]
        )


def decode(content: bytes) -> str:
    """Decode UTF-8, or UTF-16 if it starts with a byte order mark, as editors on Windows write it.

    Normalises the ends of lines to newlines.
    """
    is_utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return (
        content.decode("utf-16" if is_utf_16 else "utf-8-sig")
        .replace("\r\n", "\n")
        .replace("\r", "\n")
    )


def read_bounded(path: Path) -> bytes:
    """Read a configuration file of fitune or of another tool.

    The size is limited because a device file may never end. Raises ConfigError if the file is
    larger than MAX_FILE_BYTES, and OSError if it cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(
            [
                f"{path} has over {MAX_FILE_BYTES:,} bytes, too many for a configuration: is it "
                "the data? "
                "That is data.train"
            ]
        )
    return content


def read_text(path: Path) -> str:
    check_is_configuration(path)
    try:
        return decode(read_bounded(path))
    except UnicodeDecodeError as error:
        raise ConfigError(
            [
                f"{path} is not a text file: byte {error.start} is not UTF-8; save it in that encoding"
            ]
        ) from error
    except FileNotFoundError as error:
        twin = path.with_suffix({".yml": ".yaml", ".yaml": ".yml"}.get(path.suffix, ".yaml"))
        answer = f"did you mean {twin}?" if twin.is_file() else "give the path of a YAML file"
        raise ConfigError([f"{path} does not exist: {answer}"]) from error
    except OSError as error:
        raise ConfigError([f"{path} cannot be read: {error.strerror}"]) from error
