"""Pages read back, and what is true of all of them."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

VOID = {"meta", "br"}


class Page(HTMLParser):
    """A page read back: every tag is closed, and all text is at hand."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.text, self.open, self.tags, self.pieces = text, [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.pieces.append(data.strip())

    @property
    def words(self):
        """All text on it."""
        return " ".join(filter(None, self.pieces))

    def tiles(self):
        """The figures at the top, by name."""
        pairs = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", self.text)
        return dict(pairs)

    def svgs(self):
        """Every chart, as XML."""
        return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", self.text, flags=re.DOTALL)]  # noqa: S314


def check(page):
    """Check what is true of every page: it loads nothing, runs nothing, and its charts can be read aloud."""
    assert {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "form"} == set()
    loaded = [value for _, attrs in page.tags for name, value in attrs.items() if name in {"src", "href"}]
    assert loaded == []
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert "url(" not in page.text
    assert "default-src 'none'" in page.text
    for svg in page.svgs():
        names = [child.tag.rpartition("}")[2] for child in list(svg)[:2]]
        assert names == ["title", "desc"]
        assert all(child.text for child in list(svg)[:2])
        assert svg.get("role") == "img"
        for rect in svg.iter("{http://www.w3.org/2000/svg}rect"):
            assert float(rect.get("height")) >= 0
            assert float(rect.get("width")) > 0
    assert "nan" not in re.sub(r"[a-z]nan|nan[a-z]", "", page.text)
    return page
