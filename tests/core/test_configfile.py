import json
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from core.anneal import quota_at
from core.config import Config, Learner, Weight
from core.configcheck import check_config, check_paths
from core.configfile import ConfigError, load_config, parse_command, write_resolved
from core.confighelp import TABLES, explain, help_text
from core.configkeys import all_keys

CONFIGS = Path(__file__).parents[2] / "configs"
PAPER = ["qwen3_1.7b_to_8b", "qwen3_4b_to_8b", "qwen3_4b_to_14b", "internlm2.5_1.8b_to_7b"]


def error_of(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_command(arguments)
    return str(caught.value)


def test_no_argument_is_the_embedded_default():
    command = parse_command([])
    assert command.config == Config()
    assert (command.path, command.dry_run, command.resume, command.clean, command.help) == (None,) + (False,) * 4


def test_flags_files_and_overrides_in_any_order():
    command = parse_command(["run.seed=3", "--dry-run", str(CONFIGS / "tiny_grpo.toml"), "--clean", "run.dir=2026"])
    assert (command.dry_run, command.clean, command.resume) == (True, True, False)
    assert command.path == CONFIGS / "tiny_grpo.toml"
    assert command.config.run.seed == 3
    assert command.config.run.dir == "2026"  # a string key takes the text, though it parses as a number
    assert command.config.algorithm.anneal_steps == 0


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("algorithm.lookahead=1", "algorithm.lookahead", 1),
        ("learner.learning_rate=3e-4", "learner.learning_rate", 3e-4),
        ("loss.dual_clip=4", "loss.dual_clip", 4.0),
        ("learner.gradient_checkpointing=true", "learner.gradient_checkpointing", True),
        ("evaluation.k=[1, 4]", "evaluation.k", (1, 4)),
        ("correction.explorer.weight=geometric_mask", "correction.explorer.weight", "geometric_mask"),
        ('correction.explorer.weight="luffy"', "correction.explorer.weight", "luffy"),
        ("data.suffix= /no_think", "data.suffix", " /no_think"),
        ("run.dir=a=b", "run.dir", "a=b"),
        ("stream.endpoint=tcp://127.0.0.1:5555", "stream.endpoint", "tcp://127.0.0.1:5555"),
    ],
)
def test_an_override_is_a_toml_value_or_text(override, path, value):
    found = parse_command([override]).config
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value


