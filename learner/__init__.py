"""The learner: fresh and replayed groups in, a policy version out.

rank.py is one rank's training step; batch/ plans and packs it, model/ computes log-probabilities,
objective/ the loss, engine.py is DeepSpeed. actor.py is the rank as Ray knows it. Read first:
rank.py, then objective/loss.py beside docs/method.md.
"""
