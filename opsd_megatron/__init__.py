"""On-policy self-distillation of long-context language models on Megatron-Core."""

__version__ = "0.1.0"
