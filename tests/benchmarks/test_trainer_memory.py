"""SFTTrainer in half the memory of its batch: what the page shows was measured, and real failures change no loss."""

import pytest

import trainer_memory
from tiny_trainers import needs_trl
from trainer_memory import PAGE, RESULTS, largest_difference, measure, read_results, table


@pytest.mark.skipif(not RESULTS.exists(), reason="benchmarks/trainer_memory.py has not been run")
def test_the_table_of_the_page_is_what_was_measured() -> None:
    assert table(read_results()) in PAGE.read_text(encoding="utf-8")


@pytest.mark.skipif(not RESULTS.exists(), reason="benchmarks/trainer_memory.py has not been run")
def test_what_was_measured_is_what_the_page_says() -> None:
    outcomes = {outcome.kind: outcome for outcome in read_results()}
    assert list(outcomes) == list(trainer_memory.KINDS)
    free = outcomes["free"]
    assert outcomes["callback"].losses == free.losses
    assert outcomes["plain"].error == "out of memory"
    assert len(outcomes["auto"].batch_rows) > 1
    assert outcomes["auto"].num_steps != free.num_steps or outcomes["auto"].error is not None
    assert outcomes["safe"].num_failures > 0
    difference = largest_difference(outcomes["safe"], free)
    assert difference is not None
    assert difference < 1e-5


@needs_trl
@pytest.mark.thorough
def test_real_failures_change_no_loss_where_the_trainers_own_remedy_changes_the_batch() -> None:
    free, auto, safe = measure(("free", "auto", "safe"), quick=True)
    assert safe.num_failures > 0
    assert safe.losses == pytest.approx(free.losses, rel=1e-5)
    assert auto.batch_rows[-1] < trainer_memory.ROWS
