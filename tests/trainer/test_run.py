"""Whole runs: real processes, real sockets, real training of tiny models (issue: Spine; promises 1, 3 and 5)."""

import html.parser
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import run_parts
import torch
from run_parts import TORCHRUN, arguments, eventually, reference_run, train_here
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.anneal import explorer_quota
from rollout.store import read_rollouts
from trainer.manifest import verify
from trainer.session import Session
from trainer.tracer import read_trace

QUOTAS = [(explorer_quota(step, group_size=4, anneal_steps=4)) for step in range(1, 7)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def reference(root: Path) -> Path:
    return reference_run(root)[0]


@pytest.mark.slow
def test_every_line_has_the_quota_of_algorithm_1(reference: Path) -> None:
    assert QUOTAS == [4, 3, 2, 0, 0, 0]
    lines = run_parts.training_lines(reference)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["mix/explorer_quota"] for line in lines] == QUOTAS
    assert [line["mix/learner_quota"] for line in lines] == [4 - quota for quota in QUOTAS]
    assert [line["explorer/rows"] for line in lines] == [8 * quota for quota in QUOTAS]
    assert all(line["off_policy/staleness_max"] == 0 for line in lines)  # lookahead 0


def test_every_group_that_trained_is_exact(reference: Path) -> None:
    for step, quota in enumerate(QUOTAS, start=1):
        assert run_parts.group_counts(reference, step) == {(quota, 4 - quota)}
    expected = Counter(
        (step, slot, sample, source)
        for step, quota in enumerate(QUOTAS, start=1)
        for slot in range(8)
        for source, count in (("explorer", quota), ("learner", 4 - quota))
        for sample in range(count)
    )
    assert run_parts.trained_keys(reference) == expected


def test_learner_rows_are_of_the_weights_of_the_step_before(reference: Path) -> None:
    rows = read_rollouts(reference, columns=["step", "source", "version"]).to_pylist()
    assert {row["version"] for row in rows if row["source"] == "explorer"} == {0}
    assert all(row["version"] == row["step"] - 1 for row in rows if row["source"] == "learner")


@pytest.mark.slow
def test_a_step_trains_by_its_mini_batches_and_is_the_same_as_a_whole(
    reference: Path, root: Path, tmp_path: Path
) -> None:
    whole = train_here(arguments(root, tmp_path / "run", algorithm__stream_mini_batches="false", data__eval=""))
    assert run_parts.weights_bytes(whole) == run_parts.weights_bytes(reference)
    for run_dir, parts in ((reference, 2), (whole, 1)):
        spans = [event for event in read_trace(run_dir) if event["ph"] == "X" and event["name"] == "wait"]
        assert Counter(span["args"]["step"] for span in spans) == dict.fromkeys(range(1, 7), parts)


def test_advantages_are_over_the_combined_group(reference: Path) -> None:
    rows = read_rollouts(reference, 2, columns=["slot", "source", "reward", "advantage"]).to_pylist()
    assert {row["source"] for row in rows} == {"explorer", "learner"}
    for slot in range(8):
        group = [row for row in rows if row["slot"] == slot]
        rewards = torch.tensor([row["reward"] for row in group], dtype=torch.float64)
        expected = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        assert [row["advantage"] for row in group] == pytest.approx(expected.tolist())


def test_metrics_of_every_source_are_measured(reference: Path) -> None:
    line = run_parts.training_lines(reference)[1]
    for source in ("explorer", "learner"):
        for name in (
            "reward", "ratio_mean", "ratio_max", "clip_fraction", "ess", "kl_k1", "kl_k3", "masked_fraction", "length",
            "truncated", "weight_mean",
        ):  # fmt: skip
            assert isinstance(line[f"{source}/{name}"], float), name
    for name in ("groups/all_fail", "groups/all_pass", "frac_reward_zero_std", "loss", "kl", "entropy", "grad_norm"):
        assert isinstance(line[name], float), name
    assert line["learner/ratio_mean"] == 1.0  # anchored at the learner itself
    assert line["explorer/ratio_mean"] != 1.0  # anchored at the sampler


def test_the_ledger_is_conserved(reference: Path) -> None:
    report = run_parts.ledger(reference)
    assert report["conserved"]
    for source, owed in (("explorer", 8 * sum(QUOTAS)), ("learner", 8 * sum(4 - quota for quota in QUOTAS))):
        account = report[source]
        assert account["produced"] == account["inserted"] == account["trained"] == owed
        assert (account["dropped"], account["rejected"], account["in_flight"], account["resident"]) == ({}, {}, 0, 0)


