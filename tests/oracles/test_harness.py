"""lm-evaluation-harness gives a lapis model the scores that it gives the same folder with its own "hf" model."""

import dataclasses
import json
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lapis
from lapis.errors import ConfigError
from lapis.families.config import ModelConfig
from lapis.model.transformer import Transformer
from lapis.text.corpus.corpus import Document
from lapis.text.tokenizer.tokenizer import train_tokenizer

lm_eval = pytest.importorskip("lm_eval")
TEXTS = [f"The bird number {i} sat in tree {i % 5} and sang {i * 7 % 13} songs. " for i in range(60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has seen a few texts, so that its likeliest tokens stand clear of the others."""
    place = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(TEXTS, 300)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=64, vocab=tokenizer.rows, context=48)
    )
    documents = [Document(text, place, i) for i, text in enumerate(TEXTS)]
    config = lapis.TrainConfig(steps=60, lr=1e-2, precision="float32", threads=1, sample_every=0)
    lapis.train(model, lapis.Causal(tokenizer, documents, context=32), config, place / "out")
    return place / "out"


@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[Any, Any]:
    from lm_eval.models.huggingface import HFLM

    from lapis.evaluation.harness import LapisLM

    return LapisLM(folder), HFLM(str(folder), device="cpu", dtype="float32", batch_size=4)


def asked(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


def test_likelihoods_of_continuations(both: tuple[Any, Any]) -> None:
    requests = asked(
        ("The bird number 7 sat in", " tree 2 and sang"), ("", "The bird"), ("The bird ", "number"),
        ("a" * 90, " bird"), ("The bird number 3 sat", " in"), ("x", "<|im_end|>y"),
    )  # fmt: skip
    ours, theirs = (model.loglikelihood(requests, disable_tqdm=True) for model in both)
    special = ours.pop(), theirs.pop()
    assert [nats for nats, _ in ours] == pytest.approx([nats for nats, _ in theirs], abs=2e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs] and ours[4][1]
    assert special[0][0] < special[1][0]  # what a text only spells is not the special token here


def test_likelihoods_of_whole_texts_longer_than_the_context(both: tuple[Any, Any]) -> None:
    requests = asked(("".join(TEXTS[:4]),), (TEXTS[5],), ("b",))
    ours, theirs = (model.loglikelihood_rolling(requests, disable_tqdm=True) for model in both)
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_replies(both: tuple[Any, Any]) -> None:
    options = {"until": [".", "\n"], "max_gen_toks": 16, "do_sample": False}
    requests = asked(*((text[:n], options) for n, text in zip((9, 14, 19, 23), TEXTS, strict=False)),
                     ("The bird", {"until": "sang", "max_gen_toks": 20}), ("".join(TEXTS[:3]), options))  # fmt: skip
    ours, theirs = (model.generate_until(requests, disable_tqdm=True) for model in both)
    assert ours == theirs and len(set(ours)) > 2
    with pytest.raises(ConfigError, match="256 new tokens; the model's context is 48"):
        both[0].generate_until(asked(("a", {})))


def test_a_chat_is_rendered_and_its_special_tokens_are_read(folder: Path) -> None:
    from lapis.evaluation.harness import LapisLM

    model = LapisLM(folder)
    text = model.apply_chat_template([{"role": "user", "content": "Sing"}])
    assert text.endswith("<|im_start|>assistant\n") and model.text.id("<|im_start|>") in model.tok_encode(text)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Two tasks of lm-eval's kind: multiple choice, and an exact answer."""
    rows = [{"question": t.split(" and")[0], "good": f" and sang {i * 7 % 13} songs.", "bad": " qq zz xx"}
            for i, t in enumerate(TEXTS[:12])]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
    (tmp_path / "pick.yaml").write_text(
        shared
        + """
task: birds_pick
output_type: multiple_choice
doc_to_choice: "{{[bad, good]}}"
doc_to_target: 1
metric_list: [{metric: acc}]
"""
    )
    (tmp_path / "say.yaml").write_text(
        shared
        + """
task: birds_say
output_type: generate_until
doc_to_target: "{{good}}"
generation_kwargs: {until: ["songs"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""
    )
    return tmp_path


def test_local_task_files_run_from_python_and_command_line(
    folder: Path,
    tasks: Path,
    both: tuple[Any, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lapis.cli.main import main

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tasks / "cache"))
    main(["eval", str(folder), "--tasks", "birds_pick", "--tasks", "birds_say", "--task-folder", str(tasks), "--json"])
    ours = json.loads(capsys.readouterr().out)["tasks"]
    assert ours["birds_pick"]["acc"] == 1.0

    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    theirs = lm_eval.simple_evaluate(
        both[1], tasks=["birds_pick", "birds_say"], task_manager=manager, bootstrap_iters=0
    )
    assert theirs["results"]["birds_pick"]["acc,none"] == ours["birds_pick"]["acc"]
    assert theirs["results"]["birds_say"]["exact_match,none"] == ours["birds_say"]["exact_match"]
    registered = lm_eval.simple_evaluate("lapis", f"pretrained={folder}", ["birds_pick"], task_manager=manager, limit=3)
    assert registered["results"]["birds_pick"]["acc,none"] == 1.0
    with pytest.raises(SystemExit):
        main(["eval", str(folder), "--tasks", "birds_pik", "--task-folder", str(tasks)])
    assert 'there is no task "birds_pik"; did you mean "birds_pick"?' in capsys.readouterr().err


BELEBELE = """
task: belebele_here
output_type: multiple_choice
doc_to_text: "P: {{flores_passage}}\\nQ: {{question.strip()}}\\nA: {{mc_answer1}}\\nB: {{mc_answer2}}\\n\\
  C: {{mc_answer3}}\\nD: {{mc_answer4}}\\nAnswer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: "{{['1', '2', '3', '4'].index(correct_answer_num)}}"
metric_list: [{metric: acc}]
"""
INCLUDE = """
task: include_here
output_type: multiple_choice
doc_to_text: "{{question.strip()}}\\nA. {{option_a}}\\nB. {{option_b}}\\nC. {{option_c}}\\nD. {{option_d}}\\nAnswer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list: [{metric: acc}]
"""


@pytest.mark.parametrize("words", [BELEBELE, INCLUDE], ids=["belebele", "include"])
def test_records_of_a_benchmark_are_asked_in_its_words(
    words: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The records as they are, and the task file over the same records, by lm-eval: each answer alike."""
    from lapis.evaluation.choices import mark_choices
    from lapis.evaluation.harness import mark_tasks
    from lapis.language.card.folder import read_questions

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows: list[dict[str, Any]] = [
        {"flores_passage": f"b{i}", "question": f" q{i} ", **{f"mc_answer{n}": f"{i}{n}" for n in range(1, 5)},
         **{f"option_{a}": f"{i}{a}" for a in "abcd"}, "answer": i % 4, "correct_answer_num": str(i % 4 + 1)}
        for i in range(12)
    ]  # fmt: skip
    if words is INCLUDE:
        for row in rows:
            del row["flores_passage"]
    file, task = tmp_path / "rows.jsonl", tmp_path / "task.yaml"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task.write_text(f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}}}\ntest_split: test{words}")
    model, tokenizer = lapis.load(folder, torch.float32)
    model.config = dataclasses.replace(model.config, context=400)
    (questions, _), (none, tasks) = read_questions([file]), read_questions([task])
    ours = [right for right, _ in mark_choices(model, tokenizer, questions)]
    assert ours == mark_tasks(model, tokenizer, tasks[0]) and none == []
    assert 0 < sum(ours) < 12


def test_without_lm_eval_one_line_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval" or name == "lapis.evaluation.harness"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(lapis.LapisError, match=r"lm-eval is not installed; pip install 'lapis\[eval\]'"):
        import_module("lapis.evaluation.harness")
