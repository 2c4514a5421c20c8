"""The vLLM engine, in a process of its own: vLLM rewires torch, logging and warnings wherever it is imported.

The cases are plain tests in vllm_cases.py; `python -m pytest tests/rollout/vllm_cases.py` runs them directly.
"""

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

CASES_FILE = Path(__file__).with_name("vllm_cases.py")
HANG_GUARD_S = 600
Outcomes = dict[str, str | None]  # of every case: None, or how it failed


def case_names() -> list[str]:
    return [line[4 : line.index("(")] for line in CASES_FILE.read_text().splitlines() if line.startswith("def test_")]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    assert importlib.util.find_spec("vllm") is not None, "vLLM is not installed: docs/install.md says how"
    report = tmp_path_factory.mktemp("vllm") / "report.xml"
    child = subprocess.run(
        [sys.executable, "-m", "pytest", str(CASES_FILE), "-p", "no:cacheprovider", f"--junitxml={report}"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=HANG_GUARD_S,
    )
    assert report.is_file(), f"exit {child.returncode}\n{child.stdout[-4000:]}\n{child.stderr[-4000:]}"
    outcomes: Outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        failures = [f"{entry.tag}: {entry.text}" for entry in case if entry.tag in ("failure", "error", "skipped")]
        outcomes[case.attrib["name"]] = "\n".join(failures) or None
    return outcomes


@pytest.mark.slow
@pytest.mark.timeout(HANG_GUARD_S + 20)
@pytest.mark.parametrize("case", case_names())
def test_case(case: str, outcomes: Outcomes) -> None:
    assert case in outcomes, f"the process ended before it reached {case}; it ran {sorted(outcomes)}"
    assert outcomes[case] is None, outcomes[case]
