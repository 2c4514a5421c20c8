"""Diversity of a step's rows, and the training lines that have it."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from core.anneal import Quota
from core.config import Config, Evaluation
from core.diversity import edit_diversity, self_bleu
from core.metrics import read_metrics
from core.schema import Group
from trainer.console import Console
from trainer.record import Recorder
from trainer.step_metrics import diversity_metrics
from trainer.timeline import Part, Span


def told(groups: list[Group], say: Callable[[int, int], str]) -> list[Group]:
    """The groups with texts say(slot, place)."""
    return [
        msgspec.structs.replace(
            group,
            rows=tuple(
                msgspec.structs.replace(row, text=say(group.slot, place)) for place, row in enumerate(group.rows)
            ),
        )
        for group in groups
    ]


def test_each_source_is_measured_over_its_first_four(made_up_groups: Callable[..., list[Group]]) -> None:
    groups = told(made_up_groups(prompts=3, explorer=5, learner=4), lambda slot, place: f"a b c d {slot} {place}")
    found = diversity_metrics(groups, self_bleu=True)
    assert set(found) == {
        f"{source}/{name}"
        for source in ("explorer", "learner")
        for name in ("edit_diversity", "unique_answer_ratio", "self_bleu")
    }
    firsts = [edit_diversity([row.completion.tokens for row in group.rows[:4]]) for group in groups]
    assert found["explorer/edit_diversity"] == pytest.approx(sum(firsts) / 3)
    lasts = [self_bleu([row.text for row in group.rows[5:]]) for group in groups]
    assert found["learner/self_bleu"] == pytest.approx(sum(lasts) / 3)
    assert found["learner/unique_answer_ratio"] == 1.0  # no final answers: whole texts
    assert "explorer/self_bleu" not in diversity_metrics(groups, self_bleu=False)


def test_final_answers_count_where_there_are_some(made_up_groups: Callable[..., list[Group]]) -> None:
    groups = told(made_up_groups(explorer=4, learner=4), lambda slot, place: f"{place} so \\boxed{{{place // 2}}}")
    found = diversity_metrics(groups, self_bleu=False)
    assert found["explorer/unique_answer_ratio"] == found["learner/unique_answer_ratio"] == 0.5


def test_a_source_with_fewer_than_four_has_none(made_up_groups: Callable[..., list[Group]]) -> None:
    found = diversity_metrics(made_up_groups(explorer=3, learner=5), self_bleu=True)
    assert {name.split("/")[0] for name in found} == {"learner"}


@pytest.mark.parametrize(("every", "measured"), [(2, [1, 3]), (1, [1, 2, 3]), (0, [])])
def test_self_bleu_comes_every_so_many_steps(
    made_up_groups: Callable[..., list[Group]], tmp_path: Path, every: int, measured: list[int]
) -> None:
    with Console(Config()) as console:
        recorder = Recorder(tmp_path, console, None, Config(evaluation=Evaluation(diversity_every=every)))
        for step in (1, 2, 3):
            groups = made_up_groups(explorer=4, learner=4, step=step)
            metrics = {"loss": 0.0, "kl": 0.0, "entropy": 0.0, "time/wait_for_batch": 0.0}
            parts = [Part(tuple(groups), Span(0.0, 0.0))]
            recorder.step(step, parts, Quota(4, 4), metrics, [{"wait": [Span(0.0, 0.0)]}])
        recorder.close()
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines if "learner/self_bleu" in line] == measured
    assert all(("learner/edit_diversity" in line) == (every > 0) for line in lines)
    assert all(("time/diversity" in line) == (every > 0) for line in lines)
