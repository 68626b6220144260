"""A run's buffer as a file.

snapshot.py holds everything, for a restore; export.py trajectories for other tools, and back.
"""
