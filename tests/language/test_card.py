"""The card: figures with honest intervals, every score in both languages, and a README that the hub understands."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard, metadata_load

from lapis.errors import CheckpointError, ConfigError, DataError
from lapis.language.adapt import adapt
from lapis.language.card import scores
from lapis.language.card.bootstrap import Counts, change, difference, ratio, share_of_way
from lapis.language.card.card import make_card
from lapis.language.card.folder import gather, licence_of, models_of, read_chats, read_questions
from lapis.language.card.naming import main_language, name_languages
from lapis.language.card.readme import readme
from lapis.language.card.scores import HeldOutText, score_model
from lapis.report.pages.card import FIGURES, card_page, counted
from lapis.wording import without_folders

from .conftest import ENGLISH, MALAY, make, write

QUESTIONS = [
    {"question": f"Di mana {a} itu?", "option_a": "di taman", "option_b": "di rumah", "option_c": "di kampung",
     "option_d": "di pasar", "answer": number % 4, "language": "Malay"}
    for number, a in enumerate(("anjing", "kucing", "adik", "cikgu", "jiran"))
]  # fmt: skip


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished adaptation, with chats and questions of both languages."""
    place = tmp_path_factory.mktemp("card")
    base = make(place / "base", 0)
    chats = place / "chats.jsonl"
    turns = [
        {"messages": [{"role": "user", "content": f"Apa {a}?"}, {"role": "assistant", "content": f"{a} itu."}]}
        for a in ("kucing", "anjing", "adik", "bola", "air")
    ]
    chats.write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    questions = place / "questions.jsonl"
    asked = [
        {"prompt": "Apa ini?", "choices": [" bola", f" {a}"], "answer": 1} for a in ("air", "batu", "kawan", "adik")
    ]
    asked.append({"prompt": "kata " * 60, "choices": ["a", "b"], "answer": 0})  # longer than the context
    questions.write_text("".join(json.dumps(question) + "\n" for question in asked))
    texts = {"text": [str(write(place / "ms.jsonl", MALAY))], "replay": [str(write(place / "en.jsonl", ENGLISH[:300]))]}
    measured = {"chats": [str(chats)], "replay_chats": [str(chats)], "choices": [str(questions)], "scored": 1500}
    brief = {"train": {"precision": "float32", "threads": 1}, "tokens": 512, "batch": 4, "context": 32}
    models = {"base": str(base), "chat": str(make(place / "chat", 1, base)), "out": str(place / "out")}
    adapt({**models, **texts, **measured, **brief, "vocab": 20, "language": "ms", "tokens_per_second": 1000.0})
    return place


def test_intervals_are_those_of_a_plain_bootstrap() -> None:
    rng = np.random.default_rng(5)
    numbers, sizes = rng.uniform(1, 9, 40), rng.uniform(1, 3, 40)
    figure = ratio(Counts(list(numbers), list(sizes)))
    assert figure["value"] == pytest.approx(numbers.sum() / sizes.sum()) and figure["n"] == 40
    plain = []
    for _ in range(4000):
        drawn = rng.integers(0, 40, 40)
        plain.append(numbers[drawn].sum() / sizes[drawn].sum())
    assert figure["interval"] == pytest.approx(np.quantile(plain, (0.025, 0.975)), rel=0.02)
    assert ratio(Counts([3.0], [2.0])) == {"value": 1.5, "interval": [1.5, 1.5], "n": 1}


def test_models_are_compared_on_the_same_documents() -> None:
    rng = np.random.default_rng(1)
    hard = rng.uniform(1, 100, 30)  # documents differ far more than models do
    before, after = Counts(list(hard), [10.0] * 30), Counts(list(hard * 0.9), [10.0] * 30)
    assert change(before, after)["interval"] == pytest.approx([-0.1, -0.1])
    assert ratio(before)["interval"][1] > 1.2 * ratio(before)["interval"][0]
    half = Counts(list(hard * 0.95), [10.0] * 30)
    gone = share_of_way(before, half, after)
    assert gone["value"] == pytest.approx(0.5) and gone["interval"] == pytest.approx([0.5, 0.5])
    ended, more = Counts([0.0, 1.0, 0.0, 0.0], [1.0] * 4), Counts([1.0, 1.0, 0.0, 0.0], [1.0] * 4)
    assert difference(ended, more)["value"] == pytest.approx(0.25)
    left_out = Counts([5.0, 0.0], [1.0, 0.0])  # a document that was not measured
    assert ratio(left_out) == {"value": 5.0, "interval": [5.0, 5.0], "n": 1}


