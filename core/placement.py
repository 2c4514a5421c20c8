"""Which process runs on which GPU of a node: decided once, from the configuration and the number of visible GPUs."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from core.anneal import explorer_needed
from core.config import Config, Gpus
from core.configkeys import ConfigError

# What vLLM engines may fill of a GPU on which a trainer rank lives too: its context and allocator need the rest.
MAX_SHARE_BESIDE_TRAINER = 0.9
Named = Mapping[str, Gpus]  # the lists by role


class Placement(NamedTuple):
    """GPUs by their position among the visible ones; all empty where there is none.

    `trainer`: one per local rank. `learner`, `explorer`: the block of each process, tensor_parallel GPUs long.
    `memory_share`: part of a GPU's memory that one engine may fill; those on one GPU share rollout.memory_share.

    Example: Placement(gpus=8, trainer=(0, 1, 2, 3), learner=((4, 5),), explorer=((6,), (7,)), memory_share=0.9)
    """

    gpus: int = 0
    trainer: tuple[int, ...] = ()
    learner: tuple[tuple[int, ...], ...] = ()
    explorer: tuple[tuple[int, ...], ...] = ()
    memory_share: float = 0.9

    @property
    def engines(self) -> Counter[int]:
        """How many engines each GPU holds a part of."""
        return Counter(gpu for block in (*self.learner, *self.explorer) for gpu in block)

    def line(self) -> str:
        """The placement in words."""
        if not self.gpus:
            return "placement: no GPU, so every process runs on the CPU"
        parts = [f"trainer rank {rank}: {gpu}" for rank, gpu in enumerate(self.trainer)]
        for role, blocks in (("learner rollouts", self.learner), ("explorer", self.explorer)):
            parts += [f"{role} {index}: {'+'.join(map(str, block))}" for index, block in enumerate(blocks)]
        idle = [str(gpu) for gpu in range(self.gpus) if gpu not in (*self.trainer, *self.engines)]
        if idle:
            parts.append(f"idle: {', '.join(idle)} (more ranks, rollout.processes or explorer.processes use them)")
        return f"placement on {self.gpus} GPU{'s' if self.gpus > 1 else ''}: " + "; ".join(parts)


def place(config: Config, gpus: int, *, ranks: int = 1, engines: bool = True) -> Placement:
    """Give each of this node's processes its GPUs.

    gpus: visible on this node; 0, or run.device = "cpu", places nothing. ranks: trainer ranks of this node.
    engines: whether this node starts the workers, as the node of rank 0 does.
    Where `[placement]` says "auto": trainer ranks come first, then learner rollouts, then explorers, each on GPUs of
    their own; where these do not suffice, engines share what is left of them, or else share with the trainer.
    Raises ConfigError, one line per problem, with what to change.
    """
    lists = config.placement
    named = {"trainer": lists.trainer, "learner": lists.learner, "explorer": lists.explorer}
    if config.run.device == "cpu":
        return Placement()
    absent = [f"placement.{role} = {list(gpu)}" for role, gpu in named.items() if gpu != "auto" and gpu]
    if not gpus:
        if absent:
            raise ConfigError(f"{', '.join(absent)}: no GPU is visible here; use run.device=cpu to train without")
        return Placement()
    width = config.rollout.tensor_parallel
    processes = {
        "learner": config.rollout.processes if engines else 0,
        "explorer": config.explorer.processes if engines and explorer_needed(config) else 0,
    }
    problems = _wrong_lists(named, gpus, ranks, processes, width)
    if problems:
        raise ConfigError("\n".join(problems))
    taken = {gpu for chosen in named.values() if chosen != "auto" for gpu in chosen}
    free = [gpu for gpu in range(gpus) if gpu not in taken]
    trainer = tuple([*free, *sorted(taken)][:ranks] if lists.trainer == "auto" else lists.trainer)
    blocks = _blocks(named, processes, width, [gpu for gpu in free if gpu not in trainer], range(gpus))
    placement = Placement(gpus, trainer, blocks["learner"], blocks["explorer"], config.rollout.memory_share)
    problems = _wrong_sharing(config, placement)
    if problems:
        raise ConfigError("\n".join(problems))
    return placement._replace(memory_share=config.rollout.memory_share / max(placement.engines.values(), default=1))


def visible_devices(gpus: Sequence[int], inherited: str | None) -> str:
    """CUDA_VISIBLE_DEVICES of a process that shall see these GPUs, started by one that has `inherited` there.

    Example: visible_devices([1, 2], "4,5,GPU-7a") == "5,GPU-7a"
    """
    names = inherited.split(",") if inherited else None
    return ",".join(names[gpu].strip() if names else str(gpu) for gpu in gpus)


def _wrong_lists(named: Named, gpus: int, ranks: int, processes: dict[str, int], width: int) -> list[str]:
    problems = []
    if ranks > gpus:
        problems.append(f"{ranks} trainer ranks and {gpus} visible GPUs: start at most {gpus} ranks on this node")
    keys = {"learner": "rollout.processes", "explorer": "explorer.processes"}
    for role, chosen in named.items():
        if chosen == "auto":
            count = processes.get(role, 0)
            if count and width > gpus:
                problems.append(f"rollout.tensor_parallel = {width} and {gpus} visible GPUs: use at most {gpus}")
            continue
        assert isinstance(chosen, tuple)
        what = f"placement.{role} = {list(chosen)}"
        unknown = [gpu for gpu in chosen if not 0 <= gpu < gpus]
        if unknown:
            problems.append(f"{what}: GPU {unknown[0]} does not exist; the visible ones are 0 to {gpus - 1}")
        elif role == "trainer":
            if len(chosen) != ranks or len(set(chosen)) != ranks:
                problems.append(
                    f"{what} and {ranks} trainer rank{'s' if ranks > 1 else ''} on this node: name one GPU per rank, "
                    f"each once, or start torchrun with --nproc-per-node {len(set(chosen))}"
                )
        elif processes[role] and len(chosen) != processes[role] * width:
            problems.append(
                f"{what}: {keys[role]} = {processes[role]} x rollout.tensor_parallel = {width} take "
                f"{processes[role] * width} GPUs, {len(chosen)} are named (a GPU that two processes share stands twice)"
            )
        elif any(len(set(block)) < width for block in _cut(chosen, width)):
            problems.append(f"{what}: a GPU stands twice in one block of rollout.tensor_parallel = {width}")
    return list(dict.fromkeys(problems))


def _blocks(
    named: Named, processes: dict[str, int], width: int, rest: Sequence[int], everything: Sequence[int]
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """The block of every process: as named, else of its own in `rest`, else dealt out over what there is."""
    found = {}
    pool = _cut(rest, width) or _cut(everything, width)
    dealt = 0
    for role, count in processes.items():
        chosen = named[role]
        if chosen != "auto":
            assert isinstance(chosen, tuple)
            found[role] = tuple(_cut(chosen, width)[:count])
            continue
        found[role] = tuple(pool[(dealt + index) % len(pool)] for index in range(count))
        dealt += count
    return found


def _cut(gpus: Sequence[int], width: int) -> list[tuple[int, ...]]:
    return [tuple(gpus[start : start + width]) for start in range(0, len(gpus) - width + 1, width)]


def _wrong_sharing(config: Config, placement: Placement) -> list[str]:
    problems = []
    trainer = set(placement.trainer)
    shared, share = sorted(trainer & set(placement.engines)), config.rollout.memory_share
    if shared and config.engine != "torch" and share > MAX_SHARE_BESIDE_TRAINER:
        problems.append(
            f"rollout.memory_share = {share:g} on GPU {shared[0]}, where a trainer rank runs too: use "
            f"rollout.memory_share={MAX_SHARE_BESIDE_TRAINER:g} or less, or give the engines GPUs of their own"
        )
    return problems
