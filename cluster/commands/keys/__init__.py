"""Commands about the keys of a recipe: `avatar explain` (explain.py), `avatar schema` (schema.py),
`avatar init` (init.py), and the completion of keys in a shell (complete.py)."""
