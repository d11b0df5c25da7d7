"""A JSON array as lines, one for each element, in bounded memory."""

import re
from collections.abc import Iterator

# What may change the state of a scan: in a string, between elements, and inside an element.
IN_STRING = re.compile(rb'["\\]')
BETWEEN_ELEMENTS = re.compile(rb'["\[\]{},]')
INSIDE_ELEMENT = re.compile(rb'["\[\]{}]')
OPENING, CLOSING = b"[{", b"]}"


def array_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the chunks of a file with each element of its array on a line.

    Brackets are counted and nothing is parsed: a faulty element spoils none behind it, and no byte
    is read twice, however long the element.

    Raises:
        EOFError: the array is not closed, or text follows its end.
    """
    scan = _Scan()
    for chunk in chunks:
        yield scan.as_lines(chunk)
        if scan.is_closed and chunk[scan.at :].strip():
            raise EOFError("text follows the end of the array")
    if not scan.is_closed:
        raise EOFError("the array is not closed")


class _Scan:
    """How far an array has been scanned.

    Attributes:
        depth: open brackets; 1 between elements.
        in_string: whether a string is open.
        is_closed: whether the array has ended.
        at: how far the current chunk has been scanned. It lies one byte behind the chunk's end
            where a backslash is its last byte: what that escapes is the next chunk's first byte.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.in_string = False
        self.is_closed = False
        self.at = 0
        self.size = 0  # of the current chunk

    def as_lines(self, chunk: bytes) -> bytes:
        """Scan a chunk, and return it with line ends between elements and nowhere else."""
        self.at = 1 if self.at > self.size else 0
        self.size = len(chunk)
        # a line end is white space, as is its replacement, and as forbidden in strings
        lines = bytearray(chunk.replace(b"\n", b"\r"))
        while not self.is_closed:
            match = self._pattern().search(chunk, self.at)
            if not match:
                break
            self.at = match.end()
            replacement = self._step(match[0])
            if replacement:
                lines[match.start()] = ord(replacement)
        return bytes(lines)

    def _pattern(self) -> re.Pattern[bytes]:
        if self.in_string:
            return IN_STRING
        return BETWEEN_ELEMENTS if self.depth < 2 else INSIDE_ELEMENT

    def _step(self, character: bytes) -> str:
        """Go on behind a character; return what is to stand in its place, "" for the character."""
        if character == b'"':
            self.in_string = not self.in_string
            return ""
        if character == b"\\":
            self.at += 1  # what is escaped ends nothing
            return ""
        if character in OPENING:
            self.depth += 1
            array_begins = self.depth == 1
            return " " if array_begins else ""
        if character in CLOSING:
            self.depth -= 1
            self.is_closed = self.depth == 0
            return "\n" if self.is_closed else ""
        between_elements = self.depth == 1  # a comma
        return "\n" if between_elements else ""
