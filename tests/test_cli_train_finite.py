"""A model that training spoilt is not written."""

import equinox as eqx
import jax.numpy as jnp
import pytest
from fixtures.generation import refused
from fixtures.trainer import model

from mistral_eqx.cli.recipe import Data, Model, Optimizer, Recipe, Training
from mistral_eqx.cli.train import _save
from mistral_eqx.nn import stack


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_model_that_is_not_finite_is_not_saved(tmp_path, value):
    recipe = Recipe(str(tmp_path), Model("tiny"), Data("sort", 1), Optimizer(1e-3), Training(1))
    good = model()
    spoilt = eqx.tree_at(lambda one: one.norm.weight, good, good.norm.weight.at[1].set(value))
    with refused("NaN or infinite", str(tmp_path), "optimizer.learning_rate"):
        _save(recipe, stack(spoilt), None)
    assert not list(tmp_path.iterdir())
    _save(recipe, stack(good), None)
    assert (tmp_path / "model").is_dir()
