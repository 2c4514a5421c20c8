"""Key files: made for their owner alone, refused when others may read or replace them."""

from pathlib import Path

import pytest

from rollout.keys import main, make_keys, trainer_keys, worker_keys


def test_keys_are_made_private_and_belong_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "keys"
    assert main([str(directory)]) == 0
    assert capsys.readouterr().out.count("wrote ") == 4
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in directory.iterdir()} == dict.fromkeys(
        ["trainer.key", "trainer.pub", "worker.key", "worker.pub"], "0o600"
    )
    trainer, worker = trainer_keys(directory), worker_keys(directory)
    assert trainer.allowed == {worker.public}
    assert worker.trainer == trainer.public
    assert len({trainer.public, trainer.secret, worker.public, worker.secret}) == 4


def test_further_workers_get_pairs_of_their_own(tmp_path: Path) -> None:
    make_keys(tmp_path)
    before = trainer_keys(tmp_path)
    make_keys(tmp_path, worker="rack7")
    after = trainer_keys(tmp_path)
    assert after.secret == before.secret
    assert len(after.allowed) == 2
    assert worker_keys(tmp_path).public in before.allowed  # worker.key, where it is there


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_keys(tmp_path)
    secret = (tmp_path / "worker.key").read_bytes()
    assert main([str(tmp_path)]) == 2
    assert "exists: choose another" in capsys.readouterr().err
    assert (tmp_path / "worker.key").read_bytes() == secret


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o644])
@pytest.mark.parametrize("name", ["trainer.key", "trainer.pub", "worker.pub"])
def test_keys_that_others_may_touch_are_refused(tmp_path: Path, name: str, mode: int) -> None:
    make_keys(tmp_path)
    (tmp_path / name).chmod(mode)
    with pytest.raises(ValueError, match=rf"{name} has mode {mode:04o}.*chmod 600"):
        trainer_keys(tmp_path)


def test_missing_and_broken_keys_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trainer\.pub is missing: make keys with"):
        trainer_keys(tmp_path)
    with pytest.raises(ValueError, match=r"no worker\.key"):
        worker_keys(tmp_path)
    make_keys(tmp_path)
    (tmp_path / "trainer.key").write_text("short")
    with pytest.raises(ValueError, match="not a key: 5 bytes instead of 40"):
        trainer_keys(tmp_path)


def test_a_worker_machine_needs_no_trainer_secret(tmp_path: Path) -> None:
    make_keys(tmp_path, worker="rack7")
    (tmp_path / "trainer.key").unlink()
    assert worker_keys(tmp_path).trainer == (tmp_path / "trainer.pub").read_bytes().strip()
