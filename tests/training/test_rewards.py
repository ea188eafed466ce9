"""Rewards: what is right gets 1, what fails is counted, and a wrong function is refused before the run."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lapis.errors import ConfigError, DataError
from lapis.families.config import ModelConfig
from lapis.model.load import save
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer
from lapis.training.objectives.policy.guards import Guards, repetition
from lapis.training.objectives.policy.losses import gae, group_relative, leave_one_out, moments, whiten
from lapis.training.rewards import Case, Failure, make_judge
from lapis.training.rewards.builtin import exact, json, length, number, number_in
from lapis.training.rewards.functions import InWorker
from lapis.training.rewards.language import SAMPLES, language


def of(reward: Any, reply: str, **record: Any) -> float:
    return float(reward("", reply, Case("", reply, record, "record 1", True, len(reply.split())).full_record))


@pytest.mark.parametrize(
    ("reply", "final", "worth"),
    [
        ("so it is 1,234.", "1234", 1), ("4 + 5 = 9\n#### 9", "9", 1), ("#### 9 of 12", "9", 1), ("9 or 10", "9", 0),
        ("it is \\boxed{-3}, I think: 7", "-3", 1), ("none", "0", 0), ("$2.50", "2.5", 1), ("", "1", 0),
        ("3e2", "300", 1),
        ("1" * 5000, "1", 0),
    ],
)  # fmt: skip
def test_a_number_is_the_one_the_reply_ends_on(reply: str, final: str, worth: float) -> None:
    assert of(number(), reply, final=final) == worth


@given(st.integers(-(10**9), 10**9), st.text(max_size=30).filter(lambda s: not any(c.isdigit() for c in s)))
def test_a_number_is_found_however_it_is_written(n: int, around: str) -> None:
    assert number_in(f"so {n:,} {around.replace('.', '').replace('####', '').replace(chr(92), '')}") == n


def test_json_has_the_keys_and_is_json() -> None:
    reward = json(keys=["name", "age"], only=True)
    assert of(reward, '{"name": 1, "age": null}') == of(reward, '```json\n{"age": 2, "name": []}\n```') == 1
    for wrong in ('{"name": 1}', '{"name": 1, "age": 2, "x": 3}', '[1]', '{"name": 1, "name": 2, "age": 3}', "",
                  '{"name": NaN, "age": 1}', "{" * 100_000, 'Sure: {"name": 1, "age": 2}'):  # fmt: skip
        assert of(reward, wrong) == 0


def test_length_and_exact_fall_off_where_asked() -> None:
    assert [of(length(2, 4), "w " * n) for n in (0, 1, 2, 4, 5, 8, 20)] == [0, 0.5, 1, 1, 0.75, 0, 0]
    assert of(exact(), " 1 2 3\n", answer="1 2 3") == 1 and of(exact(), "1 2", answer="1 2 3") == 0
    assert of(exact(partial=True), "1 2 4", answer="1 2 3") == pytest.approx(0.8)
    with pytest.raises(ConfigError, match=r"0 <= least <= most"):
        length(5, 4)


def test_the_language_of_a_reply() -> None:
    said = {
        "ms": "Awak boleh datang ke pejabat saya kerana kereta itu rosak.",
        "id": "Kamu bisa datang ke kantor saya karena mobil itu rusak.",
        "en": "You can come to my house when the rain stops, and there is a reason for it.",
        "de": "Wir gehen heute nicht in das Haus, weil die Kinder in der Schule sind.",
        "uk": "Ми підемо до школи пізніше, якщо дощ не припиниться.",
        "ru": "Мы пойдём в школу позже, если дождь не кончится.",
        "ko": "오늘은 비가 와서 학교에 가지 않습니다.",
        "zh": "今天下雨，所以我们不去学校。",
    }
    for code in said:
        reward = language(code)
        scores = {other: of(reward, text) for other, text in said.items()}
        assert scores[code] > 0.8, scores
        assert all(score < 0.3 for other, score in scores.items() if other != code), (code, scores)
    assert of(language("en"), "1 2 3") == 0
    assert of(language("zh"), "今天 and then some English here") < 0.2
    with pytest.raises(ConfigError, match='"mss" is not known; did you mean "ms"'):
        language("mss")


def test_a_language_of_ones_own_needs_a_sample(tmp_path: Path) -> None:
    path = tmp_path / "toki.txt"
    path.write_text("mi moku e kili. sina pona tawa mi. jan li lukin e tomo suli lon ma ni. ona li toki e ijo mute.")
    reward = language("toki", among=["toki", "en"], samples={"toki": str(path)})
    assert of(reward, "jan li moku e kili lon tomo") > 0.9 > 0.1 > of(reward, SAMPLES["en"])


@pytest.mark.real_data
def test_real_answers_have_their_numbers_and_language(data_dir: Path) -> None:
    import json as plain
    import re

    problems = [plain.loads(line) for line in (data_dir / "reason/gsm8k.test.jsonl").read_text().splitlines()]
    assert all(number()("", problem["answer"], problem) == 1 for problem in problems)
    samples = {code: str(data_dir / f"corpus/{code}/train.jsonl") for code in ("en", "ms", "id")}
    for code, least in {"en": 0.97, "ms": 0.9, "id": 0.9}.items():
        texts = [
            plain.loads(line)["text"] for line in (data_dir / f"corpus/{code}/valid.jsonl").read_text().splitlines()
        ]
        said = [s for text in texts for s in re.split(r"(?<=[.!?])\s+", text) if 60 < len(s) < 200][:100]
        reward = language(code, among=list(samples), samples=samples)
        assert sum(of(reward, sentence) > 0.5 for sentence in said) >= least * len(said)


WORKER = """
import sys, time, os
print("hello from the import")
def fine(prompt, reply, record, bonus=0.0):
    print("said on standard output")
    return len(reply) + record["k"] + bonus