def test_the_last_override_wins_and_a_nested_table_keeps_its_other_keys(tmp_path):
    file = tmp_path / "x.toml"
    file.write_text('[correction.learner]\nweight = "icepop"\n[run]\nseed = 5\n')
    config = parse_command([str(file), "run.seed=6", "run.seed=7"]).config
    assert config.run.seed == 7
    assert config.correction.learner.weight == "icepop"
    assert config.correction.learner.anchor == "learner"  # the default of that source, though the field has none
    assert config.correction.explorer == Config().correction.explorer


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            ["algorithm.stpes=3"],
            ["algorithm.stpes=3", "did you mean algorithm.steps?", "keys of [algorithm]", "group_size"],
        ),
        (["steps=3"], ["unknown key steps", "did you mean algorithm.steps?", "tables: run, algorithm"]),
        (["correction.explorer.wieght=none"], ["did you mean correction.explorer.weight?"]),
        (["algorithm=3"], ["algorithm is a table", "anneal_steps"]),
        (["algorithm.steps.x=3"], ["unknown key algorithm.steps.x"]),
        (["algorithm.steps=0"], ["algorithm.steps = 0", "command line", "an integer >= 1"]),
        (["algorithm.steps=2.5"], ["algorithm.steps = 2.5", "an integer >= 1"]),
        (["algorithm.steps=true"], ["algorithm.steps = True", "an integer >= 1"]),
        (["algorithm.alpha=1.5"], ["a number >= 0 and <= 1"]),
        (["learner.learning_rate=inf"], ["learner.learning_rate = inf", "finite"]),
        (["learner.learning_rate=nan"], ["learner.learning_rate = nan"]),
        (["learner.gradient_checkpointing=yes"], ["true or false"]),
        (["loss.ratio=tokn"], ['one of "token", "sequence", "cispo"', "did you mean token?"]),
        (["evaluation.k=1,2"], ["a list of integers"]),
        (["run.dir="], ["a non-empty string"]),
        (["--dryrun"], ["unknown option --dryrun", "did you mean --dry-run?", "usage:"]),
        (["--resume", "--clean"], ["give one of them"]),
        (["a.toml", "b.toml"], ["a.toml, b.toml"]),
        (["nothing"], ["no configuration file nothing", "section.key=value"]),
        ([str(CONFIGS / "tinny.toml")], ["did you mean", "tiny.toml"]),
    ],
)
def test_a_wrong_argument_says_what_to_type_instead(arguments, parts):
    message = error_of(*arguments)
    assert all(part in message for part in parts), message
    assert len(message.splitlines()) <= 3


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[algorithm]\nstpes = 3", ["x.toml", "algorithm.stpes", "did you mean algorithm.steps?"]),
        ("[algoritm]\nsteps = 3", ["x.toml", "algoritm"]),
        ("steps = 3", ["x.toml", "unknown key steps", "algorithm.steps"]),
        ("algorithm = 3", ["algorithm is a table"]),
        ('[algorithm]\nsteps = "3"', ["x.toml", 'algorithm.steps = "3"', "an integer >= 1"]),
        ("[algorithm.steps]\nx = 1", ["algorithm.steps = {'x': 1}", "an integer >= 1"]),
        ("[algorithm\nsteps = 3", ["x.toml is not valid TOML", "line 1"]),
    ],
)
def test_a_wrong_file_names_file_key_and_value(tmp_path, text, parts):
    file = tmp_path / "x.toml"
    file.write_text(text)
    message = error_of(str(file))
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["algorithm.group_size=1"], ["algorithm.group_size = 1", "at least 2"]),
        (["algorithm.steps=10"], ["anneal_steps = 40", "algorithm.steps = 10", "algorithm.anneal_steps=5"]),
        (
            ["algorithm.mini_batch_prompts=12"],
            ["mini_batch_prompts = 12", "prompts_per_step = 32", "1, 2, 4, 8, 16, 32"],
        ),
        (["learner.micro_batch_tokens=0", "learner.micro_batch_rows=48"], ["16 x 8 = 128", "64, 128"]),
        (
            ["algorithm.mixing=authors_code", "learner.micro_batch_tokens=0"],
            ["micro_batch_rows = 64", "authors_code", "1, 2, 4, 8, 16"],
        ),
        (["evaluation.k=[1,16]"], ["evaluation.k = [1, 16]", "evaluation.samples = 8"]),
        (["evaluation.k=[]"], ["evaluation.k = []"]),
        (["explorer.processes=0"], ["explorer.processes = 0", "explorer.processes=1", "stream.endpoint="]),
        (["algorithm.mixing=rescue", "algorithm.rescue_quota=9"], ["rescue_quota = 9", "group_size = 8"]),
        (["correction.explorer.low=6"], ["correction.explorer.low = 6", "correction.explorer.high = 5"]),
        (["stream.credit=255"], ["stream.credit = 255", "stream.credit=256"]),
        (["rollout.max_response_tokens=400000"], ["stream.buffer_mb = 256", "stream.buffer_mb=820"]),
        (["stream.max_frame_mb=1", "rollout.max_response_tokens=130000"], ["max_frame_mb = 1"]),
        (["stream.liveness_s=1"], ["stream.liveness_s = 1", "heartbeat_s = 1"]),
        (["stream.endpoint=tcp://0.0.0.0:5000"], ["rollout.keys", "tcp://127.0.0.1"]),
        (["stream.endpoint=localhost"], ["ipc://PATH or tcp://HOST:PORT"]),
        (["explorer.top_p=0.95"], ["explorer.top_p = 0.95", "correction.explorer.anchor=learner"]),
        (["rollout.top_k=20"], ["rollout.top_k = 20", "correction.learner.weight=none"]),
        (
            ["data.train=x.parquet"],
            ['learner.model = "embedded:learner"', "both parquet files", 'function = "countdown"'],
        ),
        (["learner.model=embedded:large"], ["embedded:learner, embedded:explorer"]),
        (["data.train=embedded:sums"], ["embedded:countdown"]),
        (
            ["rollout.tensor_parallel=2", "rollout.engine=torch"],
            ["rollout.engine=vllm", "rollout.tensor_parallel at 1"],
        ),
        (["rollout.tensor_parallel=2"], ["the torch engine"]),  # of the embedded models
        (["reward.function=maths"], ["module:function"]),
        (["reward.function=math"], ["use countdown"]),
    ],
)
def test_an_impossible_combination_says_value_bound_and_remedy(arguments, parts):
    message = error_of(*arguments)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("idle", "reason", "remedy"),
    [
        ("algorithm.alpha=0.5", 'algorithm.schedule = "linear"', "algorithm.schedule=constant"),
        ("algorithm.rescue_quota=2", 'algorithm.mixing = "in_group"', "algorithm.mixing=rescue"),
        ("algorithm.driver_low=0.1", 'algorithm.driver = "clock"', "algorithm.driver=ess"),
        ("algorithm.driver_high=0.6", 'algorithm.driver = "clock"', "algorithm.driver=ess"),
        ("learner.zero_stage=3", 'learner.backend = "torch"', "learner.backend=deepspeed"),
        ("learner.recompute=selective", "learner.gradient_check", "learner.gradient_checkpointing=true"),
        ("learner.micro_batch_rows=16", "learner.micro_batch_tokens = 8192", "learner.micro_batch_tokens=0"),
        ("learner.lora_alpha=8", "learner.lora_rank = 0", "learner.lora_rank=32"),
        (
            "correction.explorer.cap=3",
            'correction.explorer.weight = "none"',
            "correction.explorer.anchor=learner correction.explorer.weight=token_tis",
        ),
        ("correction.learner.low=0.6", 'correction.learner.weight = "token', "correction.learner.weight=icepop"),
        ("correction.learner.high=4", 'correction.learner.weight = "token', "correction.learner.weight=icepop"),
        ("rollout.tensor_parallel=2", "the torch engine", "rollout.engine=vllm"),
        ("rollout.memory_share=0.4", "the torch engine", "rollout.engine=vllm"),
        ("rollout.update_in_flight=false", "algorithm.lookahead = 0", "algorithm.lookahead=1"),
    ],
)
def test_a_value_that_cannot_act_is_refused_and_its_remedies_work(idle, reason, remedy):
    key = idle.partition("=")[0]
    default = all_keys()[key].default
    message = error_of(idle)
    assert f"{key} = " in message
    assert f" has no effect with {reason}" in message
    assert f": use {remedy}" in message
    text = str(default).lower() if isinstance(default, bool) else default
    assert message.endswith(f"or leave {key} at {text}")
    parse_command([idle, *remedy.split()])
    parse_command([f"{key}={text}"])


