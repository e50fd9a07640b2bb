"""A text is the same in whatever encoding it comes, or it is refused with the likely ones."""

import bz2
import codecs
import gzip
import io
import lzma
import os
import random
import sys
from pathlib import Path

import pytest
from conftest import characters, read_file

import data.files
from data import TextConfig, Vocabulary, read_text

CHINESE = "今天天气很好，我们一起去公园散步。\n孩子们在草地上跑，老人坐在长椅上聊天。\n"
TRADITIONAL = "今天天氣很好，我們一起去公園散步。孩子們在草地上跑，老人坐在長椅上聊天。"
JAPANESE = "今日は天気がとても良いので、みんなで公園へ散歩に行きました。子どもたちは走っています。"
KOREAN = "오늘은 날씨가 아주 좋아서 우리는 함께 공원으로 산책을 갔습니다."
FRENCH = "Les élèves étudient à l’école, où l’été dernier un garçon naïf a été reçu très tôt."
RUSSIAN = "Сегодня очень хорошая погода, и мы вместе пошли гулять в парк."

# Twenty scripts, each with what is particular to it, and what is in no script.
TEXTS = {
    "latin": "The cat sleeps on the mat, doesn't it?",
    "latin, precomposed": "Žluťoučký kůň, größer, ñandú, Łódź, İstanbul, ŵyneb",
    "latin, combining": "e\u0301tude, a\u030angstro\u0308m, Vie\u0323\u0302t",
    "latin, ligatures": "ﬁre, ﬂow, ĳs, æon, œuvre, ǆ",
    "phonetic": "ˈkærəktɚ ðə ʃɪp",
    "greek": "Ο ήλιος λάμπει πάνω από τη θάλασσα.",
    "greek, polytonic": "μῆνιν ἄειδε θεά, ᾧ τὸ φῶς ἐστιν",
    "cyrillic": RUSSIAN,
    "cyrillic, ukrainian": "Ґанок і їжак, щастя й зброя",
    "armenian": "Արևը շողում է ծովի վրա։",
    "georgian": "მზე ანათებს ზღვაზე.",
    "hebrew": "הַשֶּׁמֶשׁ זורחת מעל הים.",
    "arabic": "الشَّمْسُ تُشْرِقُ فَوْقَ البَحْرِ، أليس كذلك؟",
    "persian, with joiners": "می\u200cروم به خانه\u200cها",
    "urdu": "سورج سمندر پر چمکتا ہے۔",
    "syriac": "ܫܡܫܐ ܢܗܪ",
    "devanagari": "सूरज समुद्र के ऊपर चमकता है। क्षत्रिय",
    "bengali": "সূর্য সমুদ্রের উপর জ্বলছে।",
    "gurmukhi": "ਸੂਰਜ ਸਮੁੰਦਰ ਉੱਤੇ ਚਮਕਦਾ ਹੈ।",
    "gujarati": "સૂર્ય સમુદ્ર પર ચમકે છે.",
    "tamil": "சூரியன் கடலின் மேல் ஒளிர்கிறது.",
    "telugu": "సూర్యుడు సముద్రంపై ప్రకాశిస్తాడు.",
    "kannada": "ಸೂರ್ಯ ಸಮುದ್ರದ ಮೇಲೆ ಹೊಳೆಯುತ್ತಾನೆ.",
    "malayalam": "സൂര്യൻ കടലിനു മുകളിൽ തിളങ്ങുന്നു.",
    "sinhala": "හිරු මුහුද මත බබළයි. ශ්\u200dරී",
    "thai": "ดวงอาทิตย์ส่องแสงเหนือทะเล",
    "lao": "ຕາເວັນສ່ອງແສງ",
    "tibetan": "ཉི་མ་རྒྱ་མཚོའི་སྟེང་དུ་འཕྲོ།",
    "burmese": "နေသည် ပင်လယ်ပေါ်တွင် ထွန်းလင်းသည်။",
    "khmer": "ព្រះអាទិត្យរះលើសមុទ្រ។",
    "ethiopic": "ፀሐይ በባሕር ላይ ታበራለች።",
    "cherokee": "ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ",
    "mongolian": "ᠨᠠᠷᠠ ᠳᠠᠯᠠᠢ",
    "hangul": KOREAN,
    "hangul, decomposed": "\u1112\u1161\u11ab\u1100\u1173\u11af",
    "kana": "ひらがなとカタカナ、ﾊﾝｶｸ",
    "han": CHINESE,
    "han beyond 65,535": "𠀀𠮷𡃁𪚥",
    "cuneiform": "𒀭𒂗𒆤",
    "gothic": "𐌲𐌿𐍄",
    "emoji with joiners": "👩\u200d👩\u200d👧\u200d👦 👍🏽 🏳️\u200d🌈 🇫🇷 ❤️",
    "mathematics": "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, 𝔸𝟘",
    "directions": "\u202bאבג\u202c abc \u2067דה\u2069",
    "control characters": "a\0b\x01\x1b[0m\x7f\x85\u2028\u2029\ufeffz",
    "not characters": "\ufffe\uffff\ufdd0\U0010ffff\ue000",
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_in_any_script_comes_back(name):
    text = TEXTS[name]
    Path("book.txt").write_bytes(text.encode("utf-8"))
    read = read_text(["book.txt"], TextConfig())
    vocabulary = Vocabulary.of(characters(read))
    assert vocabulary.decode(vocabulary.encode(characters(read)).tolist()) == text


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    "encoding",
    ["utf-8", "utf-8-sig", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "gb18030"],
)
def test_text_is_the_same_in_every_encoding_with_every_line_end(monkeypatch, encoding, line_end):
    text = CHINESE * 20 + "Ada, 李雷!\n"
    marks = {
        "utf-16-le": codecs.BOM_UTF16_LE,
        "utf-16-be": codecs.BOM_UTF16_BE,
        "utf-32-le": codecs.BOM_UTF32_LE,
        "utf-32-be": codecs.BOM_UTF32_BE,
    }
    written = text.replace("\n", line_end).encode(encoding)
    Path("book.txt").write_bytes(marks.get(encoding, b"") + written)
    for block in (2**20, 7):  # in blocks that cut through characters and line ends
        monkeypatch.setattr(data.files, "BLOCK", block)
        read = read_text(["book.txt"], TextConfig())
        assert characters(read) == text
        vocabulary = Vocabulary.of(characters(read))
        assert vocabulary.characters == Vocabulary.of(text).characters
        assert vocabulary.encode(characters(read)).equal(vocabulary.encode(text))


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (TRADITIONAL, "big5"),
        (JAPANESE, "shift_jis"),
        (JAPANESE, "euc_jp"),
        (KOREAN, "euc_kr"),
        (FRENCH, "cp1252"),
        (RUSSIAN, "cp1251"),
        (RUSSIAN, "koi8_r"),
    ],
)
def test_encoding_that_does_not_show_is_refused_with_candidates(text, encoding):
    Path("book.txt").write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match=r"is not in UTF-8 .* it may be in .*--encoding") as raised:
        read_file("book.txt")
    assert f"{encoding} (" in str(raised.value)
    assert characters(read_text(["book.txt"], TextConfig(encoding=encoding))) == text


