"""GPUs by name, as their makers describe them, and what a training would take there."""

from dataclasses import dataclass

# Part of the published speed that a training is taken to reach: of products in float32, and in half precision.
FLOAT_UTILISATION, HALF_UTILISATION = 0.5, 0.35
# Seconds between two launches of a kernel, which small models wait for.
LAUNCH_SECONDS = 1e-5
# Memory that the driver and its libraries take.
CONTEXT_BYTES = 600 * 2**20


@dataclass(frozen=True)
class Gpu:
    """A graphics card.

    Args:
        name: as it is called.
        memory: of it, GiB.
        float32: published operations in a second, in units of 1e12, without tensor cores.
        half: of its tensor cores on full matrices, adding up in float32.
        half_type: bfloat16, or float16 where it has no other.
    """

    name: str
    memory: float
    float32: float
    half: float
    half_type: str = "bf16"

    def seconds(self, flops: float, num_operations: float, *, half: bool) -> float:
        """Of so many floating-point operations in so many calls of torch's operators."""
        speed = self.half * HALF_UTILISATION if half else self.float32 * FLOAT_UTILISATION
        return max(flops / (speed * 1e12), num_operations * LAUNCH_SECONDS)

    def fits(self, size: float) -> bool:
        """Whether so many bytes have room beside the driver's own."""
        return size + CONTEXT_BYTES <= self.memory * 2**30


# NVIDIA's data sheets; the RTX 4090's from the Ada architecture's white paper.
GPUS = (
    Gpu("T4", 16, 8.1, 65.0, "fp16"),
    Gpu("RTX 4090", 24, 82.6, 165.2),
    Gpu("A100-40GB", 40, 19.5, 312.0),
    Gpu("H100-80GB", 80, 66.9, 989.4),
)