def test_every_score_of_both_languages_is_on_the_card(adapted: Path) -> None:
    card = json.loads((adapted / "out" / "card" / "card.json").read_text())
    names = ["base", "chat", "start", "embedded", "adapted", "calibrated", "grafted"]
    assert list(card["scores"]) == names == list(models_of(adapted / "out"))
    assert card["languages"] == {"target": "ms", "replay": "en"}
    for each in card["scores"].values():
        assert set(each["target"]) == set(FIGURES)
        assert set(each["replay"]) == set(FIGURES) - {"choices"}
        assert each["target"]["choices"]["n"] == 4 and each["target"]["choices"]["chance"] == 0.5
        assert all(f["interval"][0] <= f["value"] <= f["interval"][1] for one in each.values() for f in one.values())
    fewer = card["changes"]["grafted"]["target"]["tokens_per_byte"]
    assert fewer["value"] < 0 and fewer["interval"][0] <= fewer["value"] <= fewer["interval"][1]
    assert card["notes"]["base"] == ["1 question of target is longer than its context and was left out"]
    assert card["gap_closed"] is None and "--tuned" in card["reasons"]["gap_closed"]
    replies = [row for row in card["replies"] if row["language"] == "target"]
    assert len(replies) == 5 and all(list(row["replies"]) == names == list(row["spoken"]) for row in replies)
    page = (adapted / "out" / "card" / "index.html").read_text()
    assert page == card_page(card).render()
    won, lost = (page.index(f"<p><strong>{title}") for title in ("The language (ms)", "What it knew before (en)"))
    assert won < lost
    columns = page.split('<div class="beside">')[1].split("</section>")[0].split('<dl class="stats">')[1:]
    counts = [column.count('class="value"') for column in columns]
    assert counts == [len(FIGURES) - 1, len(FIGURES) - 2]  # two columns, with the same figures in the same size


def test_the_readme_is_a_model_card_of_the_hub(adapted: Path, tmp_path: Path) -> None:
    text = (adapted / "out" / "card" / "README.md").read_text()
    head = ModelCard(text).data.to_dict()
    assert head["language"] == ["ms", "en"] and head["tags"] == ["lapis", "language-adaptation"]
    assert metadata_load(adapted / "out" / "card" / "README.md") == head
    assert str(adapted) not in text and "/tmp" not in text  # nothing of this machine
    made = json.loads((adapted / "out" / "card" / "card.json").read_text())["how"]
    assert made["data"]["text.jsonl"] in text and made["models"]["base"]["model.safetensors"] in text
    assert "| seed | 0 |" in text and "What it knew before (en)" in text
    assert "No licence is stated here" in text

    card = json.loads((adapted / "out" / "card" / "card.json").read_text())
    card["how"] |= {"license": "apache-2.0", "base_models": ["owner/base", "owner/chat", str(adapted)]}
    card["replies"][0]["replies"]["grafted"] = "```\n# not a heading of the page\n---\nlicense: mit"
    head = ModelCard(readme(card)).data.to_dict()
    assert head["license"] == "apache-2.0" and head["base_model"] == ["owner/base", "owner/chat"]
    assert head["base_model_relation"] == "merge" and "````text\n```\n# not" in readme(card)

    secret = "/home/me/secret/scales.yaml"
    nested = {"warmup": 3, "files": [secret, {secret: Path(secret)}]}
    card["how"] |= {"settings": {"scale": secret, "train": nested}, "data": {f"text: {secret}": "0f"}}
    card["how"] |= {"models": {"base": {secret: "0a"}}}
    for text in (readme(card), card_page(card).render().replace("<wbr>", "")):
        assert "secret" not in text and "/home" not in text and str(adapted) not in text
        assert "text: scales.yaml" in text and "base: scales.yaml" in text and text.count("scales.yaml") == 6


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("/home/me/a place/scales.yaml", "scales.yaml"),
        ("by /home/me/a place/scales.yaml", "by scales.yaml"),
        ("one/two/scales.yaml", "scales.yaml"),
        ("one/scales.yaml", "scales.yaml"),
        ("../one", "one"),
        ("~/one/two/", "two"),
        ("file:///one/a.yaml", "a.yaml"),
        ("C:\\Users\\me\\a.yaml", "a.yaml"),
        ("attn=/one/a.yaml,mlp=one/b.yaml", "attn=a.yaml,mlp=b.yaml"),
        ("attn=0.5,12-23.mlp=0", "attn=0.5,12-23.mlp=0"),
        ("owner/model", "owner/model"),
        ("owner/model@v1.0", "owner/model@v1.0"),
        ("hub:owner/texts/ms", "hub:owner/texts/ms"),
        ("https://host.org/a/b.yaml", "https://host.org/a/b.yaml"),
        ("target/bits_per_byte", "target/bits_per_byte"),
        ("and/or, 1 / 2", "and/or, 1 / 2"),
        ("", ""),
        (0.5, 0.5),
        (None, None),
    ],
)
def test_a_card_tells_no_folder_of_a_machine(given: object, told: object) -> None:
    assert without_folders(given) == told


