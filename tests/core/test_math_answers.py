import pytest

from core.math_answers import answers_equal, extract_answer, undelimited


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{12}", "12"),
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\frac{\sqrt{3}}{2^{10}}} done", r"\frac{\sqrt{3}}{2^{10}}"),
        (r"\boxed{1} no, \boxed {2}", "2"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{1, \boxed{2}, 3}", "2"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{[0, 1\}}", r"[0, 1\}"),
        (r"\boxed{1} and cut: \boxed{2", "1"),
        (r"} stray { \boxed{5}", "5"),
        (r"\boxed{ $7$ }", "7"),
        ("Steps.\nAnswer: 12", "12"),
        ("Answer: 12\nAnswer: 13\nbye", "13"),
        ("**Answer:** $\\frac{3}{4}$.", r"\frac{3}{4}"),
        ("**Final Answer**: 5**", "5"),
        ("answer :  -3.5 ", "-3.5"),
        (r"Answer: \(x^2\)", "x^2"),
        (r"Answer: \boxed{12}", "12"),
        (r"Answer: the value is \boxed{12}.", "12"),
        ("\\boxed{1}\nAnswer: 2", "2"),
        ("Answer: 1\nso \\boxed{2}", "2"),
        ("Answer: .5", ".5"),
        ("Answer:\n12", None),
        ("the result is 12", None),
        (r"\boxed{", None),
        ("", None),
    ],
)
def test_final_answer(response, answer):
    assert extract_answer(response) == answer


def test_thousands_of_open_boxes_are_read_in_one_pass():
    assert extract_answer(r"\boxed{" * 50_000) is None
    assert extract_answer(r"\boxed{" * 50_000 + "}" * 50_000) == ""


@pytest.mark.parametrize(
    ("text", "bare"), [("**$12$.**", "12"), ("$12.$", "12"), (r"\[x\]", "x"), ("$.5$", ".5"), ("$$", "")]
)
def test_undelimited(text, bare):
    assert undelimited(text) == bare


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("12", "12"),
        ("033", "33"),
        ("33", "033"),
        (r"\frac{1}{2}", "0.5"),
        (r"\frac12", r"\dfrac{1}{2}"),
        (r"\frac{1}{2}", r"\dfrac12"),
        ("1/2", r"\frac{2}{4}"),
        (r"\sqrt2", r"\sqrt{2}"),
        ("1,000", "1000"),
        (r"50\%", "0.5"),
        (r"\{1,2\}", r"\{2,1\}"),
        ("x^2+1", "1+x^2"),
        ("x=3", "3"),
        ("B", r"\text{B}"),
        ("$12$", "12"),
        (r"The steps \dots so \boxed{\frac{3}{4}}", "0.75"),
        ("12", r"12\text{ cm}"),
    ],
)
def test_equal_answers(gold, answer):
    assert answers_equal(gold, answer)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("2", "12"),
        ("12", "2"),
        ("12", ""),
        ("12", "}{"),
        ("12", "twelve"),
        ("12", r"\frac{1}{"),
        ("1", "1.0000001"),
        ("(1,2)", "(2,1)"),
        ("B", "A"),
        (r"\frac{1}{2}", r"\frac{1}{3}"),
        ("x^2+1", "x^2-1"),
    ],
)
def test_different_answers(gold, answer):
    assert not answers_equal(gold, answer)


@pytest.mark.parametrize("gold", ["", "$$", r"\boxed{}"])
def test_a_gold_answer_that_cannot_be_read_is_refused(gold):
    with pytest.raises(ValueError, match="gold answer"):
        answers_equal(gold, "12")
