"""The pages against the repository; `pytest docs` runs their Python blocks."""

import importlib
import importlib.util
import inspect
import re
import shlex
import sys
import textwrap
from pathlib import Path

import optax
import pytest
import tyro

import ldadam_optax

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
COMMANDS_IN = [*PAGES, ROOT / "examples" / "flax_lm" / "README.md"]
# Run by `pytest docs`; README's by doctest.
RUN = {"python", "pycon"}
NOT_PYTHON = {"bibtex"}
FRAMEWORK = r"in (examples/frameworks/(\w+)\.py), which \.ci/frameworks runs"
# Blocks that nothing runs, beside those that stand in a script of a framework.
NOT_RUN = {
    "needs torch": "migrating.md",
    "a configuration of Kauldron, whose trainer needs TensorFlow": "frameworks.md",
}


def blocks(page):
    """Language and text of each fenced block, and why it is skipped, if it is."""
    fence = re.compile(
        r'(?:^<!-- skip: next "(?P<why>.*)" -->\n)?'
        r"^ *```(?P<language>.*)\n(?P<text>(?s:.*?))^ *```$",
        re.MULTILINE,
    )
    for match in fence.finditer(page.read_text()):
        yield match["language"], match["text"], match["why"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_run_or_says_why_not(page):
    """A block without a language, or in indented text, would not be seen."""
    found = list(blocks(page))
    assert {language for language, _, _ in found} <= RUN | NOT_PYTHON
    skipped = {why for _, _, why in found if why}
    text = page.read_text()
    assert len(skipped) == text.count("skip: "), "skip: next alone, with its reason"
    for why in skipped:
        assert re.fullmatch(FRAMEWORK, why) or NOT_RUN[why] == page.name
    outside = re.sub(r"(?ms)^ *```.*?^ *```$|^<!--.*?-->$", "", text)
    assert not re.search(
        r"^ {4,}(>>> |import |from \w+ import )", outside, re.MULTILINE
    )
    if page.name == "README.md":  # run by doctest, which sees prompts alone
        assert all(text.startswith(">>>") for kind, text, _ in found if kind in RUN)


def test_no_reason_is_stale():
    reasons = {why for page in PAGES for _, _, why in blocks(page)}
    assert reasons >= NOT_RUN.keys()


def recipes():
    for page in PAGES:
        for _, text, why in blocks(page):
            if why and (match := re.fullmatch(FRAMEWORK, why)):
                yield pytest.param(text, *match.groups(), id=match[2])


@pytest.mark.parametrize(("text", "path", "script"), list(recipes()))
def test_a_recipe_stands_in_the_script_that_is_run(text, path, script):
    """Imports line by line, and each other part of the block as it is."""
    assert re.search(rf"\b{script}\b", (ROOT / ".ci" / "frameworks").read_text())
    lines = (ROOT / path).read_text().splitlines()
    imports, *parts = re.split(r"\n{3,}", text.strip())
    assert set(imports.splitlines()) <= {*lines}
    for part in parts:
        length = len(part.splitlines())
        windows = (lines[i : i + length] for i in range(len(lines)))
        assert part in {textwrap.dedent("\n".join(window)) for window in windows}


def commands():
    """Each `python -m X ...` of this repository, in a line or in backticks."""
    for page in COMMANDS_IN:
        text = page.read_text().replace("\\\n", " ")
        found = re.findall(r"python -m ((?:examples|benchmarks)\.[^`\n&·]+)", text)
        for command in sorted(set(found)):
            yield pytest.param(command, id=f"{page.name}: {command[:60]}")


class Parsed(Exception):  # noqa: N818
    """Raised in the place of what a command would do."""


@pytest.mark.parametrize("command", list(commands()))
def test_a_command_is_understood(command, monkeypatch, tmp_path):
    """The module exists, and its parser takes the options and their values."""
    module, *arguments = shlex.split(command, comments=True)
    assert importlib.util.find_spec(module)
    if not arguments:
        return
    cli = tyro.cli

    def parse_only(*args, **options):
        parsed = cli(*args, **options)
        if options.get("return_unknown_args"):
            return parsed
        raise Parsed

    monkeypatch.setattr(tyro, "cli", parse_only)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Parsed):
        importlib.import_module(module).main()


def sections(page):
    """Text of each section of a page, by its heading."""
    parts = re.split(r"(?m)^## (.*)\n", (ROOT / "docs" / page).read_text())
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def in_first_column(text):
    cells = re.findall(r"(?m)^\| *(.*?) *\|", text)
    return {word for cell in cells for word in re.findall(r"`(\w+)", cell)}


TORCH = "lr betas eps weight_decay rank rho proj_type proj_method error_feedback"


@pytest.mark.parametrize(
    ("heading", "names"),
    [
        ("From `optax.adamw`", optax.adamw),
        ("From `optax.adafactor`", optax.adafactor),
        ("From `optax.contrib.galore`", optax.contrib.galore),
        ("From `optax.contrib.muon`", optax.contrib.muon),
        ("From the published torch code", f"{TORCH} enable_lowrank".split()),
    ],
)
def test_no_argument_is_left_out(heading, names):
    """Arguments of the installed optax; the torch code's as of its version 0.1."""
    if callable(names):
        names = inspect.signature(names).parameters
    assert set(names) <= in_first_column(sections("migrating.md")[heading])


def test_the_reference_has_everything():
    text = (ROOT / "docs" / "api.md").read_text()
    named = set(re.findall(r"(?m)^::: ldadam_optax\.(\w+)$|^`(\w+)`", text))
    assert set(ldadam_optax.__all__) <= {name for pair in named for name in pair}
    fields = in_first_column(sections("api.md")["State and storage"])
    assert fields == {*ldadam_optax.ScaleByLDAdamState._fields}


def test_messages_of_the_troubleshooting_page_exist():
    """Each is part of a message of the library, or of JAX where the page shows it."""
    files = (ROOT / "ldadam_optax").glob("*.py")
    source = "".join(path.read_text() for path in files)
    source = re.sub(r'"\n\s*f?"', "", source)  # strings over several lines
    rows = re.findall(
        r"(?m)^\| (`.*?) \|", sections("troubleshooting.md")["Errors and warnings"]
    )
    messages = [text for row in rows for text in re.findall(r"`(.*?)`", row)]
    assert len(messages) > 10
    of_jax = {
        "ShardingTypeError",
        "Reverse-mode differentiation does not work for lax.while_loop",
    }
    assert {text for text in messages if text not in source} == of_jax
