"""Captions of many images: inputs read into batches, captions written by a model, results that survive a crash.

`sources.py`, `tables.py`, `dataset_rows.py` and `inputs.py` find images, `prefetch.py`, `batches.py` and `encoding.py`
turn them into batches of caption embeddings, `captioner.py`, `acceleration.py` and `texts.py` write the captions of a
batch, `formats.py`, `output.py` and `resume.py` keep the results, and `sidecars.py` and `metadata.py` put them where
the images are. In bulk, `division.py` divides inputs, `shards.py` and `sharded.py` caption them shard by shard, and
`merging.py` puts the captions together.
"""
