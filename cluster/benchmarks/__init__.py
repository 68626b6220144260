"""The field's public benchmarks: read as published, asked, marked by their own rules.

record.py has the nouns (BenchmarkSet, Question), folder.py reads a downloaded set, sets/ has one
folder for each set, marks.py takes an answer out of a completion and marks it, metrics.py makes the
official figures, intervals.py says how sure they are, answers.py keeps every answer, convert.py
makes prompts of questions, run.py asks them. Called by `avatar evaluate --benchmark`. Read first:
sets/worldsense/, then run.py.
"""
