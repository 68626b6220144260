"""From a prompt to tokens and positions, the same for the rollout engine and the learner. Start at
template.py; processor.py loads a model's processor, rope.py computes M-RoPE positions, digest.py
names a prompt's tokens.
"""
