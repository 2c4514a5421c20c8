"""What no single key can be wrong about: combinations that cannot run, and files that are not there."""

from collections.abc import Iterator
from pathlib import Path

from core.anneal import all_quotas, explorer_needed
from core.batchcheck import batch_problems, rank_problems
from core.config import Config, SourceCorrection, full_support
from core.configeffect import effect_problems
from core.configkeys import ConfigError
from core.lease_size import lease_rows
from core.pace import driver_problems
from core.storefolder import folder_problem

EMBEDDED = "embedded:"
EMBEDDED_DATA = ("embedded:countdown",)
EMBEDDED_MODELS = ("embedded:learner", "embedded:explorer")
MEGABYTE = 10**6
TOKEN_BYTES = 8  # an int32 id and a float32 log-prob
IMPORTANCE_WEIGHTS = ("token_tis", "icepop", "sequence_tis", "mixture", "topr")  # luffy and geometric_mask are not
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def check_config(config: Config, world_size: int = 1, *, from_first_step: bool = True) -> None:
    """Raise ConfigError, one line per problem, unless the settings can run together on `world_size` trainer ranks.

    Looks at no file: `check_paths` does. `from_first_step`: false for a resumed run, of which only its checkpoint
    tells what explorers still owe, and for a replay, which asks for nothing.
    """
    checks = (_schedule, batch_problems, _sampling, _corrections, _stream, _embedded, _reward, _evaluation)
    problems = [problem for check in checks for problem in check(config)]
    problems += [*driver_problems(config), *rank_problems(config, world_size), *effect_problems(config)]
    if from_first_step and explorer_needed(config):
        problems += _unreachable(config)
    if problems:
        raise ConfigError("\n".join(problems))


def check_paths(config: Config) -> None:
    """Raise ConfigError for models, data and keys that are not there, and a store that is a folder of other files."""
    problems = list(_path_problems(config))
    if problems:
        raise ConfigError("\n".join(problems))


def require_explorers(config: Config) -> None:
    """Raise ConfigError where completions that explorers owe would be waited for in vain."""
    for problem in _unreachable(config):
        raise ConfigError(problem)


def _unreachable(config: Config) -> Iterator[str]:
    if config.explorer.processes == 0 and config.stream.endpoint == "auto":
        yield (
            'explorer.processes = 0 with stream.endpoint = "auto": the schedule needs explorer completions and '
            "no explorer could find this run. Use explorer.processes=1, or name an endpoint for explorers started "
            "by hand, such as stream.endpoint=ipc:///tmp/s2lpo.sock"
        )


def explorer_tokens(config: Config) -> int:
    """Longest explorer completion that is generated."""
    return config.explorer.max_response_tokens or config.rollout.max_response_tokens


def _schedule(config: Config) -> Iterator[str]:
    algorithm = config.algorithm
    size, anneal, steps = algorithm.group_size, algorithm.anneal_steps, algorithm.steps
    if size < 2:
        yield f"algorithm.group_size = {size}: an advantage compares completions of one prompt, so use at least 2"
    scheduled = algorithm.schedule != "constant" and algorithm.mixing != "rescue"
    if scheduled and anneal > steps:
        yield (
            f"algorithm.anneal_steps = {anneal} is more than algorithm.steps = {steps}, so α would never reach 0: "
            f"use algorithm.anneal_steps={steps // 2} (0 is plain GRPO)"
        )
    if algorithm.mixing == "rescue" and algorithm.rescue_quota > size:
        yield (
            f"algorithm.rescue_quota = {algorithm.rescue_quota} is more than algorithm.group_size = {size}: "
            f"at most {size} rows of a group can be replaced"
        )


def _sampling(config: Config) -> Iterator[str]:
    """μ of truncated sampling is normalised over the kept tokens: a ratio to a full-vocabulary log-prob is void."""
    explorer, learner = config.correction.explorer, config.correction.learner
    readers = [("explorer", "explorer", explorer), ("rollout", "learner", learner)]
    if learner.weight == "mixture":  # divides by π_ω on learner rows too
        readers.append(("explorer", "learner", learner))
    for name, source, correction in readers:
        section = config.explorer if name == "explorer" else config.rollout
        used = name == "rollout" or explorer_needed(config)
        if used and not full_support(section) and needs_sampler_logprobs(correction):
            yield (
                f"{name}.top_p = {section.top_p}, {name}.top_k = {section.top_k} truncate the sampling, but correction."
                f'{source} (anchor "{correction.anchor}", weight "{correction.weight}") divides by its log-probs: use '
                f"{name}.top_p=1 {name}.top_k=0, or correction.{source}.anchor=learner correction.{source}.weight=none"
            )


def needs_sampler_logprobs(correction: SourceCorrection) -> bool:
    """True where the loss reads log μ, which then has to be over the whole vocabulary."""
    return correction.anchor == "sampler" or correction.weight not in ("none", "luffy")


def _corrections(config: Config) -> Iterator[str]:
    for source, correction in (("explorer", config.correction.explorer), ("learner", config.correction.learner)):
        if correction.low >= correction.high:
            yield (
                f"correction.{source}.low = {correction.low:g} must be below "
                f"correction.{source}.high = {correction.high:g}: they are the two ends of a band"
            )
        if correction.anchor == "sampler" and correction.weight in IMPORTANCE_WEIGHTS:
            yield (
                f'correction.{source}.weight = "{correction.weight}" with correction.{source}.anchor = "sampler" '
                "corrects twice: the ratio π_θ/μ already holds the π_old/μ that the weight multiplies by: use "
                f"correction.{source}.anchor=learner, or correction.{source}.weight=none"
            )


