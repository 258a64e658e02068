"""Build the site: `python .docs/build.py [FOLDER]` writes it to FOLDER/html (by default build/docs/html).

Every warning of Sphinx is an error, every reference must lead somewhere, and so must every link of the built pages.
It is built anew each time: a page that is not read again keeps its warnings to itself.
`--external` asks the network, too, whether each link to another site still answers.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

from sphinx.cmd.build import build_main

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def main(arguments: list[str]) -> int:
    """Build, check, and say what is wrong; the exit code is 0 if nothing is."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "build" / "docs")
    parser.add_argument("--external", action="store_true", help="check the links to other sites (needs a network)")
    options = parser.parse_args(arguments)
    sys.path[:0] = [str(HERE), str(ROOT)]
    from links import broken_links
    from pages import write_pages

    started = time.perf_counter()
    pages, html = options.folder / "pages", options.folder / "html"
    write_pages(ROOT, pages)
    shutil.rmtree(html, ignore_errors=True)
    common = ["--fresh-env", "--fail-on-warning", "--nitpicky", "--quiet", "--conf-dir", str(HERE)]
    common += ["--doctree-dir", str(options.folder / "doctrees"), str(pages)]
    code = build_main(["--builder", "html", *common, str(html)])
    if code == 0 and options.external:
        code = build_main(["--builder", "linkcheck", *common, str(options.folder / "external")])
    if code != 0:
        return code
    broken = broken_links(html)
    for line in broken:
        print(f"broken link: {line}", file=sys.stderr)  # noqa: T201 - a program for the terminal
    count = sum(1 for _ in html.rglob("*.html"))
    print(f"{html}: {count} pages, {len(broken)} broken links, {time.perf_counter() - started:.0f} s")  # noqa: T201
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
