"""`--dry-run`: what a run would begin with, and nothing that lasts."""

from core.configcheck import EMBEDDED
from core.configfile import Command
from core.confighelp import explain
from core.configkeys import ConfigError
from core.datasets import load_questions
from trainer.checks import Place, check_start
from trainer.console import Console
from trainer.devices import memory_report, take_gpus
from trainer.materials import load_materials
from trainer.replay import recorded_part
from trainer.run_directory import check_directory
from trainer.world import World, find_rank


def dry_run(command: Command) -> list[str]:
    """Check what a run would, read its models' files and its data, and say what was found; nothing is made, started or
    written. Other ranks than the first say nothing."""
    try:
        config = command.config
        rank, size, device = find_rank(config.run.device, line_size=config.learner.sequence_parallel)
        if rank:
            return []
        devices = take_gpus(config)
        check_start(config, Place(rank, size, device, generates=command.replay is None, resumes=command.resume))
        config = recorded_part(config, command.replay)
        changes = check_directory(config, resume=command.resume, clean=command.clean)
        said = [*explain(config), *changes, devices.placement.line()]
        if any(name.startswith(EMBEDDED) for name in (config.learner.model, config.explorer.model)):
            return [*said, *load_questions(config.data, "train", config.run.seed).report]
        materials = load_materials(config, World(rank=0, size=1, device=device), Console(config))
        memory = memory_report(config, devices, materials.learner_dir, materials.explorer_dir, ranks=size)
        return [*said, *memory, *materials.report]
    except ValueError as error:
        raise ConfigError(str(error)) from error
