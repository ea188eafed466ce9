"""One chat template holds in what is written, whichever way the inputs spell theirs; generation settings stay whole."""

import json

import pytest

from lapis.text.tokenizer.folder import read_templates
from lapis.weights.graft.graft import graft
from lapis.weights.merge.merge import merge
from lapis.weights.tokenizer_files import write_template

OTHER = "{{ 'other <|im_start|><|im_end|>' }}"


def spell(folder, template, style):
    """Gives a folder a template in one of the ways that hubs have."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("chat_template", None)
    if style in ("config", "both"):
        settings["chat_template"] = template if style == "config" else "stale"
    path.write_text(json.dumps(settings))
    if style in ("jinja", "both"):
        (folder / "chat_template.jinja").write_text(template)
    if style == "folder":
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "default.jinja").write_text(template)
        (folder / "additional_chat_templates" / "tools.jinja").write_text("tools")
    return folder


@pytest.mark.parametrize("chat", ["config", "jinja", "both", "folder"])
def test_a_graft_speaks_as_chat_where_onto_is_silent(trio, tmp_path, chat):
    models = trio()
    spell(models["chat"], OTHER, chat)
    graft(**models, out=tmp_path / "out")
    assert read_templates(tmp_path / "out")["default"] == OTHER
    assert read_templates(tmp_path / "out") == read_templates(models["chat"])


@pytest.mark.parametrize("onto", ["config", "jinja", "both", "folder"])
def test_a_template_of_onto_stays_whole(trio, tmp_path, onto):
    models = trio()
    spell(models["onto"], OTHER, onto)
    done = graft(**models, out=tmp_path / "out")
    assert read_templates(tmp_path / "out") == read_templates(models["onto"])
    assert any("onto's own chat template is kept" in note for note in done.notes)


@pytest.mark.parametrize("style", ["config", "jinja", "both", "folder"])
@pytest.mark.parametrize("request_", [None, "chatml"])
def test_a_merge_has_one_template(trio, tmp_path, style, request_):
    models = trio()
    spell(models["base"], OTHER, style)
    recipe = {"merge_method": "linear", "parameters": {"weight": 1},
              "models": [{"model": str(models[name])} for name in ("base", "onto")]}  # fmt: skip
    merge(recipe | ({"chat_template": request_} if request_ else {}), tmp_path / "out")
    template = read_templates(tmp_path / "out")["default"]
    assert ("<|im_start|>assistant" in template) if request_ else (template == OTHER)


def test_a_written_template_is_the_one_that_holds(tmp_path):
    for style in ("config", "jinja", "both", "folder"):
        folder = tmp_path / style
        folder.mkdir()
        (folder / "tokenizer_config.json").write_text("{}")
        write_template(spell(folder, "before", style), "after")
        assert read_templates(folder)["default"] == "after", style


def test_generation_settings_are_kept_and_end_ids_added(trio, tmp_path):
    models = trio()
    settings = {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "eos_token_id": [32, 7], "pad_token_id": 0}
    (models["onto"] / "generation_config.json").write_text(json.dumps(settings))
    (models["chat"] / "generation_config.json").write_text('{"eos_token_id": 34, "temperature": 1.5}')
    graft(**models, out=tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written == settings | {"eos_token_id": [34, 32, 7]}