@pytest.mark.parametrize(
    ("idle", "under", "reason", "instead"),
    [
        ("algorithm.schedule=abrupt", "algorithm.mixing=rescue", "whose quota is fixed", "algorithm.mixing=in_group"),
        ("algorithm.baseline=source", "algorithm.mixing=authors_code", "of one source", "algorithm.mixing=in_group"),
        ("algorithm.stream_mini_batches=false", "algorithm.mixing=authors_code", "waits", "algorithm.mixing=in_group"),
        (
            "algorithm.stream_mini_batches=false",
            "algorithm.mini_batch_prompts=32",
            "algorithm.mini_batch_prompts = 32, which is the whole step",
            "algorithm.mini_batch_prompts=16",
        ),
        (
            "learner.share_prompts=false",
            "learner.micro_batch_tokens=0",
            "learner.micro_batch_tokens = 0, which pads",
            "learner.micro_batch_tokens=8192",
        ),
        ("correction.explorer_negatives=drop", "algorithm.anneal_steps=0", "never asks", "algorithm.anneal_steps=10"),
    ],
)
def test_a_value_is_refused_under_a_setting_that_does_not_read_it(idle, under, reason, instead):
    message = error_of(idle, under)
    key = idle.partition("=")[0]
    assert re.fullmatch(f"{key} = .* has no effect with .*{reason}.*: use .*, or leave {key} at .*", message)
    assert instead.partition("=")[0] in message
    parse_command([under])
    parse_command([idle, instead])


@pytest.mark.parametrize("source", ["explorer", "learner"])
@pytest.mark.parametrize("weight", get_args(Weight))
def test_no_row_is_corrected_twice(source, weight):
    """The sampler's ratio π_θ/μ already holds the π_old/μ of an importance weight."""
    section = f"correction.{source}"
    words = [f"{section}.anchor=sampler", f"{section}.weight={weight}"]
    parse_command([f"{section}.anchor=learner", words[1]])
    if weight in ("none", "luffy", "geometric_mask"):
        parse_command(words)
        return
    message = error_of(*words)
    assert f'{section}.weight = "{weight}" with {section}.anchor = "sampler" corrects twice' in message
    assert message.endswith(f"use {section}.anchor=learner, or {section}.weight=none")


