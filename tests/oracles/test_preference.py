"""Losses and gradients of the preference objectives against TRL's trainers, on the same tiny model and batch."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lapis.evaluation.preference import score_pairs
from lapis.evaluation.replies import collate, reply_rewards
from lapis.families.config import ModelConfig
from lapis.model.load import load, save
from lapis.model.transformer import Transformer
from lapis.text.corpus.pairs import Pair
from lapis.text.rows.pair_rows import EncodedReply
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer
from lapis.training.objectives.preference.losses import dpo_loss
from lapis.training.objectives.preference.pairwise import PairBatch, Pairwise
from lapis.training.objectives.preference.preference import DPO, IPO, KTO, ORPO, Reward, SimPO

from .gradients import assert_same_gradients

transformers = pytest.importorskip("transformers")
pytest.importorskip("trl")
pytest.importorskip("datasets")

TEXT = " ".join(f"Tree {i} has {i * 3 % 7} birds and {i * 5 % 11} nests." for i in range(300))


def message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


PROMPTS = [
    [message("user", "How many birds has tree 3?")],
    [message("system", "Count."), message("user", "Nests of tree 9, and of tree 4?")],
    [message("user", "Tree 1?"), message("assistant", "It has 3 birds."), message("user", "And tree 2, if you know?")],
]
REPLIES = [("Tree 3 has 2 birds.", "2, look it up."), ("1 and 9.", "Trees 9 and 4 have 1 and 9 nests, of course."),
           ("Tree 2 has 6 birds and 10 nests.", "6.")]  # fmt: skip
PAIRS = [
    Pair(prompt, message("assistant", good), message("assistant", bad), Path("pairs.jsonl"), line, margin=0.3 * line)
    for line, (prompt, (good, bad)) in enumerate(zip(PROMPTS, REPLIES, strict=True), 1)
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT], 300)


@pytest.fixture(scope="module")
def folders(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A reference, a policy that has moved away from it, and a reward model; as lapis writes them."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    shape = {"dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 48, "vocab": tokenizer.rows, "context": 128,
             "extra": {"pad_token_id": tokenizer.pad_id}}  # fmt: skip
    torch.manual_seed(3)
    start = Transformer(ModelConfig(**shape))
    moved = copy.deepcopy(start)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    for name, model in {
        "start": start,
        "moved": moved,
        "reward": Transformer(ModelConfig(**shape, head="scalar")),
    }.items():
        with torch.no_grad():  # well away from the ease of small weights
            for name_, parameter in model.named_parameters():
                if name == "reward" and name_.startswith("head"):
                    parameter.mul_(20)
        save(model, root / name)
        tokenizer.save(root / name)
    return {name: root / name for name in ("start", "moved", "reward")}


def ours(objective: Pairwise, model: Transformer, folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss and its gradients by the names that transformers has for them. All pairs are the batch."""
    both = [2 * pair + side for side in (0, 1) for pair in range(len(PAIRS))]
    replies = [objective.reply(number) for number in both]
    batch = PairBatch(
        list(range(len(PAIRS))),
        collate(replies, whole=len(PAIRS) if objective.with_prompts else 0),
        torch.from_numpy(objective.examples.margins),
    )
    model.zero_grad()
    total, count, metrics = objective.loss(model, objective.prepare(model, batch))
    assert count == len(PAIRS) and metrics["tokens"] > 0
    (total / count).backward()
    grads = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}
    save(model, folder, state=grads)
    return total.item() / count, load_file(folder / "model.safetensors")


TRIPLE = {"prompt": "a", "chosen": "b", "rejected": "c"}  # a trainer wants data to be made; batches are ours
SETTINGS: dict[str, Any] = {"per_device_train_batch_size": 3, "report_to": "none", "use_cpu": True, "bf16": False,
                            "gradient_checkpointing": False, "disable_dropout": False}  # fmt: skip


def theirs(folder: Path, kind: str = "CausalLM", **more: Any) -> Any:
    cls = getattr(transformers, f"AutoModelFor{kind}")
    return cls.from_pretrained(folder, dtype=torch.float32, **more)


