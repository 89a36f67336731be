"""Give the site a page for each file outside docs/ that its pages link to, so that links work there as they do in the repository.

A Markdown file becomes a page as it is, a picture stays one, any other text file becomes a page of highlighted code, and a folder a
list of its files. `mkdocs.yml` names this module as a hook; MkDocs calls the functions whose names begin with ``on_``.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).resolve().parent.parent
PREFIX = "repository/"  # of these pages in the site
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".json": "json", ".toml": "toml"}
_CODE = re.compile(r"(^[ ]*```.*?^[ ]*```$)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<=\]\()(?![a-z+]+:|#)([^)\s#]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that are linked to, and those that these link to."""
    queue = list(files.documentation_pages())
    while queue:
        page = queue.pop()
        for target in _LINK.findall("".join(_CODE.split(page.content_string)[::2])):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(_path_of(page)), target))
            if not path.startswith("docs/") and (REPOSITORY / path).exists() and _uri_of(path) not in files.src_uris:
                added = _file(path, config)
                files.append(added)
                queue += [added] * added.is_documentation_page()
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let the links lead to the pages of the site."""
    here = posixpath.dirname(_path_of(page.file))

    def to_page(link: re.Match[str]) -> str:
        uri = _uri_of(posixpath.normpath(posixpath.join(here, link[0])))
        return posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")

    parts = _CODE.split(markdown)
    parts[::2] = [_LINK.sub(to_page, part) for part in parts[::2]]
    return "".join(parts)


def _path_of(file: File) -> str:
    """Where a page of the site is in the repository."""
    return file.src_uri.removeprefix(PREFIX) if file.src_uri.startswith(PREFIX) else f"docs/{file.src_uri}"


def _uri_of(path: str) -> str:
    """Where a file or folder of the repository is in the site."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{PREFIX}{path}" if Path(path).suffix in {".md", ".svg", ".png"} else f"{PREFIX}{path}.md"


def _file(path: str, config: MkDocsConfig) -> File:
    source = REPOSITORY / path
    if _uri_of(path) == f"{PREFIX}{path}":
        return File.generated(config, _uri_of(path), abs_src_path=str(source))
    if source.is_dir():
        names = sorted(item.name + "/" * item.is_dir() for item in source.iterdir() if not item.name.startswith("__"))
        body = "\n".join(f"- `{name}`" for name in names)
    else:
        body = f"```{LANGUAGES.get(source.suffix, 'text')}\n{source.read_text(encoding='utf-8')}\n```"
    head = f"---\ntitle: {source.name}\nsearch: {{exclude: true}}\n---\n# `{path}`\n\n"
    return File.generated(config, _uri_of(path), content=head + body)
