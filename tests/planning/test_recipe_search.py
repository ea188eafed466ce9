"""`lapis plan --merge`: what it measures is what merging writes, the controls have as many tries, and it goes on."""

import json
import math

import pytest
import torch

from lapis.config import dump_yaml, load_yaml_documents
from lapis.errors import ConfigError, DataError
from lapis.evaluation.evaluate import evaluate
from lapis.evaluation.options import EvalOptions
from lapis.families.config import ModelConfig
from lapis.model.load import save
from lapis.model.transformer import Transformer
from lapis.planning import recipe_search
from lapis.planning.recipe_search import Knob, MergeSearch, at_random, compass, grid, knobs_of, search_recipe
from lapis.text.tokenizer.tokenizer import train_tokenizer
from lapis.weights.merge.merge import merge


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, a model that was trained on chats, one that was made worse, and the material."""
    root = tmp_path_factory.mktemp("search")
    words = ["red", "green", "blue", "one", "two", "three"]
    chats = [
        {"messages": [{"role": "user", "content": f"say {w} {i}"}, {"role": "assistant", "content": f"{w} {w}"}]}
        for i in range(4) for w in words
    ]  # fmt: skip
    texts = [f"the {w} and the {v} are here. " * 4 for w in words for v in words[:2]]
    (root / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (root / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = train_tokenizer([*texts, *(json.dumps(chat) for chat in chats)], 320)
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=48, vocab=tokenizer.rows, context=64)
    )
    good = [parameter.detach().clone() for parameter in model.parameters()]
    spoilt = [parameter + 0.6 * parameter.std().nan_to_num() * torch.randn_like(parameter) for parameter in good]
    ids = [tokenizer.encode(text)[:63] for text in texts] + [
        tokenizer.encode(f"<|im_start|>assistant\n{w} {w}<|im_end|>", special="trusted") for w in words
    ]
    save(model, root / "base")
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(40):
        row = torch.tensor([ids[step % len(ids)]])
        loss = torch.nn.functional.cross_entropy(model(row)[0, :-1], row[0, 1:])
        adam.zero_grad()
        loss.backward()
        adam.step()
    save(model, root / "good")
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), spoilt, strict=True):
            parameter.copy_(value)
    save(model, root / "bad")
    for name in ("base", "good", "bad"):
        tokenizer.save(root / name)
    (root / "recipe.yaml").write_text(dump_yaml({
        "merge_method": "task_arithmetic", "base_model": str(root / "base"), "dtype": "float32",
        "models": [{"model": str(root / "good"), "parameters": {"weight": 0.4}},
                   {"model": str(root / "bad"), "parameters": {"weight": 0.4}}],
    }))  # fmt: skip
    return root


def test_the_search_finds_the_model_that_was_trained(world):
    result = search_recipe(
        world / "recipe.yaml", [world / "chats.jsonl"], [world / "text.jsonl"], evaluations=9, limit=6
    )
    good, bad = result.best["search"]["values"]
    assert good > 0.4 > bad
    assert result.confirmed["search"]["score"] < -0.01
    assert [sum(row["by"] == way for row in result.tried) for way in ("start", "search", "random", "grid")] == [
        1,
        9,
        9,
        9,
    ]
    assert result.evaluations == 28 + 5
    assert [knob["name"] for knob in result.knobs] == ["weight of good", "weight of bad"]
    (written,) = result.documents
    assert [entry["parameters"]["weight"] for entry in written["models"]] == [round(good, 6), round(bad, 6)]


def test_what_is_measured_is_what_a_merge_writes(world, tmp_path):
    result = search_recipe(
        world / "recipe.yaml", [world / "chats.jsonl"], [world / "text.jsonl"], evaluations=1, limit=100
    )
    result.save(tmp_path / "chosen.yaml")
    merge(tmp_path / "chosen.yaml", tmp_path / "out")
    confirm = [line for i, line in enumerate((world / "chats.jsonl").read_text().splitlines(True)) if i % 2]
    (tmp_path / "confirm.jsonl").write_text("".join(confirm))
    texts = [line for i, line in enumerate((world / "text.jsonl").read_text().splitlines(True)) if i % 2]
    (tmp_path / "text.jsonl").write_text("".join(texts))
    scores = evaluate(
        str(tmp_path / "out"), EvalOptions(chats=tmp_path / "confirm.jsonl", text=[tmp_path / "text.jsonl"])
    )
    row = result.confirmed["search"]
    assert row["response_nll"] == pytest.approx(scores["chats"]["response_nll"], rel=1e-4)
    assert row["bits_per_byte"] == pytest.approx(scores["text"]["bits_per_byte"], rel=1e-4)


def test_a_search_that_was_killed_goes_on(world, tmp_path, monkeypatch):
    given = (world / "recipe.yaml", [world / "chats.jsonl"], [world / "text.jsonl"])
    whole = search_recipe(*given, evaluations=3, limit=3)
    real, merged = recipe_search.load_readable, []  # type: ignore[attr-defined]

    def dies(*arguments, **named):
        merged.append(1)
        if len(merged) == 5:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(recipe_search, "load_readable", dies)
    with pytest.raises(KeyboardInterrupt):
        search_recipe(*given, evaluations=3, limit=3, journal=tmp_path / "journal")
    assert (tmp_path / "journal").exists()
    merged[:] = [1] * 10
    again = search_recipe(*given, evaluations=3, limit=3, journal=tmp_path / "journal")
    assert {**again.to_json(), "seconds": 0} == {**whole.to_json(), "seconds": 0}
    distinct = len({tuple(row["values"]) for row in whole.tried})
    assert len(merged) - 10 <= distinct - 4 + 4, "what was measured is not merged again"
    assert not (tmp_path / "journal").exists()


KNOBS = [Knob("a", (0,), 0.5, 0.0, 1.0), Knob("b", (1,), 0.5, 0.0, 1.0)]


def settings_of(way, score, count=60):
    settings, tried = way(KNOBS, count), []
    values = next(settings)
    while True:
        tried.append(values)
        try:
            values = settings.send(score(values))
        except StopIteration:
            return tried


def test_compass_search_finds_the_bottom_of_a_bowl():
    def bowl(values):
        return (values[0] - 0.8) ** 2 + 2 * (values[1] - 0.1) ** 2 - 0.41

    tried = settings_of(compass, bowl)
    best = min(tried, key=bowl)
    assert math.dist(best, (0.8, 0.1)) < 0.03 and len(tried) == len(set(tried)) <= 60


def test_controls_stay_in_the_range_and_the_count():
    import random

    for way, count in ((grid, 9), (grid, 16), (grid, 3), (at_random(random.Random(0)), 7)):
        tried = settings_of(way, lambda values: 0.0, count)
        assert len(tried) == count and all(0 <= value <= 1 for values in tried for value in values)
    assert settings_of(grid, lambda values: 0.0, 4) == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize("knobs", [1, 2, 3, 4])
def test_a_grid_tries_as_many_settings_as_it_is_given(knobs):
    for count in (*range(1, 33), 100):
        tried = list(grid([Knob("a", (0,), 0.5, 0.0, 1.0)] * knobs, count))
        assert len(tried) == len(set(tried)) == count
        assert all(0 <= value <= 1 for values in tried for value in values)
    axes = [len({values[i] for values in list(grid(KNOBS * 2, 24))[:24]}) for i in range(4)]
    assert axes == [3, 2, 2, 2]  # 24 of 3 x 2 x 2 x 2


def test_the_finding_says_how_many_settings_each_way_tried():
    tried = [{"by": way} for way, count in (("start", 1), ("search", 12), ("random", 16), ("grid", 1))
             for _ in range(count)]  # fmt: skip
    confirmed = {way: {"score": score} for way, score in (("start", 0), ("search", -0.1), ("random", 0.1), ("grid", 0))}
    found = MergeSearch("recipe.yaml", [], tried=tried, confirmed=confirmed).finding()
    assert found == (
        "on chats and texts that were not searched on, the search made the recipe 9.5% better in 12 evaluations "
        "(random 10.5% worse in 16 and grid 0.0% better in 1)"
    )


def test_knobs_are_plain_numbers_of_scales_in_all_stages(world):
    (document,) = load_yaml_documents(world / "recipe.yaml")
    document["parameters"] = {"lambda": 0.9, "density": 0.5, "normalize": True}
    document["models"][0]["parameters"]["weight"] = [0.1, 0.5]
    last = {"merge_method": "slerp", "base_model": "a", "models": [{"model": "b"}], "parameters": {"t": 0.25}}
    knobs = knobs_of([{"name": "warm", **document}, last], "x")
    assert [(knob.name, knob.value, knob.low, knob.high) for knob in knobs] == [
        ("weight of bad", 0.4, 0.0, 1.0), ("lambda of warm", 0.9, 0.0, 1.35), ("t", 0.25, 0.0, 1.0),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="sets no weight, lambda, t or scale as a plain number"):
        knobs_of([{"merge_method": "linear", "models": [{"model": "a"}]}], "x")


def test_as_it_is_typed(run, world, tmp_path):
    status, out, err = run(
        "plan", "--merge", world / "recipe.yaml", "--chats", world / "chats.jsonl", "--text", world / "text.jsonl",
        "--evaluations", 2, "--limit", 3, "--out", tmp_path / "chosen.yaml", "--html", tmp_path / "page.html", "--json",
    )  # fmt: skip
    assert status == 0, err
    result = json.loads(out)
    assert result["evaluations"] == 7 + 5 and set(result["confirmed"]) == {"start", "search", "random", "grid"}
    assert "random" in result["finding"] and (tmp_path / "page.html").stat().st_size > 10_000
    assert load_yaml_documents(tmp_path / "chosen.yaml") == result["documents"]
    for arguments, message in (
        (["--merge", world / "recipe.yaml"], "give --chats"),
        (["--merge", world / "recipe.yaml", "--base", "x", "--chats", "y"], "a recipe names its models"),
        (["--base", "x"], "give --base and --chat, or --merge RECIPE"),
    ):
        status, _, err = run("plan", *arguments)
        assert status == 1 and message in err


def test_one_chat_is_too_few(world, tmp_path):
    (tmp_path / "one.jsonl").write_text((world / "chats.jsonl").read_text().splitlines()[0])
    with pytest.raises(DataError, match="1 chat; one to search on and one to confirm with"):
        search_recipe(world / "recipe.yaml", [tmp_path / "one.jsonl"])
