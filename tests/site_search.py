"""The index of the search on the web pages: a script, since file:// pages load nothing else."""

import json
import re
from collections import Counter

COMMON = 20  # a word of the code that is in more sections than this finds nothing in particular


def search_index(chapters, section_of):
    """Every section of every page: heading, exported names, text, and rare words of its code.

    Args:
        chapters: name of the page -> its Chapter
        section_of: name of the page -> its part of the sidebar
    """
    sections = [section for chapter in chapters.values() for section in chapter.sections]
    count = Counter(word for section in sections for word in section.words)
    pages, entries = [], []
    for name, chapter in chapters.items():
        pages.append([f"{name}.html", chapter.title, section_of[name], chapter.module])
        for section in chapter.sections:
            prose = re.sub(rf"You are here: .* › {re.escape(chapter.title)} ?", "", section.prose)
            rare = [w for w in sorted(section.words) if count[w] <= COMMON and w not in prose]
            names = [found for found, _ in section.names]
            entries.append(
                [len(pages) - 1, section.anchor, section.heading, names, prose, " ".join(rare)]
            )
    index = {"pages": pages, "sections": entries}
    return f"const SEARCH = {json.dumps(index, ensure_ascii=False, separators=(',', ':'))};\n"