def bad(prompt, reply): return 0
def troubled(prompt, reply, record):
    if reply == "hang":
        while True: pass
    if reply == "die": os._exit(3)
    if reply == "raise": raise KeyError("x")
    if reply == "text": return "much"
    if reply == "nan": return float("nan")
    return 1
"""


def cases(*replies: str) -> list[Case]:
    return [Case("p", reply, {"k": 2}, f"line {i}") for i, reply in enumerate(replies, 1)]


def test_a_function_by_name_may_hang_die_or_raise(tmp_path: Path) -> None:
    place = tmp_path / "mine.py"
    place.write_text(WORKER)
    assert InWorker("fine", f"{place}:fine", {"bonus": 0.5}, 5.0).score(cases("ab", "")) == [4.5, 2.5]
    reward = InWorker("troubled", f"{place}:troubled", {}, 0.3)
    begun = time.monotonic()
    result = reward.score(cases("a", "hang", "b", "die", "c", "raise", "text", "nan", "d"))
    assert time.monotonic() - begun < 10
    assert [value for value in result if isinstance(value, float)] == [1.0] * 4
    why = [value.why for value in result if isinstance(value, Failure)]
    assert why[0] == "took more than 0.3 s for line 2" and "ended its process at line 4" in why[1]
    assert "raised KeyError: 'x' for line 6" in why[2] and "returned str" in why[3] and "returned nan" in why[4]
    for target, said in (
        (f"{place}:bad", "write it as reward"), (f"{place}:no", "has no function"),
        (f"{tmp_path}/other.py:f", "no such file"), ("no_such_module:f", "No module named"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            InWorker("x", target, {}, 1.0)


def test_wrong_signatures_names_weights_and_records_are_refused(tokenizer: Tokenizer) -> None:
    def two(prompt: Any, reply: str) -> float:
        return 0.0

    for wrong, said in (
        (two, "reward two: .*write it as reward"), (["nmber"], 'did you mean "number"'), ([], "rewards is missing"),
        ([{"name": "ends", "weight": 0}], "weight is 0"), ([{"name": "ends", "wieght": 1}], 'did you mean "weight"'),
        ([{"name": "length", "options": {"mots": 3}}], 'unknown option "mots"; did you mean "most"'),
        ([3], r"rewards\[1\] is 3"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            make_judge(wrong, tokenizer, 1.0)
    judge = make_judge(["number"], tokenizer, 1.0)
    with pytest.raises(DataError, match=r"line 3: reward number reads the field final, which is missing"):
        judge.check([({"answer": "1"}, "line 3")])
    with pytest.raises(DataError, match=r"line 4: reward number: .*holds no number"):
        judge.check([({"final": "one"}, "line 4")])


def test_several_rewards_are_weighed_and_failures_do_not_count(tokenizer: Tokenizer) -> None:
    def odd(prompt: Any, reply: str, record: Mapping[str, Any]) -> Any:
        return None if reply == "b" else torch.tensor(2.0)

    judge = make_judge([(odd, 0.5), {"name": "ends", "weight": -1}], tokenizer, 1.0)
    scores = judge.score(cases("a", "b"))
    assert scores.total[0] == 0.0 and scores.total[1] != scores.total[1]
    assert judge.names == ["odd", "ends"] and scores.failed == {"odd": 1}


def test_a_reward_model_with_another_tokenizer_reads_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from lapis.evaluation.replies import reply_rewards
    from lapis.text.rows.pair_rows import encode_reply

    other = train_tokenizer(["quite another text, with other pieces of words"] * 3, 280)
    torch.manual_seed(2)
    model = Transformer(ModelConfig(dim=16, layers=1, heads=2, ffn_dim=16, vocab=other.rows, context=64, head="scalar"))
    save(model, tmp_path)
    other.save(tmp_path)
    judge = make_judge([str(tmp_path)], tokenizer, 1.0)
    assert "has another tokenizer; replies are encoded again, as text" in judge.notes[0]
    result = judge.score(cases("under tree 3", "no")).total
    replies = [encode_reply(other, [{"role": "user", "content": "p"}], {"role": "assistant", "content": reply})
               for reply in ("under tree 3", "no")]  # fmt: skip
    assert result == pytest.approx(reply_rewards(model.eval(), replies), abs=1e-6)
    save(Transformer(ModelConfig(dim=16, layers=1, heads=2, ffn_dim=16, vocab=other.rows, context=64)), tmp_path)
    with pytest.raises(ConfigError, match=r"its head is lm"):
        make_judge([str(tmp_path)], tokenizer, 1.0)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(2, 6), st.integers(0, 10**6))
def test_advantages_of_a_group_sum_to_zero_without_failures(prompts: int, group: int, seed: int) -> None:
    rewards_PG = torch.randn(prompts, group, generator=torch.Generator().manual_seed(seed))
    for made in (group_relative(rewards_PG, True), group_relative(rewards_PG, False), leave_one_out(rewards_PG)):
        torch.testing.assert_close(made.sum(1), torch.zeros(prompts), atol=1e-4, rtol=0)
    torch.testing.assert_close(leave_one_out(rewards_PG), group_relative(rewards_PG, False) * group / (group - 1))
    failed = rewards_PG.clone()
    failed[0, 0] = torch.nan
    for made, without in ((group_relative(failed, True), group_relative(failed[:1, 1:], True)),
                          (leave_one_out(failed), leave_one_out(failed[:1, 1:]))):  # fmt: skip
        assert made.isfinite().all() and made[0, 0] == 0
        torch.testing.assert_close(made[:1, 1:], without)


def test_returns_without_a_baseline_are_what_comes_later() -> None:
    rewards_BR = torch.tensor([[0.0, 1.0, 2.0], [3.0, 9.0, 9.0]])
    mask_BR = torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=torch.bool)
    advantages_BR, returns_BR = gae(rewards_BR, torch.zeros(2, 3), mask_BR, gamma=0.5, lam=1.0)
    torch.testing.assert_close(returns_BR, torch.tensor([[1.0, 2.0, 2.0], [3.0, 0.0, 0.0]]))
    white_BR = whiten(advantages_BR, mask_BR, moments(advantages_BR, mask_BR))
    assert white_BR[mask_BR].mean().abs() < 1e-6 and white_BR[1, 1] == 0


def seen(guards: Guards, rows: list[dict[str, float]]) -> set[str]:
    result: set[str] = set()
    for at, row in enumerate(rows):
        result |= {kind for kind, _ in guards.see(at, row)}
    return result


def course(**ends: tuple[float, float]) -> list[dict[str, float]]:
    """Twenty rollouts in which the figures go from one number to another."""
    base = {"reward": (0.2, 0.2), "entropy": (1.0, 1.0), "length": (10.0, 10.0), "repetition": (0.0, 0.0),
            "kl": (0.0, 0.0), **ends}  # fmt: skip
    return [{name: a + (b - a) * i / 19 for name, (a, b) in base.items()} for i in range(20)]


def test_guards_speak_where_something_goes_wrong_and_only_there() -> None:
    assert seen(Guards(), course(entropy=(1.0, -0.2))) == {"collapse"}
    assert seen(Guards(), course(entropy=(1.0, 0.0), reward=(0.2, 1.0))) == set()  # it has learned
    assert seen(Guards(), course(length=(10, 90), reward=(0.2, 0.9))) == {"length"}
    assert seen(Guards(), course(repetition=(0.0, 0.9), reward=(0.2, 0.9))) == {"repetition"}
    runaway = [{**row, "kl": 0.05 * 1.4**i} for i, row in enumerate(course())]
    assert seen(Guards(), runaway) == {"kl"}
    guards, again = Guards(), Guards()
    for at, row in enumerate(course(entropy=(1.0, 0.5))):
        guards.see(at, row)
        guards.see(at, row)  # measured once, then done
        again.see(at, row)
    assert guards.tensors()["figures"].tolist() == again.tensors()["figures"].tolist()
    assert Guards.of(guards.tensors()).tensors()["numbers"].tolist() == guards.tensors()["numbers"].tolist()
    assert repetition([[1, 2, 3, 1, 2, 3, 1, 2], [1, 2, 3, 4, 0, 0, 0, 0]], [8, 4]) == pytest.approx(0.5)
