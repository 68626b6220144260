"""vLLM behind five methods (engine.py); launch.py starts it, prompt_cache.py keeps prepared
prompts, vllm_plugin/ puts right what vLLM does differently from the learner's forward.
"""
