"""Find the data files of a path, sorted into splits as `datasets` does.

If the README.md of a data set names its splits under `configs`, those are taken. Otherwise the
names of the files and their directories decide. Training reads the training split. Evaluation reads
the validation split, or else the test split.
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from glob import glob
from pathlib import Path
from typing import Literal

import yaml

from fitune.errors import DataError
from fitune.plain_files import read_plain

LINES = (".jsonl", ".ndjson", ".jsonlines")
TABLES = (".csv", ".tsv")
SUFFIXES = (".json", *LINES, ".parquet", *TABLES, ".arrow")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
Split = Literal["train", "eval"]
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "holdout", "heldout"),
    "test": ("test", "testing", "eval", "evaluation"),
}
#: what may follow the name of a split within a word, as in traindata.jsonl and testset.json
_AFTER_SPLIT = ("", "data", "dataset", "set", "file", "split", "s")  # traindata.jsonl, testset.json
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")


def suffix_of(path: Path) -> str:
    """Return the suffix that names the format, in lower case, without that of a compression."""
    return (Path(path.stem).suffix if path.suffix.lower() in COMPRESSIONS else path.suffix).lower()


def endings() -> str:
    return f"{', '.join(SUFFIXES)} (text also with {', '.join(COMPRESSIONS)})"


def find_files(path: str, *, split: Split = "train") -> tuple[Path, ...]:
    """Return the data files of a path, sorted.

    The path may be a file, a pattern with *, or a directory, in which the files of `split` are
    found at any depth. Raises DataError if there are none.
    """
    root = Path(path).expanduser()
    if root.is_dir():
        by_split = _split_files(root)
        if not by_split:
            raise DataError(f"the directory {path} holds no data: no file that ends in {endings()}")
        wanted = ("train", "") if split == "train" else ("validation", "test", "", "train")
        name = next((name for name in wanted if name in by_split), None)
        if name is None:
            raise DataError(
                f"the directory {path} holds no training data, only files of the split "
                f"{' and '.join(by_split)}: name "
                f"the file to train on, such as {next(iter(by_split.values()))[0]}"
            )
        return by_split[name]
    if is_pattern(path):
        found = tuple(
            sorted(file for name in glob(str(root), recursive=True) if _is_data(file := Path(name)))
        )
        if not found:
            raise DataError(f"no data at {path}: no file of that pattern ends in {endings()}")
        return found
    if not root.exists():
        raise DataError(f"no data at {path}: there is no such file or directory")
    if suffix_of(root) not in SUFFIXES:
        raise DataError(
            f"{path} has an unknown ending '{root.suffix}': data is read from {endings()} files"
        )
    return (root,)


def is_pattern(path: str) -> bool:
    return any(letter in path for letter in "*?[") and not Path(path).expanduser().exists()


def other_splits(path: str, *, split: Split = "train") -> dict[str, int]:
    """Return the splits of a directory that are not read for `split`, with their numbers of files.

    The split '' stands for files that belong to no split.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        return {}
    read = set(find_files(str(root), split=split))
    return {name: len(files) for name, files in _split_files(root).items() if not read & set(files)}


def _is_data(file: Path) -> bool:
    # `datasets` caches the results of map and filter in such files.
    is_cache = file.name.startswith("cache-") and file.suffix == ".arrow"
    return (
        suffix_of(file) in SUFFIXES
        and file.name not in _NOT_DATA
        and not is_cache
        and file.is_file()
    )


def _split_files(root: Path) -> dict[str, tuple[Path, ...]]:
    """Return the data files at any depth of a directory, sorted, for each split."""
    if (named := _splits_of_card(root)) is not None:
        return named
    by_split: dict[str, list[Path]] = {}
    for file in sorted(root.rglob("*")):
        relative = file.relative_to(root)
        hidden = any(part.startswith(".") for part in relative.parts)
        if not hidden and _is_data(file):
            by_split.setdefault(_split_of(relative), []).append(file)
    shards = {
        (file.parent, match[1])
        for file in by_split.get("train", ())
        if (match := _SHARD.match(file.name))
    }
    _check_only_one(root, {name for _, name in shards if name != "train"})
    return {name: tuple(files) for name, files in by_split.items()}


