"""Spans of a step, what it waited for, arrows into its updates; and the sentence that says what bounds a run."""

from pathlib import Path

import pytest

from core.config import Algorithm, Config, Explorer
from core.schema import Completion, CompletionKey, Group, Prompt, ScoredCompletion, Source, pack_logprobs, pack_tokens
from rollout.messages import Load
from trainer.diagnosis import diagnosis
from trainer.timeline import Part, Span, Stages, trace_loads, trace_step, wait_shares
from trainer.tracer import Tracer, read_trace


def scored(source: Source, worker: str, started_s: float, finished_s: float, sample: int = 0) -> ScoredCompletion:
    completion = Completion(
        key=CompletionKey(source=source, step=1, slot=0, sample=sample), prompt_uid="p", token_bytes=pack_tokens([1]),
        logprob_bytes=pack_logprobs([-1.0]), finish="stop", version=0, worker=worker, started_s=started_s,
        finished_s=finished_s,
    )  # fmt: skip
    return ScoredCompletion(completion=completion, reward=1.0, text="")


def group(*rows: ScoredCompletion) -> Group:
    prompt = Prompt(uid="p", token_ids=(5,), text="5", answer="1")
    return Group(prompt=prompt, step=1, slot=0, rows=rows, advantages=(0.0,) * len(rows))


ROWS = (
    scored(Source.EXPLORER, "explorer-0.a", 1.0, 2.0),
    scored(Source.LEARNER, "learner-0.b", 8.0, 9.0),
    scored(Source.LEARNER, "learner-0.b", 8.0, 12.0, 1),
)


@pytest.mark.parametrize(
    ("wait", "expected"),
    [
        ((10.0, 12.5), (0.0, 2.0, 0.5)),  # the learner's last row, then its reward
        ((13.0, 13.5), (0.0, 0.0, 0.5)),  # all was generated before: only rewards were missing
        ((10.0, 11.0), (0.0, 1.0, 0.0)),  # a clock that is ahead of ours
    ],
)
def test_a_wait_is_shared_out(wait: tuple[float, float], expected: tuple[float, float, float]) -> None:
    shares = wait_shares([Part((group(*ROWS),), Span(*wait))])
    names = ("time/wait_for_explorer", "time/wait_for_learner", "time/wait_for_rewards")
    assert tuple(shares[name] for name in names) == pytest.approx(expected)
    assert sum(shares.values()) == pytest.approx(wait[1] - wait[0])


def test_the_explorer_is_named_where_it_came_last() -> None:
    rows = (scored(Source.LEARNER, "l", 1.0, 2.0), scored(Source.EXPLORER, "e", 1.0, 3.0))
    part = Part((group(*rows),), Span(2.5, 3.0))
    assert wait_shares([part])["time/wait_for_explorer"] == pytest.approx(0.5)
    assert wait_shares([part, part])["time/wait_for_explorer"] == pytest.approx(1.0)


def test_stages_add_up_and_are_taken_once() -> None:
    stages = Stages()
    for name in ("wait", "train", "wait", "train"):
        with stages(name):
            pass
    first, second = stages._spans["wait"]
    assert stages.seconds("wait") == first.seconds + second.seconds > 0
    assert stages.last("wait") == second
    assert stages.seconds("publish") == 0
    spans = stages.take()
    assert [len(spans[name]) for name in ("wait", "train")] == [2, 2]
    assert stages.take() == {}


