"""Provides fitune inside the `Trainer` of transformers and the `SFTTrainer` of TRL.

predict_trainer(trainer, gpu="RTX 4090")
    predicts the memory of a trainer before it trains (trainer_prediction.py)
with weightless(): trainer = build()
    builds a trainer for that prediction whose model does not fit into this machine's memory
class Mine(SafeSteps, SFTTrainer): pass
    makes a Trainer whose steps survive running out of memory (safe_trainer.py)
FituneCallback("runs", "first")
    writes a run directory for watch, compare and report (trainer_callback.py)
"""

from fitune.integrations.safe_trainer import SafeSteps as SafeSteps
from fitune.integrations.trainer_callback import FituneCallback as FituneCallback
from fitune.integrations.trainer_prediction import predict_trainer as predict_trainer
from fitune.integrations.trainer_prediction import weightless as weightless
