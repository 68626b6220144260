"""The field's public benchmarks: read as published, asked, marked by their own rules.

record.py has the nouns (BenchmarkSet, Question), folder.py reads a downloaded set, frames.py makes
videos of folders of frames, sets/ has one folder for each set. marks.py takes an answer out of a
completion and marks it. metrics.py makes the official figures, intervals.py says how sure they are,
table.py puts checkpoints side by side. answers.py keeps every answer, convert.py makes prompts of
questions, result.py says what came of a set. training/public_sets.py asks them, for `avatar
evaluate --benchmark` and in a run. Read first: sets/worldsense/, then result.py.
"""