def test_every_lease_points_at_the_updates_it_trained(tmp_path: Path) -> None:
    tracer = Tracer(tmp_path)
    spans = {
        "wait": [Span(10.0, 11.0), Span(11.4, 12.5)],
        "score": [Span(11.0, 11.1), Span(12.6, 12.8)],
        "train": [Span(11.1, 11.4), Span(12.8, 14.0)],
    }
    parts = [Part((group(*rows),), wait) for rows, wait in zip((ROWS[:1], ROWS[1:]), spans["wait"])]
    trace_step(tracer, 1, parts, [spans, {"train": [Span(11.2, 11.5)]}])
    tracer.close()
    events = read_trace(tmp_path)
    processes = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    rows = {
        (processes[event["pid"]], event["args"]["name"]): (event["pid"], event["tid"])
        for event in events
        if event["name"] == "thread_name"
    }
    assert rows.keys() == {
        ("trainer", "wait"), ("trainer", "score"), ("trainer", "train"), ("trainer rank 1", "train"),
        ("explorer-0.a", "generate"), ("learner-0.b", "generate"),
    }  # fmt: skip
    (other,) = [event for event in events if (event["pid"], event.get("tid")) == rows["trainer rank 1", "train"]
                and event["ph"] == "X"]  # fmt: skip
    assert (other["ts"], other["dur"], other["args"]) == (11.2e6, 0.3e6, {"step": 1})
    leases = [event for event in events if event["ph"] == "X" and event["name"] == "step 1"]
    assert [event["args"]["completions"] for event in leases] == [1, 2]
    starts = [event for event in events if event["ph"] == "s"]
    ends = {event["id"]: event for event in events if event["ph"] == "f"}
    assert {(event["pid"], event["tid"]) for event in starts} == {
        rows["explorer-0.a", "generate"], rows["learner-0.b", "generate"],
    }  # fmt: skip
    for start in starts:
        end = ends[start["id"]]
        assert (end["pid"], end["tid"]) == rows["trainer", "train"]
        assert start["ts"] < end["ts"]
    assert sorted(end["ts"] for end in ends.values()) == [11.1e6, 12.8e6]  # the update that each part was for


def test_a_lease_whose_rows_train_in_two_parts_is_drawn_once(tmp_path: Path) -> None:
    tracer = Tracer(tmp_path)
    parts = [Part((group(ROWS[1]),), Span(8.0, 9.5)), Part((group(ROWS[2]),), Span(10.0, 12.5))]
    trace_step(tracer, 1, parts, [{"train": [Span(9.5, 10.0), Span(12.5, 13.0)]}])
    tracer.close()
    events = read_trace(tmp_path)
    (lease,) = [event for event in events if event["ph"] == "X" and event["name"] == "step 1"]
    assert (lease["ts"], lease["dur"], lease["args"]["completions"]) == (8e6, 4e6, 2)
    assert sorted(event["ts"] for event in events if event["ph"] == "s") == [9e6, 12e6]  # as their rows were finished
    assert sorted(event["ts"] for event in events if event["ph"] == "f") == [9.5e6, 12.5e6]


def test_each_load_of_weights_is_a_span_on_its_worker(tmp_path: Path) -> None:
    tracer = Tracer(tmp_path)
    trace_loads(tracer, [("learner-0.b", Load(version=3, started_s=8.5, finished_s=8.75))])
    tracer.close()
    process, track, load = read_trace(tmp_path)
    assert (process["args"]["name"], track["args"]["name"]) == ("learner-0.b", "load")
    assert (load["name"], load["ts"], load["dur"]) == ("weights 3", 8.5e6, 0.25e6)


def line(**seconds: float) -> dict[str, float]:
    named = {f"time/{name}": value for name, value in seconds.items() if name != "total"}
    return {"step_time": seconds["total"], **named}


SLOW_FIRST = line(total=90.0, wait_for_batch=89.0)


