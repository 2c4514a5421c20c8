"""bench.engines measures what it says: whole batches, and new weights in the middle of one."""

import pytest

from bench import engines, publishing, rollout
from core.schema import Sampling
from rollout.torch_engine import TorchEngine


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    rollout.save_model(directory)
    return directory


def test_a_row_has_rates_and_the_time_of_an_update(model):
    row = engines.measure(TorchEngine(model), model / "model.safetensors", rows=8, new_tokens=6, rounds=1)
    assert row["rows"] == 8
    assert row["tokens_s"] > 0
    assert row["update_s"] >= row["load_s"] > 0


def test_the_update_falls_into_the_middle_of_the_batch(model):
    engine, seen = TorchEngine(model), []
    sampling = Sampling(temperature=1.0, max_tokens=6, stop_token_ids=())

    class Watched:
        def load_weights(self, file):
            engine.load_weights(file)

        def generate(self, *arguments, **options):
            for row in engine.generate(*arguments, **options):
                seen.append(row.versions)
                yield row

    engines.update(Watched(), engines.make_requests(16, engine.vocab_size), sampling, model / "model.safetensors")
    assert seen == [((0, 0), (3, 1))] * 16


def test_the_command_runs_an_engine_in_a_process_of_its_own(model):
    rows = engines.in_child("torch", model, "--rows", "8", "16", "--rounds", "1", "--new-tokens", "4")
    assert [(row["engine"], row["rows"]) for row in rows] == [("torch", 8), ("torch", 16)]


def test_publishing_has_a_row_for_each_way(tmp_path):
    rows = publishing.measure(mib=1, rounds=1, directory=tmp_path)
    assert [row["weights"] for row in rows] == ["file", "memory", "device"]
    assert rows[0]["ratio"] == 1.0
    assert all(row["publish_s"] > 0 and row["worker_s"] > 0 for row in rows)
    assert [entry.name for entry in tmp_path.iterdir()] == ["version.safetensors"]
