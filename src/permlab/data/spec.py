"""What a dataset looks like, known before torch is imported."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class DataSpec:
    """Shape of a dataset's samples, from which models and sites derive theirs.

    A sample is an image `[channels, height, width]`, cut into patches, or a sequence: of height 1,
    as long as it is wide, its entries being the items.

    Args:
        kind: word for what the samples are (`image`, `text`); models and tasks say which they take.
        num_classes: number of labels; for text the vocabulary size.
        channels, height, width: of an image, in channels and pixels; of a sequence 1, 1 and its length.
        patch_size: side of a square patch in pixels where the model's configuration names none.
        hides_order: whether the patches of all images lie in one order that only the data set's `truth` tells.
        labels, items: plural nouns for the classes and for what is permuted, in messages.
    """

    kind: str
    num_classes: int
    channels: int
    height: int
    width: int
    patch_size: int = 1
    hides_order: bool = field(default=False, compare=False)
    labels: str = field(default="classes", compare=False)
    items: str = field(default="patches", compare=False)

    @property
    def is_sequence(self) -> bool:
        """Whether samples have no patches: their entries are the items."""
        return self.height == 1

    def grid(self, patch_size: int) -> tuple[int, int]:
        """Rows and columns of the patch grid.

        Raises:
            ValueError: if the patch size does not divide the image, naming the sizes which do.
        """
        sizes = divisors(self.height, self.width)
        if patch_size not in sizes:
            raise ValueError(
                f"{patch_size} does not divide a {self.height}x{self.width} image; "
                f"sizes which do: {', '.join(map(str, sizes))}"
            )
        return self.height // patch_size, self.width // patch_size

    def describe(self, rows: int, columns: int) -> str:
        """The items of a sample in words, once it is known into how many rows and columns it is cut.

        Example:
            >>> DataSpec("image", 10, channels=1, height=8, width=16).describe(4, 8)
            '32 patches of 2x2 pixels in a 4x8 grid'
            >>> DataSpec("image", 10, channels=1, height=8, width=8).describe(8, 8)
            '64 patches of 1x1 pixels in an 8x8 grid'
        """
        if self.is_sequence:
            return f"{columns} {self.items}"
        article = "an" if str(rows).startswith("8") or rows in (11, 18) else "a"
        side = f"{self.height // rows}x{self.width // columns}"
        return f"{rows * columns} {self.items} of {side} pixels in {article} {rows}x{columns} grid"


def text_spec(vocab_size: int, sequence_length: int) -> DataSpec:
    """Shape of samples of text: token ids `[sequence_length]`, each class a token."""
    return DataSpec(
        "text", vocab_size, channels=1, height=1, width=sequence_length, labels="tokens", items="tokens"
    )  # fmt: skip


def divisors(height: int, width: int) -> list[int]:
    """Patch sizes that divide both sides of an image.

    Example:
        >>> divisors(8, 12)
        [1, 2, 4]
    """
    return [size for size in range(1, min(height, width) + 1) if height % size == 0 == width % size]
