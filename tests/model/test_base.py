import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn

from permlab.data.spec import DataSpec
from permlab.model.base import Backbone, free_of_decay, patchify

SPEC = DataSpec(kind="image", num_classes=3, channels=2, height=4, width=6)


class Sum(Backbone):
    """Patches added up by slot, so that the logits can be worked out by hand."""

    def __init__(self, spec: DataSpec, *, patch_size: int) -> None:
        super().__init__()
        self.set_grid(spec, patch_size)
        self.patch_size = patch_size
        self.head = nn.Identity()

    def embed(self, inputs: Tensor) -> Float[Tensor, "b n d"]:
        return patchify(inputs, self.patch_size)

    def encode(self, items: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
        return items.sum(1)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_patchify_cuts_in_raster_order_channel_first(patch_size):
    images = torch.rand(3, 2, 4, 6)
    expected = [
        images[:, :, top : top + patch_size, left : left + patch_size].reshape(3, -1)
        for top in range(0, 4, patch_size)
        for left in range(0, 6, patch_size)
    ]
    torch.testing.assert_close(patchify(images, patch_size), torch.stack(expected, 1), rtol=0, atol=0)


def test_the_grid_follows_from_the_data():
    model = Sum(SPEC, patch_size=2)
    assert (model.height, model.width, model.num_items) == (2, 3, 6)


def test_an_indivisible_patch_size_names_those_which_do_divide():
    with pytest.raises(ValueError, match=r"3 does not divide a 4x6 image; sizes which do: 1, 2"):
        Sum(SPEC, patch_size=3)


def test_forward_reads_the_embedded_items():
    images = torch.rand(3, 2, 4, 6)
    expected = images.reshape(3, 2, 2, 2, 3, 2).sum((2, 4)).reshape(3, -1)
    torch.testing.assert_close(Sum(SPEC, patch_size=2)(images), expected)


@pytest.mark.parametrize(("part", "size"), [("embed", (1, 1, 2, 2)), ("encode", (1, 2, 3))])
def test_a_missing_part_is_named(part, size):
    with pytest.raises(NotImplementedError, match=f"Backbone defines no {part}"):
        getattr(Backbone(), part)(torch.zeros(size))


def test_free_of_decay_marks_the_parameter_itself():
    parameter = nn.Parameter(torch.zeros(2, 2))
    assert free_of_decay(parameter) is parameter
    assert parameter._no_weight_decay
