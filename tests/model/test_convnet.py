"""The small convolutional network against its layers written out."""

import pytest
import torch
import torch.nn.functional as F

from permlab.data.spec import DataSpec
from permlab.model.convnet import Convnet


def test_features_are_those_of_convolutions_over_the_image() -> None:
    model = Convnet(DataSpec("image", 5, 3, 8, 12), patch_size=1, width=6, depth=2).double()
    images = torch.rand(2, 3, 8, 12, dtype=torch.float64)
    maps = images
    for block in model.blocks:
        maps = F.gelu(F.conv2d(maps, block.weight, block.bias, padding=1))
        maps = maps.unfold(2, 2, 2).unfold(3, 2, 2).mean((-2, -1))
    features = F.gelu(maps.flatten(1) @ model.join.weight.T + model.join.bias)
    torch.testing.assert_close(model.encode(model.embed(images)), features)


@pytest.mark.parametrize(("height", "width", "depth"), [(7, 7, 3), (1, 1, 2), (2, 5, 4)])
def test_odd_and_small_grids_are_read(height: int, width: int, depth: int) -> None:
    model = Convnet(DataSpec("image", 5, 1, 2 * height, 2 * width), patch_size=2, width=4, depth=depth)
    assert model(torch.rand(3, 1, 2 * height, 2 * width)).shape == (3, 5)
