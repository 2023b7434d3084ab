"""How the page of `vmm.testing.page` looks, and its filter of the log."""

from __future__ import annotations

MACHINES = 16
"""Machines a page has a filter for."""

_FILTERS = ",".join(
    [
        f"#f-{name}:not(:checked)~.rows .k-{name}"
        for name in ("console", "call", "event", "fault", "error", "test")
    ]
    + [f"#f-m{at}:not(:checked)~.rows .n{at}" for at in range(MACHINES)]
)

STYLE = (
    """
:root{--bg:#fbfbfa;--box:#fff;--ink:#1c1f23;--dim:#6b7280;--line:#e4e4e0;--soft:#f1f1ee;
--bad:#c62d2d;--badbg:#fdecea;--call:#2563c9;--event:#7a5ae0;--fault:#d97706;--console:#64748b;
--test:#0f766e;--m0:#2563c9;--m1:#0f8a6d;--m2:#b4579b;--m3:#c2740a;--m4:#5b5bd6;--m5:#64748b}
@media(prefers-color-scheme:dark){:root{--bg:#121416;--box:#191c1f;--ink:#e3e6e9;--dim:#949ca6;
--line:#2c3136;--soft:#212529;--bad:#ff7b72;--badbg:#3a1e1e;--call:#6ea8fe;--event:#b39cf5;
--fault:#f0b04f;--console:#8d9aab;--test:#4fc3b0;--m0:#6ea8fe;--m1:#4fc39b;--m2:#e08fcb;
--m3:#f0b04f;--m4:#9c9cf5;--m5:#94a3b8}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1280px;padding:28px 32px 60px;background:var(--bg);color:var(--ink);
font:14px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
pre,.rows,.path,time{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace}
section{margin-top:20px}
header .path{margin:0;color:var(--dim);font-size:13px;overflow-wrap:anywhere}
h1{margin:2px 0 8px;font-size:24px;line-height:1.25;font-weight:650;overflow-wrap:anywhere}
h1 b{display:inline-block;vertical-align:3px;margin-right:6px;padding:2px 9px;border-radius:99px;
background:var(--bad);color:var(--box);font-size:12px;font-weight:650;letter-spacing:.03em}
.facts{display:flex;flex-wrap:wrap;gap:2px 16px;margin:0;padding:0;list-style:none;
color:var(--dim);font-size:12.5px}
pre{margin:0;padding:14px 16px;overflow:auto;background:var(--box);border:1px solid var(--line);
border-radius:8px;font-size:12.5px;line-height:1.5}
.tb{max-height:420px;border-left:3px solid var(--bad)}
.tb .e{color:var(--bad);font-weight:600;white-space:pre-wrap;overflow-wrap:anywhere}
.tb .at{font-weight:650}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(380px,1fr));gap:14px}
article{padding:14px 16px;background:var(--box);border:1px solid var(--line);border-radius:8px}
h2,h3{margin:0;font-size:14px;font-weight:650}
h2 i,h3 i,summary i,label i,li i{display:inline-block;width:9px;height:9px;margin-right:7px;
border-radius:3px;background:var(--m)}
.m0{--m:var(--m0)}.m1{--m:var(--m1)}.m2{--m:var(--m2)}.m3{--m:var(--m3)}.m4{--m:var(--m4)}
.m5{--m:var(--m5)}
.state{margin:4px 0 6px;overflow-wrap:anywhere}
.steps{display:flex;flex-wrap:wrap;gap:6px;margin:12px 0 0;padding:0;list-style:none}
.steps li{padding:4px 10px;border-radius:6px;background:var(--soft);font-size:12px}
.steps span{display:block;color:var(--dim)}.steps b{font-variant-numeric:tabular-nums}
.steps .never b{color:var(--bad)}
.time{position:relative;padding:10px 16px 14px;background:var(--box);border:1px solid var(--line);
border-radius:8px}
.time h3{margin:12px 0 2px;font-size:12.5px}
.lane,.fail{display:grid;grid-template-columns:76px 1fr}
.lane>b{color:var(--dim);font-size:12px;font-weight:400;line-height:22px}
.lane>div{position:relative;height:18px;margin:2px 0;background:var(--soft);border-radius:4px;
overflow:hidden}
.ticks>div{height:18px;background:none;overflow:visible}
.ticks span{position:absolute;padding-left:4px;border-left:1px solid var(--line);color:var(--dim);
font-size:11px;white-space:nowrap;font-variant-numeric:tabular-nums}
.fail{position:absolute;inset:28px 16px 10px;pointer-events:none;z-index:1}
.fail>div{position:relative}
.fail span{position:absolute;top:0;bottom:0;border-left:2px solid var(--bad)}
.lane div>span,.lane div>a{position:absolute;top:0;bottom:0}
.ph,.st{overflow:hidden;padding:0 5px;font-size:11px;line-height:18px;white-space:nowrap}
.ph{background:color-mix(in srgb,var(--test) 20%,var(--box));border-left:2px solid var(--test)}
.st{background:color-mix(in srgb,var(--call) calc(14% + 12%*var(--n)),var(--box));
border-left:1px solid var(--box)}
.s0{--n:0}.s1{--n:1}.s2{--n:2}.s3{--n:3}.s4{--n:4}
.ticks div>span{top:0;bottom:auto}
.lane div>.de{top:auto;background:var(--console)}
.lane a{width:3px;min-width:3px;border-radius:1px;background:var(--k)}
.lane a:hover{outline:2px solid var(--ink)}
.lane a.k-call,.lane a.span{opacity:.7}
.lane a.bad{background:var(--bad);opacity:1}
.k-call{--k:var(--call)}.k-event{--k:var(--event)}.k-fault{--k:var(--fault)}.k-error{--k:var(--bad)}
.k-test{--k:var(--test)}.k-console{--k:var(--console)}
.log>input[type=checkbox]{position:absolute;opacity:0}
.log>label{display:inline-block;margin:0 6px 8px 0;padding:3px 11px;border:1px solid var(--line);
border-radius:99px;background:var(--box);color:var(--dim);font-size:12.5px;cursor:pointer;
user-select:none}
.log>label small{font-size:11px;opacity:.8}
.log>input:checked+label{border-color:var(--k,var(--m));color:var(--ink);
box-shadow:inset 0 0 0 1px var(--k,var(--m))}
.log>input:focus-visible+label{outline:2px solid var(--call)}
#find{width:220px;padding:4px 11px;border:1px solid var(--line);border-radius:99px;
background:var(--box);color:var(--ink);font:inherit;font-size:12.5px}
#found{margin-left:8px;color:var(--dim);font-size:12.5px}
.rows{margin:0;padding:6px 0;list-style:none;background:var(--box);border:1px solid var(--line);
border-radius:8px;font-size:12.5px;line-height:1.5}
.rows li{display:flex;padding:0 14px;content-visibility:auto;contain-intrinsic-size:auto 19px}
.rows li:hover{background:var(--soft)}
.rows li:target{outline:2px solid var(--k)}
time{flex:none;width:88px;padding-right:14px;color:var(--dim);text-align:right;
font-variant-numeric:tabular-nums}
.rows i{flex:none;margin:5px 8px 0 0}
.rows b{flex:none;width:60px;color:var(--k);font-weight:600}
.rows span{min-width:0;white-space:pre-wrap;overflow-wrap:anywhere}
.rows small{display:block;color:var(--dim);font-size:12px}
.rows .k-call,.rows .k-event,.rows .k-fault,.rows .k-error,.rows .k-test{
background:color-mix(in srgb,var(--k) 7%,transparent)}
.rows .bad{background:var(--badbg)}.rows .bad b,.rows .bad small{color:var(--bad)}
.rows .gap{padding:8px 14px;color:var(--dim);background:var(--soft);font-style:italic}
details{margin-top:10px}summary{margin-bottom:6px;font-weight:650;cursor:pointer}
footer{margin-top:28px;color:var(--dim);font-size:12px}
[hidden]{display:none!important}
@media(max-width:640px){body{padding:16px}.cards{grid-template-columns:1fr}}
@media print{.rows li{content-visibility:visible}}
"""
    + _FILTERS
    + "{display:none}\n"
)

SCRIPT = """
"use strict";
const find = document.getElementById("find"), found = document.getElementById("found");
const rows = [...document.querySelectorAll(".rows li")];
let timer = 0;
function look() {
  const words = find.value.toLowerCase();
  let count = 0;
  for (const row of rows) {
    const fits = !words || row.textContent.toLowerCase().includes(words);
    row.hidden = !fits;
    count += fits;
  }
  found.textContent = words ? count + " of " + rows.length + " rows" : "";
}
find.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(look, 120); });
"""
