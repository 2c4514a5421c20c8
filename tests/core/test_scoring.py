import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from core.rewards import RewardItem
from core.scoring import RewardPool
from core.scoring_child import DEPTH, REPOSITORY, Child, Item
from core.scoring_worker import Outcome, Started, frame, score, take_replies

ACT = "scoring_rewards:act"
HANG_GUARD_S = 60.0


@pytest.fixture(autouse=True)
def _from_the_folder_of_the_reward_functions(monkeypatch):
    monkeypatch.chdir(Path(__file__).parent)


class Scores:
    """Collects what a pool reports."""

    def __init__(self):
        self.outcomes = {}
        self.changed = threading.Condition()

    def __call__(self, ticket, outcome):
        with self.changed:
            assert ticket not in self.outcomes, "reported twice"
            self.outcomes[ticket] = outcome
            self.changed.notify_all()

    def wait(self, count):
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.outcomes) >= count, HANG_GUARD_S), self.outcomes
        return self.outcomes


def run(function, completions, *, timeout_s=30.0, workers=1, **settings):
    scores = Scores()
    with RewardPool(function, workers=workers, timeout_s=timeout_s, on_score=scores, **settings) as pool:
        for ticket, completion in enumerate(completions):
            item = (
                completion
                if isinstance(completion, RewardItem)
                else RewardItem(prompt="", completion=completion, answer="")
            )
            pool.submit(ticket, item)
        outcomes = scores.wait(len(completions))
        return [outcomes[ticket] for ticket in range(len(completions))], dict(pool.counts)


