"""`python -m llmkit` is `llmkit`."""

from llmkit.cli.main import main

main()
