"""Training: one loop, objectives, optimizers, exact resume.

lapis.train(model, lapis.Chat(tokenizer, "chats.jsonl"), lapis.TrainConfig(steps=500), out="runs/chat")
"""

from typing import TYPE_CHECKING

from lapis.rooms import furnish

if TYPE_CHECKING:
    from lapis.train.config import TrainConfig
    from lapis.train.loop import train
    from lapis.train.objectives import Causal, Chat, Classify, Masked
    from lapis.train.result import TrainResult

__all__ = ["Causal", "Chat", "Classify", "Masked", "TrainConfig", "TrainResult", "train"]

furnish(
    __name__,
    {
        "Causal": "objectives",
        "Chat": "objectives",
        "Classify": "objectives",
        "Masked": "objectives",
        "TrainConfig": "config",
        "TrainResult": "result",
        "train": "loop",
    },
    verb="train",
)
