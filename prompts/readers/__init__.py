"""Dataset rows of the field's common layouts turned into prompts."""
