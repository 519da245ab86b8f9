"""What the commands accept.

The parsers import no heavy library, so that `--help` and the error of a misspelt option come at once.
"""
