"""Files for containers and commands, and the demo as a person runs it."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import demo

ROOT = Path(__file__).parents[1]
INSTRUCTIONS = {
    "FROM", "WORKDIR", "COPY", "RUN", "USER", "ENV", "EXPOSE", "HEALTHCHECK", "CMD", "ENTRYPOINT",
}  # fmt: skip


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments, continued lines joined."""
    text = (ROOT / "Dockerfile").read_text()
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    pairs = [line.split(None, 1) for line in text.splitlines() if line.strip()]
    return [(keyword, " ".join(rest.split())) for keyword, rest in pairs]


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    """The only service of the compose file."""
    compose = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())
    assert set(compose) == {"services", "volumes"}
    (service,) = compose["services"].values()
    assert {volume.split(":")[0] for volume in service["volumes"]} == set(compose["volumes"])
    return service


def test_dockerfile_has_only_known_instructions(instructions: list[tuple[str, str]]) -> None:
    assert instructions[0][0] == "FROM"
    assert {keyword for keyword, _ in instructions} <= INSTRUCTIONS
    for keyword, rest in instructions:
        if keyword == "RUN":
            subprocess.run(["bash", "-n", "-c", rest], check=True)


def test_dockerfile_copies_what_is_there(instructions: list[tuple[str, str]]) -> None:
    kept = (ROOT / ".dockerignore").read_text()
    stages = {rest.split()[-1] for keyword, rest in instructions if " AS " in rest}
    for keyword, rest in instructions:
        if keyword != "COPY":
            continue
        *sources, _ = shlex.split(rest)
        if sources[0].startswith("--from="):
            assert sources[0].removeprefix("--from=") in stages
            continue
        for source in sources:
            assert (ROOT / source).exists(), source
            assert f"!{source}\n" in kept, source


def test_server_in_the_image_is_not_root(instructions: list[tuple[str, str]]) -> None:
    last = dict(instructions)
    assert last["USER"] not in ("root", "0")
    assert "/health" in last["HEALTHCHECK"]
    assert last["ENTRYPOINT"] == '["vllm", "serve"]'


def test_compose_serves_with_one_flag(service: dict[str, Any]) -> None:
    model, *flags = service["command"]
    assert flags == ["--kv-cache-dtype=${KV_CACHE_DTYPE:-calibquant2}"]
    assert re.fullmatch(r"\$\{MODEL:-[\w./-]+\}", model)


def test_compose_reserves_a_gpu_and_watches_health(service: dict[str, Any]) -> None:
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    kind, *command = service["healthcheck"]["test"]
    assert kind == "CMD"
    assert command[:2] == ["python3", "-c"]
    compile(command[2], "healthcheck", "exec")
    assert "/health" in command[2]


def test_compose_opens_no_port_to_the_network(service: dict[str, Any]) -> None:
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_compose_keeps_the_cache_where_the_image_has_it(
    service: dict[str, Any], instructions: list[tuple[str, str]]
) -> None:
    (volume,) = service["volumes"]
    owned = next(rest for _, rest in instructions if "install --directory" in rest)
    assert owned.endswith(volume.split(":")[1])


def test_compose_is_valid_for_docker() -> None:
    compose = shutil.which("docker") and subprocess.run(
        ["docker", "compose", "version"], capture_output=True, check=False
    )
    if not compose or compose.returncode:
        pytest.skip("no `docker compose` here")
    command = ["docker", "compose", "-f", "deploy/compose.yaml", "config", "--quiet"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("target", ["demo", "test", "lint", "types", "capacity", "lock", "clean"])
def test_make_knows_its_targets(target: str) -> None:
    subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "make test" in script.read_text()


def processes_of(session: int) -> list[int]:
    """Processes of a session that are alive."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def test_demo_stops_its_servers_on_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "OUT", tmp_path)
    monkeypatch.setattr(demo.Server, "is_ready", lambda server: True)
    sessions = []

    def interrupted() -> None:
        with demo.running(one=(), two=()) as servers:
            sessions.extend(server.process.pid for server in servers)
            assert all(map(processes_of, sessions))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(sessions) == 2
    end = time.monotonic() + 10  # what a server has started is killed too, but not waited for
    while any(map(processes_of, sessions)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(processes_of, sessions))


def test_demo_says_why_a_server_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "OUT", tmp_path)
    with (
        pytest.raises(RuntimeError, match="invalid choice: 'calibquant77'"),
        demo.running(wrong=("--kv-cache-dtype", "calibquant77")),
    ):
        pass


def test_demo() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "deploy.demo"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    answer = re.search(r"answer +(\S+) +(\S+) +true: (\S+)", run.stdout)
    assert answer, run.stdout
    at_16_bits, at_1_bit, truth = answer.groups()
    assert at_16_bits == at_1_bit == truth
    sizes = re.search(r"560 visual tokens in codes +(\d+) KiB +(\d+) KiB +11.7×", run.stdout)
    assert sizes, run.stdout
    assert (demo.OUT / "field.png").is_file()
