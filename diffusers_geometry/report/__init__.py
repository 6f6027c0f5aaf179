"""The report of an audit or a trace: one page that needs no network, a Markdown version for model cards, and figures.

What the folder's documents say is foreign: a prompt may hold HTML, a model's name a script. So Jinja escapes everything that is not
markup of our own, and the page's Content-Security-Policy allows exactly one script and one style, by their hashes, data URIs for
images, and no request at all: even what slipped through an escape could neither run nor call home.
"""

from .write import render, write_report

__all__ = ["render", "write_report"]
