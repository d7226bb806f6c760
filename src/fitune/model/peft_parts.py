"""Import from peft what fitune needs at import time, without bitsandbytes.

peft would import bitsandbytes first, which is slow (see `bitsandbytes_unseen`).
"""

from fitune.model.lora import bitsandbytes_unseen

with bitsandbytes_unseen():
    from peft import PeftModel, get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

__all__ = ["LoraLayer", "PeftModel", "get_peft_model_state_dict"]
