"""What other models write about a dataset before a run: hints, audio captions, scores and
categories. asking.py goes over the prompts, and is read first; hints.py, captions.py, scores.py and
categories.py say what is asked. funnel.py chooses by scores and categories, and reports what each
step left."""