def rows(objective: Pairwise) -> list[dict[str, Any]]:
    """The same ids, as TRL's data sets have them."""
    result = []
    for pair in range(len(PAIRS)):
        chosen, rejected = (reply.spoken for reply in objective.examples.replies[2 * pair : 2 * pair + 2])
        parts = {"prompt_ids": chosen.ids[: chosen.first], "chosen_ids": chosen.ids[chosen.first :],
                 "rejected_ids": rejected.ids[rejected.first :]}  # fmt: skip
        result.append({name: part.tolist() for name, part in parts.items()})
    return result


REFERENCED: dict[str, tuple[Callable[..., Pairwise], dict[str, Any], dict[str, Any]]] = {
    "dpo": (DPO, {"beta": 0.3}, {"loss_type": ["sigmoid"], "beta": 0.3}),
    "dpo robust": (DPO, {"beta": 0.3, "label_smoothing": 0.2, "robust": True},
                   {"loss_type": ["robust"], "beta": 0.3, "label_smoothing": 0.2}),
    "ipo": (IPO, {"beta": 0.4}, {"loss_type": ["ipo"], "beta": 0.4}),
}  # fmt: skip


@pytest.mark.parametrize("case", REFERENCED)
def test_objectives_with_a_reference(case: str, tokenizer: Tokenizer, folders: dict[str, Path], tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    make, options, settings = REFERENCED[case]
    objective: Any = make(tokenizer, PAIRS, context=128, **options)
    objective.begin(load(folders["start"]))
    mine = ours(objective, load(folders["moved"]), tmp_path / "grads")

    model = theirs(folders["moved"])
    trainer = DPOTrainer(
        model=model,
        ref_model=theirs(folders["start"]),
        args=DPOConfig(output_dir=str(tmp_path), **SETTINGS, **settings),
        train_dataset=Dataset.from_list([TRIPLE]),
        processing_class=transformers.AutoTokenizer.from_pretrained(folders["start"]),
    )
    batch = trainer.data_collator(rows(objective))
    assert_same_gradients(mine, trainer.compute_loss(trainer.model, batch), trainer.model)


def test_kto(tokenizer: Tokenizer, folders: dict[str, Path], tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    objective = KTO(tokenizer, PAIRS, context=128, beta=0.3, desirable=1.2, undesirable=0.7)
    objective.begin(load(folders["start"]))
    mine = ours(objective, load(folders["moved"]), tmp_path / "grads")

    data = []
    for pair, row in enumerate(rows(objective)):
        other = objective.examples.mismatched(pair)
        shared = {"prompt_ids": row["prompt_ids"], "KL_completion_ids": other.ids[other.first :].tolist()}
        data += [{**shared, "completion_ids": row[f"{side}_ids"], "label": side == "chosen"}
                 for side in ("chosen", "rejected")]  # fmt: skip
    settings = {**SETTINGS, "per_device_train_batch_size": 6}
    trainer = KTOTrainer(
        model=theirs(folders["moved"]),
        ref_model=theirs(folders["start"]),
        args=KTOConfig(output_dir=str(tmp_path), beta=0.3, desirable_weight=1.2, undesirable_weight=0.7, **settings),
        train_dataset=Dataset.from_list([{"prompt": "a", "completion": "b", "label": True}] * 2),
        processing_class=transformers.AutoTokenizer.from_pretrained(folders["start"]),
    )
    batch = trainer.data_collator(data)
    assert_same_gradients(mine, trainer.compute_loss(trainer.model, batch), trainer.model)
    assert trainer._metrics["eval"]["kl"][0] > 0.01  # the term was there


@pytest.mark.parametrize("case", ["orpo", "simpo", "simpo smoothed"])
def test_objectives_without_a_reference(
    case: str, tokenizer: Tokenizer, folders: dict[str, Path], tmp_path: Path
) -> None:
    from datasets import Dataset
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    smoothing = 0.1 if "smoothed" in case else 0.0
    objective: Pairwise
    if case == "orpo":
        objective = ORPO(tokenizer, PAIRS, context=128, beta=0.3)
        trainer_of, args = ORPOTrainer, ORPOConfig(output_dir=str(tmp_path), beta=0.3, **SETTINGS)
    else:
        objective = SimPO(tokenizer, PAIRS, context=128, beta=2.2, gamma=0.7, label_smoothing=smoothing)
        trainer_of, args = CPOTrainer, CPOConfig(output_dir=str(tmp_path), loss_type="simpo", cpo_alpha=0.0, beta=2.2,
                                                 simpo_gamma=0.7, label_smoothing=smoothing, **SETTINGS)  # fmt: skip
    mine = ours(objective, load(folders["moved"]), tmp_path / "grads")
    trainer = trainer_of(
        model=theirs(folders["moved"]),
        args=args,
        train_dataset=Dataset.from_list([TRIPLE]),
        processing_class=transformers.AutoTokenizer.from_pretrained(folders["start"]),
    )
    batch: dict[str, Any] = {}
    for side in ("chosen", "rejected"):
        ids = [torch.tensor(row["prompt_ids"] + row[f"{side}_ids"]) for row in rows(objective)]
        labels = [i.clone() for i in ids]
        for label, row in zip(labels, rows(objective), strict=True):
            label[: len(row["prompt_ids"])] = -100
        pad = torch.nn.utils.rnn.pad_sequence
        batch[f"{side}_input_ids"] = pad(ids, True, 0)
        batch[f"{side}_attention_mask"] = pad([torch.ones_like(i) for i in ids], True, 0)
        batch[f"{side}_labels"] = pad(labels, True, -100)
    loss, _ = trainer.get_batch_loss_metrics(trainer.model, batch)
    assert_same_gradients(mine, loss, trainer.model)
    if smoothing:  # conservative DPO is CPO's smoothed loss on log-ratios
        trainer.loss_type, (chosen, rejected) = "sigmoid", torch.randn(2, 50) * 3
        smoothed, _, _ = trainer.cpo_loss(chosen, rejected)
        torch.testing.assert_close(dpo_loss(chosen, rejected, 2.2, smoothing), smoothed)


@pytest.mark.parametrize("margins", [True, False])
def test_reward(margins: bool, tokenizer: Tokenizer, folders: dict[str, Path], tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    objective = Reward(tokenizer, PAIRS, context=128, margins=margins, center=0.05)
    mine = ours(objective, load(folders["reward"]), tmp_path / "grads")
    data = []
    for pair in range(len(PAIRS)):
        chosen, rejected = objective.examples.replies[2 * pair : 2 * pair + 2]
        row: dict[str, Any] = {"chosen_ids": chosen.ids.tolist(), "rejected_ids": rejected.ids.tolist()}
        data.append({**row, "margin": float(objective.examples.margins[pair])} if margins else row)
    trainer = RewardTrainer(
        model=theirs(folders["reward"], "SequenceClassification", num_labels=1),
        args=RewardConfig(output_dir=str(tmp_path), center_rewards_coefficient=0.05, **SETTINGS),
        train_dataset=Dataset.from_list([{name: TRIPLE[name] for name in ("chosen", "rejected")}]),
        processing_class=transformers.AutoTokenizer.from_pretrained(folders["reward"]),
    )
    batch = trainer.data_collator(data)
    assert_same_gradients(mine, trainer.compute_loss(trainer.model, batch), trainer.model)


def test_a_reward_folder_scores_a_chat_in_transformers_as_here(tokenizer: Tokenizer, folders: dict[str, Path]) -> None:
    there = theirs(folders["reward"], "SequenceClassification").eval()
    assert there.config.num_labels == 1
    words = transformers.AutoTokenizer.from_pretrained(folders["reward"])
    chats = [[*pair.prompt, reply] for pair in PAIRS for reply in (pair.chosen, pair.rejected)]
    inputs = words.apply_chat_template(chats, return_tensors="pt", padding=True, return_dict=True, padding_side="right")
    with torch.no_grad():
        scores = there(**inputs).logits[:, 0].tolist()
    objective = Reward(tokenizer, PAIRS, context=128)
    model = load(folders["reward"])
    assert reply_rewards(model, objective.examples.replies) == pytest.approx(scores, abs=1e-5)
    closed = [EncodedReply(reply.ids[: reply.last], reply.first, reply.last) for reply in objective.examples.replies]
    model.config.extra["pad_token_id"] = there.config.pad_token_id = int(closed[0].ids[-1])  # chats that end with it
    for reply, score in zip(closed, reply_rewards(model, closed), strict=True):
        with torch.no_grad():
            assert there(torch.from_numpy(reply.ids)[None]).logits.item() == pytest.approx(score, abs=1e-5)
    assert score_pairs(load(folders["reward"]), tokenizer, PAIRS)["by"] == "reward"
