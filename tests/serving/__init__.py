"""Tests of vLLM with mixed pages, in this process and as a server.

Read when PyTorch and vLLM are imported, and by the servers that tests start:
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# vLLM's CPU attention splits long rows among threads, and the split depends on the page size.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# vLLM compiles the counting of log-probabilities' ranks: a minute, for nothing here.
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
