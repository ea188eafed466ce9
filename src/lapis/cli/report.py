"""`lapis report`: what some folders hold, as one page."""

from pathlib import Path


def report(*folders: Path, out: Path, overwrite: bool = False, json: bool = False) -> None:
    """Put the pages of some runs together: learning curves, merges, diffs, lenses, as one file that works offline.

    Args:
        folders: Folders that lapis has written, or that hold its pages (--html) and its JSON (--json > FILE.json).
        out: The HTML file to write.
        overwrite: Replace it if it exists.
        json: Print one JSON object.
    """
    from lapis.checkpoint.commit import check_file
    from lapis.cli.output import notes, show, write_page
    from lapis.errors import ConfigError
    from lapis.report.pages.working_folder import report_of

    if not folders:
        raise ConfigError("report: no folder given; lapis report DIR... --out FILE")
    check_file(out, overwrite=overwrite)
    page = report_of(folders)
    write_page(page, out, overwrite=overwrite)
    show({"out": str(out), "sections": page.sections}, json, lambda: notes(page.sections))
