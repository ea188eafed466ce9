"""Calls read back from text, however the text is cut into pieces."""

import json
from itertools import pairwise

from hypothesis import example, given, settings
from hypothesis import strategies as st

from lapis.serving.tools import CallReader, Toolbox

TOOLS = [{"type": "function", "function": {"name": name}} for name in ("look", "sum")]
CALL = '{"name": "look", "arguments": {"at": "the <tool_call> cat"}}'


def read(text: str, cuts=(), tags=True, one=False) -> tuple[str, list[tuple[str, object]]]:
    """Words and calls of a reply that comes in pieces."""
    reader = CallReader(Toolbox(TOOLS, tags, one))
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    words = "".join(reader.read(text[a:b], last=False) for a, b in pairwise(places)) + reader.read("", last=True)
    return words, [(call.name, json.loads(call.arguments)) for call in reader.calls]


CASES = {
    "plain words": ("plain words", []),
    "a < b and <tool": ("a < b and <tool", []),
    f"<tool_call>\n{CALL}\n</tool_call>": ("", [("look", {"at": "the <tool_call> cat"})]),
    f"Let me look.\n<tool_call>{CALL}</tool_call>": ("Let me look.\n", [("look", {"at": "the <tool_call> cat"})]),
    f"<tool_call>{CALL}</tool_call>\n<tool_call>{{\"name\": \"sum\", \"arguments\": {{}}}}</tool_call>": (
        "", [("look", {"at": "the <tool_call> cat"}), ("sum", {})],
    ),
    f" \t<tool_call>{CALL}</tool_call> <tool_call>{CALL}</tool_call> \n": (
        "", [("look", {"at": "the <tool_call> cat"})] * 2,
    ),
    f"<tool_call>{CALL}</tool_call> so there": (" so there", [("look", {"at": "the <tool_call> cat"})]),
    f"<tool_call>{CALL}": ("", [("look", {"at": "the <tool_call> cat"})]),
    '<tool_call>{"name": "rm"}</tool_call>': ('<tool_call>{"name": "rm"}</tool_call>', []),
    "<tool_call>no json</tool_call> words": ("<tool_call>no json</tool_call> words", []),
    '{"name": "sum", "parameters": {"a": 1}}': ("", [("sum", {"a": 1})]),
    '<|python_tag|>{"name": "sum", "parameters": {"a": 1}}': ("", [("sum", {"a": 1})]),
    '{"name": "sum", "parameters": {}}; {"name": "look", "parameters": {}}': ("", [("sum", {}), ("look", {})]),
    '{"answer": 3}': ('{"answer": 3}', []),
    '{"name": "sum", "parameters"': ('{"name": "sum", "parameters"', []),
}  # fmt: skip


@given(st.sampled_from(sorted(CASES)), st.lists(st.integers(0, 200), max_size=6))
@example(f"Let me look.\n<tool_call>{CALL}</tool_call>", [12])  # before the line break, which then comes by itself
@settings(max_examples=150)
def test_calls_are_read_however_the_text_is_cut(text, cuts):
    assert read(text, cuts) == CASES[text]


def test_one_call_at_most():
    text = f"<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>"
    assert len(read(text, one=True)[1]) == 1 and len(read(text)[1]) == 2
