"""From bytes to characters: which encoding a text is in, and how it is read block by block."""

import codecs
import contextlib
import io
import itertools
import re
from collections.abc import Iterable, Iterator

# A byte order mark says it all. That of UTF-32 begins like that of UTF-16, so it comes first.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf_8_sig",
    codecs.BOM_UTF32_LE: "utf_32",
    codecs.BOM_UTF32_BE: "utf_32",
    codecs.BOM_UTF16_LE: "utf_16",
    codecs.BOM_UTF16_BE: "utf_16",
}
# What people point at that is no plain text, by its first bytes.
OTHER_FORMATS = {
    b"PK\x03\x04": "a zip file, as .docx, .odt and .epub are",
    b"%PDF-": "a PDF document",
    b"{\\rtf": "an RTF document",
    b"\xd0\xcf\x11\xe0": "a document of an older Microsoft Office",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"\x7fELF": "a program",
}
# UTF-8 is read whole to know that it is, even if a mark says so: it is often damaged somewhere.
UTF8 = ("utf_8", "utf_8_sig")
# How much is looked at to guess an encoding.
PROBE = 2**16

# The 200 most frequent characters of modern Chinese, after "Modern Chinese Character Frequency
# List" (Jun Da, 2004).
COMMON_HAN = (
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里"
    "用道行所然家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实"
    "日军者意无力它与长把机十民第公此已工使情明性知全三又关点正业外将两高间由问很最重并物手应战向头文体政"
    "美相见被利什二等产或新己制身果加西斯月话合回特代内信表化老给世位次度门任常先海通教儿原东声提立及比员"
)
# In Chinese from 1000 to today, 13 to 60 % of the characters beyond ASCII are among them; in
# Japanese, Thai or French that was taken for GB18030, less than 5 %, in Korean up to 10 %.
COMMON_SHARE = 0.08

# What many characters beyond ASCII are in a text that is in an encoding.
TYPICAL = {
    "big5": "[一-鿿，-？、-」]",
    "shift_jis": "[ぁ-ヿ]",
    "euc_jp": "[ぁ-ヿ]",
    "euc_kr": "[가-힣]",
    "cp1252": "[ß-öø-ÿ’“”«»]",
    "cp1250": "[áâäçéëíîóôöúüýăąćčďęěĺľłńňőŕřśşšťţůűźżž]",
    "cp1251": "[а-яё]",
    "koi8_r": "[а-яё]",
    "cp1253": "[ά-ώ]",
    "cp1255": "[א-ת]",
    "cp1256": "[ء-ي]",
    "cp874": "[ก-๛]",
}
MANY = 0.3
# With fewer characters beyond ASCII than this, a guess would often be wrong.
FEWEST_TO_GUESS = 20
# These write characters in ASCII, and half a character, which no other encoding has.
ESCAPES = ("unicode-escape", "raw-unicode-escape", "utf-7", "idna", "punycode")


class DamagedError(ValueError):
    """A text is in UTF-8 but for some bytes; the message is a sentence for people."""


