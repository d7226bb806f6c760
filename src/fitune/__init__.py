"""fitune: fine-tune a language model inside the memory you have."""

__version__ = "0.1.0"
