"""`python -m llmkit_lm_eval ARGS`: lm-eval's command line, with llmkit's engines as `--model llmkit`."""

from __future__ import annotations

import sys

from llmkit_lm_eval.model import run_lm_eval

if __name__ == "__main__":
    run_lm_eval(sys.argv[1:])
