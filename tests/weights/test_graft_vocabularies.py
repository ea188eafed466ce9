"""A graft of three models with three tokenizers, against float64 and as transformers reads the result."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lapis.weights.graft.graft import graft

from .conftest import near, read_model, weights, write_model

EMBED = "model.embed_tokens.weight"
BASE_TEXT = ["the cat sat on the mat and the dog ran to the hat"] * 3
CHAT_TEXT = [*BASE_TEXT, "please tell me what the cat said to the dog"]
ONTO_TEXT = [*BASE_TEXT, "kucing itu duduk di atas tikar dan anjing berlari"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' }}{{ m.content }}<|over|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TAGS = ["<|user|>", "<|assistant|>", "<|over|>"]


def tokenizer(texts: list[str], special: list[str], seed: int, size: int = 330) -> Tokenizer:
    """A byte-level BPE whose ids are shuffled, learned tokens and special ones alike."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    made.decoder = decoders.ByteLevel()
    document = json.loads(made.to_str())
    names = list(made.get_vocab())
    ids = dict(zip(sorted(names), random.Random(seed).sample(range(len(names)), len(names)), strict=True))
    document["model"]["vocab"] = dict(sorted(((t, ids[t]) for t in document["model"]["vocab"]), key=lambda p: p[1]))
    document["added_tokens"] = sorted(
        ({**token, "id": ids[token["content"]]} for token in document["added_tokens"]), key=lambda token: token["id"]
    )
    return Tokenizer.from_str(json.dumps(document))


@pytest.fixture(params=["tied", "untied"])
def three(request: Any, tmp_path: Path) -> dict[str, Any]:
    """base, chat and onto with tokenizers of their own, whose ids all differ."""
    kinds = {
        "base": tokenizer(BASE_TEXT, ["<s>", "</s>"], 1), "onto": tokenizer(ONTO_TEXT, ["<s>", "</s>"], 3),
        "chat": tokenizer(CHAT_TEXT, ["<s>", "</s>", *TAGS], 2),
    }  # fmt: skip
    base = weights(1, 400, request.param == "tied")
    tensors = {"base": base, "chat": near(base, 2), "onto": near(base, 3)}
    places = {}
    for role, made in kinds.items():
        folder = places[role] = write_model(tmp_path / role, tensors[role], vocab={"a": 0})
        made.save(str(folder / "tokenizer.json"))
        eos = "<|over|>" if role == "chat" else "</s>"
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": eos}
        (folder / "tokenizer_config.json").write_text(
            json.dumps(settings | ({"chat_template": TEMPLATE} if role == "chat" else {}))
        )
    chat = kinds["chat"].get_vocab()
    (places["chat"] / "generation_config.json").write_text(json.dumps({
        "eos_token_id": [chat["<|over|>"], chat["</s>"]], "bos_token_id": chat["<s>"], "temperature": 0.6,
        "suppress_tokens": [chat["<|user|>"]],
    }))  # fmt: skip
    return {"models": places, "words": {role: made.get_vocab() for role, made in kinds.items()}, "tensors": tensors}


@pytest.mark.parametrize("embeddings", ["keep", "add"])
def test_three_tokenizers_meet_by_token(three: dict[str, Any], embeddings: Any, tmp_path: Path) -> None:
    result = graft(**three["models"], out=tmp_path / "out", scale=0.5, embeddings=embeddings)
    base, chat, onto = (three["words"][role] for role in ("base", "chat", "onto"))
    assert sum(base[token] != onto[token] for token in base.keys() & onto.keys()) > 250  # ids have moved

    added = result.vocabulary["new_tokens"]
    assert set(added) == set(TAGS) == set(result.vocabulary["template_tokens"])
    assert sorted(added.values()) == [len(onto), len(onto) + 1, len(onto) + 2]  # in rows that were padding
    out = read_model(tmp_path / "out")
    for name in {EMBED, "lm_head.weight"} & out.keys():
        b, c, t = (three["tensors"][role][name].double() for role in ("base", "chat", "onto"))
        for token, row in {**onto, **added}.items():
            if token in TAGS:
                expected = c[chat[token]]
            elif embeddings == "add" and token in base and token in chat:
                expected = t[row] + 0.5 * (c[chat[token]] - b[base[token]])
            else:
                expected = t[row]
            assert torch.equal(out[name][row], expected.bfloat16()), (name, token)
    q = "model.layers.1.self_attn.q_proj.weight"
    b, c, t = (three["tensors"][role][q].double() for role in ("base", "chat", "onto"))
    assert torch.equal(out[q], (t + 0.5 * (c - b)).bfloat16())

    notes = " | ".join(result.notes)
    alone, lacking = onto.keys() - base.keys() - chat.keys(), chat.keys() - onto.keys() - set(TAGS)
    assert f"onto alone has {len(alone):,} tokens (" in notes and "jing" in notes
    assert f"chat has {len(lacking):,} tokens (" in notes and "nothing is taken of them" in notes
    assert "tokens have other ids in chat than in onto: rows are matched by token" in notes
    assert result.vocabulary["only_in_chat"] == len(lacking) + len(TAGS)


def test_transformers_speaks_as_chat_with_moved_ids(three: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    graft(**three["models"], out=tmp_path / "out")
    ours, theirs = (transformers.AutoTokenizer.from_pretrained(p) for p in (tmp_path / "out", three["models"]["chat"]))
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "kucing itu"}]
    read = {}
    for name, each in (("ours", ours), ("theirs", theirs)):
        read[name] = each.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert read["ours"] == read["theirs"] == "<s><|user|>the cat<|over|><|assistant|>kucing itu<|over|><|assistant|>"
    ids = ours(read["ours"], add_special_tokens=False)["input_ids"]
    words = ours.get_vocab()
    assert [i for i in ids if i in {words[tag] for tag in TAGS}] == [
        words[tag] for tag in ("<|user|>", "<|over|>", "<|assistant|>", "<|over|>", "<|assistant|>")
    ]
    assert ours.decode(ids) == read["ours"] and ours.eos_token == "<|over|>"
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [words["<|over|>"], words["</s>"]] and settings["bos_token_id"] == words["<s>"]
    assert settings["suppress_tokens"] == [words["<|user|>"]] and settings["temperature"] == 0.6
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model(torch.tensor([ids])).logits.isfinite().all()