def gone(pid):
    """Ended, or a zombie that this container's first process does not reap."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def wait_until(condition):
    end = time.monotonic() + HANG_GUARD_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
    return True


def test_countdown_in_batches():
    right = RewardItem(prompt="5 5 = 10 :", completion="5 + 5 = 10", answer="10")
    wrong = RewardItem(prompt="5 5 = 10 :", completion="5 - 5 = 0", answer="10")
    outcomes, counts = run("countdown", [right, wrong] * 200, workers=2)
    assert [outcome.reward for outcome in outcomes] == [1.0, 0.0] * 200
    assert counts == {"scored": 400}


def test_no_reward_is_never_zero():
    outcomes, counts = run(ACT, ["score 0", "raise who", "none", "score nan", "score -inf", "score 1.5"])
    assert [(outcome.reward, outcome.failure) for outcome in outcomes] == [
        (0.0, None), (None, "raised"), (None, "none"), (None, "non_finite"), (None, "non_finite"), (1.5, None),
    ]  # fmt: skip
    assert outcomes[1].detail == "KeyError: 'who' (scoring_rewards.py:15)"
    assert outcomes[3].detail == "the reward function returned nan"
    assert counts == {"scored": 2, "raised": 1, "none": 1, "non_finite": 2}


def test_only_the_one_that_hangs_is_lost():
    completions = [f"score {row}" for row in range(2 * DEPTH)]
    completions[3] = "spin"
    outcomes, counts = run(ACT, completions, timeout_s=1.5)
    assert outcomes[3] == Outcome(None, "timeout", "no score within 1.5 s")
    assert all(outcome.reward == row for row, outcome in enumerate(outcomes) if row != 3)
    assert counts == {"scored": 2 * DEPTH - 1, "timeout": 1}


@pytest.mark.parametrize(("crash", "ending"), [("segfault", "signal SIGSEGV"), ("exit", "exit status 3")])
def test_only_the_one_that_crashes_is_lost(crash, ending):
    outcomes, _ = run(ACT, ["score 1", crash, "score 2", crash, "score 3"])
    assert [outcome.reward for outcome in outcomes] == [1.0, None, 2.0, None, 3.0]
    assert outcomes[1] == Outcome(None, "crashed", f"the scoring process ended with {ending}")


def test_every_item_may_hang_in_turn():
    outcomes, counts = run(ACT, ["sleep"] * 3 + ["score 1"], timeout_s=1.0, workers=2)
    assert outcomes[3].reward == 1.0
    assert counts == {"timeout": 3, "scored": 1}


def test_memory_is_bounded():
    outcomes, _ = run(ACT, ["allocate 1000000", f"allocate {4 << 30}", "allocate 1000"], memory_bytes=1 << 30)
    assert [outcome.reward for outcome in outcomes] == [1e6, None, 1e3]
    assert outcomes[1].failure == "raised"
    assert outcomes[1].detail.startswith("MemoryError")


def test_large_completions_do_not_block_the_pool():
    # More than a socket holds, behind one that never reads.
    outcomes, _ = run(ACT, ["sleep", *["score 1" + " " * 400_000 for _ in range(8)]], timeout_s=1.5)
    assert outcomes[0].failure == "timeout"
    assert [outcome.reward for outcome in outcomes[1:]] == [1.0] * 8


def test_output_of_a_reward_function_does_not_reach_the_frames(capfd):
    outcomes, _ = run(ACT, ["print \x00\x00\x00\x01hello", "score 1"])
    assert [outcome.reward for outcome in outcomes] == [0.5, 1.0]
    assert "hello" in capfd.readouterr().err


def test_what_a_reward_function_started_is_killed_with_it(tmp_path):
    outcomes, _ = run(ACT, [f"child {tmp_path}/pid"], timeout_s=1.0)
    assert outcomes[0].failure == "timeout"
    assert wait_until(lambda: gone(int((tmp_path / "pid").read_text())))


def test_math_answers_that_never_end_end_in_time():
    factorial = RewardItem(prompt="", completion=r"\boxed{(10^{10})!}", answer="12")
    tower = RewardItem(prompt="", completion=r"\boxed{9^{9^{9^{9}}}}", answer="12")
    right = RewardItem(prompt="", completion="Answer: 12", answer="12")
    outcomes, counts = run("math", [factorial, right, tower, right], timeout_s=2.0)
    assert outcomes[0].reward is None
    assert outcomes[0].failure in ("timeout", "crashed", "raised")
    assert outcomes[2].reward != 1.0
    assert outcomes[1].reward == outcomes[3].reward == 1.0
    assert sum(counts.values()) == 4


def test_what_is_urgent_does_not_queue_behind_what_is_not():
    order = []
    done = threading.Event()

    def note(ticket, outcome):
        order.append(ticket)
        if len(order) == 3 * DEPTH + 2:
            done.set()

    with RewardPool(ACT, workers=1, timeout_s=30.0, on_score=note) as pool:
        for ticket in range(3 * DEPTH):
            pool.submit(ticket, RewardItem(prompt="", completion="slow", answer=""), urgency=(1, 7))
        for ticket, urgency in (("late", (1, 8)), ("soon", (1, 2))):
            pool.submit(ticket, RewardItem(prompt="", completion="slow", answer=""), urgency=urgency)
        assert done.wait(HANG_GUARD_S)
        assert pool.submitted == pool.finished == len(order)
    assert order.index("soon") < 2 * DEPTH  # a child may hold DEPTH already
    assert order[-1] == "late"
    assert [ticket for ticket in order if isinstance(ticket, int)] == list(range(3 * DEPTH))


def test_what_is_urgent_waits_for_one_slow_item_and_not_for_all_that_a_child_could_hold():
    order, scores = [], Scores()

    def note(ticket, outcome):
        order.append(ticket)
        scores(ticket, outcome)

    with RewardPool(ACT, workers=1, timeout_s=30.0, on_score=note) as pool:
        for ticket in range(8):
            pool.submit(ticket, RewardItem(prompt="", completion="take 0.3", answer=""), urgency=(1, 7))
        scores.wait(1)
        pool.submit("soon", RewardItem(prompt="", completion="score 1", answer=""), urgency=(0, 7))
        scores.wait(9)
    assert order.index("soon") <= 2
    assert [ticket for ticket in order if ticket != "soon"] == list(range(8))


@pytest.mark.parametrize(("seconds", "held"), [(0.0, DEPTH), (0.03, 6), (0.09, 2), (0.3, 1)])
def test_a_child_holds_what_it_scores_in_a_short_time(seconds, held):
    child = Child("countdown", 1 << 30)
    try:
        assert filled(child) == 1  # nothing is known of it yet
        for _ in range(20):
            child.took(seconds)
        assert filled(child) == held
        child.took(5.0)
        assert filled(child) == 1
    finally:
        child.kill()


def filled(child):
    """How many items it may hold."""
    child.held.clear()
    while child.has_room:
        child.held.append(Item((), 0, None, b""))
    return len(child.held)


def test_children_end_with_the_pool():
    scores = Scores()
    pool = RewardPool(ACT, workers=2, timeout_s=30.0, on_score=scores)
    for ticket in range(4 * DEPTH):
        pool.submit(ticket, RewardItem(prompt="", completion="pid", answer=""))
    pids = {int(outcome.reward) for outcome in scores.wait(4 * DEPTH).values()}
    pool.submit("endless", RewardItem(prompt="", completion="sleep", answer=""))
    pool.close()
    pool.close()
    assert all(gone(pid) for pid in pids)
    assert "endless" not in scores.outcomes
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit("late", RewardItem(prompt="", completion="score 1", answer=""))


def test_children_end_with_a_killed_parent():
    source = f"""
        import time
        from core.rewards import RewardItem
        from core.scoring import RewardPool
        say = lambda _, outcome: print(int(outcome.reward), flush=True)
        pool = RewardPool({ACT!r}, workers=1, timeout_s=60, on_score=say)
        pool.submit(0, RewardItem(prompt="", completion="pid", answer=""))
        pool.submit(1, RewardItem(prompt="", completion="sleep", answer=""))
        time.sleep(600)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(source)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    with parent:
        pid = int(parent.stdout.readline())
        assert not gone(pid)
        parent.send_signal(signal.SIGKILL)
    assert wait_until(lambda: gone(pid))


