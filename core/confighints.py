"""What a mistyped key was meant to be: a key of another table, another trainer's name for one, or a near spelling."""

import difflib
from collections.abc import Iterable, Sequence

from core.configkeys import section_of

NEAR = 0.75  # of difflib's ratio; below it, words with nothing in common but letters are found

# Names in verl, TRL, prime-rl and AReaL. A name with a dot is meant in that table only.
ALIASES: dict[str, tuple[str, ...]] = {
    "batch_size": ("algorithm.prompts_per_step", "algorithm.mini_batch_prompts"),
    "beta": ("loss.kl_coef",),
    "c_clip": ("loss.dual_clip",),
    "clip_ratio": ("loss.clip_low", "loss.clip_high"),
    "clip_ratio_c": ("loss.dual_clip",),
    "clip_ratio_high": ("loss.clip_high",),
    "clip_ratio_low": ("loss.clip_low",),
    "data.path": ("data.train",),
    "dataset_name": ("data.train",),
    "default_local_dir": ("run.dir",),
    "delta": ("loss.dual_clip",),
    "enable_gradient_checkpointing": ("learner.gradient_checkpointing",),
    "entropy_coeff": ("loss.entropy_coef",),
    "eps_clip": ("loss.clip_low", "loss.clip_high"),
    "eps_clip_higher": ("loss.clip_high",),
    "epsilon": ("loss.clip_low", "loss.clip_high"),
    "epsilon_high": ("loss.clip_high",),
    "eval_steps": ("evaluation.every",),
    "gpu_memory_utilization": ("rollout.memory_share",),
    "gradient_clipping": ("learner.grad_clip",),
    "importance_sampling_level": ("loss.ratio",),
    "kl_ctl": ("loss.kl_coef",),
    "kl_loss_coef": ("loss.kl_coef",),
    "lora_r": ("learner.lora_rank",),
    "loss_agg_mode": ("loss.aggregation",),
    "loss_type": ("loss.aggregation", "loss.ratio"),
    "lr": ("learner.learning_rate",),
    "lr_warmup_steps": ("learner.warmup_updates",),
    "mask_truncated_completions": ("loss.overlong",),
    "max_completion_length": ("rollout.max_response_tokens",),
    "max_grad_norm": ("learner.grad_clip",),
    "max_new_tokens": ("rollout.max_response_tokens",),
    "max_prompt_length": ("rollout.max_prompt_tokens",),
    "max_response_length": ("rollout.max_response_tokens",),
    "max_steps": ("algorithm.steps",),
    "max_tokens_per_mb": ("learner.micro_batch_tokens",),
    "model.path": ("learner.model",),
    "model_name_or_path": ("learner.model",),
    "n": ("algorithm.group_size",),
    "n_samples": ("algorithm.group_size",),
    "norm_adv_by_std_in_grpo": ("algorithm.advantage_scale",),
    "num_generations": ("algorithm.group_size",),
    "num_iterations": ("algorithm.epochs",),
    "output_dir": ("run.dir",),
    "per_device_train_batch_size": ("learner.micro_batch_tokens", "learner.micro_batch_rows"),
    "ppo_epochs": ("algorithm.epochs",),
    "ppo_max_token_len_per_gpu": ("learner.micro_batch_tokens",),
    "ppo_micro_batch_size_per_gpu": ("learner.micro_batch_tokens", "learner.micro_batch_rows"),
    "ppo_mini_batch_size": ("algorithm.mini_batch_prompts",),
    "prompt_key": ("data.prompt_column",),
    "reward_funcs": ("reward.function",),
    "rollouts_per_example": ("algorithm.group_size",),
    "save_freq": ("checkpoint.every",),
    "save_steps": ("checkpoint.every",),
    "save_total_limit": ("checkpoint.keep",),
    "scale_rewards": ("algorithm.advantage_scale",),
    "tensor_model_parallel_size": ("rollout.tensor_parallel",),
    "test_freq": ("evaluation.every",),
    "tis_imp_ratio_cap": ("correction.learner.cap",),
    "total_training_steps": ("algorithm.steps",),
    "train_batch_size": ("algorithm.prompts_per_step",),
    "train_files": ("data.train",),
    "ulysses_sequence_parallel_size": ("learner.sequence_parallel",),
    "val_files": ("data.eval",),
    "vllm_gpu_memory_utilization": ("rollout.memory_share",),
    "vllm_importance_sampling_cap": ("correction.learner.cap",),
    "vllm_tensor_parallel_size": ("rollout.tensor_parallel",),
    "warmup_steps": ("learner.warmup_updates",),
}


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`; did you mean CHOICE?` for the one that is spelled nearly like `word`; empty where none is."""
    return asked(near(word, choices))


def near(word: str, choices: Iterable[str]) -> list[str]:
    """The one choice that is spelled nearly like `word`, or none."""
    return difflib.get_close_matches(word, list(choices), n=1, cutoff=NEAR)


def asked(found: Sequence[str]) -> str:
    """`; did you mean A or B?`, and nothing of nothing."""
    return f"; did you mean {' or '.join(found)}?" if found else ""


def key_hint(name: str, keys: Iterable[str]) -> str:
    """`; did you mean KEY?` for the unknown key `name`, such as learner.lr; empty where nothing fits."""
    return asked(meant(name, keys))


def meant(name: str, keys: Iterable[str]) -> Sequence[str]:
    """The keys, or a [table], that the unknown key `name` may stand for."""
    known = list(keys)
    table, leaf = section_of(name), _leaf(name)
    tables = [one for one in map(section_of, known) if one.count(".") == name.count(".")]
    return (
        _same_leaf(table, leaf, known)
        or ALIASES.get(f"{_leaf(table)}.{leaf}")
        or ALIASES.get(leaf)
        or _near_leaf(leaf, [key for key in known if section_of(key) == table])
        or [f"[{one}]" for one in near(name, tables)]
        or [key for key in _near_leaf(leaf, known) if not table or near(name, [key])]
    )


def _same_leaf(table: str, leaf: str, keys: list[str]) -> list[str]:
    """Keys of that name in other tables; of several, the one whose table is spelled nearly so."""
    found = [key for key in keys if _leaf(key) == leaf]
    tables = near(table, map(section_of, found))
    return [key for key in found if section_of(key) in tables] or found


def _near_leaf(leaf: str, keys: list[str]) -> list[str]:
    leaves = near(leaf, map(_leaf, keys))
    return [key for key in keys if _leaf(key) in leaves]


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
