import json
import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from core.anneal import quota_at
from core.config import Algorithm, Config, Run
from core.configfile import write_resolved
from core.metrics import RunLog
from core.schema import Completion, CompletionKey, Group, Prompt, ScoredCompletion, Source, pack_logprobs, pack_tokens
from rollout.store import write_rollouts
from trainer.charts import Series, line_chart, stack_chart
from trainer.report import LiveReport, main, write_report
from trainer.tables import equations, ledger_table, quota_table, tiles

HOSTILE = "<script>alert('x')</script> & \"9 - 5 = 4\""


def training_line(config, step, draw):
    quota = quota_at(step, config.algorithm)
    done = step / config.algorithm.steps
    prompts = config.algorithm.prompts_per_step
    line = {
        "step": step, "reward": 0.3 + 0.25 * done + draw.gauss(0, 0.02), "mix/alpha": quota.explorer / 8,
        "mix/explorer_quota": quota.explorer, "mix/learner_quota": quota.learner, "loss": 0.001, "kl": 0.15 * done,
        "entropy": 0.3 - 0.2 * done + draw.gauss(0, 0.01), "grad_norm": abs(draw.gauss(0.5, 0.1)),
        "frac_reward_zero_std": 0.25, "groups/all_fail": max(0.2 - 0.1 * done + draw.gauss(0, 0.02), 0),
        "groups/all_pass": max(0.02 + 0.2 * done, 0), "num_tokens": step * 4100,
        "tokens_per_second": draw.gauss(9800, 400),
        "step_time": 0.44, "time/wait_for_batch": 0.1, "time/score": 0.06, "time/train": 0.22, "time/publish": 0.01,
        "buffer/resident": 1800 * (1 - done), "fault/dropped": 0,
    }  # fmt: skip
    for source, count, offset in (("explorer", quota.explorer, 0.9), ("learner", quota.learner, 0.0)):
        line[f"{source}/rows"] = float(count * prompts)
        if count:
            line |= {
                f"{source}/reward": 0.3 + 0.25 * done * (not offset) - 0.04 * (offset > 0) + draw.gauss(0, 0.03),
                f"{source}/ratio_mean": 1 + 0.1 * offset + draw.gauss(0, 0.01),
                f"{source}/ratio_max": 1.5 + math.exp(4 * offset + draw.gauss(0, 0.4)),
                f"{source}/clip_fraction": 0.02 + 0.2 * offset + draw.gauss(0, 0.004),
                f"{source}/ess": 1 - 0.4 * offset + draw.gauss(0, 0.01),
                f"{source}/length": 17.2 - offset + draw.gauss(0, 0.2), f"{source}/truncated": 0.01 + 0.02 * offset,
            }  # fmt: skip
    return line


def group(config, step, slot, draw):
    quota = quota_at(step, config.algorithm)
    prompt = Prompt(uid=f"uid{slot}", token_ids=(8, 5, 9), text=f"8 5 9 7 = {slot + 15} : {HOSTILE}", answer="15 <b>")
    rows = []
    for source, count in ((Source.EXPLORER, quota.explorer), (Source.LEARNER, quota.learner)):
        for sample in range(count):
            size = draw.randint(12, 18)
            completion = Completion(
                key=CompletionKey(source=source, step=step, slot=slot, sample=sample), prompt_uid=prompt.uid,
                token_bytes=pack_tokens([1] * size), logprob_bytes=pack_logprobs([-0.5] * size),
                finish=draw.choice(["stop", "stop", "length"]), version=0, worker="w", started_s=0.0, finished_s=1.0,
            )  # fmt: skip
            text = f"9 - {sample} = 4 , 8 - 4 = 4 , 4 + 7 = 11 {HOSTILE}"
            rows.append(ScoredCompletion(completion=completion, reward=float(draw.random() < 0.4), text=text))
    mean = sum(row.reward for row in rows) / len(rows)
    return Group(
        prompt=prompt, step=step, slot=slot, rows=tuple(rows), advantages=tuple(row.reward - mean for row in rows)
    )


