"""Answers read out of a completion and compared with the truth, by problem type. Start at
accuracy.py; format.py and grounding.py check the output's form.
"""
