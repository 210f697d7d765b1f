"""How a report looks: light, dark and on paper."""

CSS = """
:root { color-scheme: light dark;
  --back: #f6f7f9; --card: #ffffff; --ink: #1b1f24; --soft: #59636e; --rule: #d9dee4; --faint: #eceff2;
  --blue: #0b66c3; --pale: #9cc7f0; --amber: #c77700; --red: #c62f2f; --green: #1a7f4b; --violet: #7a4cc2;
  --grey: #8a949e; --cyan: #0a7f8f; --mark: #1b1f24; }
@media (prefers-color-scheme: dark) { :root {
  --back: #14171a; --card: #1d2125; --ink: #e8eaed; --soft: #a3acb5; --rule: #353b42; --faint: #282d33;
  --blue: #5aa9f5; --pale: #2f5f8f; --amber: #f0a840; --red: #f47f78; --green: #4fbf86; --violet: #b394ee;
  --grey: #7d8790; --cyan: #45bccd; --mark: #e8eaed; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { font-size: 24px; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 32px 0 10px; }
h3 { font-size: 14px; margin: 0 0 2px; overflow-wrap: anywhere; }
p { margin: 0 0 8px; max-width: 78ch; }
.meta, .note { color: var(--soft); font-size: 13px; }
.summary { font-size: 18px; margin: 12px 0 0; max-width: none; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 14px 16px; min-width: 0; }
.verdict { border-left: 4px solid var(--blue); margin-top: 18px; }
.verdict b { display: block; font-size: 16px; margin-bottom: 4px; overflow-wrap: anywhere; }
.verdict ul { margin: 4px 0 0; padding-left: 20px; max-width: 90ch; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(124px, 1fr)); gap: 10px; margin: 18px 0 0; }
.tiles div { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 8px 12px; }
.tiles dt { color: var(--soft); font-size: 12px; }
.tiles dd { margin: 0; font-size: 19px; font-variant-numeric: tabular-nums; white-space: nowrap; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 14px; }
figure { margin: 0; break-inside: avoid; }
figcaption { color: var(--soft); font-size: 13px; margin-top: 2px; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); }
svg text.label { fill: var(--ink); paint-order: stroke; stroke: var(--card); stroke-width: 3px; }
svg.bar { height: 26px; border-radius: 4px; margin: 4px 0 12px; }
.grid { stroke: var(--faint); } .axis { stroke: var(--grey); } .grid, .axis { fill: none; }
.limit { stroke: var(--mark); stroke-width: 1.4; stroke-dasharray: 5 3; fill: none; }
.mark { stroke: var(--mark); stroke-width: 1; fill: none; } .cut { fill: var(--mark); }
.break { stroke: var(--grey); stroke-width: 1.2; stroke-dasharray: 2 3; fill: none; }
.line { fill: none; stroke-width: 1.8; stroke: var(--amber); }
rect.requests, rect.admitted { fill: var(--blue); } rect.tokens, rect.reserved { fill: var(--pale); }
rect.time, rect.server { fill: var(--green); } rect.pause, rect.rate_limited { fill: var(--amber); }
rect.failed, rect.retries { fill: var(--red); } rect.concurrency { fill: var(--violet); }
rect.flight { fill: var(--cyan); } rect.waits { fill: var(--blue); }
.share rect.tokens { fill: var(--cyan); }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 6px; background: var(--grey); }
.swatch.requests, .swatch.admitted { background: var(--blue); } .swatch.tokens { background: var(--cyan); }
.swatch.reserved { background: var(--pale); } .swatch.used { background: var(--amber); height: 3px; vertical-align: 4px; }
.swatch.server, .swatch.time { background: var(--green); }
.swatch.pause, .swatch.rate_limited { background: var(--amber); }
.swatch.failed, .swatch.retries { background: var(--red); } .swatch.concurrency { background: var(--violet); }
.swatch.flight { background: var(--cyan); }
.key { margin-right: 14px; white-space: nowrap; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); font-size: 13px; padding-bottom: 6px; }
th, td { padding: 5px 10px 5px 0; border-bottom: 1px solid var(--faint); vertical-align: top; }
th { font-weight: 600; } tbody th { font-weight: 400; overflow-wrap: anywhere; min-width: 9em; }
thead th { color: var(--soft); font-weight: 500; font-size: 13px; border-bottom-color: var(--rule); white-space: nowrap; }
td { white-space: nowrap; } td .wide { display: block; white-space: normal; min-width: 16em; }
.part { display: inline-block; height: 10px; min-width: 1px; border-radius: 2px; background: var(--blue); }
.track { display: block; width: 110px; text-align: left; }
@media (max-width: 560px) { main { padding: 18px 12px 32px; } .card { padding: 12px; } .summary { font-size: 16px; }
  .tiles { grid-template-columns: repeat(auto-fit, minmax(104px, 1fr)); } .tiles dd { font-size: 17px; } }
@media print { @page { margin: 14mm; } :root { --back: #fff; --card: #fff; --ink: #000; --soft: #444; --rule: #bbb; --faint: #ddd;
  --blue: #0b66c3; --pale: #9cc7f0; --amber: #c77700; --red: #c62f2f; --green: #1a7f4b; --violet: #7a4cc2; --grey: #777;
  --cyan: #0a7f8f; --mark: #000; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } body { font-size: 11pt; }
  main { max-width: none; padding: 0; } .scroll { overflow: visible; } .card, tr { break-inside: avoid; }
  .figures { grid-template-columns: 1fr 1fr; } h2 { break-after: avoid; } }
"""
