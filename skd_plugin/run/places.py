"""Places outside the run folder that a recipe names for the student and the checkpoints (openrlhf.ckpt.*).

A link in the run folder leads to each, so that whoever reads a run folder finds all of it there.
"""

from __future__ import annotations

from pathlib import Path

from skd_plugin.config.run import Run
from skd_plugin.errors import RecipeError


def link_places(run: Run) -> None:
    """Does nothing for places in the run folder, and for links that a run to be resumed has made.

    Raises:
        RecipeError: a place holds files already. They would be another run's, and the two would mix.
    """
    links = {"ckpt.output_dir": run.folder.model, "ckpt.path": run.folder.checkpoints}
    for option, link in links.items():
        place = Path(run.host.get(option, link))
        if place == link or link.resolve() == place:
            continue
        try:
            if place.exists() and any(place.iterdir()):
                raise RecipeError(
                    f"openrlhf.{option}: {place} is not empty, and the files of two runs must not meet; name a new "
                    "folder, or leave it out: then they are in the run folder (skd.run_dir)"
                )
            place.mkdir(parents=True, exist_ok=True)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(place, target_is_directory=True)
        except OSError as error:
            raise RecipeError(f"openrlhf.{option}: {place} cannot be used: {error.strerror}") from error
