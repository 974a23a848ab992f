"""The run report's page: its style, its one script and the document around its sections.

Nothing is fetched: the content security policy forbids it, and the fonts are the reader's own.
Colours are Okabe and Ito's, told apart with any colour vision, darkened on white and lightened on
black until text in them has a contrast of 4.5. All switching is CSS; the script shows the values
under the pointer and opens the folded parts for the printer.
"""

import html

STYLE = """
:root { color-scheme: light dark;
  --paper: #ffffff; --ink: #1b1f24; --soft: #59626d; --line: #e3e6ea; --wash: #f5f6f8;
  --s0: #0068a8; --s1: #b84a00; --s2: #00735a; --s3: #8c4a78; --mark: #8a929c; --prompt: #dcebf7; }
@media screen and (prefers-color-scheme: dark) { :root {
  --paper: #131518; --ink: #e4e7eb; --soft: #99a2ad; --line: #2b3036; --wash: #1b1e22;
  --s0: #5fb3ea; --s1: #f09a55; --s2: #4fc3a1; --s3: #d79bc2; --mark: #6d7681; --prompt: #1d3a50; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.55 system-ui,
  -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%; }
main { max-width: 1040px; margin: 0 auto; padding: 44px 28px 56px; }
h1 { font-size: 29px; line-height: 1.2; font-weight: 650; letter-spacing: -.015em; margin: 0; }
h2 { font-size: 18px; font-weight: 650; letter-spacing: -.005em; margin: 0 0 14px; }
h3 { font-size: 14px; font-weight: 600; margin: 0; }
p { margin: 0; max-width: 68ch; }
section { margin-top: 46px; }
.soft, .note, .lead { color: var(--soft); }
.lead { margin-top: 6px; }
.note { font-size: 12px; margin-top: 8px; max-width: none; }
code, pre, .mono { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono",
  monospace; font-size: 13px; }

.tiles { display: grid; max-width: calc(var(--columns) * 250px); grid-template-columns: repeat(var(--columns), 1fr);
  margin: 28px 0 0; border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }
.tiles div { padding: 14px 16px 12px; display: flex; flex-direction: column-reverse;
  justify-content: flex-end; box-shadow: 1px 0 0 var(--line), 0 1px 0 var(--line),
  1px 1px 0 var(--line); }
.tiles dt { font-size: 12.5px; color: var(--soft); line-height: 1.35; }
.tiles dd { margin: 0; font-size: 23px; line-height: 1.3; font-weight: 600;
  letter-spacing: -.01em; overflow-wrap: anywhere; }

.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr));
  gap: 34px 36px; margin-top: 36px; }
figure { margin: 0; min-width: 0; break-inside: avoid; }
figcaption { display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 14px;
  min-height: 24px; margin-bottom: 10px; }
.chart { --height: 150px; }
.chart.wide { --height: 300px; }
.frame { position: relative; height: var(--height); margin-left: 44px; }
.view { position: absolute; inset: 0; }
.view svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.view.log, .chart:has(.use-log:checked) .view.linear { display: none; }
.chart:has(.use-log:checked) .view.log { display: block; }
.y-axis span, .x-axis span { position: absolute; font-size: 11.5px; line-height: 1;
  color: var(--soft); white-space: nowrap; }
.y-axis span { right: 100%; margin-right: 8px; transform: translateY(-50%); }
.x-axis { position: relative; height: 20px; margin-left: 44px; }
.x-axis span { top: 8px; transform: translateX(-50%); }
svg path { fill: none; stroke-width: 1.5; stroke-linejoin: round; stroke-linecap: round;
  vector-effect: non-scaling-stroke; }
svg .grid { stroke: var(--line); stroke-width: 1; stroke-linecap: butt; }
svg .mark { stroke: var(--mark); stroke-width: 1; stroke-dasharray: 3 4; }
.s0 { --own: var(--s0); } .s1 { --own: var(--s1); } .s2 { --own: var(--s2); }
.s3 { --own: var(--s3); }
svg .line, svg .raw, svg .smooth, svg .dots { stroke: var(--own); }
svg .dots { stroke-width: 5.5; }
svg .raw { stroke-width: 1; }
svg .smooth { display: none; stroke-width: 1.75; }
section:has(.use-smooth:checked) .smooth { display: inline; }
section:has(.use-smooth:checked) .raw { opacity: .3; }
.legend { --dot: 9px; display: flex; flex-wrap: wrap; gap: 0 14px; font-size: 13px; color: var(--soft); }
.key::before { content: ""; display: inline-block; width: 14px; height: 2.5px; margin-right: 6px;
  vertical-align: middle; border-radius: 2px; background: var(--own); }
.legend b, .tip b { color: var(--ink); font-weight: 600; }
.heading { display: flex; align-items: baseline; }
.switch { margin-left: auto; display: flex; align-items: center; gap: 5px; font-size: 12.5px;
  color: var(--soft); cursor: pointer; }
.switch input { margin: 0; width: 13px; height: 13px; accent-color: var(--s0); }
.hover { position: absolute; inset: 0; cursor: crosshair; touch-action: pan-y; }
.rule, .tip { position: absolute; visibility: hidden; pointer-events: none; }
.rule { top: 0; bottom: 0; width: 1px; background: var(--soft); }
.tip { top: 6px; padding: 6px 10px; border: 1px solid var(--line); border-radius: 6px; z-index: 1;
  background: var(--paper); box-shadow: 0 2px 10px #0002; font-size: 12.5px; white-space: nowrap; }
.hover.on .rule, .hover.on .tip { visibility: visible; }

.compare { margin-top: 18px; }
.row, .compare .axis { display: grid; grid-template-columns: var(--names, 24%) 1fr; gap: 14px;
  align-items: center; }
.row { height: var(--row, 23px); break-inside: avoid; }
.row:hover { background: var(--wash); }
.row .name { font-size: 12.5px; text-align: right; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.track { position: relative; height: 100%; background: repeating-linear-gradient(to right,
  var(--line) 0 1px, transparent 1px var(--step)); border-right: 1px solid var(--line); }
.track i, .key.model::before, .key.gzip::before, .key.xz::before { width: var(--dot, 9px);
  height: var(--dot, 9px); }
.track i { position: absolute; top: 50%; transform: translate(-50%, -50%); }
.track .gap { height: var(--gap, 1.5px); width: auto; transform: none; background: var(--mark); opacity: .6; }
.model, .key.model::before { background: var(--s0); border-radius: 50%; }
.gzip, .key.gzip::before { background: var(--paper); border: 1.5px solid var(--s1);
  border-radius: 50%; }
.xz, .key.xz::before { background: var(--s2); border-radius: 1px; }
.key.model, .key.gzip, .key.xz { background: none; border: 0; }
.axis .ticks { position: relative; height: 22px; font-size: 11.5px; color: var(--soft); }
.axis .ticks span { position: absolute; top: 5px; transform: translateX(-50%); }

.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; min-width: 60%; }
th, td { padding: 6px 0 6px 26px; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { font-weight: 600; font-size: 12.5px; color: var(--soft); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr.total td { font-weight: 600; border-bottom: 0; }
details > summary { cursor: pointer; color: var(--soft); font-size: 13.5px; padding: 3px 0;
  width: fit-content; }
details > summary:hover { color: var(--ink); }
details[open] > summary { margin-bottom: 6px; }
section > details { margin-top: 16px; }
.tree details { margin-left: 4px; padding-left: 14px; border-left: 1px solid var(--line); }
.tree summary { color: var(--ink); font-weight: 600; }
.tree dl, .facts { display: grid; grid-template-columns: max-content minmax(0, 1fr);
  gap: 2px 22px; margin: 0 0 8px; }
.tree dt, .facts dt { color: var(--soft); }
.tree dd, .facts dd { margin: 0; overflow-wrap: anywhere; }
.sample { margin: 0 0 14px; padding: 14px 16px; background: var(--wash); border-radius: 8px;
  white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.6; break-inside: avoid; }
.sample mark { background: var(--prompt); color: inherit; font-weight: 600; border-radius: 3px;
  padding: 1px 3px; margin: 0 -3px; -webkit-box-decoration-break: clone;
  box-decoration-break: clone; }

@media (max-width: 600px) {
  main { padding: 26px 16px 40px; }
  h1 { font-size: 23px; }
  section { margin-top: 36px; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .tiles dd { font-size: 19px; }
  .chart.wide { --height: 220px; }
  .row, .compare .axis { grid-template-columns: var(--names, 92px) 1fr; gap: 10px; }
}
@media print {
  body { font-size: 11pt; }
  main { max-width: none; padding: 0; }
  .switch, .hover { display: none; }
  h2, summary { break-after: avoid; }
  .sample, .track, .track i, .key::before { print-color-adjust: exact;
    -webkit-print-color-adjust: exact; }
}
"""

