"""A hook of MkDocs: what the site has beyond the pages of docs/.

Links that leave docs/ (to sources, configurations, results) lead to copies inside the site; in a checkout they lead to
the files themselves. The API reference has a page for each layer, made from the modules that there are. Pages
that do not exist stay out of the navigation.
"""

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")
COPIES = "source"
SHIM = re.compile(r'<script src="https://unpkg.com/iframe-worker/shim"></script>')
"""What the theme takes from elsewhere to search from disk; theme/search.js does the same."""
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".json": "json", ".ipynb": "json"}
PICTURES = (".png", ".svg", ".jpg", ".gif")
LIMIT = 60_000
"""Characters of a file that are shown."""
LAYERS = {
    "nets": "torch modules: what is computed.",
    "modules": "LightningModules: one local objective each, for the federation's trainer and for a stock one.",
    "methods": "One file per method: how it differs from FedAvg.",
    "federated": "Algorithm 1 on Fabric: trainer, clients, uploads, checkpoints.",
    "callbacks": "Observers of a run: progress, result files, TensorBoard.",
    "data": "Data sets, their split into clients and tasks, batches and the replay buffer.",
    "functional": "Pure functions on tensors: Eq. 5, averages, objectives, closed-form heads, privacy.",
    "flower": "The same run over a network.",
    "testing": "Checks that a method has to pass.",
}
"""Pages of the API reference: packages, and modules at the top of the package."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Drop pages that do not exist from the navigation."""
    config.nav = _existing(config.nav, Path(config.docs_dir))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a copy of everything outside docs/ that a page, or a copied page, links to."""
    root = Path(config.docs_dir).parent
    for layer, what in LAYERS.items():
        content = _reference(layer, what, root / "src" / "fedlscl" / layer)
        files.append(File.generated(config, f"reference/{layer}.md", content=content))
    waiting = [("docs/" + file.src_uri, file.content_string) for file in files.documentation_pages()]
    done = set()
    while waiting:
        page, text = waiting.pop()
        for target in _targets(page, text):
            if target.startswith("docs/") or target in done or not (root / target).exists():
                continue
            done.add(target)
            content = _copy(root / target, target)
            uri = f"{COPIES}/{_page_name(target)}"
            files.append(File.generated(config, uri, content=content, inclusion=InclusionLevel.NOT_IN_NAV))
            if isinstance(content, str) and target.endswith(".md"):
                waiting.append((target, content))
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Turn links of the checkout into links of the site."""
    uri, root = page.file.src_uri, Path(config.docs_dir).parent
    is_copy = uri.startswith(COPIES + "/")
    place = uri.removeprefix(COPIES + "/") if is_copy else "docs/" + uri

    def lead(match: re.Match[str]) -> str:
        target = _resolve(place, match[1])
        if target is None or not (root / target).exists():
            return match[0]
        if target.startswith("docs/"):
            inside = target.removeprefix("docs/")
        else:
            inside = f"{COPIES}/{_page_name(target)}"
        return f"]({posixpath.relpath(inside, posixpath.dirname(uri))}{match[2] or ''})"

    return LINK.sub(lead, markdown)


def on_post_page(output: str, page: Any, config: MkDocsConfig) -> str:
    """Pages load nothing from other servers."""
    script = posixpath.relpath("theme/search.js", posixpath.dirname(page.url) or ".")
    return SHIM.sub(f'<script src="{script}"></script>', output)


def on_post_template(output_content: str, template_name: str, config: MkDocsConfig) -> str:
    """The page that a web server shows for a wrong address has nothing to search from disk."""
    return SHIM.sub("", output_content)


def _existing(entries: list[Any], docs: Path) -> list[Any]:
    kept = []
    for entry in entries:
        ((title, value),) = entry.items()
        if isinstance(value, list):
            kept.append({title: _existing(value, docs)})
        elif (docs / value).is_file() or value in {f"reference/{layer}.md" for layer in LAYERS}:
            kept.append(entry)
    return kept


def _reference(layer: str, what: str, folder: Path) -> str:
    modules = sorted(f"{layer}.{path.stem}" for path in folder.glob("*.py") if path.stem != "__init__") or [layer]
    return "\n".join([f"# {layer.capitalize()}", "", what, "", *(f"::: fedlscl.{name}" for name in modules)])


def _targets(page: str, text: str) -> list[str]:
    return [target for link in LINK.finditer(text) if (target := _resolve(page, link[1])) is not None]


def _resolve(page: str, link: str) -> str | None:
    """Path below the top of the checkout; None for what is no file of it."""
    if "://" in link or link.startswith(("mailto:", "/")):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def _page_name(target: str) -> str:
    if target.endswith(".md"):
        return target
    return target.replace("/", "__") + ("" if target.endswith(PICTURES) else ".md")


def _copy(path: Path, target: str) -> str | bytes:
    if path.is_dir():
        names = sorted(f"- `{name}`" for name in os.listdir(path) if not name.startswith((".", "__")))
        return "\n".join([f"# {target}", "", *names])
    if path.suffix in PICTURES:
        return path.read_bytes()
    text = path.read_text(errors="replace")[:LIMIT]
    if path.suffix == ".md":
        return text
    fence, language = "`" * 4, LANGUAGES.get(path.suffix, "text")
    unsearched = "---\nsearch:\n  exclude: true\n---\n"
    return f'{unsearched}# {path.name}\n\n`{target}`\n\n{fence}{language} linenums="1"\n{text}\n{fence}\n'