@pytest.mark.parametrize(
    ("written", "place"),
    [
        (RUSSIAN.rstrip(".").encode()[:-1], "byte 0xd0 at position 109"),
        (RUSSIAN[:20].encode() + b"\xff" + RUSSIAN[20:].encode(), "byte 0xff at position 38"),
        (RUSSIAN.encode() + b"\n\xff\n", "byte 0xff at position 113"),
        (codecs.BOM_UTF8 + b"A caf\xe9.", "byte 0xe9 at position 8"),
    ],
)
def test_damaged_utf8_is_not_taken_for_another_encoding(written, place):
    Path("book.txt").write_bytes(written)
    with pytest.raises(ValueError, match="is in UTF-8, but damaged or cut off") as error:
        read_file("book.txt")
    assert place in str(error.value)
    Path("texts").mkdir()
    Path("texts/good.txt").write_text(RUSSIAN, encoding="utf-8")
    Path("book.txt").rename("texts/book.txt")
    (part,) = read_text(["texts"], TextConfig("cp1251")).parts
    assert part.unknown == ("texts/book.txt",)


def test_last_letter_of_another_encoding_is_no_cut_utf8():
    Path("book.txt").write_bytes("Il est au café".encode("cp1252"))
    with pytest.raises(ValueError, match="is not in UTF-8"):
        read_file("book.txt")


def test_what_comes_before_the_first_foreign_byte_may_be_long():
    preface = "A preface on a line of its own, and then what was found.\r" * 2000
    Path("book.txt").write_bytes((preface + CHINESE).encode("gb18030"))
    assert read_file("book.txt") == (preface + CHINESE).replace("\r", "\n")
    Path("book.txt").write_bytes((preface + FRENCH).encode("cp1252"))
    with pytest.raises(ValueError, match="it may be in cp1252"):
        read_file("book.txt")


def test_folder_that_cannot_be_read_is_left_out_with_a_warning(monkeypatch, capsys):
    def refuse(folder):
        if Path(folder).name == "locked":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    scandir = os.scandir
    Path("books/locked").mkdir(parents=True)
    Path("books/open.txt").write_text("read")
    monkeypatch.setattr(os, "scandir", refuse)
    assert read_file("books") == "read"
    assert "warning: books/locked is left out: Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("place", [*range(100, 180), 150_001, -1])
