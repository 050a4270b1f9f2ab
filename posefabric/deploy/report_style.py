"""The style sheet of a report: light or dark by the reader's system, readable on a phone."""

STYLE = """
:root{--page:#f5f6f8;--card:#fff;--ink:#1b2230;--soft:#5d6778;--line:#e1e5eb;--accent:#2563c9;
--bar:#dbe7fb;--good:#16794a;--bad:#b3261e;--code:#f0f2f6;--series-0:#2563c9;--series-1:#e2711d;
--series-2:#1f9d61;--series-3:#8e4ec6;--series-4:#d6336c;--series-5:#0d94a5;--series-6:#9a7b12;
--series-7:#6b7280}
@media(prefers-color-scheme:dark){:root{--page:#12151b;--card:#1b2029;--ink:#e6e9ef;
--soft:#98a2b3;--line:#2c3340;--accent:#7fb0ff;--bar:#24406b;--good:#5fd39a;--bad:#ff8f87;
--code:#141920;--series-0:#6ea8ff;--series-1:#ff9f57;--series-2:#4fd08f;--series-3:#c194ff;
--series-4:#ff7fab;--series-5:#4fd1e0;--series-6:#e2c044;--series-7:#a9b2c0}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);line-height:1.5;
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
header,main{max-width:1120px;margin:0 auto;padding:0 20px}
header{padding-top:36px}
h1{font-size:30px;line-height:1.2;margin:0 0 6px;letter-spacing:-.01em}
header p{color:var(--soft);margin:0 0 14px;font-size:16px}
nav{display:flex;flex-wrap:wrap;gap:6px 16px;padding:10px 0 4px;border-top:1px solid var(--line)}
nav a{color:var(--accent);text-decoration:none;font-size:14px}
nav a:hover{text-decoration:underline}
section{background:var(--card);border:1px solid var(--line);border-radius:14px;
padding:20px 24px;margin:18px 0}
h2{font-size:19px;margin:0 0 12px}
p{margin:0 0 12px;max-width:75ch}
figure{margin:0 0 16px}
figcaption{color:var(--soft);font-size:13px;margin-top:6px}
.wide{overflow-x:auto}
.paper{background:#fff;border-radius:10px}
.paper img{display:block;width:100%;height:auto;border-radius:10px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:7px 12px;border-bottom:1px solid var(--line);text-align:left;position:relative;
white-space:nowrap}
th{color:var(--soft);font-weight:600;font-size:13px}
tbody tr:last-child td{border-bottom:0}
tbody td:first-child{font-weight:600}
.numbers th:not(:first-child),.numbers td:not(:first-child){text-align:right}
td span{position:relative}
.bar{position:absolute;left:4px;top:5px;bottom:5px;background:var(--bar);border-radius:4px;
max-width:calc(100% - 8px)}
td.good span{color:var(--good);font-weight:600}
td.bad span{color:var(--bad);font-weight:600}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;
margin-bottom:18px}
.tile{border:1px solid var(--line);border-radius:12px;padding:12px 16px}
.tile span{display:block;color:var(--soft);font-size:13px}
.tile b{display:block;font-size:26px;line-height:1.25;letter-spacing:-.01em}
.tile small{color:var(--soft)}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(240px,1fr));gap:10px 28px;margin:0}
dt{color:var(--soft);font-size:13px}
dd{margin:0;overflow-wrap:anywhere}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr));gap:20px}
.chart figcaption{color:var(--ink);font-weight:600;font-size:14px;margin:0 0 4px}
.chart svg{width:100%;height:auto;display:block}
.chart text{fill:var(--soft);font-size:12px}
.chart .grid{stroke:var(--line)}
.chart .line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.keys{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:13px;color:var(--soft)}
.keys i{display:inline-block;width:20px;margin-right:6px;vertical-align:middle}
pre{background:var(--code);border-radius:10px;padding:12px 14px;overflow-x:auto;margin:0 0 12px;
font:13px/1.45 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace}
summary{cursor:pointer;color:var(--accent);margin-bottom:8px}
@media(max-width:600px){header,main{padding:0 10px}header{padding-top:20px}
h1{font-size:23px}section{padding:14px 12px;border-radius:10px}th,td{padding:6px 8px}
.tile b{font-size:21px}.tiles{grid-template-columns:repeat(2,1fr)}}
@media print{body{background:#fff}section{break-inside:avoid;border:0}nav{display:none}}
"""