def _stream(config: Config) -> Iterator[str]:
    algorithm, rollout, stream = config.algorithm, config.rollout, config.stream
    group = max(sum(quota) for quota in all_quotas(config))
    rows = lease_rows(config)
    if stream.credit < max(rows):
        yield (
            f"stream.credit = {stream.credit} is less than one lease of {max(rows)} completions (explorer "
            f"{rows.explorer}, learner {rows.learner}, evaluation {rows.evaluation}), so it could not be granted: use "
            f"stream.credit={max(rows)} or a smaller rollout.lease_prompts"
        )
    longest = max(rollout.max_response_tokens, explorer_tokens(config) if explorer_needed(config) else 0)
    step_mb = -(-algorithm.prompts_per_step * group * longest * TOKEN_BYTES // MEGABYTE)
    if stream.buffer_mb < step_mb:
        yield (
            f"stream.buffer_mb = {stream.buffer_mb} cannot hold one step ({algorithm.prompts_per_step} prompts x "
            f"{group} completions x {longest} tokens x {TOKEN_BYTES} bytes), so the run would wait for ever: "
            f"use stream.buffer_mb={step_mb} or more"
        )
    if longest * TOKEN_BYTES + 65536 > stream.max_frame_mb * MEGABYTE:
        yield f"stream.max_frame_mb = {stream.max_frame_mb} cannot carry one completion of {longest} tokens: raise it"
    if stream.liveness_s <= stream.heartbeat_s:
        yield (
            f"stream.liveness_s = {stream.liveness_s:g} is not above stream.heartbeat_s = {stream.heartbeat_s:g}, "
            "so every worker would be taken for dead: use ten times the heartbeat"
        )
    yield from _endpoint(config)


def _endpoint(config: Config) -> Iterator[str]:
    endpoint = config.stream.endpoint
    if endpoint == "auto" or endpoint.startswith("ipc://"):
        return
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    if not endpoint.startswith("tcp://") or not host or not (port.isdigit() or port == "*"):
        yield f'stream.endpoint = "{endpoint}": expected "auto", ipc://PATH or tcp://HOST:PORT'
    elif host not in LOOPBACK and not config.stream.keys:
        yield (
            f'stream.endpoint = "{endpoint}" can be reached from other machines and stream.keys is empty: make keys '
            "with python -m rollout.keys and give their directory, or use an ipc:// or tcp://127.0.0.1 endpoint"
        )


def _embedded(config: Config) -> Iterator[str]:
    """The embedded family reads only the embedded task. (Another model may read it: a checkpoint of that family.)"""
    learner, explorer, data = config.learner.model, config.explorer.model, config.data
    models = {"learner.model": learner} | ({"explorer.model": explorer} if explorer_needed(config) else {})
    for key, model in models.items():
        if model.startswith(EMBEDDED) and model not in EMBEDDED_MODELS:
            yield f'{key} = "{model}": expected one of {", ".join(EMBEDDED_MODELS)}, or a Hugging Face directory'
        elif model.startswith(EMBEDDED) and not data.train.startswith(EMBEDDED):
            yield (
                f'{key} = "{model}" can only read the embedded task, not data.train = "{data.train}": '
                f"give {key} a Hugging Face directory, or use data.train=embedded:countdown"
            )
    for key, name in {"data.train": data.train, "data.eval": data.eval}.items():
        if name.startswith(EMBEDDED) and name not in EMBEDDED_DATA:
            yield f'{key} = "{name}": expected {EMBEDDED_DATA[0]}, a parquet file or a .jsonl file'
    if data.eval and data.eval.startswith(EMBEDDED) != data.train.startswith(EMBEDDED):
        given = f'data.train = "{data.train}" and data.eval = "{data.eval}"'
        yield f"{given}: both embedded, or both parquet files (or .jsonl)"


def _reward(config: Config) -> Iterator[str]:
    function, train = config.reward.function, config.data.train
    if function not in ("countdown", "math") and ":" not in function:
        yield f'reward.function = "{function}": expected "countdown", "math" or module:function'
    if function == "countdown" and not train.startswith(EMBEDDED):
        yield f'reward.function = "countdown" cannot score data.train = "{train}": use math or module:function'
    if function == "math" and train.startswith(EMBEDDED):
        yield f'reward.function = "math" cannot score data.train = "{train}": use countdown'


def _evaluation(config: Config) -> Iterator[str]:
    evaluation = config.evaluation
    wrong = [k for k in evaluation.k if not 1 <= k <= evaluation.samples]
    if config.data.eval and (wrong or not evaluation.k):
        yield (
            f"evaluation.k = {list(evaluation.k)}: each k of pass@k must be between 1 and "
            f"evaluation.samples = {evaluation.samples}"
        )


def _path_problems(config: Config) -> Iterator[str]:
    models = {"learner.model": config.learner.model}
    if explorer_needed(config):
        models["explorer.model"] = config.explorer.model
    for key, model in models.items():
        if not model.startswith(EMBEDDED) and not (Path(model) / "config.json").is_file():
            yield f'{key} = "{model}": no Hugging Face model directory there (no config.json): download the model first'
    for key, file in {"data.train": config.data.train, "data.eval": config.data.eval}.items():
        if file and not file.startswith(EMBEDDED) and not Path(file).is_file():
            yield f'{key} = "{file}": no such {"" if file.endswith(".jsonl") else "parquet "}file'
    if config.stream.keys and not Path(config.stream.keys).is_dir():
        yield f'stream.keys = "{config.stream.keys}": no such directory: make it with python -m rollout.keys'
    if config.explorer.store and explorer_needed(config) and (problem := folder_problem(Path(config.explorer.store))):
        yield problem
