"""What all tests of serving share: the tiny model, and questions with known answers."""

from pathlib import Path

import pytest

from tests.tinyvlm.dataset import Example, examples
from tests.tinyvlm.unpack import model_path


@pytest.fixture(scope="session")
def model() -> Path:
    return model_path()


@pytest.fixture(scope="session")
def questions() -> list[Example]:
    """Two questions of each kind that the model reads well with 16-bit pages."""
    return list(examples(count=2, tasks=("field", "line", "count", "cell", "where", "barn")))


@pytest.fixture(scope="session")
def readings(questions: list[Example]) -> list[Example]:
    """Questions with several tokens to answer, the later of which are read from codes."""
    return [q for q in questions if q.task in ("field", "line", "cell", "where")]