def _check_only_one(root: Path, names: set[str]) -> None:
    if len(names) > 1:
        raise DataError(
            f"the directory {root} has several splits for training ({', '.join(sorted(names))}): "
            "name the files of "
            f"one, as in '{root}/**/{min(names)}*'"
        )


def _split_of(relative: Path) -> str:
    """Return the split that a path belongs to: 'data/train-00000-of-00001.parquet' -> 'train'.

    The name of the file takes precedence over those of its directories. Digits and capital letters
    separate words, as in dev1 and myTest.
    """
    for part in (relative.name.split(".")[0], *reversed(relative.parent.parts)):
        words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", part).lower())
        # "held_out" is two words.
        pairs = [f"{one}{other}" for one, other in itertools.pairwise(words)]
        for name, keywords in _SPLIT_NAMES.items():
            if any(word in pairs for word in keywords if word.endswith("out")):
                return name
            if any(
                word == keyword + after
                for word in words
                for keyword in keywords
                for after in _AFTER_SPLIT
            ):
                return name
    return ""


def _splits_of_card(root: Path) -> dict[str, tuple[Path, ...]] | None:
    """Return the files of each split that the README.md of a data set names, None if it names none.

    Raises DataError if it describes several data sets, none of which is the default one.
    """
    configs = [config for config in _configs(root / "README.md") if _patterns(config)]
    default = [
        config
        for config in configs
        if config.get("default") is True or config.get("config_name") == "default"
    ]
    chosen = configs if len(configs) < 2 else default[:1]
    if configs and not chosen:
        names = [str(config.get("config_name")) for config in configs]
        raise DataError(
            f"the directory {root} holds several data sets ({', '.join(names)}), as its README.md "
            "says: name the files "
            f"of one, such as '{root}/{next(iter(_patterns(configs[0]).values()))[0]}'"
        )
    found: dict[str, list[Path]] = {}
    names = []
    for name, patterns in (_patterns(chosen[0]) if chosen else {}).items():
        files = [
            file for pattern in patterns for file in sorted(root.glob(pattern)) if _is_data(file)
        ]
        if files:
            split = _split_of(Path(name))
            names += [name] if split == "train" else []
            found.setdefault(split, []).extend(
                file for file in files if file not in found.get(split, ())
            )
    _check_only_one(root, set(names))
    return {name: tuple(files) for name, files in found.items()} or None


def _configs(card: Path) -> Iterator[Mapping[str, object]]:
    """Yield the entries of `configs` in the front matter of a data set's README.md."""
    try:
        head = re.match(
            r"---\s*\n(.*?)\n---", read_plain(card, follow=True).decode(errors="replace"), re.DOTALL
        )
        tree = yaml.safe_load(head[1]) if head else None
    except (OSError, yaml.YAMLError):
        return
    configs = tree.get("configs") if isinstance(tree, dict) else None
    yield from (config for config in configs or () if isinstance(config, dict))


def _patterns(config: Mapping[str, object]) -> dict[str, list[str]]:
    """Return the file patterns of each split from any form of `data_files`."""
    files, directory = config.get("data_files"), config.get("data_dir")
    entries = files.items() if isinstance(files, dict) else [("train", files)]
    if isinstance(files, list) and all(isinstance(entry, dict) for entry in files):
        entries = [(entry.get("split", "train"), entry.get("path")) for entry in files]
    found: dict[str, list[str]] = {}
    for split, paths in entries:
        for path in paths if isinstance(paths, list) else [paths]:
            if (
                isinstance(path, str)
                and path
                and not path.startswith(("/", ".."))
                and "://" not in path
            ):
                found.setdefault(str(split), []).append(
                    f"{directory}/{path}" if directory else path
                )
    return found
