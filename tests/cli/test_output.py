"""What commands print: text of any kind as it stands, tables, and progress that a log can show."""

import io
import json
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from rich.console import Console

from lapis.cli import output
from lapis.cli.main import COMMANDS, main
from lapis.errors import OutputError
from lapis.report import Page

NASTY = "[bold]x[/bold] [/] \x1b[31mred\x07\x9b"


@pytest.fixture
def printed(monkeypatch):
    """What goes to a terminal of 100 columns."""
    stream = io.StringIO()
    monkeypatch.setattr(output, "console", Console(file=stream, force_terminal=True, width=100, highlight=False))
    return stream


def test_text_is_no_markup_and_steers_no_terminal(printed):
    output.line(NASTY)
    output.notes([NASTY])
    output.table(NASTY, [NASTY, "n"], [[NASTY, 1234], ["a\nb\tc", 0.5]], note=NASTY)
    text = printed.getvalue()
    assert text.count("[bold]x[/bold] [/] ␛[31mred␇�") == 6
    assert "\x1b[31m" not in text and "\x07" not in text and "\x9b" not in text
    assert "a↵b⇥c" in text and "1,234" in text


def test_no_figure_of_a_wide_table_is_cut(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(output, "console", Console(file=stream, width=60, highlight=False))
    output.table("by piece", ["piece", *(f"gradient part {i}" for i in range(9))], [["layer 10", *[0.00012345] * 9]])
    lines = stream.getvalue().splitlines()
    assert lines[-1].startswith("layer 10") and lines[-1].count("0.0001234") == 9 and "…" not in stream.getvalue()
    assert sum("gradient" in line for line in lines) == 1 and len(lines[-1]) == 8 + 9 * 11


def test_a_log_gets_a_line_with_share_rate_and_time_left(monkeypatch, capsys):
    monkeypatch.setattr(output, "INTERVAL", 0.05)
    with output.progress("reading", "bytes") as report:
        report(1_000_000, 4_000_000)
        time.sleep(0.2)
        report(2_000_000, 4_000_000)
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("reading   25%") for line in lines)
    assert any(line.startswith("reading   50%") and "MB/s" in line and line.endswith(" left") for line in lines)


def test_a_log_hears_of_work_that_reports_nothing(monkeypatch, capsys):
    monkeypatch.setattr(output, "INTERVAL", 0.05)
    with output.progress("reading") as report:
        report.stage("looking")
        time.sleep(0.2)
    assert "looking" in capsys.readouterr().err


def test_short_work_says_nothing_in_a_log(capsys):
    with output.progress("reading") as report:
        report(1, 2)
    assert capsys.readouterr().err == ""


def test_one_bar_is_shown_at_a_time(monkeypatch, capsys):
    monkeypatch.setattr(output, "INTERVAL", 0.05)
    with output.progress("adapting") as outer:
        with output.progress("reading", "bytes") as inner:
            inner(1_000_000, 2_000_000)
            time.sleep(0.2)
        within = capsys.readouterr().err.splitlines()
        time.sleep(0.2)
    assert within and all(line.startswith("reading   50%") and "MB/s" in line for line in within)
    assert all(line.startswith("adapting") for line in capsys.readouterr().err.splitlines())
    with output.progress("another") as fresh:
        assert fresh is not outer


def test_a_terminal_gets_a_bar(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(output, "stderr", Console(file=stream, force_terminal=True, width=100))
    with output.progress("reading [red]x", "tokens") as report:
        report(1, 4)
        time.sleep(0.15)
        report(2, 4, "scoring")
    text = stream.getvalue()
    assert "reading [red]x" in text and "━" in text and "scoring" in text


def test_a_page_is_written_whole_and_replaces_nothing(tmp_path, capsys):
    path = tmp_path / "page.html"
    output.write_page(Page("one"), path)
    assert capsys.readouterr().err == f"page: {path}\n"  # so that one knows where to look
    with pytest.raises(OutputError, match="exists already"):
        output.write_page(Page("two"), path)
    output.write_page(Page("two"), path, overwrite=True)
    assert "<h1>two</h1>" in path.read_text()


def test_json_has_no_nan():
    code = "from lapis.cli.output import show; show({'a': [float('nan'), {'b': float('inf')}]}, True, print)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == {"a": [None, {"b": None}]}


@pytest.mark.parametrize("command", ["eval", "diff", "tokenizer train", "data pack"])
def test_help_lists_no_option_that_empties_a_list(command, capsys):
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
        raise SystemExit(0)
    assert "Usage: lapis" in (text := capsys.readouterr().out) and "--empty-" not in text


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_shows_no_empty_default(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with suppress(SystemExit):
        main([*command.split(), "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Usage" in shown
    for noise in ("[default: ()]", '[default: ""]', "[default: ]", "[default: None]", "--empty-"):
        assert noise not in shown
