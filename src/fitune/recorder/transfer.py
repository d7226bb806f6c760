"""Write a recording to a file and read it in another process, whatever versions that one has.

The file is a zip archive of numpy arrays and of JSON; nothing in it is executed. It leaves out the
rules of kernels' temporaries, which are needed only to record for other sizes.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fitune.recorder.recording import COLUMNS, Label, Recording, TraceWork, Where

_TEXT = "text"


def write_recording(recording: Recording, path: Path) -> None:
    text = {
        "labels": recording.labels,
        "loops": recording.loops,
        "work": recording.work,
        "source": recording.source,
    }
    encoded = np.frombuffer(json.dumps(text).encode(), dtype=np.uint8)
    with path.open("wb") as file:
        arrays: dict[str, Any] = {_TEXT: encoded}
        np.savez_compressed(file, **arrays | {name: getattr(recording, name) for name in COLUMNS})


def read_recording(path: Path) -> Recording:
    with np.load(path, allow_pickle=False) as file:
        text = json.loads(file[_TEXT].tobytes())
        columns = {name: file[name] for name in COLUMNS}
    recording = Recording(
        labels=tuple(
            Label(category, Where(*where), op, None if freed_at is None else Where(*freed_at))
            for category, where, op, freed_at in text["labels"]
        ),
        loops=tuple(text["loops"]),
        rules=(),
        **columns,
        empty_rules=(),
        work=tuple(TraceWork(*each) for each in text["work"]),
        source=tuple(text["source"]),
    )
    return replace(recording, rule=np.full(len(recording), -1))
