"""The recipe as a left-to-right graph: own layered layout, so that no graph library has to be installed.

Arrows already implied by a longer way are left out (base -> merge, when base -> fine-tune -> merge). Where
several stages read the same set of models, as merges of the same fine-tunes do, their arrows meet in one
point: 4 x 6 arrows become 4 + 6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

from weightsmith.reports import drawing
from weightsmith.reports.folder import Run
from weightsmith.reports.scores import data_of
from weightsmith.reports.words import part_words

NODE_HEIGHT, PASS_HEIGHT = 44.0, 8.0
ROW_GAP, COLUMN_GAP, MARGIN = 14.0, 46.0, 6.0
SWEEPS = 12


@dataclass
class Node:
    """A box of the graph (`title` set), a point where arrows meet, or a point an arrow passes through."""

    layer: int
    title: str = ""
    subtitle: str = ""
    css: str = ""
    tip: str = ""
    width: float = 0.0
    x: float = 0.0  # of the left edge
    y: float = 0.0  # of the centre
    before: list[Node] = field(default_factory=list)
    after: list[Node] = field(default_factory=list)

    @property
    def height(self) -> float:
        """Room in its column."""
        return NODE_HEIGHT if self.title else PASS_HEIGHT


def draw_graph(run: Run) -> Markup:
    """The graph of all stages; models from outside are dashed boxes at the left."""
    names = {stage.name for stage in run.stages}
    outside = dict.fromkeys(model for stage in run.stages for model in stage.reads if model not in names)
    reads: dict[str, list[str]] = {model: [] for model in outside}
    reads |= {stage.name: list(stage.reads) for stage in run.stages}
    nodes = _layers(without_implied(reads))
    for model in outside:
        nodes[model].title, nodes[model].subtitle = _last_part(model), "given model"
        nodes[model].css, nodes[model].tip = "outside", model
    for stage in run.stages:
        node = nodes[stage.name]
        data = data_of(stage)
        several = f"{len(data)} data sets" if data else stage.method
        # Parts of a training by name, their options would not fit; first, as it is the end that gets cut.
        parts = [words.partition(" (")[0] for words in part_words(stage.config).values()]
        made_of = data[0] if len(data) == 1 else several
        detail = ", ".join([*parts, *filter(None, [made_of])])
        node.title = drawing.shorten(stage.name, 24)
        node.subtitle = drawing.shorten(f"{stage.kind} · {detail}" if detail else stage.kind, 30)
        node.css = f"k-{_kind_class(stage.kind)} s-{stage.state}"
        node.tip = f"{stage.name}: {stage.kind}, {stage.state}"
        if stage.state != "done":
            node.subtitle = drawing.shorten(f"{stage.kind} · {_STATE_WORDS[stage.state]}", 30)
    layers = _place(list(nodes.values()))
    return _draw(layers, run.name)


def without_implied(reads: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """`reads` without what a longer way already says; keys come out with sources before their readers."""
    ancestors: dict[str, set[str]] = {}
    kept: dict[str, list[str]] = {}

    def visit(name: str) -> None:
        if name in ancestors:
            return
        # Marked before its sources are visited: a page with a circle still gets a picture.
        ancestors[name] = set()
        sources = [source for source in dict.fromkeys(reads[name]) if source in reads]
        for source in sources:
            visit(source)
        far = set().union(*(ancestors[source] for source in sources))
        ancestors[name] = far | set(sources)
        kept[name] = [source for source in sources if source not in far and source in kept]

    for name in reads:
        visit(name)
    return kept


def _layers(reads: Mapping[str, Sequence[str]]) -> dict[str, Node]:
    """Nodes with their layers and links, meeting and passing points included."""
    readers: dict[frozenset[str], list[str]] = {}
    for name, sources in reads.items():
        readers.setdefault(frozenset(sources), []).append(name)
    nodes: dict[str, Node] = {}
    meetings: dict[frozenset[str], Node] = {}
    for name, sources in reads.items():
        group = frozenset(sources)
        before = [nodes[source] for source in sources]
        if len(group) > 1 and len(readers[group]) > 1:
            if group not in meetings:
                meetings[group] = Node(layer=1 + max(node.layer for node in before))
                for node in before:
                    _link(node, meetings[group])
            before = [meetings[group]]
        nodes[name] = Node(layer=1 + max((node.layer for node in before), default=-1), title=name)
        for node in before:
            _link(node, nodes[name])
    return nodes


def _link(source: Node, target: Node) -> None:
    """Join two nodes through one passing point in each layer between them."""
    for layer in range(source.layer + 1, target.layer):
        step = Node(layer=layer)
        source.after.append(step)
        step.before.append(source)
        source = step
    source.after.append(target)
    target.before.append(source)


def _place(named: Sequence[Node]) -> list[list[Node]]:
    """Order the layers to cross few arrows, then set coordinates."""
    layers = _by_layer(named)
    best, fewest = [list(layer) for layer in layers], _crossings(layers)
    for sweep in range(SWEEPS):
        forward = sweep % 2 == 0
        for layer in layers[1:] if forward else layers[-2::-1]:
            wanted = {
                id(node): _middle(node.before if forward else node.after, layers, rank)
                for rank, node in enumerate(layer)
            }
            layer.sort(key=lambda node: wanted[id(node)])
        crossings = _crossings(layers)
        if crossings < fewest:
            best, fewest = [list(layer) for layer in layers], crossings
    _set_rows(best)
    _set_columns(best)
    return best


def _by_layer(named: Sequence[Node]) -> list[list[Node]]:
    layers: list[list[Node]] = [[] for _ in range(1 + max((node.layer for node in named), default=-1))]
    seen: set[int] = set()
    waiting = list(named)
    while waiting:
        node = waiting.pop(0)
        if id(node) not in seen:
            seen.add(id(node))
            layers[node.layer].append(node)
            waiting += [other for other in node.before + node.after if not other.title]
    return layers


def _middle(neighbours: Sequence[Node], layers: Sequence[Sequence[Node]], alone: float) -> float:
    """Mean rank of the neighbours in their layers; `alone` where there are none."""
    if not neighbours:
        return alone
    ranks = [_rank(layers[node.layer], node) for node in neighbours]
    return sum(ranks) / len(ranks)


def _rank(layer: Sequence[Node], node: Node) -> int:
    return next(rank for rank, other in enumerate(layer) if other is node)


def _crossings(layers: Sequence[Sequence[Node]]) -> int:
    total = 0
    for layer in layers[:-1]:
        links = [
            (rank, _rank(layers[node.layer + 1], other))
            for rank, node in enumerate(layer)
            for other in node.after
        ]
        total += sum(a < c and b > d for a, b in links for c, d in links)
    return total


def _set_rows(layers: Sequence[Sequence[Node]]) -> None:
    """Pull nodes towards the middle of their neighbours, in order and without overlap."""
    for layer in layers:
        _settle(layer, [0.0] * len(layer))
    for sweep in range(SWEEPS):
        for layer in layers if sweep % 2 == 0 else layers[::-1]:
            wanted = []
            for node in layer:
                around = [other.y for other in node.before + node.after]
                wanted.append(sum(around) / len(around) if around else node.y)
            _settle(layer, wanted)
    top = min((node.y - node.height / 2 for layer in layers for node in layer), default=0.0)
    for layer in layers:
        for node in layer:
            node.y += MARGIN - top


def _settle(layer: Sequence[Node], wanted: Sequence[float]) -> None:
    """The rows nearest to `wanted` (least squares) that keep order and gaps: pool adjacent violators."""
    offset, offsets = 0.0, []
    for node, above in zip(layer, [None, *layer], strict=False):
        offset += (above.height + node.height) / 2 + ROW_GAP if above else 0.0
        offsets.append(offset)
    pools: list[list[float]] = []
    for target, shift in zip(wanted, offsets, strict=True):
        pools.append([target - shift, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            mean, count = pools.pop()
            pools[-1][0] = (pools[-1][0] * pools[-1][1] + mean * count) / (pools[-1][1] + count)
            pools[-1][1] += count
    levels = [mean for mean, count in pools for _ in range(int(count))]
    for node, level, shift in zip(layer, levels, offsets, strict=True):
        node.y = level + shift


def _set_columns(layers: Sequence[Sequence[Node]]) -> None:
    """Boxes of one layer are equally wide, as its widest text needs."""
    x = MARGIN
    for layer in layers:
        width = max(_text_room(node) for node in layer)
        for node in layer:
            node.x, node.width = x, width if node.title or len(node.before) < 2 else 0.0
        x += width + (COLUMN_GAP if width else 0.75 * COLUMN_GAP)


def _text_room(node: Node) -> float:
    if not node.title:
        return 0.0
    return max(84.0, drawing.text_width(node.title, 13.4) + 26, drawing.text_width(node.subtitle, 11) + 26)


def _draw(layers: Sequence[Sequence[Node]], name: str) -> Markup:
    nodes = [node for layer in layers for node in layer]
    arrows, boxes = [], []
    for node in nodes:
        arrows += [_arrow(node, other) for other in node.after]
        if node.title:
            boxes.append(_box(node))
        elif len(node.before) > 1:
            boxes.append(drawing.dot(node.x, node.y, 3.5, "meet"))
    width = max((node.x + node.width for node in nodes), default=0) + MARGIN
    height = max((node.y + node.height / 2 for node in nodes), default=0) + MARGIN
    head = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7.5" refY="4" markerWidth="8" markerHeight="8" '
        'orient="auto"><path d="M0 .8 8 4 0 7.2z" class="head"/></marker></defs>'
    )
    titles = [node.title for node in nodes if node.title]
    detail = "Stages from left to right: " + ", ".join(titles)
    return drawing.svg(
        width, height, f"Graph of the recipe {name}", [head, *arrows, *boxes], css="graph", detail=detail
    )


def _arrow(node: Node, other: Node) -> str:
    """A curve from the right side of `node` to the left side of `other`; straight across a passing point."""
    x, y, to_x, to_y = node.x + node.width, node.y, other.x, other.y
    start = f"M{drawing.at(x if node.title else node.x)} {drawing.at(y)}H{drawing.at(x)}"
    bend = (to_x - x) / 2
    curve = (
        f"C{drawing.at(x + bend)} {drawing.at(y)} {drawing.at(to_x - bend)} {drawing.at(to_y)} "
        f"{drawing.at(to_x)} {drawing.at(to_y)}"
    )
    marker = ' marker-end="url(#head)"' if other.title else ""
    return f'<path d="{start}{curve}" class="arrow"{marker}/>'


def _box(node: Node) -> str:
    top = node.y - NODE_HEIGHT / 2
    return (
        f'<g class="node {escape(node.css)}"><title>{escape(node.tip)}</title>'
        + drawing.box(node.x, top, node.width, NODE_HEIGHT, "frame", round=6)
        + drawing.box(node.x, top + 8, 4, NODE_HEIGHT - 16, "mark", round=2)
        + drawing.text(node.x + 14, node.y - 3, node.title, "name")
        + drawing.text(node.x + 14, node.y + 13, node.subtitle, "note")
        + "</g>"
    )


_STATE_WORDS = {"failed": "failed", "stopped": "not finished", "waiting": "not started"}


def _kind_class(kind: str) -> str:
    return kind if kind in ("train", "finetune", "merge", "average", "evaluate") else "other"


def _last_part(model: str) -> str:
    return drawing.shorten(model.rstrip("/").rpartition("/")[2] or model, 24)
