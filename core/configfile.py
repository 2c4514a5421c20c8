"""From a command line to a checked `Config`: TOML file, dotted overrides, and errors that say what to type instead."""

import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from core.config import Config
from core.configcheck import check_config
from core.confighints import asked, did_you_mean, key_hint, near
from core.configkeys import ConfigError, Key, all_keys, section_of
from core.whole_file import whole_file

__all__ = ["Command", "ConfigError", "load_config", "parse_command", "write_resolved"]

RESOLVED_FILE = "config.resolved.json"
# What the groups of a record are; a replay trains them as they were.
FIXED_BY_A_RECORD = (
    "algorithm.group_size", "algorithm.mixing", "algorithm.prompts_per_step", "algorithm.schedule", "algorithm.alpha",
    "algorithm.anneal_steps", "algorithm.rescue_quota", "reward.function",
)  # fmt: skip
USAGE = (
    "torchrun [--nproc-per-node N] trainer/main.py [configs/NAME.toml] [section.key=value ...] "
    "[--dry-run] [--resume] [--clean] [--replay RUN] [--help [WORD ...]]"
)
FLAGS = {
    "--dry-run": "check everything, print what would run, start nothing",
    "--resume": "continue the run in run.dir from its newest verified checkpoint",
    "--clean": "delete the run in run.dir first",
    "--replay": "RUN: train again on what that run consumed, into RUN-replay",
    "--help": "print this and every key; with words, the keys that have one in their name",
}


class Command(NamedTuple):
    """What the user asked for. `path` is None where no file was named; `words` are those of --help WORD.

    Example: Command(config=Config(), dry_run=True, resume=False, clean=False, help=False, path=None)
    """

    config: Config
    dry_run: bool
    resume: bool
    clean: bool
    help: bool
    path: Path | None
    replay: Path | None = None
    words: tuple[str, ...] = ()


def parse_command(arguments: Sequence[str]) -> Command:
    """The command line after the program's name: `[FILE.toml] [section.key=value ...] [--flag ...]`.

    No file is the embedded default. Overrides win over the file, later ones over earlier ones.
    Raises ConfigError for unknown arguments, files, keys and values, and for combinations that cannot run.
    """
    arguments, replay = _take_replay(arguments)
    flags = {argument for argument in arguments if argument.startswith("-")}
    if "--help" in flags or "-h" in flags:
        asked_for = _help_words(arguments)
        return Command(Config(), dry_run=False, resume=False, clean=False, help=True, path=None, words=asked_for)
    for flag in sorted(flags - FLAGS.keys()):
        raise ConfigError(f"unknown option {flag}{did_you_mean(flag, FLAGS)}\nusage: {USAGE}")
    if {"--resume", "--clean"} <= flags:
        raise ConfigError("--resume continues a run and --clean deletes it: give one of them")
    words = [argument for argument in arguments if argument not in flags]
    overrides = [word for word in words if "=" in word]
    files = [word for word in words if "=" not in word]
    for word in sorted(all_keys().keys() & set(files)):
        raise ConfigError(f"{word} has no value: write {word}=VALUE, without blanks around =")
    if len(files) > 1:
        raise ConfigError(f"one configuration file at most, got {', '.join(files)}\nusage: {USAGE}")
    path = Path(files[0]) if files else None
    if replay is not None and (files or "--resume" in flags):
        raise ConfigError("--replay takes the configuration from RUN, from its first step: no file, and no --resume")
    base = Config() if replay is None else _replay_config(replay)
    config = load_config(path, overrides, base)
    if replay is not None:
        _check_replay(replay, base, config)
    check_config(config, from_first_step="--resume" not in flags and replay is None)
    return Command(config, "--dry-run" in flags, "--resume" in flags, "--clean" in flags, False, path, replay)


def _help_words(arguments: Sequence[str]) -> tuple[str, ...]:
    """What is asked about: names after --help, without values; a file is none."""
    after = arguments[min(place for place, word in enumerate(arguments) if word in ("--help", "-h")) + 1 :]
    return tuple(word.partition("=")[0].strip() for word in after if word[:1] != "-" and not word.endswith(".toml"))


