"""Every setting of a run: typed, frozen, refused when unknown or impossible. `core.configfile` reads and prints them.

A key is `Annotated[type, Meta(bounds, description)]`; `--help` prints the description, so it is the only place it stands.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Anchor = Literal["learner", "sampler"]
Weight = Literal[
    "none", "token_tis", "icepop", "sequence_tis", "geometric_mask", "mixture", "luffy", "topr"
]

Gpus = tuple[int, ...] | Literal["auto"]
EngineName = Literal["auto", "torch", "vllm"]
Gap = Annotated[float, Meta(ge=0)] | Literal["auto"]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the TOML file."""


class Run(Section, frozen=True, kw_only=True):
    dir: Annotated[str, Meta(description="Run directory: everything a run writes.", min_length=1)] = "runs/tiny"
    seed: Annotated[int, Meta(description="Seed of prompts, sampling and the embedded models.", ge=0)] = 0
    device: Annotated[Literal["auto", "cpu", "cuda"], Meta(description="Where the learner trains.")] = "auto"
    threads: Annotated[int, Meta(description="Torch threads per process on CPU.", ge=1)] = 1
    log_to: Annotated[tuple[Literal["tensorboard", "wandb"], ...], Meta(description="Where the numbers of metrics.jsonl go as well: TensorBoard files in run.dir/tensorboard, Weights & Biases (WANDB_MODE=offline without a network). Install the library first.")] = ()


class Algorithm(Section, frozen=True, kw_only=True):
    steps: Annotated[int, Meta(description="Training steps T.", ge=1)] = 80
    group_size: Annotated[int, Meta(description="Completions per prompt G.", ge=1)] = 8
    anneal_steps: Annotated[int, Meta(description="Steps T_mix over which the explorer's share α falls from 1 to 0; 0 is plain GRPO.", ge=0)] = 40
    schedule: Annotated[Literal["linear", "abrupt", "constant"], Meta(description="How α moves: linear to 0 at T_mix, abrupt from 1 to 0 after T_mix, or constant.")] = "linear"
    alpha: Annotated[float, Meta(description="The explorer's share of a group under schedule = \"constant\" (1 is small-only).", ge=0, le=1)] = 1.0
    driver: Annotated[Literal["clock", "ess", "zero_variance"], Meta(description="What moves α along the linear schedule: clock, a step each step; ess, the effective sample size of explorer rows (explorer/ess): low ends the annealing sooner; zero_variance, the share of groups without a gradient (frac_reward_zero_std): while it is high, α is held. Reacts algorithm.lookahead + explorer.ahead_steps steps later; α is 0 by the last step.")] = "clock"
    driver_low: Annotated[float, Meta(description="Below it, a driver other than clock moves two steps along the schedule.", ge=0, le=1)] = 0.25
    driver_high: Annotated[float, Meta(description="Above it, a driver other than clock holds α; up to it, one step as the clock.", ge=0, le=1)] = 0.5
    mixing: Annotated[Literal["in_group", "authors_code", "rescue"], Meta(description="in_group: explorer and learner share each group (Algorithm 1); authors_code: an explorer-only phase, then a learner-only one; rescue: correct explorer rows replace learner rows where the whole group fails.")] = "in_group"
    rescue_quota: Annotated[int, Meta(description="Explorer completions per prompt generated for mixing = \"rescue\", and the most that replace learner rows.", ge=1)] = 4
    baseline: Annotated[Literal["group", "source"], Meta(description="Advantages of learner rows come from the whole group, or from its learner rows only.")] = "group"
    advantage_scale: Annotated[Literal["std", "none"], Meta(description="Divide advantages by the group's standard deviation, or not (Dr.GRPO).")] = "std"
    prompts_per_step: Annotated[int, Meta(description="Prompts B of one step; a step trains B × G completions.", ge=1)] = 32
    mini_batch_prompts: Annotated[int, Meta(description="Prompts of one optimizer update; must divide prompts_per_step.", ge=1)] = 16
    epochs: Annotated[int, Meta(description="Passes over a step's mini-batches; updates per step U = B / mini_batch_prompts × epochs.", ge=1)] = 1
    stream_mini_batches: Annotated[bool, Meta(description="Train each mini-batch of a step as soon as its prompts are complete (the updates are the same); costs a copy of the weights for π_old. Off: wait for the whole step.")] = True
    lookahead: Annotated[int, Meta(description="Steps of learner rollouts in flight while a step trains; 0 is Algorithm 1 to the letter.", ge=0)] = 0

    @property
    def in_parts(self) -> bool:
        """Whether a step trains part by part: not where its first update takes rows of every prompt (authors_code)."""
        several = self.prompts_per_step > self.mini_batch_prompts
        return self.stream_mini_batches and several and self.mixing != "authors_code"


