"""Places of the user's for the student and the checkpoints: used, found through the run folder, and never shared."""

from __future__ import annotations

from pathlib import Path

import pytest

from skd_plugin.config.run import Run
from skd_plugin.config.schema import SKDConfig
from skd_plugin.errors import RecipeError
from skd_plugin.run.places import link_places


def a_run(folder: Path, **places: Path) -> Run:
    skd = SKDConfig(teacher={"model_name_or_path": "t"}, run_dir=str(folder))
    own = {"output_dir": folder / "model", "path": folder / "checkpoints"}
    return Run(skd, {f"ckpt.{name}": str(place) for name, place in (own | places).items()}, cpu=True)


def test_places_in_the_run_folder_need_nothing(tmp_path: Path) -> None:
    link_places(a_run(tmp_path / "run"))
    assert not list(tmp_path.iterdir())


def test_a_link_leads_to_a_place_elsewhere(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", path=tmp_path / "disk" / "saved", output_dir=tmp_path / "student")
    link_places(run)
    (tmp_path / "disk" / "saved" / "_actor").mkdir()
    assert [path.name for path in run.folder.checkpoints.iterdir()] == ["_actor"]
    assert run.folder.model.resolve() == tmp_path / "student"
    link_places(run)  # as a run that is resumed does


def test_a_place_with_files_of_another_run_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    link_places(a_run(tmp_path / "a", path=shared))
    (shared / "_actor").mkdir()
    with pytest.raises(
        RecipeError, match=r"ckpt\.path: .*shared is not empty, and the files of two runs must not meet"
    ):
        link_places(a_run(tmp_path / "b", path=shared))


def test_a_place_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match=r"ckpt\.output_dir: .* cannot be used: Not a directory"):
        link_places(a_run(tmp_path / "run", output_dir=tmp_path / "file" / "model"))
