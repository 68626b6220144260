"""What other models write about a dataset before a run: hints and audio captions. asking.py goes
over the prompts, and is read first; hints.py and captions.py say what is asked."""