SCRIPT = """
const nearest = (steps, x) => {
  let low = 0, high = steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] < x) low = middle; else high = middle;
  }
  return x - steps[low] < steps[high] - x ? low : high;
};
const add = (parent, tag, text, name = '') => {
  const node = parent.appendChild(document.createElement(tag));
  node.textContent = text;
  node.className = name;
  return node;
};
for (const chart of document.querySelectorAll('.chart')) {
  const {first, last, lines} = JSON.parse(chart.querySelector('script').textContent);
  const hover = chart.querySelector('.hover');
  const [rule, tip] = hover.children;
  hover.addEventListener('pointermove', event => {
    const box = hover.getBoundingClientRect();
    const at = first + (event.clientX - box.left) / box.width * (last - first);
    const step = lines[0].steps[nearest(lines[0].steps, at)];
    const part = last > first ? Math.min(1, Math.max(0, (step - first) / (last - first))) : 0.5;
    rule.style.left = part * 100 + '%';
    tip.style.left = part > 0.5 ? 'auto' : `calc(${part * 100}% + 10px)`;
    tip.style.right = part > 0.5 ? `calc(${100 - part * 100}% + 10px)` : 'auto';
    tip.textContent = '';
    add(tip, 'div', `step ${step.toLocaleString('en')}`, 'soft');
    lines.forEach((line, index) => {
      const i = nearest(line.steps, step);
      const value = line.values[i] === null ? 'not finite' : line.values[i];
      const row = add(tip, 'div', lines.length > 1 ? line.name + ' ' : '', 'key s' + index);
      add(row, 'b', value);
      if (line.steps[i] !== step) add(row, 'span', ` at ${line.steps[i].toLocaleString('en')}`);
    });
    hover.classList.add('on');
  });
  hover.addEventListener('pointerleave', () => hover.classList.remove('on'));
}
addEventListener('beforeprint', () => {
  for (const folded of document.querySelectorAll('details')) folded.open = true;
});
"""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def document(title: str, sections: list[str]) -> str:
    """The whole page; `title` is text, each section is HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body><main>"
        + "\n".join(section for section in sections if section)
        + f"</main>\n<script>{SCRIPT}</script></body></html>\n"
    )
