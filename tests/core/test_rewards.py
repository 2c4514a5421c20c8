import math
import sys
import textwrap

import pytest

from core.rewards import RewardItem, require_columns, resolve_reward

ITEM = RewardItem(
    prompt="What is 6+6?",
    completion="Twelve.\nAnswer: 12",
    completion_ids=(3, 1, 4),
    answer="12",
    columns={"data_source": "math_dapo", "extra_info": {"index": "a", "tags": [1, None]}, "level": 5},
)


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Write a module of the test's own reward functions and return its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, source):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        return name

    return write


def test_countdown():
    reward = resolve_reward("countdown")
    right = RewardItem(prompt="5 5 = 10 :", completion="5 + 5 = 10", answer="10")
    wrong = RewardItem(prompt="5 5 = 10 :", completion="5 - 5 = 0", answer="10")
    assert (reward(right), reward(wrong)) == (1.0, 0.0)
    with pytest.raises(ValueError, match="not a countdown prompt"):
        reward(ITEM)


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("Answer: 12", 1.0),
        (r"\boxed{12}", 1.0),
        (r"I first had \boxed{3}, but \boxed{\frac{24}{2}}", 1.0),
        ("Answer: 2", 0.0),
        ("Answer: 112", 0.0),
        ("Answer: 12\nno: \\boxed{13}", 0.0),
        ("it is 12", 0.0),
        ("", 0.0),
    ],
)
def test_math(completion, score):
    assert resolve_reward("math")(RewardItem(prompt="q", completion=completion, answer="12")) == score


def test_math_without_a_readable_gold_answer_has_no_reward():
    with pytest.raises(ValueError, match="gold answer"):
        resolve_reward("math")(RewardItem(prompt="q", completion="Answer: 1", answer=""))


def test_trl_signature_gets_columns_as_lists_of_one(user_module):
    user_module(
        "trl_rewards",
        """
        import json
        def every(prompts, completions, completion_ids, **columns):
            assert (prompts, completions, completion_ids) == (["What is 6+6?"], ["Twelve.\\nAnswer: 12"], [[3, 1, 4]])
            assert columns.pop("extra_info") == [{"index": "a", "tags": [1, None]}]
            assert columns == {"answer": ["12"], "data_source": ["math_dapo"], "level": [5]}
            return [0.5]
        def few(completions, level):
            return [float(level[0])]
        def none(completions, **columns):
            return [None]
        def nan(completions, **columns):
            return [float("nan")]
        def two(completions, **columns):
            return [1.0, 0.0]
        def scalar(completions, **columns):
            return 1.0
        def text(completions, **columns):
            return ["1.0"]
        def missing(completions, difficulty):
            return [1.0]
        """,
    )
    assert resolve_reward("trl_rewards:every")(ITEM) == 0.5
    assert resolve_reward("trl_rewards:few")(ITEM) == 5.0
    assert resolve_reward("trl_rewards:none")(ITEM) is None
    assert math.isnan(resolve_reward("trl_rewards:nan")(ITEM))
    for name in ("two", "scalar", "text"):
        with pytest.raises(TypeError, match="score"):
            resolve_reward(f"trl_rewards:{name}")(ITEM)
    with pytest.raises(TypeError, match=r"trl_rewards:scalar \(trl_rewards.py:16\) returned 1.0; TRL's signature"):
        resolve_reward("trl_rewards:scalar")(ITEM)
    with pytest.raises(TypeError, match="difficulty"):
        resolve_reward("trl_rewards:missing")(ITEM)


def test_required_columns_are_those_without_a_default(user_module):
    user_module(
        "needing_rewards",
        """
        def some(prompts, completions, completion_ids, answer, solution, level=1, *, weight, **columns): return [1.0]
        def verl(solution_str, ground_truth, extra_info): return 1.0
        """,
    )
    reward = resolve_reward("needing_rewards:some")
    assert reward.needs == ("solution", "weight")
    require_columns("needing_rewards:some", reward.needs, ["weight", "solution"], "data.train")
    with pytest.raises(ValueError, match=r'"f" requires solution, and data.eval has .* there are: level, weight\.'):
        require_columns("f", reward.needs, ["weight", "level"], "data.eval")
    assert resolve_reward("needing_rewards:verl").needs == ()


