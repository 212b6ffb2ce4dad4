"""`skd check`: runs the checks, and shows a table of what they found."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path

from skd_plugin.check.checks import run_checks
from skd_plugin.check.findings import Finding, exit_status, findings_table, verdict
from skd_plugin.terminal import plain_console, waiting


def run_check(recipe: str, overrides: Sequence[str], *, self_test: bool, dry_run: bool) -> int:
    """Returns 0 (nothing failed), 1 (a check failed), 2 (the recipe is wrong) or 130 (Ctrl-C).

    Raises:
        RecipeError: the file is no recipe; there is nothing to check.
    """
    _be_quiet()
    console = plain_console()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix="skd-check-"))
    findings: list[Finding] = []
    try:
        with waiting(console, "reading the recipe") as progress:
            checks = run_checks(recipe, overrides, folder, progress, self_test=self_test, dry_run=dry_run)
            for finding in checks:
                findings.append(finding)
    except KeyboardInterrupt:
        console.print("Stopped; this is what had been found:")
        console.print(findings_table(findings, f"skd check {recipe}"))
        return 130
    finally:
        if not any(finding.level == "failed" and str(folder) in finding.remedy for finding in findings):
            shutil.rmtree(folder)  # else its log is named in the table
    console.print(findings_table(findings, f"skd check {recipe}"))
    console.print(verdict(findings))
    return exit_status(findings)


def _be_quiet() -> None:
    """The libraries' own warnings would break into the table; what matters of them is a finding."""
    import transformers
    from datasets.utils import logging as datasets_logging
    from huggingface_hub.utils import logging as hub_logging

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
