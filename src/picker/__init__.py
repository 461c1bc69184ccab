"""picker: routes each LLM request to the endpoint where it costs least."""

__version__ = "0.1.0"