def test_it_is_evaluated_before_and_after(reference: Path) -> None:
    lines = run_parts.evaluation_lines(reference)
    assert [line["step"] for line in lines] == [0, 6]
    assert all({"eval/pass@1", "eval/pass@2"} <= line.keys() and line["eval/completions"] == 16 for line in lines)


def test_the_model_loads_in_transformers_and_has_moved(reference: Path, root: Path) -> None:
    directory = reference / "model"
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    answer = model.generate(**tokenizer("8 5 9 7 = 15 :", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > 7
    before = load_file(run_parts.tiny_family(root).learner / "model.safetensors")
    after = load_file(directory / "model.safetensors")
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_checkpoints_verify_and_only_the_newest_stay(reference: Path) -> None:
    found = sorted(path.name for path in (reference / "checkpoints").iterdir())
    assert found == ["step_4", "step_6"]
    assert [verify(reference / "checkpoints" / name, int(name[5:])) for name in found] == [None, None]
    saved = (reference / "checkpoints" / "step_6" / "model.safetensors").read_bytes()
    assert saved == run_parts.weights_bytes(reference)


def test_the_trace_is_json_with_a_track_of_each_worker(reference: Path) -> None:
    events = json.loads((reference / "trace.json").read_text())
    events = events if isinstance(events, list) else events["traceEvents"]
    names = json.dumps([event for event in events if event["ph"] == "M"])
    assert "explorer-0" in names
    assert "learner-0" in names
    spans = [event for event in events if event["ph"] == "X"]
    assert spans
    assert all(event["dur"] >= 0 for event in spans)


def test_the_report_is_one_self_contained_page(reference: Path) -> None:
    class Links(html.parser.HTMLParser):
        found: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found += [value for name, value in attrs if name in ("src", "href") and value]

    page = (reference / "report.html").read_text()
    Links().feed(page)
    assert not [link for link in Links.found if not link.startswith(("#", "data:"))]
    assert len(page) > 10_000


def test_the_console_says_what_happened(root: Path) -> None:
    text = reference_run(root)[1]
    assert "explorer+learner completions per prompt, by step: 4+0 in 1, 3+1 in 2, 2+2 in 3, 0+4 in 4-6" in text
    assert "step 1/6" in text
    assert "step 6/6" in text
    assert "(mean, 8 problems x 2); above 0.5: pass@1" in text  # run_rewards.pluses is graded
    assert text.count("report.html") == 2  # where to look while it trains, and at the end
    assert "real_accelerator" not in text  # of DeepSpeed, which transformers imports as it saves
    assert "Traceback" not in text


def test_no_process_outlives_the_run(reference: Path) -> None:
    log = (reference / "logs" / "explorer-0.log").read_text()
    endpoint = log.split("joining ")[1].split()[0]
    assert endpoint.startswith("ipc://")
    eventually(lambda: not run_parts.processes_naming(endpoint), "workers gone")
    assert not run_parts.processes_naming(reference)
    assert not Path(endpoint.removeprefix("ipc://")).exists()
    assert not (reference / "endpoint").exists()


@pytest.fixture(scope="module")
def ranks(root: Path) -> Path:
    """The run of SETTINGS on two ranks of one node."""
    run_dir, log = root / "ranks", root / "ranks.log"
    launcher = (*TORCHRUN, "--nproc-per-node", "2")
    text = run_parts.finish(run_parts.start(arguments(root, run_dir), log=log, launcher=launcher), log=log)
    assert text.count("step 6/6") == 1  # one rank speaks
    return run_dir


@pytest.mark.slow
def test_two_ranks_train_what_one_trains(reference: Path, ranks: Path) -> None:
    """Up to the order of sums over ranks."""
    assert run_parts.trained_keys(ranks) == run_parts.trained_keys(reference)
    one, two = load_file(reference / "model" / "model.safetensors"), load_file(ranks / "model" / "model.safetensors")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5)
    ours, theirs = run_parts.training_lines(reference), run_parts.training_lines(ranks)
    assert all(line["grad_norm"] > 0 for line in ours)
    for name in ("reward", "loss", "kl", "grad_norm"):
        measured = [[line[name] for line in lines if name in line] for lines in (ours, theirs)]  # no kl at α = 1
        assert measured[1] == pytest.approx(measured[0], abs=1e-4), name
    assert run_parts.ledger(ranks)["conserved"]


@pytest.mark.slow
def test_the_trace_has_the_stages_of_every_rank(ranks: Path) -> None:
    events = read_trace(ranks)
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    trained = Counter(names[event["pid"]] for event in events if event["ph"] == "X" and event["name"] == "train")
    assert trained == {"trainer": 12, "trainer rank 1": 12}  # 6 steps of two updates
    stages = {event["name"] for event in events if event["ph"] == "X" and names[event["pid"]] == "trainer rank 1"}
    assert {"wait", "pack", "score", "train", "publish"} <= stages


@pytest.mark.slow
def test_two_nodes_of_a_rank_each_train_the_bits_of_one_node_with_two(ranks: Path, root: Path, tmp_path: Path) -> None:
    """As docs/cluster.md starts them: a torchrun per node, of fixed rank, with rank 0's address."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    run_dir, logs, nodes = tmp_path / "run", [tmp_path / f"node_{rank}.log" for rank in range(2)], []
    words = arguments(root, run_dir, data__eval="")
    try:
        for rank, log in enumerate(logs):
            place = ("--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1")
            address = ("--master-addr", "127.0.0.1", "--master-port", str(port))
            nodes.append(run_parts.start(words, log=log, launcher=(*TORCHRUN, *place, *address)))
        texts = [run_parts.finish(node, log=log) for node, log in zip(nodes, logs)]
    finally:
        for node in nodes:
            node.terminate()  # torchrun passes it on; one that has ended hears nothing
    assert [text.count("step 6/6") for text in texts] == [1, 0]
    assert [text.count("starting the rollout workers") for text in texts] == [1, 0]  # rank 0's node has them
    assert run_parts.weights_bytes(run_dir) == run_parts.weights_bytes(ranks)
    assert run_parts.trained_keys(run_dir) == run_parts.trained_keys(ranks)
    assert run_parts.ledger(run_dir)["conserved"]


@pytest.fixture
def socket_path() -> Iterator[Path]:
    """Short enough for an ipc address, whatever pytest calls its directories."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="s2l-") as folder:
        yield Path(folder) / "s"


@pytest.mark.slow
def test_explorers_started_by_hand_join_a_waiting_run_and_share_the_work(
    root: Path, tmp_path: Path, socket_path: Path
) -> None:
    run_dir, hands = tmp_path / "run", []

    def start_explorers() -> None:
        eventually((run_dir / "endpoint").exists, "the run listens")
        for number in range(2):
            command = [sys.executable, "-m", "rollout.explorer", "--connect", f"ipc://{socket_path}"]
            command += ["--name", f"hand-{number}", "--threads", "1"]
            hands.append(subprocess.Popen(command, cwd=run_parts.REPOSITORY, env=run_parts.environment()))

    def wait_for_both(session: Session, step: int) -> None:
        """The second may load longer than the first takes for step 1."""
        pool = session.stream.rollouts.pool

        def ready() -> int:
            workers = pool.counters()["workers"].items()
            return sum(name.startswith("hand-") and worker["state"] == "ready" for name, worker in workers)

        eventually(lambda: ready() == 2, "both explorers are ready")

    words = arguments(
        root, run_dir, explorer__processes=0, stream__endpoint=f"ipc://{socket_path}", explorer__ahead_steps=1,
        algorithm__schedule="constant", algorithm__alpha=0.5, algorithm__steps=3, rollout__lease_prompts=1,
    )  # fmt: skip
    starter = threading.Thread(target=start_explorers)
    starter.start()
    try:
        train_here(words, on_step=wait_for_both)
        starter.join()
        assert [hand.wait(timeout=60) for hand in hands] == [0, 0]
    finally:
        for hand in hands:
            hand.kill()
    rows = read_rollouts(run_dir, columns=["step", "source", "worker"]).to_pylist()
    makers = {row["worker"].partition(".")[0] for row in rows if row["source"] == "explorer" and row["step"] > 1}
    assert makers == {"hand-0", "hand-1"}
    assert [run_parts.group_counts(run_dir, step) for step in (1, 2, 3)] == [{(2, 2)}] * 3
    assert run_parts.ledger(run_dir)["conserved"]


@pytest.mark.slow
def test_an_explorer_killed_in_the_middle_costs_nothing_but_time(root: Path, tmp_path: Path) -> None:
    killed = []

    def kill_explorers(session: Session, step: int) -> None:
        """One after step 1 and another after step 2, while they generate what follows."""
        workers = session.stream.rollouts.pool.counters()["workers"].values()
        alive = [worker["pid"] for worker in workers if worker["role"] == "explorer" and worker["state"] == "ready"]
        if step <= 2 and alive:
            os.kill(alive[0], signal.SIGKILL)
            killed.append(alive[0])

    words = arguments(
        root, tmp_path / "run", explorer__processes=2, explorer__ahead_steps=4, algorithm__schedule="constant",
        algorithm__alpha=0.5, algorithm__steps=4, rollout__lease_prompts=1,
    )  # fmt: skip
    run_dir = train_here(words, on_step=kill_explorers)
    assert killed
    assert run_parts.trained_keys(run_dir) == Counter(
        (step, slot, sample, source)
        for step in range(1, 5)
        for slot in range(8)
        for sample in range(2)
        for source in ("explorer", "learner")
    )
    assert run_parts.ledger(run_dir)["conserved"]


@pytest.mark.slow
def test_completions_whose_reward_fails_are_dropped_counted_and_replaced_never_zero(root: Path, tmp_path: Path) -> None:
    words = arguments(
        root, tmp_path / "run", reward__function="run_rewards:fragile", reward__timeout_s=2, data__eval="",
        algorithm__prompts_per_step=16, algorithm__steps=4, algorithm__anneal_steps=4, reward__max_tries=6,
    )  # fmt: skip
    run_dir = train_here(words)
    rows = read_rollouts(run_dir, columns=["step", "slot", "source", "sample", "reward"]).to_pylist()
    assert {row["reward"] for row in rows} == {1.0, 2.0}
    for step, quota in enumerate(QUOTAS[:3], start=1):
        assert run_parts.group_counts(run_dir, step) == {(quota, 4 - quota)}
    report = run_parts.ledger(run_dir)
    assert report["conserved"]
    dropped = Counter(report["explorer"]["dropped"]) + Counter(report["learner"]["dropped"])
    assert dropped["reward_raised"] > 0
    assert dropped["reward_timeout"] > 0
    trained = report["explorer"]["trained"] + report["learner"]["trained"]
    assert trained == len(rows)
    groups = {(row["step"], row["slot"]) for row in rows}
    assert len(groups) < 4 * 16  # prompts that can never be scored are dropped whole …
    assert len(rows) == 4 * len(groups)
    replaced = report["explorer"]["replaced"] + report["learner"]["replaced"]
    assert replaced >= sum(row["sample"] >= (QUOTAS[row["step"] - 1] if row["source"] == "explorer" else
                           4 - QUOTAS[row["step"] - 1]) for row in rows) > 0  # fmt: skip
    line = run_parts.training_lines(run_dir)[-1]
    assert line["fault/replaced"] == replaced  # … and counted
    assert line["fault/dropped"] == dropped.total()
    reasons = (run_dir / "logs" / "reward.log").read_text()
    assert "raised RuntimeError: this prompt can never be scored (run_rewards.py:20)" in reasons
    assert ": no score within 2 s (reward.timeout_s)" in reasons


@pytest.mark.slow
def test_a_run_goes_on_from_where_it_ended_with_more_steps(reference: Path, root: Path, tmp_path: Path) -> None:
    """And a reward in verl's signature; resuming a finished run with no more steps changes nothing."""
    (tmp_path / "my_rewards.py").write_text((run_parts.HERE / "run_rewards.py").read_text())
    words = arguments(
        root, tmp_path / "run", algorithm__steps=2, algorithm__anneal_steps=2,
        reward__function="my_rewards:verl_style",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)  # a user's module is found where the run was started
        run_dir = train_here(words)
        assert {row["reward"] for row in read_rollouts(run_dir, columns=["reward"]).to_pylist()} <= {0.5, -0.5}
        saved, lines = run_parts.weights_bytes(run_dir), run_parts.training_lines(run_dir)
        train_here([*words, "--resume"])
        assert run_parts.weights_bytes(run_dir) == saved
        assert run_parts.training_lines(run_dir) == lines
        train_here([*words, "algorithm.steps=3", "--resume"])
    assert [line["step"] for line in run_parts.training_lines(run_dir)] == [1, 2, 3]
    assert [line["step"] for line in run_parts.evaluation_lines(run_dir)] == [0, 2, 3]
    assert run_parts.weights_bytes(run_dir) != saved
