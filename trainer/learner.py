"""π_θ: scores a step's rows, updates on its mini-batches, saves and publishes its weights, on any backend."""

import json
import math
import time
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Self

import msgspec
import numpy as np
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from core.allocator import keep_freed_memory
from core.config import Config
from rollout.store import rollout_file
from trainer.backend import make_backend, read_model
from trainer.batch import MiniBatch, StepBatch
from trainer.correction import needs_explorer_scores
from trainer.lora import Adapter, whole_weights
from trainer.loss_metrics import MAXIMA, SUMS, Tally, measure, over_ranks, overall_metrics
from trainer.micro_batch import MicroBatch
from trainer.models import load_tokenizer, save_model, weight_checksum
from trainer.objective import Scores, policy_objective
from trainer.recompute import enable_gradient_checkpointing
from trainer.scorer import Scorer
from trainer.signals import alive
from trainer.tensor_files import TensorFiles, gather, write_file, write_files, write_stream
from trainer.weight_buffers import WeightBuffer, buffer_bytes
from trainer.world import World

STATE_FORMAT = 2


class NonFiniteUpdatesError(RuntimeError):
    """Too many updates in a row had a loss or gradient that is not finite."""


class Learner:
    """The model being trained, with its optimizer and the frozen models that its loss needs.

    Example: learner.begin_step(batch); [learner.update(m) for m in batch.updates(epochs)]; metrics = learner.end_step()
    """

    def __init__(
        self,
        config: Config,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        world: World,
        *,
        reference: PreTrainedModel | None,
        explorer: PreTrainedModel | None,
        adapter: Adapter | None = None,
    ) -> None:
        self.config, self.world = config, world
        self.model, self.tokenizer = model, tokenizer
        self.weights_bytes = buffer_bytes(model.parameters())
        self.backend = make_backend(model, config.learner, world)
        self.adapter = adapter
        self.reference = self.backend.frozen(reference) if reference is not None else None
        if adapter is not None and config.loss.kl_coef > 0:
            self.reference = adapter.without(self.backend.forward)
        self.explorer = self.backend.frozen(explorer) if explorer is not None else None
        self.scorer = Scorer(config, self.backend, reference=self.reference, explorer=self.explorer)
        self.step = 0  # completed training steps
        self.skipped_updates = self._skipped_in_a_row = 0
        self._scored: dict[int, tuple[MicroBatch, Scores]] = {}
        self._visited: set[int] = set()
        self._tally = Tally(config)
        self._updates: list[dict[str, float]] = []
        self._seconds = {"time/score": 0.0, "time/train": 0.0}

    @classmethod
    def load(
        cls,
        config: Config,
        *,
        model_dir: Path,
        explorer_dir: Path | None,
        world: World,
        checkpoint: Path | None = None,
    ) -> Self:
        """The learner at its start (`model_dir`), or as a checkpoint directory holds it.

        The reference of the KL penalty is always the model it started from. `explorer_dir` is read only where a
        correction scores π_ω. ValueError for missing directories, weights that do not fit, or ranks that differ.
        """
        torch.manual_seed(config.run.seed)
        if world.device.type == "cpu":
            keep_freed_memory()
        start, state = checkpoint or model_dir, checkpoint and checkpoint / "trainer"
        adapted = config.learner.lora_rank > 0
        model = read_model(model_dir if adapted else start, config.learner, world, "learner.model")
        adapter = Adapter(model, config.learner, state) if adapted else None
        if config.learner.gradient_checkpointing:
            enable_gradient_checkpointing(model, selective=config.learner.recompute == "selective")
        reference = explorer = None
        if config.loss.kl_coef > 0 and adapter is None:
            reference = read_model(model_dir, config.learner, world, "learner.model").requires_grad_(False)
        if needs_explorer_scores(config.correction):
            assert explorer_dir is not None, "mixture weights on learner rows need the explorer"
            explorer = read_model(explorer_dir, config.learner, world, "explorer.model").requires_grad_(False)
        tokenizer = load_tokenizer(model_dir, key="learner.model")
        world.agree("the configuration", msgspec.json.encode(config).decode())
        world.agree("the learner's weights", weight_checksum(model))
        learner = cls(config, model, tokenizer, world, reference=reference, explorer=explorer, adapter=adapter)
        if state is not None:
            learner.load_state(state)
        return learner

    def begin_step(self, batch: StepBatch, *, in_parts: bool = False) -> None:
        """Fix π_old, π_ref and π_ω for every row that needs them, before the first update changes π_θ.

        `in_parts`: more of the step follows, by `score`.
        """
        self._visited, self._tally, self._updates = set(), Tally(self.config), []
        self._scored, self._seconds = {}, {"time/score": 0.0, "time/train": 0.0}
        self.scorer.begin_step(in_parts=in_parts)
        self.score(batch)

    def score(self, batch: StepBatch) -> None:
        """Fix the same for a later part of the step: π_old is π_θ before the step's first update, not of now."""
        start = time.perf_counter()
        with self.scorer.at_start():
            for cpu_batch in chain.from_iterable(mini_batch.micro_batches for mini_batch in batch.mini_batches):
                micro_batch = cpu_batch.to(self.world.device)
                self._scored[micro_batch.index] = (micro_batch, self.scorer.scores(micro_batch))
                alive(self.config.stream.starvation_s)
        self._seconds["time/score"] += time.perf_counter() - start

    def update(self, mini_batch: MiniBatch) -> dict[str, float]:
        """One optimizer update. Returns its loss, kl, entropy, clip fractions, grad_norm and learning_rate.

        A loss or gradient that is not finite, on any rank, skips the update on all of them and counts it;
        `learner.max_nonfinite_updates` in a row raise NonFiniteUpdatesError.
        """
        start = time.perf_counter()
        first_visit = mini_batch.micro_batches[0].index not in self._visited
        self._visited.update(micro_batch.index for micro_batch in mini_batch.micro_batches)
        loss, sums, maxima = self._accumulate(mini_batch)
        learning_rate = self.backend.learning_rate
        norm = self.backend.step(apply=math.isfinite(loss))
        metrics = {"loss": loss, "grad_norm": norm, "learning_rate": learning_rate}
        if math.isfinite(loss) and math.isfinite(norm):
            self._skipped_in_a_row = 0
            metrics |= overall_metrics(sums)
            self._tally.add(sums, maxima, first_visit=first_visit, num_tokens=mini_batch.num_tokens)
            self._updates.append(metrics)
        else:
            self._skip(loss, norm)
        self._seconds["time/train"] += time.perf_counter() - start
        return metrics

    def end_step(self) -> dict[str, float]:
        """Close the step; its metrics over all applied updates, by the names of metrics.jsonl."""
        self.step += 1
        self._scored = {}
        metrics = self._tally.metrics() | self._seconds | {"fault/skipped_updates": float(self.skipped_updates)}
        for name in ("loss", "grad_norm"):
            metrics[name] = float(np.mean([update[name] for update in self._updates])) if self._updates else math.nan
        metrics["learning_rate"] = self._updates[-1]["learning_rate"] if self._updates else 0.0
        return metrics

    def write_weights(self, target: BinaryIO | WeightBuffer | None) -> None:
        """Write the weights with Hugging Face names into a buffer, or as one safetensors file into an empty stream.

        All that saves is a collective: every rank calls it, and None takes part and writes nothing.
        """
        tensors = whole_weights(self.backend, self.adapter, keep=target is not None, on_host=False)
        if isinstance(target, WeightBuffer):
            return target.fill(tensors)
        write_stream(tensors, target, [name for name, _ in self.model.named_parameters()])

    def save_model(self, directory: Path | None) -> None:
        """Write a directory that transformers and vLLM load: weights, configs, tokenizer."""
        keep = directory is not None
        tensors = gather(whole_weights(self.backend, self.adapter, keep=keep), keep=keep)
        if directory is not None:
            save_model(self.model, self.tokenizer, directory, tensors)

    def save_state(self, directory: Path | None) -> None:
        """Write what a resumed run needs besides the model: optimizer moments, fp32 masters, counters, torch's RNG.

        Whole tensors by parameter name: 12 bytes a parameter with bf16 weights, 8 with fp32 ones.
        """
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
        try:
            write_files(self.backend.state(), directory, "optimizer")
        finally:  # a collective too: the other ranks come to it whatever rank 0's disk does
            if self.adapter is not None:
                self.adapter.save(self.backend, directory)
        if directory is not None:
            state = {
                "format": STATE_FORMAT,
                "step": self.step,
                "updates": self.backend.updates,
                "skipped_updates": self.skipped_updates,
                "skipped_in_a_row": self._skipped_in_a_row,
            }
            (directory / "state.json").write_text(json.dumps(state, indent=1) + "\n")
            write_file({"rng": torch.get_rng_state()}, directory / "rng.safetensors")

    def load_state(self, directory: Path) -> None:
        """Take over what `save_state` wrote, bit for bit; the model's weights are those of the checkpoint's model."""
        state = json.loads((directory / "state.json").read_text())
        if state["format"] != STATE_FORMAT:
            raise ValueError(
                f"{directory}: learner state of format {state['format']}, this version reads {STATE_FORMAT}"
            )
        torch.set_rng_state(load_file(directory / "rng.safetensors")["rng"])
        with TensorFiles(directory, "optimizer") as tensors:
            self.backend.restore(tensors, state["updates"])
        self.step, self.skipped_updates = state["step"], state["skipped_updates"]
        self._skipped_in_a_row = state["skipped_in_a_row"]

    def _accumulate(self, mini_batch: MiniBatch) -> tuple[float, np.ndarray, np.ndarray]:
        """Loss and measured sums of the update over all ranks, in one copy to the host; the gradient stays behind."""
        loss = torch.zeros(1, dtype=torch.float64, device=self.world.device)
        sums = torch.zeros(2, len(SUMS), dtype=torch.float64, device=self.world.device)
        maxima = torch.zeros(2, len(MAXIMA), dtype=torch.float64, device=self.world.device)
        for micro_batch in mini_batch.micro_batches:
            batch, scores = self._scored[micro_batch.index]
            outcome = policy_objective(self.backend.forward, batch, scores, self.config)
            self.backend.backward(outcome.loss, last=micro_batch is mini_batch.micro_batches[-1])
            measured, highest = measure(batch, scores, outcome, self.config.correction)
            loss += outcome.loss.detach()
            sums += measured
            maxima = torch.maximum(maxima, highest)
            alive(self.config.stream.starvation_s)  # a long update does not hang
        return over_ranks(self.world.gathered(torch.cat([loss, sums.flatten(), maxima.flatten()])))

    def _skip(self, loss: float, norm: float) -> None:
        self.skipped_updates += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= self.config.learner.max_nonfinite_updates:
            raise NonFiniteUpdatesError(
                f"{self._skipped_in_a_row} updates in a row were skipped at step {self.step + 1}: loss {loss}, "
                f"gradient norm {norm}; lower learner.learning_rate, or look at this step's completions in "
                f"{rollout_file(Path(self.config.run.dir), self.step + 1)} (the limit: learner.max_nonfinite_updates)"
            )
