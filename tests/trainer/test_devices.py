import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from core.configfile import ConfigError, load_config, parse_command
from core.placement import Placement
from core.schema import Source
from trainer.devices import Devices, find_placement, memory_report, take_gpus
from trainer.dry_run import dry_run

LLAMA = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4}  # fmt: skip


ALL = "0,1,2,3,4,5,6,7"
Peers = Callable[[int, int], bool]


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    for name in ("LOCAL_WORLD_SIZE", "GROUP_RANK", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_gpu_workers_inherit_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    devices = take_gpus(load_config())
    assert devices.placement == Placement()
    assert devices.of_worker(Source.LEARNER, 0) is None


def test_workers_get_theirs_and_the_trainer_keeps_its_order(eight_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    devices = take_gpus(load_config(None, ["rollout.processes=2", "explorer.processes=2"]))
    assert "CUDA_VISIBLE_DEVICES" not in os.environ  # ranks 0 to 3 are cuda:0 to cuda:3 already
    assert [devices.of_worker(Source.LEARNER, index) for index in (0, 1)] == ["4", "5"]
    assert [devices.of_worker(Source.EXPLORER, index) for index in (0, 1)] == ["6", "7"]


def test_a_trainer_elsewhere_finds_its_gpus_first(eight_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "10,11,12,13,14,15,16,17")
    words = ["placement.trainer=[6, 7]", "placement.learner=[0, 1]", "rollout.tensor_parallel=2", "rollout.engine=vllm"]
    devices = take_gpus(load_config(None, words))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "16,17,10,11,12,13,14,15"
    assert devices.of_worker(Source.LEARNER, 0) == "10,11"  # by the names the trainer was given


def test_only_the_node_of_rank_0_has_workers(eight_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("GROUP_RANK", "1")
    assert find_placement(load_config()) == Placement(8, tuple(range(8)), (), (), 0.9)


def test_a_placement_that_cannot_be_is_refused_by_a_dry_run_too(eight_gpus: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="GPU 9 does not exist"):
        dry_run(parse_command(["placement.learner=[9]"]))
    said = dry_run(parse_command([f"run.dir={tmp_path / 'run'}"]))
    assert any(line.startswith("placement on 8 GPUs: trainer rank 0: 0; learner rollouts 0: 1") for line in said)
    assert Devices().placement.line() == "placement: no GPU, so every process runs on the CPU"


def test_memory_is_read_from_the_model_directories(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    config = load_config()
    report = memory_report(config, Devices(), tmp_path, tmp_path, ranks=1)
    assert [line.partition(":")[0] for line in report] == [
        "memory of a trainer rank", "host memory of rank 0", "memory of a learner rollout engine",
        "memory of an explorer engine",
    ]  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"model_type": "mamba"}))
    assert memory_report(config, Devices(), tmp_path, None, ranks=1)[0].startswith("memory is not estimated")


def test_each_gpu_s_own_memory_counts(eight_gpus: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """After take_gpus torch numbers the trainer's GPUs first; here GPU 3 is the trainer's and the large one."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ALL)
    number_as_cuda(monkeypatch, sizes={3: 80})
    config = load_config(None, ["placement.trainer=[3]"])
    report = memory_report(config, take_gpus(config), tmp_path, tmp_path, ranks=1)
    assert any(line.startswith("GPU 3 (80.0 GiB)") for line in report)
    assert any(line.startswith("GPU 0 (40.0 GiB)") for line in report)


def test_workers_see_the_gpu_of_shared_weights_last_and_once(eight_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Last: the worker's own GPUs keep their numbers."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "10,11,12,13,14,15,16,17")
    words = ["placement.trainer=[6]", "placement.learner=[0, 6]", "placement.explorer=[7]", "rollout.processes=2"]
    devices = take_gpus(load_config(None, [*words, "rollout.weights=device"]))
    assert devices.shared == 6
    assert [devices.of_worker(Source.LEARNER, index) for index in (0, 1)] == ["10,16", "16"]
    assert devices.of_worker(Source.EXPLORER, 0) == "17,16"  # it may be handed over
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "10,11,12,13,14,15,16,17")
    devices = take_gpus(load_config(None, words))
    assert devices.shared is None
    assert devices.of_worker(Source.LEARNER, 0) == "10"


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (["rollout.weights=device"], 5),
        (["rollout.weights=device", "placement.trainer=[5]", "placement.learner=[4]"], None),
        (["rollout.weights=device", "placement.trainer=[6]", "placement.learner=[6]"], None),
        (["rollout.weights=device", "rollout.roles=handover", "placement.learner=[4]"], 5),
        (["rollout.weights=device", "rollout.roles=handover", "placement.explorer=[7]", "placement.learner=[4]"], None),
        (["rollout.weights=memory"], None),
    ],
)
def test_gpus_that_cannot_read_rank_0_s_memory_are_refused(
    eight_gpus: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str], refused: int | None
) -> None:
    """Here GPU 5 and the trainer's cannot reach each other."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    defaults = ["placement.trainer=[6]", "placement.learner=[5]", "placement.explorer=[5]"]
    config = load_config(None, [*defaults, *words])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ALL)
    owner = config.placement.trainer[0]
    assert isinstance(owner, int)
    number_as_cuda(monkeypatch, peers=lambda own, other: other == owner != own and own != 5)
    devices = take_gpus(config)
    if refused is None:
        assert memory_report(config, devices, tmp_path, tmp_path, ranks=1)
        return
    said = rf"GPU {refused}, which generates, cannot read the memory of GPU 6.*use rollout\.weights=memory"
    with pytest.raises(ConfigError, match=said):
        memory_report(config, devices, tmp_path, tmp_path, ranks=1)


@pytest.mark.parametrize("near", [True, False])
def test_a_dry_run_asks_about_the_gpus_that_the_run_would_pair(
    eight_gpus: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, near: bool
) -> None:
    """The trainer's GPU is not the first: CUDA numbers it so only once it is told."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ALL)
    number_as_cuda(monkeypatch, peers=lambda own, other: ({own, other} == {5, 6}) == near, sizes={6: 80})
    monkeypatch.setattr("trainer.dry_run.check_start", lambda config, place: None)
    made = SimpleNamespace(learner_dir=tmp_path, explorer_dir=tmp_path, report=[])
    monkeypatch.setattr("trainer.dry_run.load_materials", lambda config, world, console: made)
    words = ["placement.trainer=[6]", "placement.learner=[5]", "rollout.weights=device", f"run.dir={tmp_path / 'run'}"]
    command = parse_command([*words, *(f"{role}.model={tmp_path}" for role in ("learner", "explorer"))])
    if near:
        assert any(line.startswith("GPU 6 (80.0 GiB)") for line in dry_run(command))
        return
    with pytest.raises(ConfigError, match="GPU 5, which generates, cannot read the memory of GPU 6"):
        dry_run(command)


def number_as_cuda(
    monkeypatch: pytest.MonkeyPatch, *, peers: Peers = lambda own, other: True, sizes: dict[int, int] | None = None
) -> None:
    """Questions by CUDA's numbers, which follow CUDA_VISIBLE_DEVICES, answered by the GPUs' own. `sizes` in GiB, 40
    where not given."""

    def own(number: int) -> int:
        return int(os.environ["CUDA_VISIBLE_DEVICES"].split(",")[number])

    def properties(number: int) -> SimpleNamespace:
        return SimpleNamespace(total_memory=(sizes or {}).get(own(number), 40) << 30)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: peers(own(one), own(other)))
