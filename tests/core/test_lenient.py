import pytest

from core.lenient import lenient_answer, lenient_equal, lenient_score


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{3} then \boxed{4}", "4"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1"),  # the box ends at its first closing brace
        (r"so \boxed{ } or \frac{1}{2} or \dfrac{3}{4}, the answer: 7", r" "),
        (r"first \frac{1}{2}, at last \dfrac{3}{4}; Answer: 7", r"\dfrac{3}{4}"),
        ("Answer: 7\nThe final answer is 8 apples\nSee 9", "8 apples"),
        ("答案是 12", "12"),
        ("答案:12", "12"),
        ("between 1,234.5 and -6", "-6"),
        ("it grows\nno numbers here\n\n", "no numbers here"),
        ("", ""),
    ],
)
def test_the_first_kind_of_answer_that_is_there_counts(response, answer):
    assert lenient_answer(response) == answer.strip()


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        ("2", "x=12", True),  # gold within the answer
        ("2", "12", False),  # two numbers: their difference decides
        ("0.5", "0.5000001", True),
        ("0.5", "0.50001", False),
        ("033", "33", True),
        ("33", "x = 033", True),
        ("1,000", "1000", True),
        ("1,2", "1, 2", True),
        (r"\frac{1}{2}", r"\dfrac{1}{2}", True),
        (r"\frac{1}{2}", "0.5", False),  # one of them is no number
        (r"\text{Evelyn}", "evelyn.", True),
        (r"\left(3, \frac{\pi}{2}\right)", r"(3,\frac{\pi}{2})", True),
        ("$5$", "5", True),
        ("5", "5 cm", True),
        ("5", "50%", True),
        ("50", "0.5", False),
        ("[2,4)", "(2,4]", False),
        ("B", "The bank", True),
        ("", "anything", False),
        ("", "", True),
    ],
)
def test_equality_as_described(gold, answer, equal):
    assert lenient_equal(gold, answer) is equal


def test_a_response_is_scored_by_its_extracted_answer():
    assert lenient_score(r"I try 3. So \boxed{x = 12}.", "2") == 1.0
    assert lenient_score(r"I try 2. So \boxed{12}.", "2") == 0.0
    assert lenient_score(r"\boxed{\frac{1}{2}}", r"\frac{1}{2}") == 0.0  # right, and counted as wrong


def test_long_responses_take_linear_time():
    text = "answer " * 9_000 + "\\boxed{" * 9_000 + "\\frac{" * 9_000 + " " * 30_000 + "1," * 30_000
    assert lenient_score(text + "\n42", "42") == 1.0
