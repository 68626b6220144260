"""The learner: fresh and replayed groups in, a policy version out.

actor.py is a rank as Ray knows it, rank.py sets it up, step.py trains one step. batch/ plans a step
and packs each prompt with its completions, media/ has the embeddings of their media, model/
computes log-probabilities of a pack, objective/ the loss and the metrics, engine.py is DeepSpeed.
publication.py streams the weights out under their published names. state.py copies the state out
for checkpoints and for state_replica.py, another process; sft.py is the supervised cold start. Read
first: ``StepTrainer.train_step`` in step.py, then objective/loss.py beside docs/method.md.
"""
