"""The style of a plan's page, beside that of every report (metrics/page.py): bars, plots, lists, findings.

The colours c0 to c10 are Okabe and Ito's and their tints; two that touch in a bar differ in lightness.
"""

STYLE = """
:root { --c0: #0068a8; --c1: #63acdb; --c2: #00735a; --c3: #c75100; --c4: #e0a100; --c5: #8c4a78;
  --c6: #d394c0; --c7: #565c64; --c8: #a3abb5; --c9: #dde1e6; --c10: #123a5c; --bad: #b3261e; --good: #00735a; }
@media screen and (prefers-color-scheme: dark) { :root { --c0: #3f96d3; --c1: #93cdf1;
  --c2: #2f9d7f; --c3: #e27a35; --c4: #efc04a; --c5: #b3719d; --c6: #e2b0d3; --c7: #a3abb5;
  --c8: #66707b; --c9: #363c44; --c10: #c9e4f7; --bad: #ff8a80; --good: #4fc3a1; } }
.c0 { --own: var(--c0); } .c1 { --own: var(--c1); } .c2 { --own: var(--c2); }
.c3 { --own: var(--c3); } .c4 { --own: var(--c4); } .c5 { --own: var(--c5); }
.c6 { --own: var(--c6); } .c7 { --own: var(--c7); } .c8 { --own: var(--c8); }
.c9 { --own: var(--c9); } .c10 { --own: var(--c10); }
h2.plan { font-size: 23px; margin: 64px 0 6px; padding-top: 26px; border-top: 2px solid var(--line); }
section h3 { margin: 26px 0 10px; }
section h2 + h3 { margin-top: 0; }
.answer { margin-top: 8px; font-size: 17px; font-weight: 600; color: var(--good); }
.answer.no { color: var(--bad); }
.estimate { display: inline-block; margin-top: 10px; padding: 3px 10px; border-radius: 6px;
  background: var(--wash); border: 1px solid var(--c4); font-size: 13.5px; }
.bars { display: grid; gap: 8px; }
.bars + .bars { margin-top: 8px; }
.bar { display: grid; grid-template-columns: var(--names, 110px) 1fr 84px; gap: 12px;
  align-items: center; break-inside: avoid; }
.wide-names { --names: 180px; }
.bar-name { font-size: 13px; overflow-wrap: anywhere; line-height: 1.25; }
.bar-said { font-size: 13px; text-align: right; white-space: nowrap; }
.bar-track { position: relative; display: block; height: 24px; }
.bar-track svg { width: 100%; height: 100%; display: block; background: var(--wash); border-radius: 3px; }
.bar.marked { padding-top: 20px; }
svg rect { fill: var(--own); stroke: var(--paper); stroke-width: .6; vector-effect: non-scaling-stroke; }
svg rect:hover { opacity: .8; }
.limit { position: absolute; top: -5px; bottom: -5px; width: 0; border-left: 2px solid var(--ink); }
.limit span { position: absolute; bottom: 100%; font: normal 12px/1.3 system-ui, sans-serif;
  white-space: nowrap; padding: 0 2px; }
.limit.before span { right: -3px; } .limit.after span { left: -3px; }
.pieces { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(285px, 100%), 1fr));
  gap: 3px 28px; margin-top: 14px; font-size: 13.5px; }
.pieces div { display: grid; grid-template-columns: 11px 1fr auto 52px; gap: 8px; align-items: center; }
.pieces b { font-weight: 600; white-space: nowrap; } .pieces .soft { text-align: right; }
.swatch { width: 11px; height: 11px; border-radius: 2px; background: var(--own); display: inline-block; }
.keys { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 13px; color: var(--soft); }
.keys .swatch { margin-right: 6px; }
.keys + .bars { margin-top: 12px; }
.plot { --height: 240px; margin-top: 28px; } .plot.tall, .plot:has(.circle) { --height: 380px; }
.plot figcaption h3 { margin: 0; }
.axis-name { font-size: 11.5px; color: var(--soft); margin-bottom: 8px; }
.axis-name.x { text-align: right; margin: 4px 0 0; }
svg .area { fill: var(--own); fill-opacity: .25; stroke: var(--own); }
svg .limit { stroke: var(--ink); stroke-width: 2; stroke-dasharray: 6 4; }
svg .roof { stroke: var(--ink); stroke-width: 1.75; }
.dot { position: absolute; width: 9px; height: 9px; border-radius: 50%; background: var(--c3);
  transform: translate(-50%, -50%); }
.note-at { position: absolute; font-size: 12.5px; line-height: 1.3; white-space: nowrap; padding: 1px 9px; }
.note-at.before { transform: translate(-100%, -50%); } .note-at.after { transform: translate(0, -50%); }
.note-at.above { transform: translate(0, -100%); padding-left: 4px; }
.note-at.above-left { transform: translate(-100%, -100%); padding-right: 4px; }
.circle { position: absolute; transform: translate(-50%, -50%); border-radius: 50%; background: color-mix(in srgb, var(--own) 30%, transparent);
  border: 1.5px solid var(--own); }
.number { position: absolute; transform: translate(-50%, -50%); font-size: 12px; line-height: 1;
  font-weight: 600; pointer-events: none; }
.list td { vertical-align: top; }
.list td.w, .list th.w { text-align: left; }
.reasons { margin: 14px 0 0; padding-left: 18px; max-width: 82ch; font-size: 14px; }
.list td.wrap { white-space: normal; overflow-wrap: anywhere; min-width: 150px; }
.list td .soft { display: block; font-size: 12.5px; }
.list { width: 100%; }
.list th:not(:first-child), .list td:not(:first-child) { padding-left: 18px; }
.no-fit { color: var(--bad); font-weight: 600; }
.findings { list-style: none; margin: 0; padding: 0; display: grid; gap: 10px; }
.findings li { padding: 10px 14px; background: var(--wash); border-left: 3px solid var(--c4);
  border-radius: 0 6px 6px 0; break-inside: avoid; }
.findings li.of-note { border-color: var(--line); }
.findings code { overflow-wrap: anywhere; }
.findings .soft { display: block; font-size: 13px; overflow-wrap: anywhere; }
.facts-grid { display: grid; gap: 8px 48px; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); }
@media (max-width: 600px) {
  .bar { grid-template-columns: 64px 1fr 62px; gap: 8px; }
  .plot { --height: 200px; } .plot:has(.circle) { --height: 300px; }
  h2.plan { margin-top: 44px; }
}
@media print { .swatch, .circle, .dot, .limit, .bar-track svg { print-color-adjust: exact;
  -webkit-print-color-adjust: exact; } }
"""
