from typing import Any

import pytest

from core.config import Config
from core.configfile import ConfigError, load_config, parse_command
from core.placement import Placement, place, visible_devices


def config(*overrides: str) -> Config:
    return load_config(None, overrides)


def test_without_a_gpu_nothing_is_placed() -> None:
    assert place(config(), 0) == Placement()
    assert place(config("run.device=cpu", "placement.trainer=[0]"), 8) == Placement()
    assert "CPU" in Placement().line()


@pytest.mark.parametrize(
    ("overrides", "gpus", "ranks", "trainer", "learner", "explorer"),
    [
        ((), 1, 1, (0,), ((0,),), ((0,),)),  # one GPU: all share it
        ((), 2, 1, (0,), ((1,),), ((1,),)),  # engines share what the trainer leaves
        ((), 3, 1, (0,), ((1,),), ((2,),)),
        (
            ("rollout.processes=2", "explorer.processes=2"),
            8, 4, (0, 1, 2, 3), ((4,), (5,)), ((6,), (7,)),
        ),
        (("rollout.tensor_parallel=2", "rollout.engine=vllm"), 8, 4, (0, 1, 2, 3), ((4, 5),), ((6, 7),)),
        (("rollout.tensor_parallel=2", "rollout.engine=vllm"), 6, 4, (0, 1, 2, 3), ((4, 5),), ((4, 5),)),
        # Less than one block is left beside the trainer: engines go over all GPUs.
        (("rollout.tensor_parallel=2", "rollout.engine=vllm"), 4, 3, (0, 1, 2), ((0, 1),), ((2, 3),)),
        (("algorithm.anneal_steps=0",), 2, 1, (0,), ((1,),), ()),  # plain GRPO has no explorer
        (("explorer.processes=0", "stream.endpoint=ipc:///tmp/x"), 2, 1, (0,), ((1,),), ()),
        # A list wins, and "auto" takes the others.
        (("placement.trainer=[3]",), 4, 1, (3,), ((0,),), ((1,),)),
        (("placement.learner=[0]", "placement.explorer=[1]"), 4, 2, (2, 3), ((0,),), ((1,),)),
        (("placement.explorer=[2, 2]", "explorer.processes=2"), 3, 1, (0,), ((1,),), ((2,), (2,))),
    ],
)  # fmt: skip
def test_who_gets_which_gpu(
    overrides: tuple[str, ...], gpus: int, ranks: int, trainer: Any, learner: Any, explorer: Any
) -> None:
    found = place(config(*overrides), gpus, ranks=ranks)
    assert (found.trainer, found.learner, found.explorer) == (trainer, learner, explorer)


@pytest.mark.parametrize(
    ("replicas", "width", "ranks", "gpus"), [(4, 1, 4, 8), (3, 2, 2, 8), (2, 4, 8, 16), (1, 8, 8, 16)]
)
def test_replicas_take_their_own_gpus_replicas_times_width_in_all(
    replicas: int, width: int, ranks: int, gpus: int
) -> None:
    words = (f"rollout.processes={replicas}", f"rollout.tensor_parallel={width}", "rollout.engine=vllm")
    grpo = "algorithm.anneal_steps=0"
    found = place(config(*words, grpo), gpus, ranks=ranks)
    taken = [gpu for block in found.learner for gpu in block]
    assert [len(block) for block in found.learner] == [width] * replicas
    assert len(set(taken)) == replicas * width <= gpus - ranks
    assert not set(taken) & set(found.trainer)
    assert found.memory_share == pytest.approx(0.9)  # each GPU holds a part of one engine
    named = place(config(*words, grpo, f"placement.learner={taken[::-1]}"), gpus, ranks=ranks)
    assert [gpu for block in named.learner for gpu in block] == taken[::-1]
    assert named.memory_share == pytest.approx(0.9)


