"""Prompts and rewards in, a policy's loss out: rollouts, advantages, clipped surrogates, and what can go wrong."""
