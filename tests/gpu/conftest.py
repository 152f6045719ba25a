"""Figures that tests on a GPU find, printed at the end of the run."""

import pytest

FINDINGS = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FINDINGS] = []


@pytest.fixture
def findings(request: pytest.FixtureRequest) -> list[str]:
    """Lines of the report; a test appends to it."""
    return request.config.stash[FINDINGS]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    found = terminalreporter.config.stash[FINDINGS]
    if found:
        terminalreporter.section("found on the GPU")
        for line in found:
            terminalreporter.write_line(line)
