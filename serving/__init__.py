"""An OpenAI-compatible server of one VLV: captions, caption embeddings and reconstructions over HTTP.

`images.py` reads the images of requests, `rows.py` gives each caption of a batch settings of its own, `engine.py`
computes batches, `protocol.py` has requests and answers, `limits.py` what is refused before they are read, and
`app.py` the routes.
"""
