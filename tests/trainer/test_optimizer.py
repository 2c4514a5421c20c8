import pytest
import torch

from core.config import Learner
from trainer.optimizer import Optimizer


def parameters(dtype=torch.float32):
    torch.manual_seed(0)
    return {name: torch.nn.Parameter(torch.randn(3, 2).to(dtype)) for name in ("a", "b")}


def settings(**overrides):
    return Learner(**{"learning_rate": 0.1, "warmup_updates": 0, "grad_clip": 1.0, "weight_decay": 0.1, **overrides})


def fill(optimizer, value):
    """Leave gradients as a backward pass does."""
    for parameter in optimizer.parameters.values():
        (parameter * value).sum().backward()
    optimizer.collect()


def test_learning_rate_warms_up_in_updates_and_then_is_constant():
    optimizer = Optimizer(parameters(), settings(warmup_updates=4))
    rates = []
    for _ in range(6):
        rates.append(optimizer.learning_rate)
        optimizer.step(0.0)
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
    assert Optimizer(parameters(), settings()).learning_rate == 0.1


@pytest.mark.parametrize("norm", [0.5, 8.0])
def test_a_step_is_clipped_adamw(norm):
    found, expected = parameters(), parameters()
    optimizer = Optimizer(found, settings(adam_beta2=0.95))
    plain = torch.optim.AdamW(expected.values(), lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
    for scale in (1.0, 0.3):
        optimizer.zero_gradient()
        gradient = scale * norm * torch.ones(12) / 12**0.5
        optimizer.gradient.copy_(gradient)
        optimizer.step(scale * norm)
        clipped = gradient * min(1.0, 1.0 / (scale * norm))
        for parameter, part in zip(expected.values(), clipped.split(6)):
            parameter.grad = part.view(3, 2)
        plain.step()
    for name in found:
        torch.testing.assert_close(found[name], expected[name])
    assert optimizer.updates == 2


def test_gradients_of_several_backward_passes_add_in_the_flat_buffer():
    optimizer = Optimizer(parameters(), settings())
    fill(optimizer, 2.0)
    fill(optimizer, 0.5)
    assert optimizer.gradient.tolist() == [2.5] * 12
    optimizer.zero_gradient()
    assert optimizer.parameters["a"].grad.tolist() == [[0.0, 0.0]] * 3


def test_bfloat16_gradients_add_in_float32():
    optimizer = Optimizer(parameters(torch.bfloat16), settings())
    for _ in range(300):
        fill(optimizer, 1.0)
    assert optimizer.gradient.tolist() == [300.0] * 12  # bf16 would stop at 256
    assert all(parameter.grad is None for parameter in optimizer.parameters.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restored_state_continues_bit_for_bit(dtype):
    first = Optimizer(parameters(dtype), settings())
    for value in (1.0, -0.5):
        first.zero_gradient()
        fill(first, value)
        first.step(1.0)
    saved = {name: tensor.clone() for name, tensor in first.tensors().items()}
    second = Optimizer(parameters(dtype), settings())
    for name, parameter in second.parameters.items():
        parameter.data.copy_(first.parameters[name])
    second.restore(saved, updates=2)
    for optimizer in (first, second):
        optimizer.zero_gradient()
        fill(optimizer, 0.7)
        optimizer.step(1.0)
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, second.tensors()[name])
    for name, parameter in first.parameters.items():
        assert torch.equal(parameter, second.parameters[name])


def test_state_of_another_model_is_refused():
    optimizer = Optimizer(parameters(), settings())
    with pytest.raises(ValueError, match=r"4 entries differ, such as exp_avg\.a"):
        optimizer.restore({}, updates=1)