def detect_encoding(blocks: Iterable[bytes], name: str) -> str:
    """Return the encoding of a text that comes in blocks of bytes.

    That is what its byte order mark says, or UTF-8, or GB18030 if it looks like Chinese: as
    GB18030, much can be read that is none. Anything else is a ValueError with the candidates,
    and so is what is known to be no text; DamagedError if it is UTF-8 but for some bytes.
    """
    decoder, n_read, blocks = codecs.getincrementaldecoder("utf_8")(), 0, iter(blocks)
    beyond_ascii = False
    for block in itertools.chain(blocks, [b""]):  # an empty block is the end
        if n_read == 0:
            marks = (mark for mark in BYTE_ORDER_MARKS if block.startswith(mark))
            encoding = BYTE_ORDER_MARKS.get(next(marks, b""), "utf_8")
            if encoding not in UTF8:
                return encoding
            for beginning, kind in OTHER_FORMATS.items():
                if block.startswith(beginning):
                    raise ValueError(
                        f"{name} is {kind}, not plain text; name a file that was saved as .txt"
                    )
            _refuse_utf16(block, name)
        n_read += len(block)
        try:
            beyond_ascii |= not decoder.decode(block, final=not block).isascii()
        except UnicodeDecodeError as error:
            place = _place(error, n_read)
            around = error.object[max(0, error.start - PROBE // 2) :]
            while len(around) < 2 * PROBE and (more := next(blocks, b"")):
                around += more
            cut_off = beyond_ascii and not block
            if encoding == "utf_8_sig" or cut_off or _beyond_ascii(around[:PROBE], "utf_8"):
                raise DamagedError(
                    f"{name} is in UTF-8, but damaged or cut off ({place}); mend it, or leave such "
                    "bytes out with iconv -c -f utf-8 -t utf-8; if it is in another encoding, say "
                    "--encoding"
                ) from None
            # What comes before is ASCII or luck; a line is a good place to begin.
            line = around.rfind(b"\n", 0, min(error.start, PROBE // 2)) + 1
            return _guess(around[line:][:PROBE], f"{name} is not in UTF-8 ({place})")
    return encoding


def decode(blocks: Iterable[bytes], encoding: str, name: str, line_ends: set[str]) -> Iterator[str]:
    r"""Yield a text in blocks; a byte order mark is no character, and every line ends in \n.

    How lines ended before is added to `line_ends`.
    """
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(), translate=True)
    n_read = n_characters = 0
    try:
        for block in itertools.chain(blocks, [b""]):
            n_read += len(block)
            text = decoder.decode(block, final=not block)
            if n_characters == 0:
                text = text.removeprefix("\ufeff")
            n_characters += len(text)
            yield text
        found = decoder.newlines or ()
        line_ends.update([found] if isinstance(found, str) else found)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not in {encoding}, or is damaged or cut off ({_place(error, n_read)}); say "
            "another --encoding, or leave such bytes out with "
            f"iconv -c -f {encoding.replace('_', '-')} -t utf-8"
        ) from None
    except UnicodeError as error:
        raise ValueError(f"{name} is not in {encoding}: {error}") from None


def check_encoding(encoding: str) -> None:
    """Raise ValueError if Python knows no such encoding of text."""
    with contextlib.suppress(LookupError, ValueError):
        known = codecs.lookup(encoding)
        if known._is_text_encoding and known.name not in ESCAPES:
            return
    usual = ["auto", "utf_8", "utf_16", "utf_32", "gb18030", *TYPICAL]
    raise ValueError(f"there is no encoding {encoding!r}; among those there are {', '.join(usual)}")


def _place(error: UnicodeDecodeError, n_read: int) -> str:
    """Name the byte that could not be decoded by its place in the file."""
    # The decoder keeps the beginning of a character from one block to the next.
    place = n_read - len(error.object) + error.start
    return f"byte {error.object[error.start]:#04x} at position {place:,}"


def _guess(probe: bytes, complaint: str) -> str:
    """Return GB18030 if bytes look like Chinese in it, or complain and name what they may be."""
    shares = {name: _share_beyond_ascii(probe, name, typical) for name, typical in TYPICAL.items()}
    likely = sorted((name for name in shares if shares[name] >= MANY), key=lambda n: -shares[n])
    if _share_beyond_ascii(probe, "gb18030", f"[{COMMON_HAN}]") >= COMMON_SHARE:
        # Taken for Korean, Chinese is half Hangul and half Han, and Korean all Hangul.
        if len(_beyond_ascii(probe, "gb18030")) >= FEWEST_TO_GUESS and shares["euc_kr"] < 0.9:
            return "gb18030"
        likely.insert(1 if shares["euc_kr"] >= 0.9 else 0, "gb18030")
    # Whoever knows the text sees at once which of them is right.
    shown = " or ".join(f"{name} ({_preview(probe, name)!r})" for name in likely[:4])
    hint = f"it may be in {shown}" if likely else "if it is a text"
    raise ValueError(f"{complaint}; {hint}: say which encoding with --encoding")


def _preview(probe: bytes, encoding: str) -> str:
    """Return a few characters from the first one beyond ASCII on."""
    text = codecs.getincrementaldecoder(encoding)("replace").decode(probe)
    return re.search("[^\0-\x7f].{0,11}", text)[0]


def _refuse_utf16(block: bytes, name: str) -> None:
    """Raise ValueError for the beginning of a file whose zero bytes show that it is no UTF-8.

    In UTF-16, at least spaces and line ends have one, on one side of the pair.
    """
    sides = block[0::2].count(0), block[1::2].count(0)
    one_sided = min(sides) == 0 and sum(sides) >= 4 and 100 * sum(sides) > len(block)
    if one_sided or 5 * sum(sides) > len(block):
        likely = "utf_16_be" if sides[0] > sides[1] else "utf_16_le"
        raise ValueError(
            f"{name} is binary, or in UTF-16 without a byte order mark; if so, say "
            f"--encoding {likely}"
        )


def _beyond_ascii(probe: bytes, encoding: str) -> str:
    """Return the characters beyond ASCII, none if ten or fewer can be decoded for each that cannot.

    So a little damage does not hide which encoding it is. Characters for private use are in no
    text, so they count among what cannot be decoded.
    """
    text = codecs.getincrementaldecoder(encoding)("replace").decode(probe)
    beyond = re.sub("[\0-\x7f]", "", text)
    n_wrong = len(re.findall("[\ufffd\ue000-\uf8ff]", beyond))
    return beyond if len(beyond) > 11 * n_wrong else ""


def _share_beyond_ascii(probe: bytes, encoding: str, wanted: str) -> float:
    """Return the share of characters beyond ASCII that match a pattern, 0 if few can be decoded."""
    beyond = _beyond_ascii(probe, encoding)
    return len(re.findall(wanted, beyond)) / len(beyond) if beyond else 0.0
