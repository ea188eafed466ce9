"""Rewards: what a reply is worth. Built in (checkable), a user's function, or a reward model; several with weights.

A reward is `reward(prompt, reply, record) -> float`: the prompt as the record has it (text or messages), the reply as
text without its end token, and the whole record, to which "_reply" adds {"ended": bool, "tokens": int}. What fails (it
raises, hangs, gives NaN or no number) is counted, and such a reply teaches nothing; it is never a crash.
"""

from lapis.training.rewards.case import Case, Failure, Reward
from lapis.training.rewards.judge import Judge, Scores
from lapis.training.rewards.settings import make_judge

__all__ = ["Case", "Failure", "Judge", "Reward", "Scores", "make_judge"]
