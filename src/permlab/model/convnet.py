"""A small convolutional network over the grid of patches: the encoder of images that are sorted or put together."""

import itertools

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from permlab.data.spec import DataSpec
from permlab.model.base import Backbone, patchify
from permlab.option import PositiveInt, Side


class Convnet(Backbone):
    """Blocks of a 3x3 convolution, GELU and averages over 2x2 cells, then a linear map of all that is left.

    Items are the patches' own values, laid out on their grid slot by slot: what a patch is read as depends on its
    neighbours, so order matters as nowhere else. A grid that is odd keeps its last row or column; one that has come
    down to one cell stays as it is.

    Shapes:
        b: images.  n: patches.  d: channels * patch_size^2.  f: width.
    Args:
        spec: shape of the images.
        patch_size: side of a patch in pixels; 1 convolves pixels.
        width: channels of the first block, and number of features; each further block has as many.
        depth: number of blocks.
    Raises:
        ValueError: if the patch size does not divide the image.
    Source: LeCun et al. 1998, Gradient-based learning applied to document recognition.
    Differs from source: averages without parameters, GELU, one linear layer.
    Cost: O(n d width + depth n width^2) time for each image.
    Example:
        >>> spec = DataSpec(kind="image", num_classes=10, channels=1, height=8, width=8)
        >>> Convnet(spec, patch_size=1, width=16, depth=2)(torch.rand(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """

    def __init__(self, spec: DataSpec, *, patch_size: Side, width: PositiveInt, depth: PositiveInt) -> None:
        super().__init__()
        self.set_grid(spec, patch_size)
        self.patch_size = patch_size
        self.num_features = spec.channels * patch_size**2
        widths = [self.num_features, *[width] * depth]
        self.blocks = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1) for before, after in itertools.pairwise(widths)
        )
        height, breadth = self.height, self.width
        for _ in range(depth):
            height, breadth = (height + 1) // 2, (breadth + 1) // 2
        self.join = nn.Linear(width * height * breadth, width)
        self.head = nn.Linear(width, spec.num_classes)

    def embed(self, inputs: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        return patchify(inputs, self.patch_size)

    def encode(self, items: Float[Tensor, "b n d"]) -> Float[Tensor, "b f"]:
        maps = items.mT.unflatten(-1, (self.height, self.width))
        for block in self.blocks:
            maps = functional.gelu(block(maps))
            maps = functional.avg_pool2d(maps, 2, ceil_mode=True)
        return functional.gelu(self.join(maps.flatten(1)))
