"""The embedded model: a miniature VLV, trained by this project on its own pictures."""

from pathlib import Path

MINIATURE = Path(__file__).parent / "vlv-miniature"
"""A complete VLV in the Hub's layout. It knows sixteen drawings and no photographs."""