class Loss(Section, frozen=True, kw_only=True):
    ratio: Annotated[Literal["token", "sequence", "cispo"], Meta(description="Token ratio with PPO clip, sequence ratio (GSPO), or CISPO's clipped detached ratio.")] = "token"
    clip_low: Annotated[float, Meta(description="Lower clip ε of the ratio: 1 − ε.", gt=0, le=1)] = 0.2
    clip_high: Annotated[float, Meta(description="Upper clip ε of the ratio: 1 + ε.", gt=0)] = 0.2
    dual_clip: Annotated[float, Meta(description="Bound on the ratio of rows with A < 0 (verl's dual clip c).", gt=1)] = 3.0
    aggregation: Annotated[Literal["token_mean", "sequence_mean", "dr_grpo"], Meta(description="Mean over tokens, mean over rows of row means, or sum over rows and tokens divided by rows × max_response_tokens.")] = "token_mean"
    kl_coef: Annotated[float, Meta(description="β of the k3 KL penalty to the reference model.", ge=0)] = 1e-3
    kl_rows: Annotated[Literal["learner", "all"], Meta(description="Rows the KL penalty applies to; on explorer rows k3 does not estimate KL(π_θ‖π_ref).")] = "learner"
    entropy_coef: Annotated[float, Meta(description="Entropy bonus per token.", ge=0)] = 0.0
    overlong: Annotated[Literal["keep", "mask"], Meta(description="Completions cut by the length limit train, or leave the loss (they still count in the group's mean).")] = "keep"


class SourceCorrection(Section, frozen=True, kw_only=True):
    anchor: Annotated[Anchor, Meta(description="What the PPO ratio divides by: the learner at the start of the step (π_old), or the policy that sampled the row (μ).")]
    weight: Annotated[Weight, Meta(description="Detached factor on the row's loss that corrects π_old / μ, for anchor = \"learner\" (luffy and geometric_mask, which are no such ratio, for either).")]
    cap: Annotated[float, Meta(description="Upper bound of token_tis, sequence_tis and of mixture at α = 1.", gt=0)] = 2.0
    low: Annotated[float, Meta(description="Lower end of the band of icepop and geometric_mask.", ge=0)] = 0.5
    high: Annotated[float, Meta(description="Upper end of the band of icepop and geometric_mask.", gt=0)] = 5.0

    @property
    def needs_old(self) -> bool:
        """True where rows under these settings need a forward pass for π_old at the start of the step."""
        return self.anchor == "learner" or self.weight != "none"


class Correction(Section, frozen=True, kw_only=True):
    explorer: SourceCorrection = SourceCorrection(anchor="sampler", weight="none")
    learner: SourceCorrection = SourceCorrection(anchor="learner", weight="token_tis")
    explorer_negatives: Annotated[Literal["keep", "drop"], Meta(description="Explorer rows with A < 0 train, or leave the loss (they still count in the group's mean and std).")] = "keep"

    @property
    def needs_old(self) -> bool:
        """True where rows of some source do."""
        return self.explorer.needs_old or self.learner.needs_old


