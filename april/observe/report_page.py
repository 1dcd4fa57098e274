"""The page around the charts: style, sections, tiles, tables. Everything that comes from a run is escaped here."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

STYLE = """
:root{color-scheme:light dark;--bg:#fbfbfa;--card:#fff;--ink:#1c2024;--dim:#5d6570;--rule:#e3e5e8;--soft:#f2f3f5;
--c1:#1f6fd0;--c2:#d0660a;--c3:#12805c;--c4:#7a48c4;--c5:#c42b4c;--c6:#737b87;--good:#12805c;--bad:#c42b4c;
--v0:#dbe9fb;--v1:#fbe6cf;--v2:#d7f0e4;--v3:#eadff8;--v4:#fadbe2}
@media(prefers-color-scheme:dark){:root{--bg:#14171a;--card:#1b1f24;--ink:#e8eaed;--dim:#a0a8b3;--rule:#30363d;--soft:#23282e;
--c1:#6aabf7;--c2:#f3a256;--c3:#4cc99a;--c4:#b493f2;--c5:#f47f98;--c6:#949daa;--good:#4cc99a;--bad:#f47f98;
--v0:#1d3a5f;--v1:#57391a;--v2:#17472f;--v3:#3d2c5c;--v4:#5a2432}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 24px 80px}
h1{font-size:30px;line-height:1.2;margin:0 0 6px}h2{font-size:21px;margin:0 0 4px}h3{font-size:16px;margin:22px 0 6px}
h1+.lead{margin:0 0 18px}.lead,.caption,.small{color:var(--dim)}.caption{margin:0 0 14px;max-width:86ch}.small{font-size:14px}
section{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:22px 24px;margin-top:22px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(168px,1fr));gap:12px;margin-top:12px}
.tile{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:14px 16px}
.tile b{display:block;font-size:25px;line-height:1.25;font-variant-numeric:tabular-nums}
.tile span{display:block;font-size:14px;color:var(--dim)}.tile.good b{color:var(--good)}.tile.bad b{color:var(--bad)}
.plots{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:20px 26px}
.plots.three{grid-template-columns:repeat(3,minmax(0,1fr))}.plots.one{grid-template-columns:minmax(0,1fr)}
@media(max-width:820px){.plots,.plots.three,.pair{grid-template-columns:minmax(0,1fr)!important}}
figure{margin:0;position:relative;min-width:0}figcaption{font-weight:600;font-size:15px}
figure svg{width:100%;height:auto;display:block;overflow:visible}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:14px;color:var(--dim);min-height:22px}
.legend .key{display:inline-block;width:22px;height:10px;margin-right:6px;vertical-align:middle}
.legend i{display:inline-block;width:14px;height:12px;border-radius:3px;margin-right:6px;vertical-align:-1px}
.grid{stroke:var(--rule);stroke-width:1}.axis{stroke:var(--dim);stroke-width:1}
.tick,.name{fill:var(--dim);font-size:12.5px;font-variant-numeric:tabular-nums}.name{font-size:13px}
.s{fill:none;stroke-linejoin:round;stroke-linecap:round}.faint{opacity:.3}.band{opacity:.16;stroke:none}.soft{opacity:.45}
.s.c1{stroke:var(--c1)}.s.c2{stroke:var(--c2)}.s.c3{stroke:var(--c3)}.s.c4{stroke:var(--c4)}.s.c5{stroke:var(--c5)}
.s.c6{stroke:var(--c6)}
.f.c1,.band.c1{fill:var(--c1)}.f.c2,.band.c2{fill:var(--c2)}.f.c3,.band.c3{fill:var(--c3)}
.f.c4,.band.c4{fill:var(--c4)}.f.c5,.band.c5{fill:var(--c5)}.f.c6,.band.c6{fill:var(--c6)}
i.c1{background:var(--c1)}i.c2{background:var(--c2)}i.c3{background:var(--c3)}i.c4{background:var(--c4)}i.c6{background:var(--c6)}
.wait{fill:url(#hatch)}i.wait{background:repeating-linear-gradient(135deg,var(--c2) 0 2px,transparent 2px 5px);
border:1px solid var(--c2)}
.boundary{stroke:var(--ink);stroke-width:1;stroke-dasharray:3 3;opacity:.55}
.tip{position:absolute;pointer-events:none;background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:6px 10px;
font-size:13px;line-height:1.45;box-shadow:0 4px 14px rgba(0,0,0,.16);white-space:nowrap;display:none;z-index:2}
.missing{color:var(--dim);background:var(--soft);border-radius:8px;padding:10px 14px;margin:6px 0}
table{border-collapse:collapse;width:100%;font-size:15px;font-variant-numeric:tabular-nums}
td{white-space:nowrap}
th,td{text-align:right;padding:6px 10px;border-bottom:1px solid var(--rule)}th:first-child,td:first-child{text-align:left}
th{color:var(--dim);font-weight:600}.scroll{overflow-x:auto}
pre{font:13.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
white-space:pre-wrap;
overflow-wrap:anywhere;margin:0}
details{margin-top:10px}summary{cursor:pointer;font-weight:600}details pre{background:var(--soft);border-radius:8px;
padding:14px;margin-top:8px}
.pair{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:18px}
.prompt{background:var(--soft);border-radius:8px;padding:10px 14px;margin:6px 0 10px}
.answer{border:1px solid var(--rule);border-left:5px solid var(--c6);border-radius:8px;padding:10px 12px;margin-bottom:10px}
.answer.right{border-left-color:var(--good)}.answer.wrong{border-left-color:var(--bad)}
.answer header{font-size:13.5px;color:var(--dim);margin-bottom:6px}.answer pre{max-height:300px;overflow:auto}
.seg{border-radius:3px;padding:1px 0}.seg sup{font-size:10px;color:var(--dim);padding:0 3px;user-select:none}
.v0{background:var(--v0)}.v1{background:var(--v1)}.v2{background:var(--v2)}.v3{background:var(--v3)}.v4{background:var(--v4)}
@media print{section{break-inside:avoid}.answer pre{max-height:none}}
"""

SCRIPT = """
for (const svg of document.querySelectorAll("svg[data-readout]")) {
  const data = JSON.parse(svg.dataset.readout), box = svg.viewBox.baseVal, figure = svg.parentNode;
  const tip = figure.appendChild(Object.assign(document.createElement("div"), {className: "tip"}));
  const rule = svg.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "line"));
  rule.setAttribute("class", "axis"); rule.setAttribute("y1", data.top); rule.setAttribute("y2", data.bottom);
  rule.style.display = "none";
  svg.addEventListener("pointermove", event => {
    const place = svg.getBoundingClientRect(), at = (event.clientX - place.left) / place.width * box.width;
    let best = null;
    for (const row of data.rows) if (!best || Math.abs(row[0] - at) < Math.abs(best[0] - at)) best = row;
    if (!best) return;
    rule.setAttribute("x1", best[0]); rule.setAttribute("x2", best[0]); rule.style.display = "";
    tip.replaceChildren(...best.slice(1).map(text => Object.assign(document.createElement("div"), {textContent: text})));
    const left = best[0] / box.width * place.width, right = best[0] > box.width / 2;
    const top = place.top - figure.getBoundingClientRect().top + 8;
    tip.style.cssText = `display:block;top:${top}px;` +
      (right ? `right:${place.width - left + 10}px` : `left:${left + 10}px`);
  });
  svg.addEventListener("pointerleave", () => { tip.style.display = rule.style.display = "none"; });
}
"""

HATCH = (
    '<svg width="0" height="0" style="position:absolute" aria-hidden="true"><defs><pattern id="hatch" width="5" height="5" '
    'patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><rect width="5" height="5" style="fill:var(--card)"/>'
    '<rect width="2.4" height="5" style="fill:var(--c2)"/></pattern></defs></svg>'
)

POLICY = "default-src 'none';style-src 'unsafe-inline';script-src 'unsafe-inline'"
"""Nothing may be loaded from anywhere."""


def page(title: str, body: str) -> str:
    """A whole HTML document that needs nothing else."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>{HATCH}<main>{body}</main>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def section(title: str, caption: str, *parts: str, missing: str = "") -> str:
    """A card; when it has nothing to show it says what is missing."""
    body = "".join(parts)
    if not body:
        body = f'<p class="missing">Not shown: {escape(missing or "the run has no data for this")}.</p>'
    return f'<section><h2>{escape(title)}</h2><p class="caption">{escape(caption)}</p>{body}</section>'


def plots(*charts: str, columns: int = 2) -> str:
    """Charts side by side; those that are empty are left out."""
    shown = [chart for chart in charts if chart]
    kind = {1: " one", 2: "", 3: " three"}[columns]
    return f'<div class="plots{kind}">{"".join(shown)}</div>' if shown else ""


def note(text: str) -> str:
    """A dim line of plain text."""
    return f'<p class="small">{escape(text)}</p>'


def missing(text: str) -> str:
    """Says what cannot be shown, and why."""
    return f'<p class="missing">{escape(text)}</p>'


def tile(label: str, value: str, detail: str = "", mood: str = "") -> str:
    """One headline number."""
    kind = f"tile {mood}".strip()
    return f'<div class="{kind}"><span>{escape(label)}</span><b>{escape(value)}</b><span>{escape(detail)}</span></div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def folded(title: str, text: str) -> str:
    """Preformatted text behind a click."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
