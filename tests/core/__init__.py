"""Tests of the block manager and of the scheduler, on the real vLLM classes."""

import pytest

pytest.register_assert_rewrite("tests.core.harness")
