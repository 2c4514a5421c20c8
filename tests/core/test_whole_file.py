import pytest

from core.whole_file import whole_file


def test_a_file_is_old_until_it_is_new(tmp_path):
    file = tmp_path / "ledger.json"
    file.write_text("old")
    with whole_file(file) as partial:
        partial.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]


def test_what_fails_leaves_nothing_and_changes_nothing(tmp_path):
    file = tmp_path / "ledger.json"

    def interrupted():
        with whole_file(file) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError), whole_file(file):
        pass