def test_damaged_chinese_is_known_as_such(place):
    book = bytearray((CHINESE * (200_000 // len(CHINESE))).encode("gb18030"))
    book[place] = 0xFF
    Path("book.txt").write_bytes(book)
    with pytest.raises(ValueError, match=r"not in gb18030, or is damaged.*iconv -c -f gb18030"):
        read_file("book.txt")


def test_position_of_a_wrong_byte_counts_from_the_beginning_of_the_file(monkeypatch):
    monkeypatch.setattr(data.files, "BLOCK", 7)
    Path("book.txt").write_bytes("naïve naïve ".encode() + b"\xff")
    with pytest.raises(ValueError, match="byte 0xff at position 14"):
        read_file("book.txt")
    Path("book.txt").write_bytes("naïve naïve 李".encode()[:-1])
    with pytest.raises(ValueError, match="byte 0xe6 at position 14"):
        read_file("book.txt")
    Path("book.txt").write_bytes(b"a\xff")
    with pytest.raises(
        ValueError, match=r"not in cp1255, or is damaged.*\(byte 0xff at position 1\)"
    ):
        read_text(["book.txt"], TextConfig(encoding="cp1255"))


@pytest.mark.parametrize("encoding", ["utf_16_le", "utf_16_be"])
@pytest.mark.parametrize("name", ["latin", "cyrillic", "greek", "arabic", "devanagari", "thai"])
def test_utf16_without_a_mark_is_not_taken_for_characters_and_zeros(encoding, name):
    text = (TEXTS[name] + "\n") * 5
    Path("book.txt").write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match=f"--encoding {encoding}$"):
        read_file("book.txt")
    assert characters(read_text(["book.txt"], TextConfig(encoding=encoding))) == text


def test_what_is_no_chinese_is_not_taken_for_it():
    draw = random.Random(1)
    pairs = ["".join(map(chr, draw.choices(range(0x4E00, 0x9FA6), k=200))) for _ in range(50)]
    texts = [pair.encode("gb18030") for pair in pairs]
    texts += [draw.randbytes(300) for _ in range(50)]
    republic = "대한민국은 민주공화국이다. 모든 권력은 국민으로부터 나온다.\n" * 9
    for korean in ("제일 좋은 일", "안녕하세요. 오늘은 일요일입니다.", KOREAN, republic):
        texts.append(korean.encode("euc_kr"))
    texts += ["ДАТА ОТВЕТА".encode("cp1251")]
    for text in texts:
        Path("book.txt").write_bytes(text)
        with pytest.raises(ValueError, match="book"):
            read_file("book.txt")


def test_short_chinese_is_refused_with_gb18030_among_the_candidates():
    Path("book.txt").write_bytes("你好，世界！".encode("gb18030"))
    with pytest.raises(ValueError, match="it may be in gb18030 \\('你好，世界！'\\)"):
        read_file("book.txt")


def test_escapes_are_no_encodings_of_texts():
    for encoding in ("unicode_escape", "unicode-escape", "utf_7", "UTF-7", "u7"):
        with pytest.raises(ValueError, match=f"there is no encoding '{encoding}'"):
            TextConfig(encoding=encoding)


@pytest.mark.parametrize(
    ("name", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)]
)
def test_compressed_text_is_read_as_it_is(name, compress):
    Path(f"book.txt.{name}").write_bytes(compress(CHINESE.encode("gb18030")))
    text = read_text([f"book.txt.{name}"], TextConfig())
    assert (text.name, characters(text)) == ("book", CHINESE)


def test_zstd_is_named():
    Path("book.zst").write_bytes(b"\x28\xb5\x2f\xfd\0\0\0\0")
    with pytest.raises(ValueError, match=r"book\.zst is compressed with zstd.*with zstd -d first"):
        read_file("book.zst")


def test_standard_input_and_pipes_are_read(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(CHINESE.encode("gb18030"))))
    text = read_text(["-"], TextConfig())
    assert (text.name, characters(text)) == ("stdin", CHINESE)
    if not hasattr(os, "mkfifo"):
        return
    os.mkfifo("pipe")
    with pytest.raises(ValueError, match="pipe is empty"):
        read_text(["pipe"], TextConfig())
    # What was written stays in the pipe for as long as someone holds it open.
    holder = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)
    Path("pipe").write_text("piped")
    assert read_file("pipe") == "piped"
    os.close(holder)


def test_folder_is_read_without_what_is_no_text_of_its_own():
    Path("texts/node_modules").mkdir(parents=True)
    Path("texts/node_modules/a.txt").write_text("vendored")
    Path("texts/a.txt").write_text("one\n")
    Path("texts/b.md").write_bytes(codecs.BOM_UTF16_LE + "two\n".encode("utf-16-le"))
    Path("texts/c.txt").write_bytes(FRENCH.encode("cp1252"))
    Path("texts/d.gz").write_bytes(gzip.compress(b"\0" * 9))
    Path("texts/e.gz").write_bytes(gzip.compress(b"three")[:-4])
    text = read_text(["texts"], TextConfig())
    assert characters(text) == "one\n\ntwo\n"
    assert text.encodings == ["utf_16", "utf_8"]
    assert (len(text.parts[0].files), text.parts[0].n_binary) == (2, 1)
    assert text.parts[0].unknown == (str(Path("texts/c.txt")), str(Path("texts/e.gz")))
    # An encoding that is asked for is that of the files that do not show theirs.
    text = read_text(["texts"], TextConfig(glob="*.md", val_text="texts"))
    assert (characters(text), text.n_training) == ("two\ntwo\n", 4)
    text = read_text(["texts"], TextConfig(encoding="cp1252", glob="[abc]*"))
    assert characters(text) == f"one\n\ntwo\n\n{FRENCH}\n"
    assert characters(read_text(["texts"], TextConfig(glob="*.md"))) == "two\n"
