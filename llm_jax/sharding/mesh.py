"""The device mesh: named axes over the devices of all processes."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Size of each mesh axis; -1, at most once, takes the devices that are left.

    data:   copies of the parameters, each on its share of the batch.
    fsdp:   parameters, gradients and optimizer state in shares, each device also on its share of
            the batch (ZeRO stage 3).
    tensor: heads, MLP and vocabulary in shares (Megatron), for fast links.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for axis, size in sizes.items():
            if size != -1 and size < 1:
                raise ValueError(f"mesh.{axis} = {size}: expected a positive size, or -1 to fill")
        if list(sizes.values()).count(-1) > 1:
            filled = [axis for axis, size in sizes.items() if size == -1]
            raise ValueError(f"mesh axes {' and '.join(filled)} are all -1: only one can fill")

    def shape(self, num_devices: int) -> dict[str, int]:
        """Axis sizes for this many devices.

        Raises:
          ValueError: the sizes do not multiply to `num_devices`.
        """
        sizes = dataclasses.asdict(self)
        fixed = math.prod(size for size in sizes.values() if size != -1)
        if -1 in sizes.values() and num_devices % fixed == 0:
            return {a: num_devices // fixed if s == -1 else s for a, s in sizes.items()}
        if fixed != num_devices:
            product = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
            raise ValueError(
                f"mesh {product} does not divide over {num_devices} devices: choose sizes whose "
                f"product is {num_devices}, or -1 on one axis"
            )
        return sizes


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices`, by default all devices of all processes."""
    devices = jax.devices() if devices is None else devices
    shape = config.shape(len(devices))
    return jax.make_mesh(
        tuple(shape.values()),
        tuple(shape),
        axis_types=(AxisType.Auto,) * len(shape),
        devices=devices,
    )
