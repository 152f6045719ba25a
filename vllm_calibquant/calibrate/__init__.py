"""``vllm-calibquant calibrate``: search a profile for a model.

command: prompts → probe (a real vLLM, its layers watched) → moments → search → profile.
"""
