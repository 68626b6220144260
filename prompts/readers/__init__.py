"""Dataset rows of the field's common layouts turned into prompts. Start at layouts.py; rows.py
reads files, chat.py and media_items.py parts of a row, build.py checks them and makes a Prompt.
"""
