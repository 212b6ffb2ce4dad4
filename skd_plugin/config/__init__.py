"""From a recipe to a checked run: `load_run` is the one way in."""

from __future__ import annotations

from skd_plugin.config.recipe import RecipeError, load_recipe
from skd_plugin.config.run import Run, load_run
from skd_plugin.config.schema import SKDConfig

__all__ = ["RecipeError", "Run", "SKDConfig", "load_recipe", "load_run"]
