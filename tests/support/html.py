"""What an HTML page shows."""

from collections import Counter
from html.parser import HTMLParser

__all__ = ["Page"]

OPEN = {"meta", "img", "wbr", "rect", "line", "circle", "polyline"}  # elements that may have no end


class Page(HTMLParser):
    """The titles of a page's sections, the classes of its elements, its images, and what it needs from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.titles: list[str] = []
        self.classes: Counter[str] = Counter()
        self.images = 0
        self.elsewhere: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, f"no end of {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        if tag in OPEN:
            self.open.pop()
        of = dict(attrs)
        self.classes[" ".join((of.get("class") or "").split())] += 1
        self.images += tag == "img"
        self.elsewhere += [v or "" for k, v in attrs if k in ("src", "href") and not (v or "").startswith("data:")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in OPEN:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.titles.append(data)
