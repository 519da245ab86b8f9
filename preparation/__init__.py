"""Preparation of data: filters metadata, downloads, packs, finds duplicates, captions, inspects, splits.

Each step has a module, writes a manifest beside its output, and goes on where it was ended (`run.Run`).
"""
