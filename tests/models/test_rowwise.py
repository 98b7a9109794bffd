"""Functions of rows under `jax.vmap`: the rows of all calls go through the function at once."""

import jax
import jax.numpy as jnp
import numpy as np

from xtransfer.models.rowwise import rowwise


def test_vmapped_rows_are_concatenated_into_one_call() -> None:
    """Under vmap, `rowwise` merges the rows of all calls, and the results stay the same."""
    shapes = []

    @rowwise
    def scaled(x: jax.Array, factors: tuple[jax.Array, None], shared: jax.Array) -> dict[str, jax.Array]:
        shapes.append(x.shape)
        return {"a": x * factors[0][:, None] + shared, "b": jnp.sum(x, axis=1)}

    x, factor = jnp.arange(24.0).reshape(2, 3, 4), jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    batched = jax.vmap(lambda x, factor: scaled(x, (factor, None), jnp.float32(7)))(x, factor)
    assert shapes[-1] == (6, 4)
    np.testing.assert_array_equal(batched["a"], x * factor[:, :, None] + 7)
    np.testing.assert_array_equal(batched["b"], x.sum(axis=2))
    single = scaled(x[1], (factor[1], None), jnp.float32(7))
    assert shapes[-1] == (3, 4)
    np.testing.assert_array_equal(single["a"], batched["a"][1])
