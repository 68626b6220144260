"""Stages in series, each from the checkpoint of the one before: stages.py reads them, run.py runs
them, record.py remembers, report.py tells.
"""
