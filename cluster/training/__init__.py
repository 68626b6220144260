"""One run from recipe to report.

restarts.py starts or resumes a run and restarts it when state is lost. run.py sets one up and ends
it; system.py is the part that evaluate.py shares. loop.py is the training loop; supervisor.py looks
after the processes meanwhile. coldstart.py is Stage 0. Read first: loop.py.
"""
