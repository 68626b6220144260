"""vLLM behind five methods (engine.py); launch.py starts it, rendering.py prepares prompts,
prompt_cache.py keeps them, vllm_plugin/ puts right what vLLM does differently from the learner's
forward.
"""
