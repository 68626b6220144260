"""What a run says.

run_folder.py writes all files of a run, run_files.py reads them back; screen.py prints a line per
step, live_view.py draws on a terminal; metrics.py is the catalogue of names. After the run:
report.py with plots.py and distributions.py, upload.py. Read first: run_folder.py.
"""
