"""Compression of tokenizers: bytes of text a token, on samples of several kinds of text, beside well-known ones."""

from __future__ import annotations

from collections.abc import Sequence

from llmkit.tokenizer import Tokenizer

#: Vocabularies that others are compared with.
REFERENCES = ("gpt2", "cl100k_base")
_SAMPLE_CHARACTERS = 1 << 20

ENGLISH = """\
The harbour was quiet when the first boats came back. An old man sat on the wall with a cup of tea and counted them, as
he had done every morning since his own boat was sold. "Eleven," he said to nobody. "That's one too few." He waited, and
the light grew, and a gull walked up and down beside him as though it were waiting too. Shortly after seven o'clock the
twelfth boat rounded the point, low in the water, with more fish than anyone had caught that year.

Language models read text in pieces. A tokenizer decides what the pieces are: frequent words become one token, rare
ones several, and the number of tokens sets how much text fits into the context, and how long training on it takes. For
example, in 2019 a typical vocabulary held about 50,000 entries; five years later 128,000 or 200,000 were common.
"""
CODE = '''\
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A half-open range of integers [start, stop)."""

    start: int
    stop: int

    def overlaps(self, other: "Interval") -> bool:
        return self.start < other.stop and other.start < self.stop


def merge(intervals: list[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for interval in sorted(intervals, key=lambda i: (i.start, i.stop)):
        if merged and interval.start <= merged[-1].stop:
            merged[-1] = Interval(merged[-1].start, max(merged[-1].stop, interval.stop))
        else:
            merged.append(interval)
    return merged


if __name__ == "__main__":
    print(merge([Interval(1, 4), Interval(3, 7), Interval(10, 12)]))  # two of them remain
'''
C_CODE = """\
#include <stddef.h>

/* Sum of products of two vectors of n floats, kept in double so that long vectors lose nothing. */
double dot(const float *x, const float *y, size_t n) {
    double sum = 0.0;
    for (size_t i = 0; i < n; i++) {
        sum += (double)x[i] * y[i];
    }
    return sum;
}
"""
NUMBERS = """\
3 + 4 = 7, 12 * 12 = 144, 2^10 = 1024, 1/3 = 0.333333, pi = 3.14159265358979, 9999 - 8765 = 1234
date,temperature,rain
2024-01-01,4.5,0.0
2024-01-02,6.25,12.75
2024-01-03,-1.0,3.125
"""
GERMAN = """\
Am Morgen lag dichter Nebel über den Wiesen, und die Kinder mussten vorsichtig über die glatte Holzbrücke gehen. „Beeilt
euch nicht“, rief die Lehrerin, „wir haben genügend Zeit.“ Später schien die Sonne, und alle aßen draußen ihr Frühstück.
"""
FRENCH = """\
Le marché ouvrait à six heures, bien avant que la ville ne s'éveille. Une vieille dame y achetait chaque jour des
pommes, du fromage et un bouquet de fleurs séchées; elle disait que l'hiver n'était qu'une question de patience.
"""
RUSSIAN = """\
Вечером поезд остановился на маленькой станции, где никто не выходил. Только проводник спустился на платформу, посмотрел
на звёзды и сказал, что завтра будет мороз.
"""
CHINESE = """\
清晨的图书馆里只有三个人。一个学生在写论文,一位老人在读报纸,还有一个孩子坐在窗边看书。外面下着小雨,大家都很安静。
"""
JAPANESE = """\
駅前の小さな喫茶店では、毎朝同じ音楽が流れている。店主は窓を開け、コーヒーを淹れながら、通りを歩く人たちを眺めていた。
"""
ARABIC = """\
كان البيت القديم يقع على تلة صغيرة تطل على البحر، وكانت الجدة تجلس كل مساء أمام الباب وتحكي للأطفال قصصا طويلة.
"""
HINDI = """\
गाँव के स्कूल में एक बड़ा पेड़ था, जिसकी छाया में बच्चे दोपहर को बैठकर कहानियाँ पढ़ते थे। शाम को सब लोग घर लौट जाते थे।
"""

#: Kind of text -> sample, written for this purpose.
SAMPLES = {
    "English": ENGLISH,
    "Python": CODE,
    "C": C_CODE,
    "numbers": NUMBERS,
    "German": GERMAN,
    "French": FRENCH,
    "Russian": RUSSIAN,
    "Chinese": CHINESE,
    "Japanese": JAPANESE,
    "Arabic": ARABIC,
    "Hindi": HINDI,
}


def sample_texts(sources: Sequence[str], text_field: str | None = None) -> dict[str, str]:
    """The first megabyte of each source (see `llmkit.data.readers.open_source`); with none, SAMPLES.

    Raises ValueError where a source has no text.
    """
    if not sources:
        return dict(SAMPLES)
    from llmkit.data.readers import open_source

    texts = {}
    for spec in sources:
        pieces: list[str] = []
        left = _SAMPLE_CHARACTERS
        for document in open_source(spec, text_field=text_field).documents():
            pieces.append(document.text[:left])
            left -= len(pieces[-1])
            if left <= 0:
                break
        texts[spec] = "\n".join(pieces)
        if not texts[spec]:
            raise ValueError(f"there is no text in {spec}")
    return texts


def load_references(*, but: str = "") -> tuple[dict[str, Tokenizer], dict[str, str]]:
    """(name -> tokenizer, name -> why it cannot be had) of REFERENCES, without the one of fingerprint `but`."""
    from llmkit.plugins import get_plugins

    found: dict[str, Tokenizer] = {}
    missing: dict[str, str] = {}
    for name in REFERENCES:
        try:
            reference = get_plugins().tokenizer(name).load()
        except ValueError as error:
            missing[name] = str(error)
            continue
        if reference.fingerprint != but:
            found[name] = reference
    return found, missing


def compare(tokenizers: dict[str, Tokenizer], texts: dict[str, str]) -> dict[str, dict[str, float]]:
    """Text -> tokenizer -> bytes per token; the row `all` is over all texts together."""
    counts = {text: {name: len(t.encode(texts[text])) for name, t in tokenizers.items()} for text in texts}
    sizes = {text: len(content.encode()) for text, content in texts.items()}
    result = {text: {name: sizes[text] / count for name, count in counts[text].items()} for text in texts}
    if len(texts) > 1:
        total = sum(sizes.values())
        result["all"] = {name: total / sum(counts[text][name] for text in texts) for name in tokenizers}
    return result