def test_a_child_killed_from_outside_is_replaced():
    scores = Scores()
    with RewardPool(ACT, workers=1, timeout_s=30.0, on_score=scores) as pool:
        pool.submit("first", RewardItem(prompt="", completion="pid", answer=""))
        pid = int(scores.wait(1)["first"].reward)
        os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: gone(pid))
        pool.submit("second", RewardItem(prompt="", completion="pid", answer=""))
        second = scores.wait(2)["second"]
        # The pool may learn of the death only when it hands the item over.
        assert second.failure == "crashed" or int(second.reward) != pid


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("cuontdown", 'did you mean "countdown"'),
        ("scoring_rewards:nothing", "has no nothing"),
        ("no_such_module:f", "cannot import no_such_module"),
        ("broken_rewards:f", r"ZeroDivisionError: division by zero \(broken_rewards.py:1\)"),
        ("leaving_rewards:f", 'reward.function = "leaving_rewards:f": its .* ended as it started, with exit status 9'),
    ],
)
def test_a_reward_function_that_cannot_be_used_is_refused_at_once(function, message, tmp_path, monkeypatch):
    (tmp_path / "broken_rewards.py").write_text("1 / 0")
    (tmp_path / "leaving_rewards.py").write_text("import os; os._exit(9)")
    (tmp_path / "scoring_rewards.py").write_text("something = 1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        RewardPool(function, workers=1, timeout_s=1.0, on_score=Scores())


def test_a_relative_file_and_what_it_opens_are_those_of_the_folder_where_the_run_was_started(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "reward.py").write_text(
        "def f(completions, level):\n    return [float(open('mine/value').read()) + level[0]]\n"
    )
    (tmp_path / "mine" / "value").write_text("0.5")
    monkeypatch.chdir(tmp_path)
    item = RewardItem(prompt="", completion="", answer="", columns={"level": 2})
    [outcome], _ = run("mine/reward.py:f", [item])
    assert outcome.reward == 2.5


def test_a_relative_entry_of_pythonpath_counts_from_the_folder_where_the_run_was_started(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libreward.py").write_text("def f(completions):\n    return [0.25]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "lib")
    [outcome], _ = run("libreward:f", ["text"])
    assert outcome.reward == 0.25


def test_a_callback_that_raises_fails_the_pool_by_name():
    def broken(ticket, outcome):
        raise OSError(f"no space for {ticket}")

    with RewardPool(ACT, workers=1, timeout_s=30.0, on_score=broken) as pool:
        pool.submit(7, RewardItem(prompt="", completion="score 1", answer=""))
        assert wait_until(lambda: pool._error is not None)
        with pytest.raises(RuntimeError, match="the reward pool has failed: no space for 7"):
            pool.check()
        with pytest.raises(RuntimeError, match="no space for 7"):
            pool.submit(8, RewardItem(prompt="", completion="score 1", answer=""))


@pytest.mark.parametrize("settings", [{"workers": 0, "timeout_s": 1.0}, {"workers": 1, "timeout_s": 0.0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match="workers >= 1 and timeout_s > 0"):
        RewardPool("countdown", on_score=Scores(), **settings)


def test_frames_may_arrive_in_pieces():
    whole = frame(Started()) + frame(Outcome(1.0)) + frame(Outcome(None, "none", "x" * 300))
    received, replies = bytearray(), []
    for byte in whole:
        received.append(byte)
        replies += take_replies(received)
    assert replies == [Started(), Outcome(1.0), Outcome(None, "none", "x" * 300)]
    assert not received


def test_a_detail_names_the_user_s_line_and_not_the_library_s():
    def raising(item):
        return json.loads("{")

    outcome = score(raising, RewardItem(prompt="", completion="", answer=""))
    line = raising.__code__.co_firstlineno + 1
    assert outcome.detail.endswith(f"(char 1) (test_scoring.py:{line})")
    assert outcome.detail.startswith("JSONDecodeError: Expecting property name")


def test_a_function_of_conversational_completions_is_told_that_they_are_text():
    outcome = score(lambda item: item.completion[0]["content"], RewardItem(prompt="", completion="a", answer=""))
    assert "prompts and completions are text here, not lists of messages (test_scoring.py:" in outcome.detail


def test_details_are_bounded():
    def raising(item):
        raise RuntimeError("x" * 10_000)

    outcome = score(raising, RewardItem(prompt="", completion="", answer=""))
    assert outcome.failure == "raised"
    assert len(outcome.detail) == 500
