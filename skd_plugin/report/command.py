"""`skd report`: from run folders to one HTML page, and PNGs of the curves."""

from __future__ import annotations

from pathlib import Path

from skd_plugin.errors import RecipeError
from skd_plugin.report.run_record import RunRecord, read_runs
from skd_plugin.terminal import say


def run_report(paths: list[str], out: str, png: str | None, max_traces: int) -> int:
    """Raises RecipeError: a path is no run folder, nothing can be written at `out`, --png without matplotlib."""
    if max_traces < 0:
        raise RecipeError(f"--traces is {max_traces}; it is how many responses of each run the page holds")
    target = Path(out)
    if target.is_dir():
        raise RecipeError(f"--out: {target} is a folder; name the file to write")
    runs = read_runs(paths)
    if png is not None:
        from skd_plugin.report.plots import write_plots

        files = write_plots(runs, Path(png))
        say(f"{len(files)} curves are in {png}")
    _write_page(runs, target, max_traces)
    for run in runs:
        for note in run.notes:
            say(f"{run.name}: {note}")
    say(f"The report is {target} ({target.stat().st_size / 1e6:.1f} MB); open it in a browser")
    return 0


def _write_page(runs: list[RunRecord], target: Path, max_traces: int) -> None:
    from skd_plugin.report.page import render
    from skd_plugin.report.pieces import Pieces, load_pieces, same_tokenizer
    from skd_plugin.report.tables import kinds_of_loss
    from skd_plugin.report.traces import pack_traces

    pieces = [load_pieces(run) if run.folder.traces.path.is_file() else Pieces(None) for run in runs]
    notes = []
    if not same_tokenizer(pieces):
        notes.append(
            "The students' tokenizers differ, so what is counted a token differs too: "
            "losses, KL and lengths of these runs do not compare."
        )
    if len(kinds_of_loss(runs)) > 1:
        notes.append("The runs have different losses (skd.loss.kind): compare KL and accuracy, not the loss.")
    page = render(runs, pack_traces(runs, pieces, max_traces), notes)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page, encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"--out: {target} cannot be written: {error.strerror}") from error
