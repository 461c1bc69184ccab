"""Several processes that serve one picker: workers read requests, one decider decides.

The rooms: `frames` (the words on the bus between them, pure), `link` (one end of it), `remote` (the worker's side),
`desk` (the decider's), `door` (connections handed to workers), `processes` (who starts whom, and again).
"""
