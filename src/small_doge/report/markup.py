"""Values as HTML that is safe whatever they hold: text of the model and of the data is untrusted."""

from __future__ import annotations

import html
import re
from typing import Any


def text(value: Any) -> str:
    """Any value as text inside HTML or a quoted attribute; characters that HTML does not allow become U+FFFD."""
    allowed = re.sub("[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", str(value))
    return html.escape(allowed, quote=True)


def table(rows: list[tuple[str, Any]]) -> str:
    """Names and values, one a line."""
    cells = "".join(f"<tr><th>{text(name)}</th><td>{text(value)}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"
