"""Whole training loops against TRL's: tasks, both sides, and what is kept of a run."""
