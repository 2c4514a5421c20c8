"""Packages with generic names are ours, and core starts without anything heavy."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("core", "kernels", "rollout", "trainer", "bench")
MODULES = sorted(
    ".".join(file.relative_to(REPOSITORY).with_suffix("").parts)
    for package in PACKAGES
    for file in (REPOSITORY / package).rglob("*.py")
)


def run_python(code: str, cwd: Path = REPOSITORY) -> str:
    run = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_is_the_repository_s(package: str) -> None:
    assert Path(str(importlib.import_module(package).__file__)).parent == REPOSITORY / package


def test_the_entry_point_puts_the_repository_first() -> None:
    """Run as a script, sys.path[0] would be trainer/, where `trainer` itself is not found."""
    lines = (REPOSITORY / "trainer" / "main.py").read_text().splitlines()
    code = [line for line in lines if line and not line.startswith(('"""', "#"))]
    assert code[:3] == [
        "import sys", "from pathlib import Path", "sys.path[0] = str(Path(__file__).resolve().parents[1])",
    ]  # fmt: skip


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("core.") and "worker" not in name])
def test_core_modules_are_importable(module: str) -> None:
    assert importlib.import_module(module).__doc__


def test_core_imports_nothing_heavy() -> None:
    names = [name.removesuffix(".__init__") for name in MODULES if name.startswith("core")]
    heavy = {"torch", "transformers", "zmq", "vllm", "deepspeed", "sympy", "math_verify", "pyarrow", "sacrebleu"}
    code = f"import sys, importlib; [importlib.import_module(name) for name in {names}]; "
    code += f"print(sorted({heavy} & set(sys.modules)))"
    assert run_python(code) == "[]"


def test_a_command_line_mistake_costs_no_torch() -> None:
    code = (
        "import sys; from trainer.command import main; code = main(['algorithm.stpes=3']); "
        "print(code, sorted({'torch', 'transformers', 'zmq'} & set(sys.modules)))"
    )
    assert run_python(code) == "2 []"


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    stems = {part for name in MODULES for part in name.split(".")} - {"__init__"}
    assert not stems & set(sys.stdlib_module_names)
    tests = {file.stem for file in (REPOSITORY / "tests").rglob("*.py")}
    assert not tests & set(sys.stdlib_module_names)


def test_kernels_does_not_pass_for_hugging_face_s() -> None:
    code = (
        "import kernels; from transformers.utils.import_utils import is_kernels_available; "
        "print(kernels.__version__, is_kernels_available())"
    )
    assert run_python(code) == "0.0.0 False"
