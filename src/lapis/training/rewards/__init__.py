"""A reply and its prompt in, what the reply is worth out: built-in checks, a user's function, or a reward model.

A reward is `reward(prompt, reply, record) -> float`: the prompt as the record has it (text or messages), the reply as
text without its end token, and the whole record, to which "_reply" adds {"ended": bool, "tokens": int}. What fails (it
raises, hangs, gives NaN or no number) is counted, and such a reply is not learned from; the run goes on.
"""

from lapis.training.rewards.reward import Case, Failure, Judge, RewardFunction, Scores
from lapis.training.rewards.settings import make_judge

__all__ = ["Case", "Failure", "Judge", "RewardFunction", "Scores", "make_judge"]
