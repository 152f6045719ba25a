"""1-bit KV cache pages for the visual tokens of vision-language models in vLLM."""

__version__ = "0.1.0"
