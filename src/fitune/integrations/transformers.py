"""fitune inside the `Trainer` of transformers and the `SFTTrainer` of TRL.

    predict_trainer(trainer, gpu="RTX 4090")    what it will need, before it trains    (trainer_prediction.py)
"""

from fitune.integrations.trainer_prediction import predict_trainer as predict_trainer
