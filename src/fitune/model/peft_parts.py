"""What fitune takes of peft at import time, without the bitsandbytes that peft would import first."""

from fitune.model.lora import bitsandbytes_unseen

with bitsandbytes_unseen():
    from peft import PeftModel, get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

__all__ = ["BaseTunerLayer", "PeftModel", "get_peft_model_state_dict"]
