"""Captions of many images: inputs read into batches, captions written by a model, results that survive a crash.

`inputs.py` finds images, `batches.py` and `encoding.py` turn them into batches of caption embeddings, `captioner.py`
writes the captions of a batch, and `output.py` and `resume.py` keep the results.
"""
