"""Prompts as their engine reads them: chat templates, tokenizer files and where tokens end, for exact matching.

A shell: needs the optional extra `exact` (`tokenizers`, `jinja2`), which is imported only where it is used. `Reader` is
what the rest of picker calls; it never refuses a request, it only fails to read one.
"""
