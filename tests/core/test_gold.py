import pytest

from core.gold import look_at_golds
from core.math_answers import answers_equal, extract_answer, require_gold

SOLUTION = "Natalia sold 48/2 = 24 clips in May.\nShe sold 48 + 24 = 72 clips."


@pytest.mark.parametrize(
    "gold", ["5", "033", "1,234", r"$\frac{1}{2}$", "(1, 2)", "x = 3", f"{SOLUTION}\n" r"\boxed{72}"]
)
def test_gold_answers_that_can_be_matched(gold):
    """Whatever passes is found right in a response that boxes it."""
    require_gold(gold)
    response = f"So it is {gold}" if "boxed" in gold else rf"So it is \boxed{{{gold}}}."
    answer = extract_answer(response)
    assert answer is not None
    assert answers_equal(gold, answer)


@pytest.mark.parametrize(
    ("gold", "reason"),
    [
        (SOLUTION, "several lines without a box are a worked solution"),
        ("$", "cannot be read as an expression"),
        (r"2^{10", "does not equal itself"),
    ],
)
def test_gold_answers_that_cannot_say_why(gold, reason):
    with pytest.raises(ValueError, match=reason):
        require_gold(gold)


def test_a_sample_of_gold_answers_is_counted_and_the_first_bad_one_is_shown():
    assert look_at_golds("data.train", ["1", "2"]) == (
        "data.train: 2 gold answers looked at: math-verify reads them all"
    )
    line = look_at_golds("data.eval", [SOLUTION if number == 300 else str(number) for number in range(600)])
    assert line.startswith("warning: data.eval: 1 of 200 gold answers looked at can never be matched by math-verify; ")
    assert f"the first is {SOLUTION!r}: several lines without a box" in line


def test_gold_answers_of_which_none_can_be_matched_are_refused_with_the_remedy():
    with pytest.raises(
        ValueError, match=r'data.train: reward.function = "math" .*of 2 .*none; .*with data.answer_column'
    ):
        look_at_golds("data.train", [SOLUTION, "$"])


def test_what_takes_for_ever_is_left_behind_and_refuses_nothing(monkeypatch, tmp_path):
    reader = tmp_path / "reader.py"
    reader.write_text(
        "import time\ndef f(completions, answer):\n    time.sleep(600 * (answer == ['3']))\n    return [1.0]\n"
    )
    monkeypatch.setattr("core.gold.READER", f"{reader}:f")
    monkeypatch.setattr("core.gold.GOLD_TIMEOUT_S", 0.5)
    line = look_at_golds("data.train", ["1", "3", "2"])
    assert line.startswith("warning: data.train: 1 of 3 gold answers looked at")
    assert line.endswith("the first is '3': no score within 0.5 s")
    assert "1 of 1 gold answers" in look_at_golds("data.train", ["3"])
    monkeypatch.setattr("core.gold.GOLD_TIMEOUT_S", 60.0)
    monkeypatch.setattr("core.gold.LOOK_TIMEOUT_S", 0.5)
    assert (
        look_at_golds("data.train", ["1", "2", "3"])
        == "data.train: 2 gold answers looked at: math-verify reads them all"
    )
    assert look_at_golds("data.train", ["3"]) == "warning: data.train: no gold answer could be looked at within 0.5 s"
