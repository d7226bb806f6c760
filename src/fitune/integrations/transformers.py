"""fitune inside the `Trainer` of transformers and the `SFTTrainer` of TRL.

predict_trainer(trainer, gpu="RTX 4090")     what it will need, before it trains           (trainer_prediction.py)
with weightless(): trainer = build()         the same for a model too large to be here
class Mine(SafeSteps, SFTTrainer): pass      steps that running out of memory does not end (safe_trainer.py)
    FituneCallback("runs", "first")              a run directory for watch, compare and report (trainer_callback.py)
"""

from fitune.integrations.safe_trainer import SafeSteps as SafeSteps
from fitune.integrations.trainer_callback import FituneCallback as FituneCallback
from fitune.integrations.trainer_prediction import predict_trainer as predict_trainer
from fitune.integrations.trainer_prediction import weightless as weightless