def test_a_file_is_loaded_from_the_current_folder_with_what_lies_beside_it(tmp_path, monkeypatch):
    folder = tmp_path / "rewards"
    folder.mkdir()
    (folder / "math.py").write_text("from beside import VALUE\ndef f(completions, **columns):\n    return [VALUE]\n")
    (folder / "beside.py").write_text("VALUE = 0.25\n")
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    assert resolve_reward("rewards/math.py:f")(ITEM) == 0.25
    assert resolve_reward(f"{folder}/math.py:f")(ITEM) == 0.25
    assert math.sqrt(4) == 2
    with pytest.raises(ValueError, match=f"there is no file {tmp_path}/rewards/none.py"):
        resolve_reward("rewards/none.py:f")


def test_errors_of_a_module_name_the_key_and_the_place(user_module, monkeypatch, tmp_path):
    user_module("unclosed_rewards", "x = [1,\ndef f(completions): ...")
    user_module("importing_rewards", "import no_such_library_here\ndef f(completions): ...")
    user_module("dividing_rewards", "def g():\n    return 1 / 0\ng()")
    for name, message in (
        ("unclosed_rewards", r"SyntaxError: '\[' was never closed \(unclosed_rewards.py, line 1\)"),
        (
            "importing_rewards",
            r"ModuleNotFoundError: No module named 'no_such_library_here' \(importing_rewards.py:1\)",
        ),
        ("dividing_rewards", r"ZeroDivisionError: division by zero \(dividing_rewards.py:2\)"),
    ):
        with pytest.raises(ValueError, match=f'reward.function = "{name}:f": importing {name} failed: {message}'):
            resolve_reward(f"{name}:f")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"no module no_such_rewards in PYTHONPATH, .*{tmp_path}; set PYTHONPATH"):
        resolve_reward("no_such_rewards:f")


def test_verl_signature(user_module):
    user_module(
        "verl_rewards",
        """
        class Scorer:
            @staticmethod
            def score(data_source, solution_str, ground_truth, extra_info=None):
                assert (data_source, extra_info) == ("math_dapo", {"index": "a", "tags": [1, None]})
                return {"score": 1.0 if solution_str.endswith(ground_truth) else -1.0, "acc": True}
        def bare(solution_str, ground_truth, extra_info):
            return float(extra_info == {})
        def plain(solution_str, ground_truth):
            return solution_str.endswith(ground_truth)
        def no_score(solution_str, ground_truth, **kwargs):
            return {"acc": 1.0}
        """,
    )
    assert resolve_reward("verl_rewards:Scorer.score")(ITEM) == 1.0
    assert resolve_reward("verl_rewards:plain")(ITEM) == 1.0
    assert resolve_reward("verl_rewards:bare")(RewardItem(prompt="", completion="", answer="")) == 1.0
    with pytest.raises(KeyError, match="score"):
        resolve_reward("verl_rewards:no_score")(ITEM)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("both", r"takes \(completions, solution_str\), both completions and solution_str"),
        ("neither", r"takes \(x, ground_truth\), neither completions nor solution_str"),
        ("state", "needs trainer_state, which nobody here can give it"),
        ("extra", "needs temperature, which nobody"),
        ("positional", "needs completions, which nobody"),
        ("later", "is an async function"),
        ("NUMBER", "is a int"),
        ("nether", 'has no nether; did you mean "neither"'),
    ],
)
def test_other_signatures_are_refused_with_the_reason(user_module, name, message):
    user_module(
        "odd_rewards",
        """
        NUMBER = 3
        def both(completions, solution_str): ...
        def neither(x, ground_truth): ...
        def state(completions, trainer_state): ...
        def extra(solution_str, ground_truth, temperature): ...
        def positional(completions, /): ...
        async def later(completions): ...
        """,
    )
    with pytest.raises(ValueError, match=message):
        resolve_reward(f"odd_rewards:{name}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuontdown", 'did you mean "countdown"'),
        ("my_rewards", 'neither "countdown", "math" nor module:function'),
        ("my_rewards:", "neither"),
        (":score", "neither"),
        ("no_such_module_here:score", "cannot import no_such_module_here"),
    ],
)
def test_names_that_lead_nowhere_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        resolve_reward(name)
