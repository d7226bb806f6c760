"""What of the rehearsal needs no card: its cases, rows, explanations and tables."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

import fits as fits_section
from fitune.machine.devices import find_device
from fitune.recorder.events import MemoryEvent
from rehearsal import possible
from rehearsal.cases import ARCHITECTURES, BY_NAME, CARDS, CASES, LoopCase, StepCase, TrainerCase
from rehearsal.explain import explain
from rehearsal.golden import CATALOGUE, Golden, last_steps, read_golden, renumbered, write_golden
from rehearsal.launches.counters import NAMES
from rehearsal.rows import ComparedRow, append_row, read_rows
from rehearsal.run import LIBRARIES, card_environment
from rehearsal.table import merged, table, write

DRIVER = Path(__file__).parents[2] / "rehearsal" / "driver"
ROW = ComparedRow(
    name="full",
    card="4090",
    setting="llama, 4 x 1024",
    predicted_allocated_bytes=1000,
    measured_allocated_bytes=1000,
    predicted_reserved_bytes=2000,
    measured_reserved_bytes=1600,
    versions="torch 1",
)
FAILED = ComparedRow(name="lora", card="T4", setting="llama", failure="OutOfMemoryError: none left")


def event(storage: int, num_bytes: int, step: int, op: str = "aten.mm") -> MemoryEvent:
    return MemoryEvent(storage, num_bytes, "activation", "forward", step=step, op=op)


# ---- cases ----


def test_there_are_at_least_sixty_rows() -> None:
    assert sum(len(case.cards) for case in CASES) >= 60


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.name))
def test_a_case_names_cards_and_a_model_that_there_are(
    case: StepCase | LoopCase | TrainerCase,
) -> None:
    assert {*case.cards} <= {*CARDS}
    assert case.model in ARCHITECTURES or case.model.startswith("minimind")


@pytest.mark.parametrize("card", CARDS)
def test_a_rehearsed_card_is_that_of_the_catalogue(card: str) -> None:
    rows = re.findall(r"\{([^{}]+)\},", (DRIVER / "cards.h").read_text())
    (fields,) = (
        [field.strip().strip('"') for field in row.split(",")] for row in rows if f'"{card}"' in row
    )
    device = find_device(CATALOGUE[card])
    assert (int(fields[2]), int(fields[3])) == device.compute_capability
    assert int(fields[-2]) == pytest.approx(device.total_bytes, rel=0.02)  # by driver


def test_the_counters_are_named_in_the_order_of_the_driver() -> None:
    enum = re.search(
        r"enum Counted \{(.*?)NUM_COUNTED", (DRIVER / "counters.h").read_text(), re.DOTALL
    )
    assert enum is not None
    names = re.findall(r"^\s+([A-Z_]+),", enum[1], re.MULTILINE)
    plural = [re.sub("IES", "Y", name.upper()).replace("S_", "_").rstrip("S") for name in NAMES]
    assert [name.replace("IES", "Y").replace("S_", "_").rstrip("S") for name in names] == plural


def test_a_process_is_given_the_card_that_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    variables = card_environment("T4")
    assert variables["FAKE_CARD"] == "T4"
    assert variables["LD_PRELOAD"].startswith(variables["LD_LIBRARY_PATH"])
    assert variables["LD_LIBRARY_PATH"] == str(LIBRARIES)


def test_a_machine_that_cannot_rehearse_says_so_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr("sys.argv", ["possible"])
    with pytest.raises(SystemExit) as ended:
        possible.main()
    assert ended.value.code == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert "Linux on x86_64" in line


# ---- rows ----


def test_rows_survive_a_rehearsal_that_is_killed_while_it_writes(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_row(ROW, path)
    append_row(FAILED, path)
    path.write_text(path.read_text() + path.read_text()[:40])
    assert read_rows(path) == [ROW, FAILED]


def test_the_newest_row_of_a_case_counts(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for row in (ROW, replace(ROW, measured_allocated_bytes=999)):
        append_row(row, path)
    assert [row.measured_allocated_bytes for row in read_rows(path)] == [999]


def test_a_part_of_the_cases_leaves_the_other_rows_as_they_are() -> None:
    other = replace(ROW, card="H100")
    gone = replace(ROW, name="no case any more")
    new = replace(ROW, measured_reserved_bytes=2000)
    assert merged([gone, other, ROW], [new]) == [new, other]


def test_the_table_shows_errors_failures_and_bounds() -> None:
    name = next(name for name, case in BY_NAME.items() if case.depends_on_data)
    bounded = replace(
        ROW,
        name=name,
        depends_on_data="the router",
        low_allocated_bytes=900,
        high_allocated_bytes=1100,
    )
    text = "\n".join(table([ROW, FAILED, bounded]))
    assert (
        "| full | 4090 | llama, 4 x 1024 | 1,000 | 1,000 | 0 | 2,000 | 1,600 | +400 (+25.000%) |"
        in text
    )
    assert "lora on T4 was not measured: OutOfMemoryError: none left" in text
    assert (
        "between 900 (tokens spread evenly) and 1,100 (all at the same experts); what is measured lies inside"
        in text
    )
    assert "fitune's own step, allocated: 1 of 1 to the byte" in text


def test_the_page_keeps_what_stands_around_the_table(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- rehearsal.table: begin -->\nold\n<!-- rehearsal.table: end -->\nafter\n"
    )
    for _ in range(2):
        write([ROW], results=tmp_path / "rows.json", page=page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert text.count("| full |") == 1


# ---- explanations ----


def test_equal_steps_need_no_explanation() -> None:
    events = [event(1, 512, 0), event(2, 64, 1), event(2, -64, 1)]
    assert explain(events, [event(9, 512, 0), event(8, 64, 1), event(8, -64, 1)]) == []


def test_what_one_side_has_alone_is_named_with_its_operator() -> None:
    predicted = [event(1, 512, 0), event(2, 4096, 1, "aten.sum"), event(2, -4096, 1)]
    measured = [event(1, 512, 0), event(2, 1024, 1, "add"), event(2, -1024, 1)]
    text = "\n".join(explain(predicted, measured))
    assert "alive at the peak only as predicted: 1 x 4,096, among forward aten.sum (1)" in text
    assert "allocated in the step only as measured: 1 x 1,024, among forward add (1)" in text


def test_blocks_that_are_larger_than_their_tensors_are_named_where_the_tensors_are_equal() -> None:
    predicted = [event(1, 4096, 1), event(1, -4096, 1), event(2, 512, 1)]
    text = "\n".join(explain(predicted, [event(2, 512, 1), event(2, -512, 1), event(1, 4096, 1)]))
    assert "alive at the peak are the same tensors" in text


# ---- golden steps ----


def test_a_golden_file_holds_the_events_and_the_setting(tmp_path: Path) -> None:
    events = [
        event(7, 512, 0),
        event(9, 64, 1),
        event(7, -512, 1),
        event(5, 32, 2),
        event(9, -64, 2),
    ]
    golden = Golden(StepCase(name="full", model="tiny-llama", rows=((4, 3),)), "T4", {"torch": "1"}, (576, 96),
                    renumbered(events))  # fmt: skip
    write_golden(golden, tmp_path / "full.json.gz")
    read = read_golden(tmp_path / "full.json.gz")
    assert (read.case, read.card, read.versions, read.peaks) == (
        golden.case,
        "T4",
        {"torch": "1"},
        (576, 96),
    )
    sides = [
        [(each.storage, each.num_bytes, each.step) for each in of.trace.events]
        for of in (read, golden)
    ]
    assert sides[0] == sides[1]


def test_the_last_steps_of_a_trace_begin_with_what_was_alive() -> None:
    events = (
        event(1, 8, 0),
        event(2, 16, 1),
        event(3, 32, 1),
        event(2, -16, 1),
        event(4, 64, 2),
        event(5, 128, 3),
    )
    trace = last_steps(type(renumbered(events))(events), 2)
    assert [(each.storage, each.step) for each in trace.events] == [(1, 0), (3, 0), (4, 1), (5, 2)]


# ---- does it fit ----


def test_the_section_counts_what_was_said_and_what_happened(tmp_path: Path) -> None:
    path = tmp_path / "fits.jsonl"
    said = [(True, False), (True, True), (False, True), (False, False), (True, False)]
    lines = [
        f'{{"seed": {seed}, "card": "T4", "says_fits": {str(fits).lower()}, "ran_out": {str(out).lower()}, '
        '"failure": null, "torch": "1"}'
        for seed, (fits, out) in enumerate(said)
    ]
    path.write_text("\n".join(lines) + "\n")
    assert "| all | 5 | 3 | 1 | 2 | 1 |" in fits_section.section(path)
