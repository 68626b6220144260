"""What a completion is paid.

suite.py weighs the components and actor.py serves it to the rollout actors. answers/ reads and
compares answers; group_rewards.py compares completions of one prompt; judges/ asks a model or exact
rules; custom.py runs a user's own function. Read first: record.py, suite.py. How to write a reward:
README.md.
"""
