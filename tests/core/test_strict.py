import msgspec
import pytest

from core.rewards import RewardItem, resolve_reward
from core.strict import score_choice, score_olympiad, without_unit


def olympiad(answer: str, golds: list[str], *, tolerance: str = "", unit: str = "") -> float:
    return score_olympiad(
        completions=[rf"Thus \boxed{{{answer}}}"],
        answer=[", ".join(golds)],
        golds=[msgspec.json.encode(golds).decode()],
        tolerance=[tolerance],
        unit=[unit],
        prompts=["?"],
    )[0]


@pytest.mark.parametrize(
    ("answer", "golds", "score"),
    [
        (r"\frac{\sqrt{3}}{2}", [r"\frac{\sqrt{3}}{2}"], 1),  # nested braces
        (r"\dfrac12", [r"\frac{1}{2}"], 1),
        ("0.5", [r"\frac{1}{2}"], 1),
        ("12", ["2"], 0),
        ("2", ["12"], 0),
        ("2, 1", ["1", "2"], 1),
        ("2, 1", ["1,2"], 1),
        ("1", ["1", "2"], 0),
        ("1, 2, 3", ["1", "2"], 0),
        ("(3,4), (1,2)", ["(1,2)", "(3,4)"], 1),
        ("(2,1), (3,4)", ["(1,2)", "(3,4)"], 0),  # a tuple keeps its order
        (r"(-\infty,-1]\cup[1,\infty)", [r"(-\infty,-1] \cup [1,\infty)"], 1),
        ("(2,4]", ["[2,4)"], 0),
        ("[2,4]", ["[2,4)"], 0),
        (r"50\%", ["50"], 1),
    ],
)
def test_answers_of_olympiadbench(answer, golds, score):
    assert olympiad(answer, golds) == score


@pytest.mark.parametrize(
    ("answer", "golds", "tolerance", "score"),
    [
        ("3.15", ["3.14"], "0.01", 1),
        ("3.1501", ["3.14"], "0.01", 0),
        (r"\frac{22}{7}", ["3.14"], "1e-2", 1),
        ("1,000.4", ["1000"], "0.5", 1),
        ("2, 1.01", ["1", "2"], "0.05", 1),
        ("2.2, 1.01", ["1", "2"], "0.05, 0.3", 1),
        ("2.01, 1.2", ["1", "2"], "0.05, 0.3", 0),
        ("2", ["1", "2"], "0.05", 0),
        ("x", ["1"], "0.05", 0),
    ],
)
def test_numbers_may_be_off_by_the_tolerance(answer, golds, tolerance, score):
    assert olympiad(answer, golds, tolerance=tolerance) == score


def test_tolerances_that_do_not_match_the_answers_are_an_error():
    with pytest.raises(ValueError, match="are 2, the gold answers"):
        olympiad("1, 2, 4", ["1", "2", "3"], tolerance="0.1,0.1")


@pytest.mark.parametrize(
    ("answer", "unit", "bare"),
    [
        ("5 km/s", "km/s", "5"),
        (r"5 \mathrm{~km} / \mathrm{s}", "$\\mathrm{~km} / \\mathrm{s}$", "5"),
        (r"\frac{1}{2}\text{ cm}", "cm", r"\frac{1}{2}"),
        ("5", "km", "5"),
        ("m", "m", "m"),
    ],
)
def test_the_unit_is_taken_off(answer, unit, bare):
    assert without_unit(answer, unit) == bare
    assert olympiad(answer, [bare], unit=unit) == 1


def test_a_response_without_a_final_answer_is_wrong():
    kwargs = {"golds": ['["5"]'], "tolerance": ["1"], "unit": [""]}
    assert score_olympiad(completions=["it is 5"], answer=["5"], **kwargs) == [0.0]
    assert score_choice(completions=["B"], answer=["B"]) == [0.0]


@pytest.mark.parametrize(
    ("response", "score"),
    [
        (r"\boxed{B}", 1),
        (r"\boxed{\text{B}}", 1),
        (r"\boxed{(B)}", 1),
        ("Answer: B. bank", 1),
        ("**Answer:** B", 1),
        (r"\boxed{A} no, \boxed{B}", 1),
        (r"\boxed{Bank}", 0),
        (r"\boxed{A}", 0),
        (r"\boxed{A, B}", 0),
    ],
)
def test_a_choice_is_its_letter(response, score):
    assert score_choice(completions=[response], answer=["B"]) == [score]


def test_scoring_processes_find_them_by_name():
    columns = {"golds": '["1","2"]', "tolerance": "", "unit": ""}
    item = RewardItem(prompt="?", completion=r"\boxed{2, 1}", answer="1, 2", columns=columns)
    assert resolve_reward("core.strict:score_olympiad")(item) == 1.0
    choice = RewardItem(prompt="?", completion=r"\boxed{C}", answer="C")
    assert resolve_reward("core.strict:score_choice")(choice) == 1.0
