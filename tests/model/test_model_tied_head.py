"""A weight that is head and embedding gets one gradient, the sum that autograd would make of two."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fitune.config import read_config
from fitune.model.head import Head
from fitune.model.tied_head import joined_to_embedding
from fitune.trace.own_step import Pass, longest_rows, record_step
from tiny_models import TINY

PADDING_ID = 3
IDS = torch.tensor([[1, PADDING_ID, 2, 1, 0, PADDING_ID]])


class Decoder(nn.Module):
    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embedding = embedding

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.embedding(ids).square())


def tied_head(**options: object) -> Head:
    torch.manual_seed(0)
    embedding = nn.Embedding(5, 4, padding_idx=PADDING_ID, **options)  # type: ignore[arg-type]
    output = nn.Linear(4, 5, bias=False)
    output.weight = embedding.weight
    return Head(Decoder(embedding), output, 1.0, None)


@pytest.mark.parametrize("uses_head", [True, False], ids=["head and embedding", "embedding alone"])
def test_the_gradient_is_the_sum_of_both_without_the_padding_token(uses_head: bool) -> None:
    plain, joined = tied_head(), tied_head()
    with joined_to_embedding(joined) as heads:
        hidden = joined.decoder(IDS).last_hidden_state
    assert heads[-1] is not joined
    for head, its_hidden in ((heads[-1], hidden), (plain, plain.decoder(IDS).last_hidden_state)):
        (head.logits(its_hidden) if uses_head else its_hidden).sin().sum().backward()
    torch.testing.assert_close(joined.weight.grad, plain.weight.grad)


def test_an_embedding_that_changes_its_weight_is_left_alone() -> None:
    head = tied_head(max_norm=1.0)
    with joined_to_embedding(head) as heads:
        head.decoder(IDS)
    assert heads == [head]


def test_one_matrix_of_the_vocabulary_is_made_in_a_micro_batch(tmp_path: Path) -> None:
    TINY["llama"].save_pretrained(tmp_path)
    tree = {
        "model": {"source": str(tmp_path), "init": "random", "precision": "float32"},
        "data": {"train": "rows.jsonl", "max_length": 24},
        "batch": {"micro": 2, "accumulation": 3},
    }
    config = read_config(tree).config
    rows = longest_rows(config.data.max_length, num_rows=config.batch.rows_per_step)
    trace = record_step(config, [Pass("train", rows, most_micro_batches=3)], target=None).trace
    matrix_bytes = TINY["llama"].vocab_size * TINY["llama"].hidden_size * 4
    made = [
        e.op
        for e in trace.events
        if e.num_bytes == matrix_bytes and e.phase in ("forward", "backward")
    ]
    assert made == ["aten.zeros_like.default"] * 3
