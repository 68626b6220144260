"""vLLM behind five methods (engine.py); launch.py starts it, rendering.py prepares prompts,
prompt_cache.py keeps them, stored_media.py has what the learner's towers made of their media,
vllm_plugin/ puts right what vLLM does differently from the learner's forward.
"""
