"""Opens a page in headless Chromium and lets it answer questions; the console must stay clean."""

from __future__ import annotations

import json
import re
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

# A frame may be narrower than a window, and --dump-dom writes out what this page was told.
FRAME = """<!DOCTYPE html>
<body><iframe src="asking.html" style="width: {width}px; height: 900px; border: 0"></iframe><script>
addEventListener("message", (event) => document.body.append(JSON.stringify(event.data)));
</script></body>
"""


def ask(
    chromium: str, page: Path, questions: str, folder: Path, width: int = 1200, dark: bool = False
) -> dict[str, Any]:
    """Open a page, and let it answer.

    Args:
        chromium: The browser.
        page: The page.
        questions: A script that posts its answers to the page's parent.
        folder: For what the browser writes.
        width: Of the page in px.
        dark: Whether the browser prefers dark pages.
    """
    (folder / "asking.html").write_text(page.read_text().replace("</body>", f"{questions}</body>"))
    (folder / "frame.html").write_text(FRAME.format(width=width))
    command = [
        chromium,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--dump-dom",
    ]
    command += [f"--user-data-dir={folder / 'profile'}", "--hide-scrollbars", "--virtual-time-budget=5000"]
    command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--window-size=1300,1000"]
    address = (folder / "frame.html").as_uri()
    done = subprocess.run([*command, address], capture_output=True, text=True, timeout=180, check=True)
    assert "CONSOLE" not in done.stderr
    found = re.search(r"</script>\s*(\{.*\})</body>", done.stdout)
    assert found, done.stdout + done.stderr
    answers: dict[str, Any] = json.loads(unescape(found[1]))
    return answers
