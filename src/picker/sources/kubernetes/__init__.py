"""Endpoints from a Kubernetes API server: pools and pods in, facts out.

| module | owns |
|---|---|
| `objects` | what is read of each kind of object; pure |
| `members` | what a pod or an address of a slice is to a scheduler; pure |
| `roster` | which endpoints the scheduler has been told of, and what to tell it next; pure |
| `objectives`, `rewrites` | priorities by name, models by weight; pure |
| `credentials` | where the API server is and what to say to be let in |
| `client` | requests to it, and errors in plain words |
| `reflector` | a copy of one collection, kept by list and watch |
| `leases` | what a Lease says and what to write into one; pure |
| `election` | which of several replicas holds it |
| `source` | all of it together, and how old it is |
"""
