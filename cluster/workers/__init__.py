"""The run's Ray actors, kept alive.

pool.py makes and places them; rollout_fleet.py and learner_group.py start, watch and replace them.
turns.py alternates them where they share devices.
supervision.py is the table of what a death costs, with the watches and the restart budget. Called
by training/. Read first: supervision.py.
"""
