"""What runs inside vLLM's processes, in vLLM's environment. It imports the standard library and vLLM, not llmkit.

`llmkit_vllm.bridge` copies this folder, as package `llmkit_inside`, to where that environment finds it.
"""
