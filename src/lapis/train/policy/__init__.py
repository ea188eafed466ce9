"""Learning from rewards, step by step: prompts, replies, advantages, what is minimized, and what can go wrong.

The objectives that put these together are objectives/on_policy.py and objectives/policy.py; rewards are in rewards/.
"""
