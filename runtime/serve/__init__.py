"""An HTTP server that speaks OpenAI's protocol, imported as `mla_deploy.runtime.serve`.

`scheduler.py` owns the engine: one thread in which all sequences advance together. `job.py` is one
of them, `prefix_cache.py` what is kept of those that ended. `schema.py` says what a request may
hold and what an answer looks like, `app.py` joins both by routes, `http.py` knows bodies, streams
and clients that leave. `server.py` is the socket and the life of it all.

Only `app.py`, `http.py` and `server.py` need the extra `serve` (fastapi and uvicorn).
"""
