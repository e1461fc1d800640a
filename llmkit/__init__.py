"""llmkit: train, evaluate and serve small language models; every part a plugin.

What a plugin or a script needs is in the submodules, one noun each: `llmkit.checkpoint`, `llmkit.tokenizer`,
`llmkit.trainer`, `llmkit.engine`, `llmkit.evaluator`, `llmkit.server`, `llmkit.data`. Importing this package imports
none of them, so that the command line starts quickly.
"""

from pluggy import HookimplMarker

__version__ = "0.1.0"

#: Marks a function of a plugin module as the implementation of a hook of `llmkit.hookspecs`.
hookimpl = HookimplMarker("llmkit")

__all__ = ["__version__", "hookimpl"]