def test_engines_of_one_gpu_share_its_memory() -> None:
    assert place(config(), 1).memory_share == pytest.approx(0.45)
    assert place(config(), 3).memory_share == pytest.approx(0.9)
    assert place(config("rollout.memory_share=0.6", "explorer.processes=2"), 1).memory_share == pytest.approx(0.2)


def test_other_nodes_have_trainer_ranks_only() -> None:
    assert place(config(), 8, ranks=8, engines=False) == Placement(8, tuple(range(8)), (), (), 0.9)


@pytest.mark.parametrize(
    ("overrides", "gpus", "ranks", "parts"),
    [
        (("placement.learner=[7]",), 4, 1, ("GPU 7 does not exist", "0 to 3")),
        (("placement.learner=[-1]",), 4, 1, ("GPU -1 does not exist",)),
        (("placement.trainer=[0]",), 0, 1, ("placement.trainer = [0]", "no GPU is visible", "run.device=cpu")),
        (("placement.trainer=[0, 1]",), 4, 1, ("1 trainer rank", "--nproc-per-node 2")),
        (("placement.trainer=[1, 1]",), 4, 2, ("each once",)),
        ((), 2, 3, ("3 trainer ranks and 2 visible GPUs", "at most 2 ranks")),
        (("placement.learner=[1, 2, 3]", "rollout.processes=2"), 4, 1, ("rollout.processes = 2", "3 are named")),
        (
            ("placement.explorer=[1, 1]", "rollout.tensor_parallel=2", "rollout.engine=vllm"),
            4, 1, ("stands twice in one block",),
        ),
        (("rollout.tensor_parallel=4", "rollout.engine=vllm"), 2, 1, ("rollout.tensor_parallel = 4", "use at most 2")),
        (("rollout.engine=vllm", "rollout.memory_share=1"), 1, 1, ("memory_share = 1", "rollout.memory_share=0.9")),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_the_remedy(
    overrides: tuple[str, ...], gpus: int, ranks: int, parts: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as raised:
        place(config(*overrides), gpus, ranks=ranks)
    message = str(raised.value)
    assert all(part in message for part in parts), message
    assert len(message.splitlines()) == 1


def test_lookahead_is_fine_on_gpus_of_its_own_and_one_engine_beside_no_trainer_may_fill_them() -> None:
    found = place(config("algorithm.lookahead=1", "rollout.memory_share=1"), 3)
    assert found.learner == ((1,),)


def test_the_line_names_every_process_and_what_is_idle() -> None:
    line = place(config("rollout.tensor_parallel=2", "rollout.engine=vllm"), 8, ranks=2).line()
    assert "trainer rank 1: 1" in line
    assert "learner rollouts 0: 2+3" in line
    assert "explorer 0: 4+5" in line
    assert "idle: 6, 7" in line


def test_a_worker_sees_its_gpus_by_the_trainers_own_names() -> None:
    assert visible_devices([1, 2], None) == "1,2"
    assert visible_devices([1, 2], "4, 5,GPU-7a") == "5,GPU-7a"


def test_the_keys_take_a_list_or_auto() -> None:
    command = parse_command(["placement.trainer=[0, 1]", "placement.learner=auto"])
    assert (command.config.placement.trainer, command.config.placement.learner) == ((0, 1), "auto")
    with pytest.raises(ConfigError, match=r'placement.trainer = "atuo".*expected a list of integers.* or "auto"'):
        parse_command(["placement.trainer=atuo"])


def test_auto_is_the_embedded_engine_for_the_embedded_models() -> None:
    """On an H200 with vLLM installed the embedded default waited over a minute for vLLM to compile its models."""
    assert load_config(None).engine == "torch"
    assert load_config(None, ["rollout.engine=vllm"]).engine == "vllm"
    assert load_config(None, ["learner.model=/models/a", "explorer.model=/models/b"]).engine == "auto"


def test_one_gpu_may_train_and_generate_ahead() -> None:
    found = place(config("algorithm.lookahead=1"), 1)
    assert (found.trainer, found.learner) == ((0,), ((0,),))
