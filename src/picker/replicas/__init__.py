"""Several pickers that serve one pool: what each decides and sees is told to the others, who learn it as facts."""
