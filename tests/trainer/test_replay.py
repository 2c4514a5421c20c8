"""A run trains again from what it wrote down."""

from pathlib import Path

import pytest
import run_parts
from msgspec.structs import replace
from run_parts import arguments, train_here

from core.configfile import parse_command
from core.configkeys import ConfigError
from rollout.store import read_rollouts, rollout_file
from trainer.dry_run import dry_run
from trainer.replay import read_groups
from trainer.session import Session

SETTINGS = {"algorithm__steps": 4, "algorithm__anneal_steps": 3, "evaluation__problems": 4}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def asynchronous(root: Path) -> Path:
    words = arguments(root, root / "asynchronous", algorithm__lookahead=1, rollout__processes=2, **SETTINGS)
    return train_here(words)


@pytest.mark.slow
def test_a_replay_of_an_asynchronous_run_reaches_its_parameters(asynchronous: Path) -> None:
    assert max(line["off_policy/staleness_max"] for line in run_parts.training_lines(asynchronous)) == 1
    log = asynchronous.parent / "replay.log"
    text = run_parts.finish(run_parts.start(["--replay", str(asynchronous)], log=log), log=log)
    replay = Path(f"{asynchronous}-replay")
    assert "replay: the parameters are those of" in text
    assert run_parts.weights_bytes(replay) == run_parts.weights_bytes(asynchronous)
    assert read_rollouts(replay).equals(read_rollouts(asynchronous))
    ours, theirs = run_parts.training_lines(replay), run_parts.training_lines(asynchronous)
    for name in ("reward", "loss", "kl", "grad_norm", "learner/ess", "explorer/ratio_max"):
        assert [line.get(name) for line in ours] == [line.get(name) for line in theirs], name
    assert not (replay / "logs" / "learner-0.log").exists()


@pytest.mark.slow
def test_a_replay_may_change_what_training_does_and_says_so(asynchronous: Path, capfd) -> None:
    replay = train_here(["--replay", str(asynchronous), f"run.dir={asynchronous}-other", "learner.learning_rate=2e-3"])
    assert run_parts.weights_bytes(replay) != run_parts.weights_bytes(asynchronous)
    assert "DIFFER" in capfd.readouterr().out


def test_the_configuration_comes_from_the_run(asynchronous: Path) -> None:
    command = parse_command(["--replay", str(asynchronous), "algorithm.epochs=2"])
    assert command.replay == asynchronous
    assert command.config.run.dir == f"{asynchronous}-replay"
    assert (command.config.algorithm.lookahead, command.config.algorithm.epochs) == (1, 2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--replay"], "name the run directory"),
        (["--replay", "nowhere"], "nowhere holds no run"),
    ],
)
def test_wrong_calls_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_command(words)


def test_a_file_or_a_resume_beside_it_is_refused(asynchronous: Path) -> None:
    for word in ("configs/tiny.toml", "--resume"):
        with pytest.raises(ConfigError, match="takes the configuration from RUN"):
            parse_command(["--replay", str(asynchronous), word])


@pytest.mark.parametrize(
    "word", ["algorithm.mixing=authors_code", "algorithm.group_size=2", "algorithm.anneal_steps=2"]
)
def test_what_the_record_already_fixed_is_refused(asynchronous: Path, word: str) -> None:
    with pytest.raises(ConfigError, match=rf"{word.partition('=')[0]} was .* needs a run of its own"):
        parse_command(["--replay", str(asynchronous), word])


@pytest.mark.parametrize("place", [".", "inside", ".."])
def test_a_replay_never_writes_where_it_reads(asynchronous: Path, place: str) -> None:
    """--clean would delete the record first."""
    with pytest.raises(ConfigError, match="lie in one another"):
        parse_command(["--replay", str(asynchronous), "--clean", f"run.dir={asynchronous / place}"])


def test_the_same_questions_as_other_prompts_are_refused(asynchronous: Path, tmp_path: Path) -> None:
    words = ["--replay", str(asynchronous), "data.suffix= 1", f"run.dir={tmp_path / 'c'}"]
    with pytest.raises(ValueError, match=r"keep run\.seed, data"), Session(parse_command(words)) as session:
        list(session.stream.parts(1))


def test_other_prompts_and_gaps_are_refused(asynchronous: Path, tmp_path: Path) -> None:
    words = ["--replay", str(asynchronous), "run.seed=1", f"run.dir={tmp_path / 'a'}"]
    with pytest.raises(ValueError, match=r"keep run\.seed"), Session(parse_command(words)) as session:
        list(session.stream.parts(1))
    gap = tmp_path / "gap"
    (gap / "rollouts").mkdir(parents=True)
    (gap / "config.resolved.json").write_bytes((asynchronous / "config.resolved.json").read_bytes())
    for step in (1, 3):
        rollout_file(gap, step).write_bytes(rollout_file(asynchronous, step).read_bytes())
    command = parse_command(["--replay", str(gap), f"run.dir={tmp_path / 'b'}"])
    with pytest.raises(ConfigError, match=r"without a gap, but \[1, 3\]"), Session(command):
        pytest.fail("a gap was not noticed")


def test_a_run_that_ended_within_its_annealing_can_be_replayed(asynchronous: Path, tmp_path: Path) -> None:
    part = tmp_path / "part"
    (part / "rollouts").mkdir(parents=True)
    (part / "config.resolved.json").write_bytes((asynchronous / "config.resolved.json").read_bytes())
    for step in (1, 2):
        rollout_file(part, step).write_bytes(rollout_file(asynchronous, step).read_bytes())
    command = parse_command(["--replay", str(part)])
    dry_run(command)
    with Session(command) as session:
        algorithm = session.config.algorithm
        assert (algorithm.steps, algorithm.anneal_steps) == (2, 3)
        sources = [[row.completion.key.source for row in group.rows] for group in next(session.stream.parts(2))]
    assert sources == [["explorer"] * 2 + ["learner"] * 2] * 8


def test_groups_read_back_as_they_were_written(asynchronous: Path) -> None:
    command = parse_command(["--replay", str(asynchronous), f"run.dir={asynchronous}-read"])
    with Session(command) as session:
        prompts = session.materials.demand.prompts_at(2)
        algorithm = session.config.algorithm
        groups = read_groups(asynchronous, 2, prompts, algorithm)
        split = read_groups(asynchronous, 2, prompts, replace(algorithm, mixing="authors_code"))
        unscaled = read_groups(asynchronous, 2, prompts, replace(algorithm, advantage_scale="none"))
    recorded = read_rollouts(asynchronous, 2, columns=["advantage", "reward"]).to_pydict()
    assert [advantage for group in groups for advantage in group.advantages] == recorded["advantage"]
    for group in unscaled:
        rewards = [row.reward for row in group.rows]
        assert group.advantages == pytest.approx([reward - sum(rewards) / len(rewards) for reward in rewards])
    assert [len(group.rows) for group in groups] == [4] * 8
    assert [len(group.rows) for group in split] == [2] * 16
    assert groups[3].prompt == prompts[3]
    row = groups[3].rows[-1].completion
    assert (row.key.step, row.key.slot, row.key.source) == (2, 3, "learner")
    assert len(row.tokens) == len(row.logprobs) > 0
