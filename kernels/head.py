"""A language model's head that answers with log-probs or a loss instead of logits, sharded or not.

ZeRO-3 and FSDP hold the weight whole only while its own module's forward runs, so the fused op must be called there:
outside of it the weight has shape [0] or is a DTensor shard.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kernels import ops


class LogprobHead(nn.Linear):
    """A bias-free linear head [V, H] whose forward calls `kernels.ops`.

        head(hidden)                                      logits [..., V], as nn.Linear: generation keeps working
        head(hidden, targets, **options)                  ops.linear_logprob
        head(hidden, targets, anchor, advantage, **options)   ops.linear_policy_loss

    Shapes: hidden [T, H], targets, anchor and advantage [T].

    `install` puts it in the place of a Hugging Face model's own head and keeps the very Parameter, so tied embeddings
    stay tied, optimizers and state dicts see nothing new, and `save_pretrained` writes the same file. Do it before
    DeepSpeed, FSDP or the optimizer see the model. Under FSDP2 give an untied head its own `fully_shard`; leave a
    tied one to the root, which then holds the shared weight once and reduces one gradient for both uses.

    `main_grad`, set by whoever owns the gradients, returns the buffer [V, H] that `ops.linear_policy_loss` adds the
    weight's gradient to (its `main_grad`), and is called for every loss in grad mode, before it is formed. Autograd
    then only brings what another use of the weight adds, such as a tied embedding.
    """

    main_grad: Callable[[], Tensor] | None = None

    def __init__(self, weight: nn.Parameter) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", None)

    @staticmethod
    def install(model: nn.Module) -> "LogprobHead":
        """Replaces `model`'s output embeddings and returns the new head; refuses a head with a bias."""
        old: Any = model.get_output_embeddings()  # type: ignore[operator]
        if isinstance(old, LogprobHead):
            return old
        if getattr(old, "bias", None) is not None:
            raise ValueError(
                f"the fused head has no bias, {type(model).__name__} has one of {old.bias.numel()} entries"
            )
        head = LogprobHead(old.weight)
        head.train(old.training)
        model.set_output_embeddings(head)  # type: ignore[operator]
        return head

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        anchor_logprob: Tensor | None = None,
        advantage: Tensor | None = None,
        **options: Any,
    ) -> Any:
        if targets is None:
            return super().forward(hidden)
        if anchor_logprob is None or advantage is None:
            return ops.linear_logprob(hidden, self.weight, targets, **options)
        if self.main_grad is not None and torch.is_grad_enabled():
            options["main_grad"] = self.main_grad()
        return ops.linear_policy_loss(hidden, self.weight, targets, anchor_logprob, advantage, **options)


class LogprobModel(nn.Module):
    """A causal language model and its head as one module, for engines that shard: its forward is one forward.

        model(inputs, rows, targets, **options)                     (logprob, entropy)
        model(inputs, rows, targets, anchor, advantage, **options)  (loss, logprob, entropy, metrics)

    `inputs` are the decoder's keyword arguments (input_ids, position_ids, ...), with any batch shape; `rows` [T]
    indexes the flattened positions whose hidden state predicts `targets` [T], so prompt and padding cost no logits.

    Example: batch of one packed row [prompt a b, answer c d]: rows [1, 2], targets [c, d].
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        LogprobHead.install(model)

    def forward(self, inputs: dict[str, Tensor], rows: Tensor, targets: Tensor, *args: Any, **options: Any) -> Any:
        decoder: Any = self.model.get_decoder()  # type: ignore[operator]
        hidden = decoder(**inputs, use_cache=False).last_hidden_state
        selected = torch.index_select(hidden.flatten(0, -2), 0, rows)
        head: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        return head(selected, targets, *args, **options)
