"""Who judges reasoning: base.py the contract, openai_judge.py a model behind an endpoint,
rule_judge.py exact rules of the synthetic world; component.py and segments.py make rewards of it.
"""
