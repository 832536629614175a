"""Hooks of MkDocs: the pages that have their source elsewhere, and links to files that are not pages.

README.md becomes the first page; the command's page comes from Typer, that of the API from its docstrings.
"""

import re
from pathlib import Path
from typing import Any

import typer.main
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click

from launcher.cli.main import app

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?://|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    command = typer.main.get_command(app)
    pages = {
        "index.md": (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "]("),
        "cli.md": get_docs_for_click(obj=command, ctx=typer.Context(command, info_name="prism"), name="prism"),
        "api.md": "# The Python API\n\n::: prism_job.api\n    options: {members: [select, Selection]}\n",
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links to files of the repository become their names, since the site does not hold them."""
    folder = ROOT if page.file.src_uri == "index.md" else ROOT / "docs"

    def plain(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        path = (folder / target).resolve()
        if target == "../README.md":
            return f"[{text}](index.md{anchor or ''})"
        if files.get_file_from_path(target) or path.is_relative_to(ROOT / "docs"):
            return match.group()
        if not path.exists():
            raise PluginError(f"{page.file.src_uri} links to {target}, which is not there")
        return text if target.strip("./") in text else f"{text} (`{target.strip('./')}`)"

    return LINK.sub(plain, markdown)
