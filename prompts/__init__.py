"""What is asked: prompts as records, their datasets, media and tokens.

record.py is the noun (Prompt); datasets.py and readers/ make it from rows; media/ opens its clips;
encoding/ turns it into tokens for both the rollout and the learner side; workers/ are processes
that do so ahead of need; synthetic/ is a toy world with exact ground truth. Read first: record.py,
then encoding/template.py.
"""
