"""A Modelfile: templates are recognized by what they write; what is not recognized is said."""

from pathlib import Path

import pytest

from lapis.formats.ollama import CHATS, FORMS, Form, modelfile, recognize
from lapis.text.tokenizer.folder import CHATML
from lapis.text.tokenizer.tokenizer import Tokenizer

from .models import CASES, byte_level, make_folder

TEMPLATES = {
    "ChatML": CHATML,
    "Llama 3": "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim"
    " + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    "Gemma": "{% if messages[0].role == 'system' %}{% set lead = messages[0].content + '\\n\\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set lead = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{{ '<start_of_turn>' + "
    "('model' if m.role == 'assistant' else 'user') + '\\n' + (lead if loop.first else '') + m.content + "
    "'<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
    "Mistral": "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% elif m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + '</s>' }}"
    "{% endif %}{% endfor %}",
}
OWN = "{% for m in messages %}{{ '## ' + m.role + ': ' + m.content + '\\n' }}{% endfor %}## assistant: "


def with_template(text: str) -> Tokenizer:
    base = byte_level()
    return Tokenizer(base._backend, base.named, {"default": text})


@pytest.mark.parametrize("name", TEMPLATES)
def test_known_forms_are_recognized(name: str) -> None:
    known = recognize(with_template(TEMPLATES[name]))
    assert known is not None and known[0].name == name and known[1] is None


def test_a_system_prompt_of_the_template_is_kept() -> None:
    lead = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe \"kind\".<|im_end|>\\n' }}{% endif %}"
    known = recognize(with_template(lead + CHATML))
    assert known is not None and known[0].name == "ChatML" and known[1] == 'Be "kind".'


def test_forms_differ_on_every_chat() -> None:
    for chat in CHATS:
        assert len({form.write(chat) for form in FORMS}) == len(FORMS)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_templates_of_go_are_balanced(form: Form) -> None:
    text = form.template
    assert text.count("{{") == text.count("}}")
    opened = sum(text.count(f"{{{{{dash} {word} ") for dash in ("", "-") for word in ("range", "if"))
    assert opened == text.count("{{ end }}") + text.count("{{- end }}")


def test_what_a_modelfile_holds(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(make_folder(tmp_path / "model", "llama"))
    from lapis.model.check import read_config

    notes: list[str] = []
    generation = {"temperature": 0.6, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1}
    config = read_config(tmp_path / "model")
    lines = modelfile("m.gguf", tokenizer, config, generation, notes).split("\n")
    assert lines[0] == "FROM ./m.gguf" and notes == ["Modelfile: the chat template writes ChatML"]
    assert {"PARAMETER num_ctx 128", "PARAMETER temperature 0.6", "PARAMETER repeat_penalty 1.1", "PARAMETER top_k 40",
            'PARAMETER stop "<|im_end|>"', 'PARAMETER stop "<|endoftext|>"'} <= set(lines)  # fmt: skip
    assert "llama" in CASES
    greedy = modelfile("m.gguf", tokenizer, config, {"do_sample": False, "temperature": 1.0}, [])
    assert "PARAMETER temperature 0\n" in greedy
    strange: list[str] = []
    text = modelfile("m.gguf", with_template(OWN), config, None, strange)
    assert "TEMPLATE" not in text and "is none of ChatML, Llama 3, Gemma, Mistral" in strange[0]
    base = byte_level()
    assert 'TEMPLATE "{{ .Prompt }}"' in modelfile("m.gguf", Tokenizer(base._backend, base.named, {}), config, None, [])
