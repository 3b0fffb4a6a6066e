"""Runs the Python blocks of a Markdown file as tests.

The ``python`` and ``pycon`` blocks of one file run in order, in one namespace, as a reader would
paste them; each is one test, named ``file:line``. They run in a temporary directory, so what they
write is gone afterwards. Blocks of other languages are text.

A block isn't run if the line above it says why not: ``<!-- skip: needs two GPUs -->``, or
``% skip: needs two GPUs`` where the file is a MyST page.
"""

import contextlib
import doctest
import re
import sys
import tempfile
import types
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from markdown_it import MarkdownIt

SKIP = re.compile(r"(?:<!--|%)\s*skip\b:?\s*(?P<reason>.*?)\s*(?:-->)?")
DOCTEST_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    """One fenced block of a Markdown file."""

    language: str
    source: str
    line: int  # of the opening fence, counted from 1
    skip: str | None  # why it isn't run; None if it is, "" if no reason was given


def find_blocks(text: str, first_line: int = 1) -> Iterator[Block]:
    lines = text.splitlines()
    for token in MarkdownIt().parse(text):
        if token.type != "fence":
            continue
        above = next((line for line in reversed(lines[: token.map[0]]) if line.strip()), "")
        skip = SKIP.fullmatch(above.strip())
        line = first_line + token.map[0]
        language = (token.info.split() or [""])[0]
        if language.startswith("{"):  # a MyST directive: its body is Markdown again
            yield from find_blocks(token.content, line + 1)
        else:
            yield Block(language, token.content, line, skip and skip["reason"])


class MarkdownFile(pytest.File):
    """A Markdown file: owns the namespace its blocks share."""

    def collect(self) -> Iterator[pytest.Item]:
        self.blocks = [
            block
            for block in find_blocks(self.path.read_text(encoding="utf-8"))
            if block.language in ("python", "pycon")
        ]
        for index, block in enumerate(self.blocks):
            name = f"{self.path.name}:{block.line}"
            yield MarkdownBlock.from_parent(self, name=name, index=index)

    def setup(self) -> None:
        # A real module, so that classes defined in a block can be pickled and be dataclasses.
        self.module = types.ModuleType(re.sub(r"\W", "_", self.path.name))
        sys.modules[self.module.__name__] = self.module
        self.directory = tempfile.TemporaryDirectory()
        self.num_run = 0
        self.broken: Block | None = None
        torch.manual_seed(0)

    def teardown(self) -> None:
        self.directory.cleanup()
        del sys.modules[self.module.__name__]

    def run_through(self, index: int) -> None:
        """Run the blocks up to this one that haven't run: all of them if one test is selected."""
        with contextlib.chdir(self.directory.name):
            while self.num_run <= index:
                if self.broken:
                    pytest.skip(f"the block in line {self.broken.line} failed")
                block = self.blocks[self.num_run]
                self.num_run += 1
                if block.skip is None:
                    self.broken = block
                    self.run(block)
                    self.broken = None

    def run(self, block: Block) -> None:
        namespace = self.module.__dict__
        if block.language == "python":
            # The empty lines make line numbers in tracebacks those of the file.
            code = compile("\n" * block.line + block.source, str(self.path), "exec")
            exec(code, namespace)
            return
        test = doctest.DocTestParser().get_doctest(
            block.source, {}, self.path.name, str(self.path), block.line
        )
        test.globs = namespace  # the parser would work on a copy
        report: list[str] = []
        runner = doctest.DocTestRunner(verbose=False, optionflags=DOCTEST_FLAGS)
        if runner.run(test, out=report.append, clear_globs=False).failed:
            pytest.fail("".join(report), pytrace=False)


class MarkdownBlock(pytest.Item):
    """One block of a Markdown file."""

    parent: MarkdownFile

    def __init__(self, *, index: int, **kwargs) -> None:
        super().__init__(**kwargs)
        self.index = index

    def runtest(self) -> None:
        skip = self.parent.blocks[self.index].skip
        if skip == "":
            pytest.fail("a skipped block needs a reason: <!-- skip: reason -->", pytrace=False)
        if skip is not None:
            pytest.skip(skip)
        self.parent.run_through(self.index)

    def repr_failure(self, excinfo, style=None):
        # Begin where the block does, not at pytest's calls; "long" would print the page up to it.
        excinfo.traceback = excinfo.traceback.cut(path=self.path)
        return super().repr_failure(excinfo, style="short")

    def reportinfo(self):
        return self.path, self.parent.blocks[self.index].line, self.name
