"""Renders and writes: ``index.html``, ``report.md`` and ``figures/`` beside the documents that they are made from."""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .. import __version__
from ..storage import write_together
from .document import Source, read_source
from .figures import FIGURES, figures
from .memorization import rank_text
from .text import estimate, link, markdown, markdown_code, number, prompt_name, script_json, shortened, visible, words
from .view import view

TOP_IN_MARKDOWN = 20


def write_report(folder: str | os.PathLike) -> Path:
    """Writes the report of an audit or a trace into its folder and returns the path of ``index.html``.

    Args:
        folder: Of an audit (``audit.json``, ``spectra.safetensors``, images) or of a saved :class:`~.trajectory.GeometryTrace`.

    Raises:
        FileNotFoundError: the folder holds neither.
        ValueError: it is damaged or of another version.
    """
    source = read_source(folder)
    page, text = render(source)
    path = Path(folder)
    drawn = figures(source)
    write_together(path / "figures", drawn)
    for name in set(FIGURES) - set(drawn):  # of an earlier report, of which there is nothing to draw now
        (path / "figures" / name).unlink(missing_ok=True)
    write_together(path, {"index.html": page.encode(), "report.md": text.encode()})
    return path / "index.html"


def render(source: Source) -> tuple[str, str]:
    """The page and the Markdown version of a folder that was read."""
    seen = view(source)
    return _page(seen), _markdown(seen)


def _page(seen: dict[str, Any]) -> str:
    environment = _environment(autoescape=True, finalize=_plain)
    style, script = (environment.loader.get_source(environment, name)[0] for name in ("report.css", "report.js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    template = environment.get_template("report.html.j2")
    data = None if seen["explorer"] is None else seen["explorer"] | {"reference": 1 if seen["map"] == "D'" else None}
    return template.render(
        seen, style=Markup(style), script=Markup(script), policy=policy, data=script_json(data), version=__version__
    )


def _markdown(seen: dict[str, Any]) -> str:
    environment = _environment(autoescape=False, finalize=_no_markdown)
    environment.filters |= {"code": markdown_code, "literal": Markup}
    kind = seen["document"]["request"]["kind"]
    prompts = [p for p in seen["document"]["prompts"] if p.get("rank") is not None]
    prompts = sorted(prompts, key=lambda p: p["rank"])[:TOP_IN_MARKDOWN]
    ranked = [
        {
            "rank": rank_text(p),
            "title": prompt_name(kind, p["prompt"]),
            "flagged": p.get("flagged"),
            "combined": estimate(p.get("combined")),
        }
        for p in prompts
    ]
    return environment.get_template("report.md.j2").render(seen, ranked=ranked, version=__version__).rstrip() + "\n"


def _environment(**options: Any) -> Environment:
    environment = Environment(
        loader=PackageLoader(__name__.rpartition(".")[0]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )
    environment.globals |= {"number": number, "link": link, "value": _value, "words": words, "shortened": shortened}
    return environment


def _plain(value: Any) -> Any:
    """Every text that is not markup of ours: what cannot be seen is written out; Jinja escapes the rest afterwards."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _no_markdown(value: Any) -> Any:
    return markdown(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _value(raw: float | None) -> Markup:
    """The attribute that a column is sorted by; nothing for what is not known."""
    return Markup("") if raw is None else Markup(' data-value="{}"').format(float(raw))


def _hash(text: str) -> str:
    """As a Content-Security-Policy names an inline script or style."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