def test_a_card_of_an_adaptation_from_the_command_line(
    adapted: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    """With a tuned model there is a gap; the same command again is refused, and writes over it when it is told to."""
    command = ["card", str(adapted / "out"), "--out", str(tmp_path / "card"), "--json"]
    command += ["--tuned", str(adapted / "out" / "adapted"), "--license", "mit", "--base-model", "owner/base"]
    status, output, error = run(*command)
    assert status == 0, error
    result = json.loads(output)
    assert list(result["scores"]) == ["base", "chat", "start", "embedded", "adapted", "calibrated", "grafted", "tuned"]
    assert result["gap_closed"] is None and "no gap to close" in result["reasons"]["gap_closed"]
    assert "out" not in result["notes"]  # it is finished
    assert sorted(path.name for path in (tmp_path / "card").iterdir()) == [
        "README.md", "card.json", "index.html", "lapis-manifest.json",
    ]  # fmt: skip
    head = metadata_load(tmp_path / "card" / "README.md")
    assert head is not None and head["license"] == "mit" and head["base_model"] == ["owner/base"]
    status, _, error = run(*command)
    assert status == 1 and error.count("\n") == 1 and "--overwrite" in error


def test_a_gap_is_measured_against_a_tuned_model(adapted: Path) -> None:
    gathered = gather([adapted / "out" / "start", adapted / "base"], {"text": [adapted / "ms.jsonl"],
                      "chats": [adapted / "chats.jsonl"]}, 800)  # fmt: skip
    card = make_card(gathered.models, {"target": gathered.held["target"]}, tuned=adapted / "out" / "grafted")
    bits = {name: each["target"]["response_bits_per_byte"]["value"] for name, each in card["scores"].items()}
    if bits["start"] > bits["tuned"]:
        way = (bits["start"] - bits["base"]) / (bits["start"] - bits["tuned"])
        assert card["gap_closed"] == pytest.approx(way) and card["gap"]["n"] == 5
    else:
        assert "no likelier" in card["reasons"]["gap_closed"]
    assert card["cost"] is None and "no replay text" in card["reasons"]["cost"]


@pytest.mark.parametrize("memory", [0, 1 << 40])
def test_equal_models_are_as_fast_on_a_busy_machine(
    memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are timed in turn, so that one slow round changes nothing."""
    busy = iter([*range(100, 115), *[1000] * 1000])
    monkeypatch.setattr(scores, "tokens_per_second", lambda *_: float(next(busy)))
    monkeypatch.setattr(scores, "free_memory", lambda: memory)
    models = dict.fromkeys(("first", "second", "third"), make(tmp_path / "one", 0))
    card = make_card(models, {"target": HeldOutText(MALAY[:5]), "replay": HeldOutText(ENGLISH[:1])})
    for language, timed in (("target", 4), ("replay", 1)):
        for name in ("second", "third"):
            assert card["changes"][name][language]["characters_per_second"]["value"] == 0.0
            assert card["scores"][name][language]["characters_per_second"]["n"] == timed


def test_models_without_a_template_are_asked_by_the_last_ones(tmp_path: Path) -> None:
    folder = make(tmp_path / "plain", 0)
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": [{"role": "user", "content": "Apa?"},
                                              {"role": "assistant", "content": "Kucing."}]}) + "\n")  # fmt: skip
    held = {"target": HeldOutText(MALAY[:5], read_chats([chats]))}
    whole = score_model(folder, held)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = config.pop("chat_template")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    without = score_model(folder, held)
    assert "response_nll" not in without.counts["target"] and not without.replies
    given = score_model(folder, held, {"default": template})
    assert given.counts["target"]["response_nll"] == whole.counts["target"]["response_nll"]
    assert given.replies == whole.replies and "that of the last model" in given.notes[0]


def test_without_chats_models_go_on_with_held_out_text(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", 0)
    card = make_card({"a": folder, "b": folder}, {"target": HeldOutText(MALAY[:12])})
    assert [row["prompt"] for row in card["replies"]] == [" ".join(text.split()[:8]) for text in MALAY[:10]]
    assert card["won"] == 0 and card["changes"]["b"]["target"]["bits_per_byte"]["interval"] == [0.0, 0.0]
    assert "stop_rate" not in card["scores"]["a"]["target"] and card["scores"]["a"]["target"]["in_language"]["n"] == 10


def test_the_language_of_texts_and_replies() -> None:
    assert main_language(MALAY) in ("ms", "id") and main_language(ENGLISH) == "en" and not main_language(["1 2 3"] * 5)
    told = name_languages({"target": HeldOutText(MALAY)})  # which of the two nobody said: its own text is the sample
    assert told.codes == {"target": "target"} and told.of("Kucing itu bermain di taman.") == "target"
    told = name_languages({"target": HeldOutText(MALAY, code="ms"), "replay": HeldOutText(ENGLISH)})
    assert told.codes == {"target": "ms", "replay": "en"} and "id" not in told.detect.scripts
    assert [told.of(text) for text in ("Kucing itu di rumah.", "The cat is in the house.", "42")] == ["ms", "en", ""]
    khmer = "សត្វឆ្មាស្ថិតនៅក្នុងផ្ទះ។ "
    told = name_languages({"target": HeldOutText([khmer] * 20, code="km")})  # not built in: its own text is the sample
    assert told.of("ឆ្មានៅផ្ទះ") == "km" and told.of("The cat sits in the house today.") == "en"


def test_questions_of_belebele_include_and_mmlu(tmp_path: Path) -> None:
    include, belebele, mmlu = (tmp_path / f"{name}.jsonl" for name in ("include", "belebele", "mmlu"))
    include.write_text(json.dumps(QUESTIONS[1]))
    belebele.write_text(
        json.dumps(
            {"flores_passage": "Ali di taman.", "question": " Siapa di taman? ", "mc_answer1": "Ali",
             "mc_answer2": "Abu", "mc_answer3": "Siti", "mc_answer4": "Omar", "correct_answer_num": "1"}
        )
    )  # fmt: skip
    mmlu.write_text(json.dumps({"question": "Satu?", "choices": ["a", "b", "c"], "answer": "C"}))
    (one, two, three), tasks = read_questions([include, belebele, mmlu])
    assert tasks == [] and (one.answer, two.answer, three.answer) == (1, 0, 2)
    assert one.prompt == "Di mana kucing itu?\nA. di taman\nB. di rumah\nC. di kampung\nD. di pasar\nAnswer:"
    assert two.prompt == "P: Ali di taman.\nQ: Siapa di taman?\nA: Ali\nB: Abu\nC: Siti\nD: Omar\nAnswer:"
    assert one.choices == (" A", " B", " C", " D") and three.choices == (" A", " B", " C")
    for field, value in (("correct_answer_num", "5"), ("correct_answer_num", "0"), ("mc_answer3", 7)):
        belebele.write_text(json.dumps({**json.loads(belebele.read_text()), field: value}))
        with pytest.raises(DataError, match="line 1"):
            read_questions([belebele])


def test_what_makes_no_card_is_refused(adapted: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--text is missing"):
        gather([adapted / "base"], {}, 1000)
    with pytest.raises(CheckpointError, match="there is no such folder"):
        gather([tmp_path / "none"], {}, 1000)
    second = tmp_path / "elchat"
    shutil.copytree(adapted / "out", second)
    names = list(gather([adapted / "out", second, adapted / "base"], {}, 1000).models)  # both ways in one table
    steps = ["start", "embedded", "adapted", "calibrated", "grafted"]
    assert names == ["base", "chat", *steps, *(f"elchat/{step}" for step in steps)]
    assert list(gather([adapted / "out", second, second / "start"], {}, 1000).models) == names  # it is there
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": [{"role": "assistant", "content": "Ya."}]}) + "\n")
    with pytest.raises(DataError, match=r"chats.jsonl line 1.*no reply of the assistant"):
        read_chats([chats])
    task = tmp_path / "task.yaml"
    task.write_text("group: many\n")
    with pytest.raises(ConfigError, match="names no task"):
        read_questions([task])


@pytest.mark.parametrize("scored", [0, -5])
def test_less_than_a_byte_cannot_be_scored(
    scored: int, adapted: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    text = adapted / "ms.jsonl"
    status, _, error = run("card", adapted / "base", "--text", text, "--scored", scored, "--out", tmp_path / "card")
    assert status == 1 and error == f"lapis: card: --scored is {scored}; give 1 or more\n"


def test_every_file_that_was_read_has_its_digest(adapted: Path, tmp_path: Path) -> None:
    def digest(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    one, two, other = (tmp_path / name / "valid.jsonl" for name in ("a", "b", "c"))
    for number, path in enumerate((one, two, other)):
        path.parent.mkdir()
        write(path, MALAY[20 * number : 20 * number + 9])
    chats, questions = adapted / "chats.jsonl", adapted / "questions.jsonl"
    given = {"text": [one, two], "replay": [other], "chats": [chats]}
    assert gather([adapted / "base"], given, 800).how["data"] == {
        "text: valid.jsonl": digest(one), "text: valid.jsonl (2)": digest(two), "replay: valid.jsonl": digest(other),
        "chats: chats.jsonl": digest(chats),
    }  # fmt: skip
    parts = [f"{part}.jsonl" for name in ("text", "replay") for part in (name, f"{name}.held", f"{name}.spare")]
    texts = {name: digest(adapted / "out" / "measure" / name) for name in parts}
    read = {"chats: chats.jsonl": digest(chats), "replay_chats: chats.jsonl": digest(chats)}
    asked = {"choices: questions.jsonl": digest(questions)}
    assert gather([adapted / "out"], {}, 800).how["data"] == texts | read | asked
    mine = shutil.copy(chats, tmp_path / "mine.jsonl")
    instead = gather([adapted / "out"], {"chats": [mine], "text": [one]}, 800).how["data"]
    del read["chats: chats.jsonl"]
    mines = {"chats: mine.jsonl": digest(chats), "text: valid.jsonl": digest(one)}
    assert instead == texts | read | asked | mines


def test_a_licence_is_what_the_base_states(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", 0)
    assert licence_of(folder) == ""
    for text, stated in (
        ("---\nlicense: apache-2.0\n---\n# A", "apache-2.0"),
        ("# A\nlicense: mit", ""),
        ("---\n: [\n---", ""),
    ):
        (folder / "README.md").write_text(text)
        assert licence_of(folder) == stated


def test_what_scores_are_measured_on_is_counted() -> None:
    assert [counted("bits_per_byte", n) for n in (1, 2)] == ["1 document", "2 documents"]
    assert [counted("in_language", *n) for n in ((1, 1), (1, 3))] == ["1 reply", "1–3 replies"]
