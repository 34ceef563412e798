"""mkdocs hooks: README, CONTRIBUTING, CHANGELOG and SECURITY as pages of the site, their links led to its pages."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
LINK = re.compile(r"(\]\()([^)\s]+)(\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie in the root of the repository."""
    root = Path(config.config_file_path).parent
    for source, page in PAGES.items():
        text = (root / source).read_text()
        content = LINK.sub(lambda link: link[1] + led(link[2], config.repo_url or "") + link[3], text)
        files.append(File.generated(config, page, content=content))
    return files


def led(link: str, repository: str) -> str:
    """A link of a root page, relative or to the repository, as a link from a page of the site's root."""
    path = re.sub(rf"^{re.escape(repository)}/(blob|raw)/main/", "", link)
    name, mark, anchor = path.partition("#")
    if name in PAGES:
        return PAGES[name] + mark + anchor
    return path.removeprefix("docs/") if path.startswith("docs/") else link