@pytest.mark.parametrize(
    ("step", "lookahead", "parts"),
    [
        (
            line(total=1.0, wait_for_batch=0.6, wait_for_learner=0.45, wait_for_explorer=0.15, train=0.2, score=0.1),
            0,
            (
                "generation-bound: the learner waited 60% of the step",
                "75% of that for the learner's own",
                "lookahead=1",
            ),
        ),
        (
            line(total=1.0, wait_for_batch=0.5, wait_for_explorer=0.5, train=0.3),
            1,
            ("generation-bound", "100% of that for the explorer's", "explorer.processes"),
        ),
        (
            line(total=1.0, wait_for_batch=0.3, wait_for_learner=0.3, train=0.4, score=0.2),
            0,
            ("training-bound: scoring and updates took 60% of the step", "30%", "algorithm.lookahead=1"),
        ),
        (line(total=1.0, wait_for_batch=0.02, train=0.8), 1, ("training-bound", "80%", "would not help")),
        (
            line(total=1.0, wait_for_batch=0.7, wait_for_rewards=0.6, wait_for_learner=0.1, train=0.2),
            1,
            ("reward-bound: the learner waited 60% of the step for rewards", "reward.workers"),
        ),
        (line(total=1.0, publish=0.6, train=0.3), 1, ("publishing-bound", "60%")),
    ],
)
def test_one_sentence_says_what_bounds_the_run(step: dict[str, float], lookahead: int, parts: tuple[str, ...]) -> None:
    config = Config(algorithm=Algorithm(lookahead=lookahead))
    (text,) = diagnosis([SLOW_FIRST, *[step] * 5], config)
    assert all(part in text for part in parts), text


def test_nothing_measured_is_nothing_said() -> None:
    assert diagnosis([], Config()) == diagnosis([SLOW_FIRST], Config()) == []


FAST = line(total=0.1, wait_for_batch=0.01, wait_for_learner=0.01, train=0.08)
STARTING = line(total=2.6, wait_for_batch=2.5, wait_for_learner=2.5, train=0.08)


def of_start(start: int, step: dict[str, float], explorer: int = 0, learner: int = 4) -> dict[str, float]:
    return {**step, "run/start": float(start), "mix/explorer_quota": explorer, "mix/learner_quota": learner}


@pytest.mark.parametrize(
    "training",
    [
        # All explorer rows are read from a store, and step 2 is the first to need a worker at all.
        [of_start(1, FAST, 4, 0), of_start(1, STARTING, 3, 1), *[of_start(1, FAST, 0, 4)] * 4],
        # A resumed run trains one step more.
        [of_start(1, STARTING), *[of_start(1, FAST)] * 4, of_start(2, STARTING)],
        # The third start is the first to ask for the explorer, at its second step.
        [of_start(1, STARTING), *[of_start(1, FAST)] * 4, of_start(3, STARTING), of_start(3, STARTING, 1, 3)],
    ],
)
def test_the_start_of_a_worker_is_not_taken_for_generation(training: list[dict[str, float]]) -> None:
    (text,) = diagnosis(training, Config())
    assert text.startswith("training-bound: scoring and updates took 80% of the step")


def test_too_few_steps_say_nothing() -> None:
    assert diagnosis([of_start(1, STARTING), of_start(1, FAST), of_start(1, FAST)], Config()) == []
    assert diagnosis([of_start(start, STARTING) for start in range(1, 9)], Config()) == []


@pytest.mark.parametrize(
    ("store", "reused", "generated", "remedy"),
    [
        ("", None, None, "or read recorded completions (explorer.store)"),
        ("/store", 24, 0, "all of these were read from explorer.store: put it on a faster disk"),
        ("/store", 0, 24, "explorer.processes or explorer.ahead_steps; a run that finds them in explorer.store will"),
    ],
)
def test_advice_about_the_explorer_fits_where_its_completions_come_from(
    store: str, reused: int | None, generated: int | None, remedy: str
) -> None:
    counts = {"store/reused": reused, "store/generated": generated}
    step = line(total=1.0, wait_for_batch=0.8, wait_for_explorer=0.8, train=0.1) | counts
    (text,) = diagnosis([step] * 4, Config(explorer=Explorer(store=store)))
    assert text.startswith("generation-bound: the learner waited 80% of the step")
    assert remedy in text
    assert ("raise explorer.processes" in text) == (reused != 24)
