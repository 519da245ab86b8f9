"""An OpenAI-compatible server of one VLV: captions, caption embeddings and reconstructions over HTTP.

`limits.py` refuses requests before they are read, `protocol.py` has requests and answers, `images.py` reads images,
`batching.py` gathers the jobs of concurrent requests, `served.py` computes them, `rows.py` gives each caption of a
batch settings of its own, `app.py` has the routes, and `run.py` starts and stops the server.
"""
