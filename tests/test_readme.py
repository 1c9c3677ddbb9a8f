"""What the README shows is what is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def tree_paths() -> set[str]:
    """Paths of the README's file tree; indented lines belong to the folder above them."""
    block = (ROOT / "README.md").read_text().split("## Where things are")[1].split("```")[1]
    paths, folder = set(), ""
    for line in block.strip("\n").splitlines():
        names = re.match(r"( *)((?:[\w.]+/?(?: (?=[\w.]+[/.]))?)+)", line)
        assert names, line
        indent, listed = names.groups()
        words = [word for word in listed.split() if "/" in word or "." in word]
        if not indent:
            folder = words[0]
        paths.update(words if not indent else (folder + word for word in words))
    return paths


def test_every_path_of_the_file_tree_exists():
    assert all((ROOT / path).exists() for path in tree_paths()), tree_paths()


def test_every_folder_of_the_package_is_in_the_file_tree():
    folders = {f"opsd_megatron/{path.parent.name}/" for path in (ROOT / "opsd_megatron").glob("*/__init__.py")}
    files = {f"opsd_megatron/{path.name}" for path in (ROOT / "opsd_megatron").glob("*.py")} - {
        "opsd_megatron/__init__.py"
    }
    assert folders | files <= tree_paths()


def test_every_local_link_of_the_documents_leads_somewhere():
    for document in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
