"""The documents: every Python block runs, every command that they name exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
ids = {"ids": lambda path: path.relative_to(ROOT).as_posix()}


def blocks(text: str, *languages: str) -> list[tuple[int, str]]:
    """(line, code) of every fenced block in one of these languages."""
    found = re.finditer(r"^```(\w+)[^\n]*\n(.*?)^```", text, re.M | re.S)
    return [
        (text.count("\n", 0, match.start(2)), match[2]) for match in found if match[1] in languages
    ]


@pytest.mark.parametrize("document", DOCUMENTS, **ids)
def test_python_blocks_run(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": document.stem}
    for line, code in blocks(document.read_text(), "python"):
        exec(compile("\n" * line + code, str(document), "exec"), namespace)


def commands(document: Path) -> list[list[str]]:
    """Every shell command of a document, in blocks or in backquotes, as words."""
    text = document.read_text()
    lines = [
        line
        for _, code in blocks(text, "bash", "sh", "shell", "console")
        for line in code.splitlines()
    ]
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    words = []
    for line in lines + inline:
        try:
            parts = shlex.split(line.removeprefix("$ "), comments=True)
        except ValueError:
            continue
        while parts and re.fullmatch(r"\w+=\S*", parts[0]):
            parts = parts[1:]
        if parts[:2] == ["python", "-m"] and len(parts) > 2:
            parts = [parts[2].replace("wus_ext", "wus-ext"), *parts[3:]]
        if parts:
            words.append(parts)
    return words


@pytest.mark.parametrize("document", DOCUMENTS, **ids)
def test_make_targets_exist(document):
    targets = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {
        word
        for command in commands(document)
        if command[0] == "make"
        for word in command[1:]
        if "=" not in word and not word.startswith("-")
    }
    assert named <= targets


@pytest.mark.parametrize("document", DOCUMENTS, **ids)
def test_command_line_flags_exist(document, capsys):
    cli = pytest.importorskip("wus_ext.cli")
    for command in commands(document):
        if command[0] != "wus-ext":
            continue
        arguments = command[1:]
        name = arguments[:1] if arguments and not arguments[0].startswith("-") else []
        with pytest.raises(SystemExit) as left:
            cli.main([*name, "--help"])
        assert left.value.code == 0, command
        known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
        given = {word.split("=")[0] for word in arguments if word.startswith("--")}
        assert given <= known, f"{document.name}: {' '.join(command)}"


@pytest.mark.parametrize("document", DOCUMENTS, **ids)
def test_named_files_exist(document):
    text = document.read_text()
    folders = r"(?:csrc|wus_ext|tests|benchmarks|docs|examples|\.ci)"
    named = re.findall(rf"`({folders}/[\w./-]*)[^`]*`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []
