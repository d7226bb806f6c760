"""PyTorch's unmodified CUDA build over a stand-in for the driver: what fitune predicts for a card, held against the
genuine allocator, on a machine without a card. docs/rehearsal.md says what it shows and what it cannot."""
