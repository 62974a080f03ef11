"""PEFT's LoRA folders, in and out: ``adapter_config.json`` beside ``adapter_model.safetensors``."""

from loraspan.adapters.keys import CONFIG_NAME, WEIGHTS_NAME
from loraspan.adapters.peft_read import read
from loraspan.adapters.peft_write import write

__all__ = ["CONFIG_NAME", "WEIGHTS_NAME", "read", "write"]