def test_cispo_has_no_dual_clip():
    message = error_of("loss.ratio=cispo", "loss.dual_clip=5")
    assert 'loss.dual_clip = 5.0 has no effect with loss.ratio = "cispo"' in message
    parse_command(["loss.ratio=cispo"])


def test_the_quota_of_rescue_leaves_no_alpha_to_set():
    message = error_of("algorithm.mixing=rescue", "algorithm.schedule=constant", "algorithm.alpha=0.5")
    assert "algorithm.alpha = 0.5 has no effect" in message
    assert "use algorithm.rescue_quota" in message


def test_an_engine_that_is_not_decided_yet_may_spread_over_gpus():
    words = ["rollout.tensor_parallel=2", str(CONFIGS / "qwen3_4b_to_8b.toml")]
    assert parse_command(words).config.engine == "auto"


@pytest.mark.parametrize(
    "arguments",
    [
        ["algorithm.schedule=constant", "algorithm.steps=10"],  # T_mix is not used
        ["algorithm.schedule=abrupt", "algorithm.anneal_steps=80"],  # the explorer alone, to the end
        ["algorithm.anneal_steps=1"],
        ["algorithm.anneal_steps=0", "explorer.processes=0"],
        ["explorer.processes=0", "stream.endpoint=ipc:///tmp/s2lpo.sock"],
        ["explorer.processes=0", "--resume"],  # its checkpoint tells what explorers still owe
        ["explorer.top_p=0.9", "correction.explorer.anchor=learner"],
        ["data.eval=", "evaluation.k=[99]"],
        ["algorithm.mixing=authors_code"],
        ["algorithm.mixing=authors_code", "learner.micro_batch_tokens=0", "learner.micro_batch_rows=8"],
        ["algorithm.mixing=rescue"],
        ["stream.endpoint=tcp://0.0.0.0:5000", "stream.keys=keys"],
        ["learner.model=runs/tiny/model"],  # train on from an embedded run
        ["learner.model=/family/learner", "explorer.model=/family/explorer"],  # a family made elsewhere
        ["reward.function=my.rewards:score"],
    ],
)
def test_unusual_but_possible(arguments):
    assert parse_command(arguments).config != Config()


def test_ranks_must_share_an_update_evenly():
    check_config(Config(), world_size=3)
    padded = Config(learner=Learner(micro_batch_tokens=0))
    check_config(padded, world_size=2)
    with pytest.raises(ConfigError, match="3 trainer ranks x"):
        check_config(padded, world_size=3)


