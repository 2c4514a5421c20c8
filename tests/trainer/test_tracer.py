import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from trainer.tracer import PENDING_EVENTS, Moment, Tracer, read_trace


def load(run_dir):
    return json.loads((run_dir / "trace.json").read_text())


def spans(events):
    return [event for event in events if event["ph"] == "X"]


def tracks(events):
    processes = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    return {
        (event["pid"], event["tid"]): (processes[event["pid"]], event["args"]["name"])
        for event in events
        if event["name"] == "thread_name"
    }


def test_a_span_has_name_track_microseconds_and_arguments(tmp_path):
    tracer = Tracer(tmp_path)
    before = time.monotonic()
    with tracer.span("train", step=3):
        pass
    tracer.add("explorer-0", "generate", "lease 7", 12.5, 12.75, {"path": Path("x")})
    tracer.close()
    events = load(tmp_path)
    train, lease = spans(events)
    assert train["name"] == "train"
    assert train["args"] == {"step": 3}
    assert before <= train["ts"] / 1e6 <= time.monotonic()
    assert (lease["ts"], lease["dur"], lease["args"]) == (12_500_000.0, 250_000.0, {"path": "x"})
    assert tracks(events)[train["pid"], train["tid"]] == ("trainer", "MainThread")
    assert tracks(events)[lease["pid"], lease["tid"]] == ("explorer-0", "generate")


def test_a_span_is_recorded_when_its_block_raises(tmp_path):
    tracer = Tracer(tmp_path)
    with pytest.raises(ValueError, match="inner"), tracer.span("train"):
        raise ValueError("inner")
    tracer.close()
    assert [span["name"] for span in spans(load(tmp_path))] == ["train"]


def test_the_file_is_json_after_every_flush_and_empty_is_json_too(tmp_path):
    tracer = Tracer(tmp_path)
    assert load(tmp_path) == []
    for number in range(3):
        tracer.add("p", "t", f"span {number}", number, number + 1)
        tracer.flush()
        assert len(spans(load(tmp_path))) == number + 1
    tracer.flush()
    tracer.close()
    assert len(spans(load(tmp_path))) == 3


def test_memory_is_bounded(tmp_path):
    tracer = Tracer(tmp_path)
    for number in range(5 * PENDING_EVENTS):
        tracer.add("p", "t", "span", number, number + 1)
        assert len(tracer._pending) < PENDING_EVENTS
    assert len(spans(load(tmp_path))) >= 4 * PENDING_EVENTS  # spilled before close
    tracer.close()
    assert len(spans(load(tmp_path))) == 5 * PENDING_EVENTS


def test_threads_share_a_tracer_and_have_their_own_tracks(tmp_path):
    tracer = Tracer(tmp_path)

    def work():
        for _ in range(300):
            with tracer.span("work"):
                pass

    threads = [threading.Thread(target=work, name=f"thread-{number}") for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tracer.close()
    events = load(tmp_path)
    assert len(spans(events)) == 1200
    assert sorted(tracks(events).values()) == [("trainer", f"thread-{number}") for number in range(4)]
    assert len({span["tid"] for span in spans(events)}) == 4


def test_arrows_pair_up_and_counters_carry_values(tmp_path):
    tracer = Tracer(tmp_path)
    tracer.arrow("trained", Moment("explorer-0", "generate", 1.0), Moment("trainer", "MainThread", 2.0))
    tracer.arrow("trained", Moment("explorer-0", "generate", 1.5), Moment("trainer", "MainThread", 2.5))
    tracer.counter("buffer", 3.0, explorer=10, learner=4)
    tracer.close()
    events = load(tmp_path)
    starts = {event["id"]: event for event in events if event["ph"] == "s"}
    ends = {event["id"]: event for event in events if event["ph"] == "f"}
    assert starts.keys() == ends.keys() == {1, 2}
    assert all(event["bp"] == "e" for event in ends.values())
    assert [event["args"] for event in events if event["ph"] == "C"] == [{"explorer": 10, "learner": 4}]


def test_resume_goes_on_in_the_same_file(tmp_path):
    tracer = Tracer(tmp_path)
    tracer.add("explorer-0", "generate", "first", 1.0, 2.0)
    tracer.arrow("trained", Moment("explorer-0", "generate", 1.0), Moment("trainer", "MainThread", 2.0))
    tracer.close()
    tracer = Tracer(tmp_path, resume=True)
    tracer.add("explorer-0", "generate", "second", 3.0, 4.0)
    tracer.add("learner-0", "generate", "third", 3.0, 4.0)
    tracer.arrow("trained", Moment("explorer-0", "generate", 3.0), Moment("trainer", "MainThread", 4.0))
    tracer.close()
    events = load(tmp_path)
    assert [span["name"] for span in spans(events)] == ["first", "second", "third"]
    first, second, third = spans(events)
    assert (first["pid"], first["tid"]) == (second["pid"], second["tid"]) != (third["pid"], third["tid"])
    assert len(tracks(events)) == 3  # no track is declared twice
    assert sorted(event["id"] for event in events if event["ph"] == "s") == [1, 2]


def test_resume_after_the_clock_started_anew_stays_behind_what_is_there(tmp_path):
    late = time.monotonic() + 1000.0
    tracer = Tracer(tmp_path)
    tracer.add("p", "t", "before", late, late + 5.0)
    tracer.close()
    tracer = Tracer(tmp_path, resume=True)
    with tracer.span("after"):
        pass
    tracer.close()
    before, after = spans(load(tmp_path))
    assert after["ts"] >= before["ts"] + before["dur"]


def test_a_new_run_replaces_an_old_trace(tmp_path):
    (tmp_path / "trace.json").write_text("x" * 1000)
    Tracer(tmp_path).close()
    assert load(tmp_path) == []


def test_a_file_cut_anywhere_resumes_with_its_whole_events(tmp_path):
    tracer = Tracer(tmp_path)
    for number in range(3):
        tracer.add("p", "t", f"span {number}", number, number + 1, {"deep": {"er": number}})
    tracer.close()
    whole = (tmp_path / "trace.json").read_bytes()
    for cut in range(len(whole)):
        (tmp_path / "trace.json").write_bytes(whole[:cut])
        kept = read_trace(tmp_path)
        tracer = Tracer(tmp_path, resume=True)
        tracer.close()
        assert load(tmp_path) == kept == json.loads(whole)[: len(kept)]
    assert len(kept) == 5  # all but the closing bracket was there


def test_killed_at_any_instant_it_is_still_json(tmp_path):
    code = (
        "import pathlib, sys; from trainer.tracer import Tracer\n"
        "tracer = Tracer(pathlib.Path(sys.argv[1]))\n"
        "while True:\n"
        "    with tracer.span('train'): pass\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 60
    try:
        while not (tmp_path / "trace.json").exists() or (tmp_path / "trace.json").stat().st_size < 100_000:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:  # also where the test fails: it never ends by itself
        process.kill()
        process.wait(timeout=60)
    assert len(spans(load(tmp_path))) > 500


def test_no_run_directory_records_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracer = Tracer(None)
    with tracer.span("train"):
        pass
    tracer.counter("buffer", 0.0, resident=1)
    tracer.close()
    assert list(tmp_path.iterdir()) == []
