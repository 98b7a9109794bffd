"""Low-rank adapters of linear layers: a product of two narrow matrices beside a frozen kernel.

Shapes: R rows, S tokens per row, T tokens, I inputs, O outputs, K the adapter's rank.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


class Adapter(nnx.Module):
    """The map x -> scale · x a b, which a linear layer adds to its output. With b of zeros, as here, it adds nothing.

    Args:
      inputs: I.
      outputs: O.
      rank: K.
      scale: the factor.
      dtype: the compute dtype.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float, dtype: DTypeLike = jnp.float32):
        self.a = nnx.Param(jnp.zeros((inputs, rank), jnp.float32))
        self.b = nnx.Param(jnp.zeros((rank, outputs), jnp.float32))
        self.scale, self.dtype = scale, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [T, I] -> [T, O]."""
        a, b = self._matrices()
        return ((x.astype(self.dtype) @ a) @ b) * self.scale

    def to_columns(self, x: jax.Array) -> jax.Array:
        """Map [R, S, I] -> [R, O, S]."""
        a, b = self._matrices()
        narrow = jnp.einsum("rsi,ik->rsk", x.astype(self.dtype), a)  # [R, S, K]
        return jnp.einsum("rsk,ko->ros", narrow, b) * self.scale

    def from_columns(self, x: jax.Array) -> jax.Array:
        """Map [R, I, S] -> [R, S, O]."""
        a, b = self._matrices()
        narrow = jnp.einsum("ris,ik->rsk", x.astype(self.dtype), a)  # [R, S, K]
        return jnp.einsum("rsk,ko->rso", narrow, b) * self.scale

    def _matrices(self) -> tuple[jax.Array, jax.Array]:
        return self.a[...].astype(self.dtype), self.b[...].astype(self.dtype)
