"""Reports: outcomes as JSON, in the terminal, as Markdown and as JUnit XML. Pure functions of results; no torch."""