class Learner(Section, frozen=True, kw_only=True):
    model: Annotated[str, Meta(description="Hugging Face directory of π_θ, or \"embedded:learner\".", min_length=1)] = "embedded:learner"
    dtype: Annotated[Literal["float32", "bfloat16"], Meta(description="Working precision of the learner.")] = "float32"
    learning_rate: Annotated[float, Meta(description="AdamW learning rate.", gt=0)] = 2e-4
    adam_beta1: Annotated[float, Meta(description="AdamW β₁.", ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Meta(description="AdamW β₂.", ge=0, lt=1)] = 0.99
    weight_decay: Annotated[float, Meta(description="AdamW weight decay.", ge=0)] = 0.0
    warmup_updates: Annotated[int, Meta(description="Optimizer updates of linear warm-up.", ge=0)] = 4
    grad_clip: Annotated[float, Meta(description="Largest global gradient norm.", gt=0)] = 1.0
    micro_batch_rows: Annotated[int, Meta(description="Completions per forward pass and rank where micro_batch_tokens is 0; must divide mini_batch_prompts × group_size.", ge=1)] = 64
    liger: Annotated[bool, Meta(description="On a GPU, Liger's RMSNorm, rotary embedding and SwiGLU, where it is installed and knows the model.")] = True
    micro_batch_tokens: Annotated[int, Meta(description="Tokens (prompts and completions) per forward pass and rank, packed without padding; 0 pads rows and counts them by micro_batch_rows.", ge=0)] = 8192
    share_prompts: Annotated[bool, Meta(description="Packed rows of one prompt compute its tokens once (the updates are equal up to rounding).")] = True
    skip_zero_gradient: Annotated[bool, Meta(description="Leave rows out whose gradient is exactly 0, such as those of groups with equal rewards that no KL penalty reaches: the updates are equal up to rounding, and the metrics of updates are those of the other rows.")] = True
    sequence_parallel: Annotated[int, Meta(description="Ranks that share each packed line of tokens (DeepSpeed-Ulysses: each holds a part of the tokens, and in attention a part of the heads), for rows longer than one rank can hold; micro_batch_tokens counts each rank's part.", ge=1)] = 1
    gradient_checkpointing: Annotated[bool, Meta(description="Recompute activations in the backward pass.")] = False
    recompute: Annotated[Literal["full", "selective"], Meta(description="What gradient checkpointing computes twice: every layer in full (least memory), or all but its matrix products and attention, whose outputs are kept.")] = "full"
    backend: Annotated[Literal["torch", "deepspeed"], Meta(description="What trains: plain data-parallel torch (every rank holds everything), or DeepSpeed, which shards over the ranks.")] = "torch"
    zero_stage: Annotated[int, Meta(description="DeepSpeed shards nothing (0), optimizer states (1), gradients too (2), parameters too (3).", ge=0, le=3)] = 2
    offload: Annotated[Literal["none", "optimizer", "parameters"], Meta(description="What DeepSpeed keeps in host memory: nothing, optimizer states (stages 1 to 3), or those and parameters (stage 3).")] = "none"
    lora_rank: Annotated[int, Meta(description="Rank of LoRA adapters on every linear layer but the head (peft), which then are all that trains; 0 trains every weight. What is published and saved is merged.", ge=0)] = 0
    lora_alpha: Annotated[int, Meta(description="LoRA's α: adapters count α / lora_rank.", ge=1)] = 32
    kernels: Annotated[Literal["auto", "triton", "torch", "reference"], Meta(description="Implementation of the log-prob and loss kernels; auto picks by device.")] = "auto"
    max_nonfinite_updates: Annotated[int, Meta(description="Consecutive updates skipped for a non-finite gradient before the run stops.", ge=1)] = 3


class Explorer(Section, frozen=True, kw_only=True):
    model: Annotated[str, Meta(description="Hugging Face directory of the frozen π_ω, or \"embedded:explorer\".", min_length=1)] = "embedded:explorer"
    processes: Annotated[int, Meta(description="Explorer processes the trainer starts; 0 waits for explorers started by hand.", ge=0)] = 1
    temperature: Annotated[float, Meta(description="Sampling temperature of the explorer.", gt=0)] = 1.0
    top_p: Annotated[float, Meta(description="Nucleus of the explorer's sampling; below 1 only where no π_ω log-prob is used.", gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(description="Top-k of the explorer's sampling; 0 is off.", ge=0)] = 0
    max_response_tokens: Annotated[int, Meta(description="Longest explorer completion generated; 0 means rollout.max_response_tokens. A longer one is cut to that after scoring.", ge=0)] = 0
    ahead_steps: Annotated[int, Meta(description="Steps of explorer completions that may be generated ahead of training.", ge=1)] = 8
    store: Annotated[str, Meta(description="Directory of recorded explorer completions (docs/store.md): those in it are read, the missing ones generated and added; empty for none.")] = ""


class Rollout(Section, frozen=True, kw_only=True):
    engine: Annotated[EngineName, Meta(description="Generation engine of explorers and learner rollouts: our embedded one, or vLLM; auto is vLLM on a GPU where it is installed, else torch; torch for the embedded models.")] = "auto"
    tensor_parallel: Annotated[int, Meta(description="GPUs that one vLLM engine spreads over.", ge=1)] = 1
    memory_share: Annotated[float, Meta(description="Part of a GPU's memory that the vLLM engines on it may fill together.", gt=0, le=1)] = 0.9
    max_logprob_gap: Annotated[Gap, Meta(description="Largest |log π_old - log μ| of a learner token before an alarm (metric sampling/sampling_logp_difference/max); 0 is off; auto is 0.02 in float32 and 2 in bfloat16 for rows that π_old's own weights sampled, 1 in the mean over all, and off where top_p or top_k make the two differ by themselves.")] = "auto"
    processes: Annotated[int, Meta(description="Learner rollout processes.", ge=1)] = 1
    temperature: Annotated[float, Meta(description="Sampling temperature of the learner's rollouts; its log-probs are scored and trained at it too.", gt=0)] = 1.0
    top_p: Annotated[float, Meta(description="Nucleus of the learner's sampling.", gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(description="Top-k of the learner's sampling; 0 is off.", ge=0)] = 0
    max_prompt_tokens: Annotated[int, Meta(description="Longest prompt; longer ones are filtered or refused (data.overlong).", ge=1)] = 16
    max_response_tokens: Annotated[int, Meta(description="Longest completion that trains.", ge=1)] = 24
    roles: Annotated[Literal["dedicated", "handover"], Meta(description="dedicated: every process keeps its role. handover: the learner's processes begin as explorers until their rollouts need them, and the explorer's join the learner's rollouts when all they owe is generated.")] = "dedicated"
    update_in_flight: Annotated[bool, Meta(description="Under lookahead, learner rollouts take new weights between two tokens of a lease in work (each token keeps its version and log-prob); false finishes the lease first.")] = True
    weights: Annotated[Literal["memory", "files", "device"], Meta(description="Where new weights lie for the learner's rollout processes. memory: host memory of the trainer's rank 0, which processes of its user on its machine can read (files where the system has no such memory). files: run.dir, for workers on other nodes too. device: two buffers in the memory of rank 0's GPU, which workers copy from GPU to GPU (host memory without one).")] = "memory"
    lease_prompts: Annotated[int, Meta(description="Prompts of one lease: the unit of work a process takes, generates as one batch and can lose.", ge=1)] = 32


class GpuLists(Section, frozen=True, kw_only=True):
    trainer: Annotated[Gpus, Meta(description="GPUs of the trainer's ranks on a node, by local rank; auto takes the first ones.")] = "auto"
    learner: Annotated[Gpus, Meta(description="GPUs of the learner's rollouts, rollout.tensor_parallel for each process in turn; auto takes those after the trainer's, or shares.")] = "auto"
    explorer: Annotated[Gpus, Meta(description="GPUs of the explorers that the trainer starts, rollout.tensor_parallel for each process in turn; auto takes those after the rollouts', or shares.")] = "auto"


class Stream(Section, frozen=True, kw_only=True):
    endpoint: Annotated[str, Meta(description="Where workers connect: \"auto\" (an ipc socket in the run directory), ipc://…, or tcp://host:port. An address that is not loopback needs keys.")] = "auto"
    keys: Annotated[str, Meta(description="Directory of CURVE keys (python -m rollout.keys); empty means none.")] = ""
    credit: Annotated[int, Meta(description="Completions a worker may have leased or unacknowledged.", ge=1)] = 1024
    buffer_mb: Annotated[int, Meta(description="Bytes of completions the replay buffer may hold, in MB.", ge=1)] = 256
    max_frame_mb: Annotated[int, Meta(description="Largest message accepted or sent, in MB.", ge=1)] = 16
    heartbeat_s: Annotated[float, Meta(description="Seconds between a worker's heartbeats.", gt=0)] = 1.0
    liveness_s: Annotated[float, Meta(description="Silence after which a worker is dead and its leases go to others.", gt=0)] = 10.0
    lease_timeout_s: Annotated[float, Meta(description="Seconds without progress after which a worker is hung and its leases go to others.", gt=0)] = 300.0
    starvation_s: Annotated[float, Meta(description="Seconds the trainer waits with nothing moving (no token, completion or reward) before it stops and says whom it waited for.", gt=0)] = 600.0


class Data(Section, frozen=True, kw_only=True):
    train: Annotated[str, Meta(description="Parquet or .jsonl file of training prompts, or \"embedded:countdown\".", min_length=1)] = "embedded:countdown"
    eval: Annotated[str, Meta(description="Parquet or .jsonl file of held-out prompts, \"embedded:countdown\", or empty for no evaluation.")] = "embedded:countdown"
    prompt_column: Annotated[str, Meta(description="Column of the prompt; auto tries prompt, problem, question, Problem.")] = "auto"
    answer_column: Annotated[str, Meta(description="Column of the answer; auto tries answer, Answer, solution, reward_model.ground_truth, …")] = "auto"
    template: Annotated[Literal["chat", "plain"], Meta(description="Render prompts with the tokenizer's chat template, or as they stand.")] = "plain"
    suffix: Annotated[str, Meta(description="Text appended to every prompt, such as \" /no_think\".")] = ""
    overlong: Annotated[Literal["filter", "error"], Meta(description="Prompts above rollout.max_prompt_tokens are filtered and counted, or refused.")] = "filter"


class Reward(Section, frozen=True, kw_only=True):
    function: Annotated[str, Meta(description="\"countdown\", \"math\" (math-verify), or module:function or path/file.py:function in TRL's or verl's signature (docs/rewards.md).", min_length=1)] = "countdown"
    workers: Annotated[int, Meta(description="Killable scoring processes.", ge=1)] = 1
    timeout_s: Annotated[float, Meta(description="Seconds one completion may take to score before its process is killed and it is dropped.", gt=0)] = 10.0
    max_tries: Annotated[int, Meta(description="Further samples drawn per prompt and source in place of completions whose reward failed, before the prompt is dropped.", ge=0)] = 3


class Evaluation(Section, frozen=True, kw_only=True):
    every: Annotated[int, Meta(description="Steps between evaluations; 0 evaluates only before and after.", ge=0)] = 20
    samples: Annotated[int, Meta(description="Completions per held-out problem, n of pass@k.", ge=1)] = 8
    problems: Annotated[int, Meta(description="Held-out problems evaluated; 0 is all of them.", ge=0)] = 256
    temperature: Annotated[float, Meta(description="Sampling temperature of evaluation.", gt=0)] = 1.0
    top_p: Annotated[float, Meta(description="Nucleus of evaluation's sampling.", gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(description="Top-k of evaluation's sampling; 0 is off.", ge=0)] = 0
    k: Annotated[tuple[int, ...], Meta(description="The k of pass@k; each at most evaluation.samples.")] = (1, 2, 4, 8)
    diversity_every: Annotated[int, Meta(description="Steps between measurements of the training rows' Self-BLEU, from step 1 on; 0 measures no diversity at all.", ge=0)] = 10


class Checkpoint(Section, frozen=True, kw_only=True):
    every: Annotated[int, Meta(description="Steps between checkpoints; the last step is always saved.", ge=1)] = 20
    keep: Annotated[int, Meta(description="Complete checkpoints kept.", ge=1)] = 2
    grace_s: Annotated[float, Meta(description="Seconds a begun step has to end after SIGTERM or Ctrl-C, so that it is in a checkpoint; later the run stops without. torchrun kills 30 s after the signal.", ge=0)] = 20.0


class Config(Section, frozen=True, kw_only=True):
    """A whole run. `Config()` is the embedded default."""

    run: Run = Run()
    algorithm: Algorithm = Algorithm()
    loss: Loss = Loss()
    correction: Correction = Correction()
    learner: Learner = Learner()
    explorer: Explorer = Explorer()
    rollout: Rollout = Rollout()
    placement: GpuLists = GpuLists()
    stream: Stream = Stream()
    data: Data = Data()
    reward: Reward = Reward()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()

    @property
    def engine(self) -> EngineName:
        """rollout.engine; an auto that remains depends on the device (rollout.engine.engine_kind)."""
        return engine_for(self.rollout.engine, self.learner.model, self.explorer.model)


def full_support(sampling: Explorer | Rollout) -> bool:
    """True where a sampled token's log-prob is over the whole vocabulary, as the trainer's is."""
    return sampling.top_p == 1 and sampling.top_k == 0


def engine_for(engine: EngineName, *models: str) -> EngineName:
    """`engine`, but auto is torch for the embedded models: vLLM takes longer to start than they take to train."""
    return "torch" if engine == "auto" and any(model.startswith("embedded:") for model in models) else engine