def account(produced, rejected, dropped, resident):
    inserted = produced - sum(rejected.values())
    return {
        "produced": produced, "inserted": inserted, "rejected": rejected, "in_flight": 0,
        "trained": inserted - sum(dropped.values()) - resident, "dropped": dropped, "resident": resident,
    }  # fmt: skip


def make_run(run_dir, steps=80, ledger=True):
    """A run directory as training leaves it, with made-up numbers of the size of the embedded default's."""
    draw = random.Random(0)
    run_dir.mkdir(parents=True, exist_ok=True)
    config = Config(run=Run(dir=str(run_dir)), algorithm=Algorithm(steps=steps, anneal_steps=steps // 2))
    write_resolved(config, run_dir / "config.resolved.json")
    with RunLog(run_dir) as log:
        for step in range(steps + 1):
            if step:
                log.write(training_line(config, step, draw))
            if step % max(steps // 4, 1) == 0:
                accuracy = 0.33 + 0.23 * step / steps
                scores = {f"eval/pass@{k}": 1 - (1 - accuracy) ** (1 + 0.5 * math.log2(k)) for k in (1, 2, 4, 8)}
                log.write(
                    {"step": step, **scores, "eval/mean_length": 17.1, "eval/unique_trace_ratio": 0.4 - 0.002 * step}
                )
    for step in {1, steps // 4, steps} - {0}:
        write_rollouts(run_dir, step, [group(config, step, slot, draw) for slot in range(4)])
    if ledger:
        explorer = account(5731, {"duplicate": 3}, {"reward_timeout": 2, "group_incomplete": 14}, 0)
        contents = {"explorer": explorer, "learner": account(14752, {}, {}, 0), "conserved": True}
        (run_dir / "ledger.json").write_text(json.dumps(contents))
    return config


class Page(HTMLParser):
    """Checks that tags close in order, and collects what could load something or clash."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self):
        super().__init__()
        self.open, self.links, self.ids, self.text, self.tags = [], [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parsed(path):
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    return page, " ".join(" ".join(page.text).split())


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "tiny <b>"
    make_run(run_dir)
    return write_report(run_dir)


def test_the_page_is_well_formed_and_loads_nothing(report):
    page, _ = parsed(report)
    assert page.links == []
    assert "script" not in page.tags
    assert not re.search(r"https?://(?!www\.w3\.org/)", report.read_text())
    assert "url(" not in report.read_text().replace("url(#", "")
    assert len(page.ids) == len(set(page.ids))
    assert report.stat().st_size < 1_500_000
    assert [path.name for path in report.parent.glob("*.partial")] == []


def test_what_a_model_wrote_is_text_and_never_markup(report):
    _, text = parsed(report)
    assert HOSTILE in text
    assert "<script" not in report.read_text()
    assert "tiny <b>" in text
    assert "15 <b>" in text


def test_headline_says_from_what_to_what(report):
    _, text = parsed(report)
    for part in ("33.0 % → 56.0 %", "pass@1, +23.0 points", "80 of 80 steps, 35 s", "28% of rows from the explorer",
                 "328 k tokens trained", "balanced", "2 optimizer updates of 128"):  # fmt: skip
        assert part in text


def test_every_curve_is_there(report):
    page, text = parsed(report)
    assert page.tags.count("svg") == 16
    for title in ("Held-out accuracy", "Who made the rows", "Reward", "Groups without a signal", "KL to the reference",
                  "Entropy", "Ratio, mean", "Clipped tokens", "Effective sample size", "Length", "Truncated",
                  "Seconds per step", "Buffer"):  # fmt: skip
        assert title in text
    assert "#0a00" not in report.read_text()  # every colour is the page's


def test_quotas_of_every_step_are_listed_and_equal_ones_share_a_row():
    config = Config(algorithm=Algorithm(steps=80, anneal_steps=40))
    lines = [training_line(config, step, random.Random(0)) for step in range(1, 72)]
    lines[9]["learner/rows"] -= 1.0  # a prompt was dropped
    rows = re.findall(r"<tr>(.*?)</tr>", quota_table(config, lines))
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in rows][1:]
    assert cells[0] == ["1 – 5", "1.000", "8", "0", "256", "0"]
    assert cells[-2] == ["40 – 71", "0.000", "0", "8", "0", "256"]
    assert cells[-1] == ["72 – 80", "", "0", "8", "", ""]
    listed = []
    for step, alpha, explorer, learner, *trained in cells:
        first, _, last = step.partition(" – ")
        listed += [(number, alpha, explorer, learner, *trained) for number in range(int(first), int(last or first) + 1)]
    assert [row[0] for row in listed] == list(range(1, 81))
    quotas = [quota_at(step, config.algorithm) for step in range(1, 81)]
    assert [row[2:4] for row in listed] == [(str(quota.explorer), str(quota.learner)) for quota in quotas]
    assert [row[0] for row in listed if row[5] == str(32 * int(row[3]) - 1)] == [10]


def test_a_long_run_has_a_small_page(tmp_path):
    config = Config(run=Run(dir=str(tmp_path)), algorithm=Algorithm(steps=5000, anneal_steps=2500))
    write_resolved(config, tmp_path / "config.resolved.json")
    draw = random.Random(0)
    lines = [json.dumps(training_line(config, step, draw)) for step in range(1, 5001)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    path = write_report(tmp_path)
    parsed(path)
    assert path.stat().st_size < 1_000_000


def test_the_ledger_shows_reasons_and_equations(report):
    _, text = parsed(report)
    assert "explorer produced 5,731 = inserted 5,728 + rejected 3 + in flight 0" in text
    assert "explorer inserted 5,728 = trained 5,712 + dropped 16 + resident 0" in text
    assert "– reward timeout 2 0 2" in text


def test_samples_of_early_middle_and_late_steps(report):
    _, text = parsed(report)
    assert all(f"Step {step}" in text for step in (1, 20, 80))
    assert "tokens · cut" in text


def test_configuration_marks_what_differs_from_the_default(report):
    source = report.read_text()
    assert "default &quot;runs/tiny&quot;" in source
    assert source.count("class=changed") == 1


@pytest.mark.parametrize("account_", [{"produced": 5, "inserted": 5, "trained": 4}, {"produced": 1}])
def test_an_unbalanced_account_is_found_whatever_it_claims(account_):
    assert not all(held for _, held in equations(account_))


def test_an_unbalanced_ledger_is_loud():
    explorer = account(100, {}, {}, 0) | {"trained": 101}
    ledger = {"explorer": explorer, "learner": account(50, {}, {}, 0), "conserved": True}
    assert "NOT balanced" in tiles(Config(), [], [], ledger)
    assert "≠" in ledger_table(ledger)


def test_a_run_that_has_only_begun(tmp_path):
    write_resolved(Config(), tmp_path / "config.resolved.json")
    _, text = parsed(write_report(tmp_path))
    for part in (
        "No evaluation yet",
        "No training step yet",
        "No ledger.json yet",
        "No rollouts stored yet",
        "0 of 80 steps",
    ):
        assert part in text


def test_one_step_and_values_that_are_not_finite(tmp_path):
    make_run(tmp_path, steps=2, ledger=False)
    with RunLog(tmp_path, resume_step=1) as log:
        log.write(training_line(Config(), 2, random.Random(1)) | {"kl": math.nan, "explorer/ratio_max": math.inf})
        log.write({"step": 2, "eval/pass@1": math.nan})
    _, text = parsed(write_report(tmp_path))
    assert "n/a" in text


def test_no_explorer_gives_no_shade_and_no_explorer_curve(tmp_path):
    config = Config(algorithm=Algorithm(steps=3, anneal_steps=0))
    write_resolved(config, tmp_path / "config.resolved.json")
    with RunLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.write(training_line(config, step, random.Random(step)))
    source = write_report(tmp_path).read_text()
    assert "stroke: var(--explorer)" not in source
    assert "fill: var(--explorer)" not in source
    assert "No explorer: plain GRPO" in source


def test_graded_rewards_are_charted_before_pass_at_k(tmp_path):
    make_run(tmp_path, steps=2)
    with RunLog(tmp_path, resume_step=1) as log:
        for step, reward in ((2, 2.69), (2, 2.31)):
            log.write({"step": step, "eval/pass@1": 0.75, "eval/reward": reward, "eval/graded_ratio": 0.9})
    page, text = parsed(write_report(tmp_path))
    assert "→ 2.310 mean held-out reward" in text
    assert "pass@1 (reward above 0.5), " in text
    assert text.index("Held-out reward Mean over completions") < text.index("Held-out accuracy Completions with")
    assert page.tags.count("svg") == 17


def test_an_evaluation_whose_rewards_all_failed_leaves_a_report(tmp_path):
    make_run(tmp_path, steps=1, ledger=False)
    with RunLog(tmp_path, resume_step=0) as log:
        log.write({"step": 1, "eval/problems": 2.0, "eval/completions": 16.0, "eval/failed_ratio": 1.0})
    _, text = parsed(write_report(tmp_path))
    assert "33.0 % → 33.0 %" in text


def test_a_directory_without_a_run_is_refused(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    (tmp_path / "config.resolved.json").write_text('{"algoritm": {}}')
    assert main([str(tmp_path)]) == 2
    assert "does not fit" in capsys.readouterr().err
    assert main([]) == 2
    assert "usage" in capsys.readouterr().err


def test_it_runs_as_a_module(tmp_path):
    write_resolved(Config(), tmp_path / "config.resolved.json")
    command = [sys.executable, "-m", "trainer.report", str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == str(tmp_path / "report.html"), done.stderr


def test_charts_of_empty_flat_and_gappy_series():
    gaps = Series("a & b", (1, 2, 3), (None, 0.5, None), "learner")
    for svg in (
        line_chart("one", [gaps]),
        line_chart("log of nothing positive", [Series("zero", (1, 2), (0.0, None), "ink")], log=True),
        line_chart("shaded", [gaps], share=[(1, 1.0), (2, 0.5), (3, 0.0)], percent=True),
        stack_chart("stack", [gaps, gaps], percent=True),
        stack_chart("wide", [gaps], wide=True),
    ):
        assert svg.startswith("<svg role=")
        assert svg.endswith("</svg>")


def test_a_chart_is_a_function_of_its_numbers():
    series = [Series("a", (1, 2), (1.0, 2.0), "ink")]
    assert line_chart("same", series) == line_chart("same", series)


def test_a_live_report_is_renewed_where_that_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    make_run(tmp_path, steps=1)
    now = 0.0

    def write(run_dir):
        nonlocal now
        now += 2.0
        (run_dir / "report.html").write_text(str(now))

    monkeypatch.setattr("trainer.report.time.monotonic", lambda: now)
    monkeypatch.setattr("trainer.report.write_report", write)
    report = LiveReport(tmp_path, pytest.fail)
    for now, written in ((0.0, 2.0), (99.0, 2.0), (103.0, 105.0), (106.0, 105.0)):  # noqa: B007
        report.refresh()
        assert report.path.read_text() == str(written)
    now = 110.0
    report.write()
    assert report.path.read_text() == "112.0"


def test_a_report_that_cannot_be_written_is_one_warning(tmp_path):
    make_run(tmp_path, steps=1)
    (tmp_path / "report.html").mkdir()
    warnings = []
    report = LiveReport(tmp_path, warnings.append)
    report.write()
    report.write()
    assert len(warnings) == 1
    assert "IsADirectoryError" in warnings[0]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".report")] == []
