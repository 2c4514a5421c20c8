"""bench.gpu without a GPU: the whole command at toy sizes, and what it says when a stage fails or hangs."""

import json

import pytest

from bench import gpu


@pytest.mark.slow
def test_a_dry_run_goes_through_every_stage(tmp_path, capsys):
    code = gpu.main(["--dry", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "report.json").read_text())
    assert code == 0, capsys.readouterr().out
    assert {name: stage["status"] for name, stage in report.items()} == dict.fromkeys(gpu.LIMITS_S, "ok")
    text = (tmp_path / "report.md").read_text()
    assert "these numbers mean nothing" in text
    assert "Liger fused GRPO" in text
    assert "missing: CCE exact" in text


def test_without_a_gpu_a_stage_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.main(["--only", "machine", "--out", str(tmp_path)]) == 0
    assert "torch sees no CUDA device" in (tmp_path / "report.md").read_text()


def test_a_stage_that_hangs_is_ended_and_named(tmp_path):
    report = gpu.run_stage("machine", tmp_path, dry=True, limit_s=0)
    assert report["status"] == "failed"
    assert "no result within" in report["why"]


def test_a_stage_that_crashes_shows_its_last_words(tmp_path):
    report = gpu.run_stage("no such stage", tmp_path, dry=True, limit_s=60)
    assert report["status"] == "failed"
    assert "KeyError" in report["log"]
    assert "KeyError" in gpu.render({"x": report}, dry=True)