def _take_replay(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """The arguments without `--replay RUN`, and RUN."""
    words = list(arguments)
    if "--replay" not in words:
        return words, None
    place = words.index("--replay")
    if place + 1 == len(words) or words[place + 1].startswith("-"):
        raise ConfigError("--replay RUN: name the run directory")
    run = Path(words[place + 1])
    return words[:place] + words[place + 2 :], run


def _replay_config(run: Path) -> Config:
    """What a run was run with; a directory of its own, and no evaluation, since nothing is generated."""
    file = run / RESOLVED_FILE
    if not file.is_file():
        raise ConfigError(f"--replay: {run} holds no run (no {file.name})")
    try:
        config = msgspec.json.decode(file.read_bytes(), type=Config)
    except msgspec.DecodeError as error:
        raise ConfigError(f"--replay: {file} is not of this version: {error}") from error
    return msgspec.structs.replace(
        config,
        run=msgspec.structs.replace(config.run, dir=f"{str(run).rstrip('/')}-replay"),
        data=msgspec.structs.replace(config.data, eval=""),
    )


def _check_replay(run: Path, recorded: Config, config: Config) -> None:
    """ConfigError where what is asked for would destroy the record, or is about what the record already fixed."""
    here, there = Path(config.run.dir).resolve(), run.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ConfigError(f"--replay: run.dir = {config.run.dir} and the run it reads, {run}, lie in one another")
    for name in FIXED_BY_A_RECORD:
        section, _, key = name.partition(".")
        was, asked = (getattr(getattr(each, section), key) for each in (recorded, config))
        if was != asked:
            raise ConfigError(
                f"--replay: {name} was {was!r} when {run} made its groups, which are trained again as they are: "
                f"{asked!r} needs a run of its own"
            )


def load_config(path: Path | None = None, overrides: Sequence[str] = (), base: Config | None = None) -> Config:
    """`base` (the defaults), then the file's keys, then `section.key=value` overrides; each value is checked."""
    keys = all_keys()
    given: dict[str, Any] = {}
    if path is not None:
        for name, value in _flatten(_read_toml(path), keys, str(path)):
            given[name] = _checked(keys[name], value, str(path))
    for override in overrides:
        name, text = _halves(override)
        _require_key(name, keys, f'argument "{override}"')
        given[name] = _checked(keys[name], _value_of(keys[name], text), "command line")
    tree = msgspec.to_builtins(base or Config())
    for name, value in given.items():
        *sections, leaf = name.split(".")
        table = tree
        for section in sections:
            table = table[section]
        table[leaf] = value
    return msgspec.convert(tree, Config)


def _halves(override: str) -> tuple[str, str]:
    """Name and value. Blanks around = are none of either; without one before it, they are the value's."""
    name, text = override.split("=", 1)
    return name.strip(), text.strip() if name != name.rstrip() else text


def write_resolved(config: Config, path: Path) -> None:
    """The whole configuration as indented JSON."""
    with whole_file(path) as partial:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n")


def _read_toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        found = [
            str(path.parent / name) for name in near(path.name, [file.name for file in path.parent.glob("*.toml")])
        ]
        raise ConfigError(f"no configuration file {path}{asked(found) or '; expected FILE.toml or section.key=value'}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def _flatten(
    table: Mapping[str, Any], keys: Mapping[str, Key], origin: str, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Dotted names and values of a TOML document; every name is a key."""
    sections = {name[: place + 1] for name in keys for place, letter in enumerate(name) if letter == "."}
    for word, value in table.items():
        name = prefix + word
        if isinstance(value, dict) and name + "." in sections:
            yield from _flatten(value, keys, origin, name + ".")
        else:
            _require_key(name, keys, origin)
            yield name, value


def _require_key(name: str, keys: Mapping[str, Key], origin: str) -> None:
    if name in keys:
        return
    within = [key for key in keys if section_of(key) == name]
    if within:
        raise ConfigError(f"{origin}: {name} is a table, not a value\nits keys: {_leaves(within)}")
    section = section_of(name)
    siblings = [key for key in keys if section_of(key) == section]
    if siblings:
        listing = f"keys of [{section}]: {_leaves(siblings)}"
    else:
        listing = "tables: " + ", ".join(dict.fromkeys(section_of(key) for key in keys))
    raise ConfigError(f"{origin}: unknown key {name}{key_hint(name, keys)}\n{listing}")


def _leaves(names: Sequence[str]) -> str:
    return ", ".join(name.rpartition(".")[2] for name in names)


def _value_of(key: Key, text: str) -> Any:
    """A TOML value where `text` is one of the key's type; otherwise the text itself."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    if len(parsed) != 1 or (key.takes_text and not isinstance(parsed["value"], str)):
        return text
    return parsed["value"]


def _checked(key: Key, value: Any, origin: str) -> Any:
    """The value, converted to the key's type (an integer may stand for a number, a list for a tuple)."""
    try:
        converted = msgspec.convert(value, key.annotation)
    except msgspec.ValidationError as error:
        hint = did_you_mean(value, key.choices) if isinstance(value, str) else ""
        raise ConfigError(f"{key.name} = {_show(value)} ({origin}): expected {key.expected}{hint}") from error
    if isinstance(converted, float) and not math.isfinite(converted):
        raise ConfigError(f"{key.name} = {value} ({origin}): expected {key.expected}, and finite")
    return converted


def _show(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