def test_missing_models_and_data_are_named_together(tmp_path):
    config = load_config(CONFIGS / "qwen3_4b_to_8b.toml", [f"learner.model={tmp_path}", f"stream.keys={tmp_path}/keys"])
    with pytest.raises(ConfigError) as caught:
        check_paths(config)
    message = str(caught.value)
    assert all(key in message for key in ("learner.model", "explorer.model", "data.train", "data.eval", "stream.keys"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError) as caught:
        check_paths(config)
    assert "learner.model" not in str(caught.value)
    check_paths(Config())  # the embedded default reads nothing


def test_tiny_states_the_default():
    assert parse_command([str(CONFIGS / "tiny.toml")]).config == Config()


def test_every_preset_is_tested():
    assert {file.stem for file in CONFIGS.glob("*.toml")} == {"tiny", "tiny_grpo", "authors_code", *PAPER}


def test_tiny_grpo_never_asks_the_explorer():
    config = parse_command([str(CONFIGS / "tiny_grpo.toml")]).config
    assert {quota_at(step, config.algorithm) for step in range(1, 81)} == {(0, 8)}
    assert "no explorer: plain GRPO, 20,480" in "\n".join(explain(config))


@pytest.mark.parametrize("name", PAPER)
def test_paper_presets_have_the_values_of_appendix_c(name):
    config = parse_command([str(CONFIGS / f"{name}.toml")]).config
    algorithm = config.algorithm
    assert (algorithm.steps, algorithm.anneal_steps, algorithm.prompts_per_step, algorithm.mini_batch_prompts) == (
        16,
        8,
        1024,
        16,
    )
    assert (config.rollout.max_prompt_tokens, config.rollout.max_response_tokens) == (512, 4096)
    assert (config.learner.learning_rate, config.learner.micro_batch_tokens) == (1e-6, 2 * 4608)
    assert (config.loss.kl_coef, config.loss.entropy_coef, config.loss.kl_rows) == (1e-3, 0.0, "all")
    assert (config.data.overlong, config.checkpoint.every, config.evaluation.every) == ("filter", 1, 100)
    assert config.run.dir == f"runs/{name}"
    text = "\n".join(explain(config))
    assert "1024 prompts x 16 completions = 16384 completions per step; 64 optimizer updates of 256" in text
    assert "owes 68,608 of 262,144 completions (26%), the last at step 7" in text
    assert "16+0 in 1, 14+2 in 2, 12+4 in 3, 10+6 in 4, 7+9 in 5, 5+11 in 6, 3+13 in 7, 0+16 in 8-16" in text


def test_authors_code_preset_is_their_script():
    config = parse_command([str(CONFIGS / "authors_code.toml")]).config
    assert [sum(quota_at(step, config.algorithm)) for step in range(1, 9)] == [16, 17, 17, 17, 17, 17, 17, 16]
    assert (config.explorer.temperature, config.explorer.top_p, config.explorer.max_response_tokens) == (
        0.7,
        0.95,
        30000,
    )
    assert (config.correction.explorer.anchor, config.correction.explorer.weight) == ("learner", "none")


def test_help_names_every_key_its_default_and_its_type():
    text = help_text(width=90)
    assert max(len(line) for line in text.splitlines()) <= 90
    for key in all_keys().values():
        assert f"  {key.name} = {msgspec.json.encode(key.default).decode()}\n" in text
        assert key.sentence
        assert key.expected
    words = re.sub(r"\s+", " ", text)
    assert "Training steps T. (an integer >= 1)" in words
    assert 'anchor = "sampler"' in words
    assert "--dry-run" in words


def test_help_says_what_each_table_is_about_and_breaks_no_word():
    for width in (80, 120):
        lines = help_text(width).splitlines()
        assert max(map(len, lines)) <= width
        assert [line.split("]")[0][1:] for line in lines if line.startswith("[")] == list(TABLES)
        assert not [line for line in lines if line.endswith("-")]


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["loss.kl_coef"], ["loss.kl_coef"]),
        (["lora"], ["learner.lora_rank", "learner.lora_alpha"]),
        (["lora_rank", "grad_clip"], ["learner.grad_clip", "learner.lora_rank"]),
        (["learner.lr=3e-4"], ["learner.learning_rate"]),  # as verl calls it
        (["num_generations"], ["algorithm.group_size"]),
        (["stpes"], ["algorithm.steps"]),
        (["gspo"], ["loss.ratio"]),  # in its sentence
        (
            ["configs/tiny.toml", "run.", "--dry-run"],
            ["run.dir", "run.seed", "run.device", "run.threads", "run.log_to"],
        ),
    ],
)
def test_help_of_words_is_of_the_keys_that_they_name(words, shown):
    text = help_text(80, parse_command(["configs/tiny.toml", "run.seed=1", "--help", *words]).words)
    assert re.findall(r"^  (\S+) = ", text, re.MULTILINE) == shown
    assert "usage" not in text


def test_help_of_a_word_that_nothing_has_is_an_error():
    with pytest.raises(ConfigError, match="--help banana: no key has that"):
        help_text(80, ["banana"])
    assert parse_command(["run.seed=1", "--help"]).words == ()


def test_help_wins_over_everything_else():
    assert parse_command(["--help", "nonsense=1", "--what"]).help
    assert parse_command(["-h"]).help


def test_explain_states_which_batch_is_which():
    lines = explain(Config())
    assert (
        "32 prompts x 8 completions = 256 completions per step; 2 optimizer updates of 128, "
        "micro-batches of 8192 tokens" in lines
    )
    assert any("owes 5,728 of 20,480 completions (28%), the last at step 39" in line for line in lines)
    assert any("256 problems x 8 completions" in line and "every 20 steps" in line for line in lines)


def test_resolved_configuration_reads_back(tmp_path):
    config = load_config(CONFIGS / "authors_code.toml")
    write_resolved(config, tmp_path / "config.resolved.json")
    data = (tmp_path / "config.resolved.json").read_bytes()
    assert msgspec.json.decode(data, type=Config) == config
    assert json.loads(data)["algorithm"]["mixing"] == "authors_code"


def test_loading_a_configuration_imports_nothing_heavy():
    code = (
        "import sys, core.confighelp; print(sorted({'torch', 'zmq', 'transformers', 'pyarrow'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=CONFIGS.parent, capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "[]", run.stderr
