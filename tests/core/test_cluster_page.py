"""The command lines of docs/cluster.md name keys and values that exist."""

import re
from pathlib import Path

from core.configcheck import check_config
from core.configfile import load_config
from core.memory import GIB, ModelShape, trainer_parts

ROOT = Path(__file__).resolve().parents[2]


def test_every_command_of_the_page_is_a_configuration_that_can_run() -> None:
    text = (ROOT / "docs" / "cluster.md").read_text("utf-8").replace("\\\n", " ")
    commands = re.findall(r"trainer/main\.py (configs/\S+\.toml)((?: +[a-z_.]+=[^\s']+)*)", text)
    assert len(commands) == 3
    for preset, words in commands:
        config = load_config(ROOT / preset, words.split())
        check_config(config)
        assert config.learner.backend == "deepspeed" or config.explorer.processes == 0


def test_keys_named_in_the_text_exist() -> None:
    text = (ROOT / "docs" / "cluster.md").read_text("utf-8")
    sections = r"(?:placement|rollout|explorer|learner|algorithm|stream)"
    named = set(re.findall(rf"`({sections}\.[a-z_]+)(?: [<=>][^`]*|=[^`]*)?`", text))
    config = load_config()
    missing = [name for name in named if not hasattr(getattr(config, name.partition(".")[0]), name.partition(".")[2])]
    assert len(named) >= 8
    # Modules and files share the form; these are the ones meant.
    assert missing == []


def test_the_memory_of_the_example_is_what_the_preflight_says() -> None:
    text = (ROOT / "docs" / "cluster.md").read_text("utf-8")
    qwen3_8b = ModelShape(
        vocab=151936, hidden=4096, intermediate=12288, layers=36, heads=32, kv_heads=8, head_dim=128, tied=False,
        qk_norm=True, qkv_bias=False,
    )  # fmt: skip
    words = ["learner.backend=deepspeed", "learner.zero_stage=3"]
    parts = trainer_parts(load_config(ROOT / "configs" / "qwen3_1.7b_to_8b.toml", words), qwen3_8b, None, ranks=4)
    assert f"memory of a trainer rank: {sum(parts.values()) / GIB:.1f} GiB" in text
