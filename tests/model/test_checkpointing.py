"""Gradient checkpointing changes nothing but memory."""

import pytest
import torch
from tiny_models import IMAGES, TEXT, llama, vim, vit
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from permlab.model.checkpointing import checkpoint_stages

MODELS = {"vit": lambda: vit(drop_path=0.4), "vim": vim, "llama": llama}


def samples(name: str) -> Tensor:
    if name == "llama":
        return torch.randint(TEXT.num_classes, (3, 6))
    return torch.rand(3, IMAGES.channels, IMAGES.height, IMAGES.width)


def loss_and_gradients(model: nn.Module, inputs: Tensor, weights: dict[str, Tensor]) -> tuple[Tensor, list, int]:
    """Loss, gradients and what the graph keeps for them, in bytes, parameters left out."""
    kept: dict[int, int] = {}
    parameters = {parameter.data_ptr() for parameter in [*model.parameters(), *weights.values()]}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    torch.manual_seed(0)  # of drop path
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = functional_call(model, weights, (inputs,)).square().mean()
    leaves = list(weights.values()) or list(model.parameters())
    return loss, list(torch.autograd.grad(loss, leaves, allow_unused=True)), sum(kept.values())


@pytest.mark.parametrize("exchanged", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_the_same_bits_and_less_is_kept(name: str, exchanged: bool) -> None:
    """Under exchanged weights, too, which are the model's own again by the time of the backward pass."""
    model, inputs = MODELS[name]().train(), samples(name)
    names = [key for key, _ in model.named_parameters() if "proj" in key or "mlp" in key] if exchanged else []
    weights = {key: torch.randn_like(model.get_parameter(key)).requires_grad_() for key in names}
    loss, gradients, kept = loss_and_gradients(model, inputs, weights)
    checkpoint_stages(model)
    again, others, less = loss_and_gradients(model, inputs, weights)
    assert torch.equal(loss, again)
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    for gradient, other in zip(gradients, others, strict=True):
        assert gradient is other is None or torch.equal(gradient, other)
    assert less < 0.6 * kept
    assert set(model.state_dict()) == set(MODELS[name]().state_dict())


def test_a_model_without_stages_is_refused() -> None:
    class Plain:
        stages = ()

    with pytest.raises(ValueError, match="Plain has no blocks"):
        checkpoint_stages.__wrapped__(Plain()) if hasattr(checkpoint_stages, "__wrapped__") else checkpoint_stages(
            Plain()  # type: ignore[arg-type]
        )
