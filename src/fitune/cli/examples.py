"""Hold two example commands for each verb, which its help begins with."""

from fitune.language import say

#: Verb -> two commands that show its use; '' is `fitune` itself.
EXAMPLES = {
    "": ('fitune plan minimind2 --gpu "RTX 4090"', "fitune train sft.yaml"),
    "env": ("fitune env", "fitune env --format json"),
    "check": ("fitune check sft.jsonl --model ./my-model", "fitune check sft.yaml --show 2"),
    "plan": (
        'fitune plan minimind2 --gpu "RTX 4090"',
        'fitune plan --gpu "RTX 4090" -- python train.py --batch_size 6',
    ),
    "explain": ("fitune explain train.log", "fitune explain train.log --format json"),
    "train": ("fitune train sft.yaml optim.lr=1e-5 --name second", "fitune train --resume latest"),
    "sweep": ("fitune sweep three.yaml", "fitune sweep three.yaml --dry-run"),
    "watch": ("fitune watch", "fitune watch first --once"),
    "board": ("fitune board", "fitune board elsewhere --port 8800 --open"),
    "runs": ("fitune runs", "fitune runs elsewhere --format json"),
    "compare": ("fitune compare first second", "fitune compare first second --at 24M --md"),
    "advise": ("fitune advise first", "fitune advise first second"),
    "report": ("fitune report first -o first.html", "fitune report first second -o both.html"),
    "chat": ("fitune chat first", 'fitune chat first --base --system "Answer briefly."'),
    "export": (
        "fitune export first --to hf -o exported",
        "fitune export first --to gguf --quantise q8_0 -o first-gguf",
    ),
    "demo": ("fitune demo", "fitune demo --steps 8 --output elsewhere"),
    "config": ("fitune config import llama_factory.yaml -o sft.yaml", "fitune config schema"),
}


def examples(verb: str) -> str:
    """Return the text that the help of a verb begins with."""
    return "\n".join([say("Examples:"), *(f"  {command}" for command in EXAMPLES[verb])])
