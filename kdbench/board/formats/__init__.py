"""The formats of a board: for a terminal, in Markdown, CSV, JSON and HTML."""
