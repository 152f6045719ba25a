"""The HTML page of ``vllm-calibquant inspect``: one file, without anything from elsewhere."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from typing import Any

from PIL import Image

PIXELS = 1024
"""Longest side of the picture in the page."""

STYLE = """
:root { --ink: #1d2230; --soft: #667085; --line: #d9dee8; --paper: #fff; --ground: #f4f6fa; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 22px; margin: 0 0 2px; } h2 { font-size: 17px; margin: 0 0 10px; }
p { margin: 0 0 10px; } .soft { color: var(--soft); }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 8px;
  padding: 18px 20px; margin-top: 18px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 6px 14px 6px 0;
  border-top: 1px solid var(--line); }
thead th { border-top: 0; color: var(--soft); font-weight: 500; }
td.answer { font-family: ui-monospace, monospace; white-space: pre-wrap; }
td.other { color: #b42318; } .number { font-variant-numeric: tabular-nums; text-align: right; }
.picture { display: flex; gap: 24px; flex-wrap: wrap; }
.picture svg { width: 560px; max-width: 100%; height: auto; border: 1px solid var(--line); }
fieldset { border: 0; padding: 0; margin: 0 0 14px; } legend { color: var(--soft); padding: 0; }
label { display: flex; gap: 6px; align-items: baseline; cursor: pointer; }
.legend { height: 12px; width: 220px; border: 1px solid var(--line); }
.ends { display: flex; justify-content: space-between; width: 220px; font-size: 12px; }
.maps { display: grid; gap: 18px 28px; grid-template-columns: 90px repeat(3, auto);
  justify-content: start; align-items: start; }
.maps svg { display: block; } .maps text { font-size: 9px; fill: var(--soft); }
"""

SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const rects = [...document.querySelectorAll("#tokens rect")];
const views = {
  page: s => s.pages.map(p => p < 0 ? null : [`hsl(${p * 137.5 % 360} 75% 50%)`, 0.38,
    `visual page ${p}`]),
  error: s => heat(s.token_error, v => `error of keys ${v.toFixed(3)}`),
  attention: s => heat(s.attention, v => `attention ${(100 * v).toFixed(2)} %`),
};
function heat(values, say) {
  const top = Math.max(...values.filter(v => v !== null));
  return values.map(v => v === null ? null : [`rgb(214 40 40)`, 0.85 * v / top, say(v)]);
}
function show() {
  const view = document.querySelector("input[name=view]:checked").value;
  const setting = data.settings[document.querySelector("input[name=setting]:checked").value];
  views[view](setting).forEach((cell, i) => {
    const [fill, opacity, text] = cell ?? ["none", 0, "16 bits"];
    rects[i].setAttribute("fill", fill);
    rects[i].setAttribute("fill-opacity", opacity);
    rects[i].firstChild.textContent = `token ${i}: ${text}`;
  });
  const values = {error: setting.token_error, attention: setting.attention}[view];
  document.getElementById("scale").hidden = !values;
  if (values) {
    const top = Math.max(...values.filter(v => v !== null));
    document.getElementById("top").textContent =
      view === "error" ? top.toFixed(2) : `${(100 * top).toFixed(2)} %`;
  }
  history.replaceState(null, "", `#${view}-${data.settings.indexOf(setting)}`);
}
const [view, setting] = location.hash.slice(1).split("-");
for (const [name, value] of [["view", view], ["setting", setting]]) {
  const input = document.querySelector(`input[name=${name}][value="${CSS.escape(value ?? "")}"]`);
  if (input) input.checked = true;
}
document.querySelectorAll("input").forEach(input => input.addEventListener("change", show));
show();
"""

PARTS = (("key", "K", "KV heads"), ("value", "V", "KV heads"), ("output", "output", "query heads"))
RAMP = ("#f7fbff", "#c6dbef", "#6baed6", "#2171b5", "#08306b")
"""Colours of errors from 0 to 1; larger ones have the last."""


def render(data: dict[str, Any], image: Image.Image) -> str:
    """The page.

    Parameters
    ----------
    data
        Of :func:`vllm_calibquant.inspector.as_json`.
    image
        The picture.
    """
    settings = data["settings"]
    coded = [i for i, one in enumerate(settings) if one["layers"]]
    script = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    title = f"{data['model']}: what codes do to an image"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title>",
            f"<style>{STYLE}</style></head><body><main>",
            f"<h1>{html.escape(data['question'])}</h1>",
            f'<p class="soft">{html.escape(data["model"])} · {data["tokens"]} visual tokens</p>',
            "<section><h2>Answers</h2>",
            answers(settings),
            "</section><section><h2>The image and its tokens</h2>",
            picture(data, image, coded),
            "</section><section><h2>Relative error by layer and head</h2>",
            '<p class="soft">Rows are layers, columns heads. Keys and values: length of the '
            "difference over the length of the deviation from the mean over the image, so that 1 "
            "is the error of knowing the mean alone. Output: of attention, for the tokens behind "
            "the image, if they read codes as they do behind a prefix hit.</p>",
            maps([settings[i] for i in coded]),
            "</section></main>",
            f'<script type="application/json" id="data">{script}</script>',
            f"<script>{SCRIPT}</script></body></html>\n",
        ]
    )


def answers(settings: Sequence[dict[str, Any]]) -> str:
    """The answers side by side; those that differ from 16 bits are marked."""
    exact = settings[0]["cold"]
    rows = []
    for one in settings:
        cells = [f"<td>{html.escape(one['name'])}</td>"]
        for answer in (one["cold"], one["hit"]):
            if answer is None:
                cells.append('<td class="soft">the same</td>')
                continue
            kind = "answer" if answer == exact else "answer other"
            cells.append(f'<td class="{kind}">{html.escape(answer)}</td>')
        for name, _, _ in PARTS:
            numbers = [x for layer in one.get(name, ()) for x in layer]
            text = f"{sum(numbers) / len(numbers):.3f}" if numbers else ""
            cells.append(f'<td class="number">{text}</td>')
        tokens = "" if one["page_tokens"] is None else one["page_tokens"]
        rows.append(f'<tr>{"".join(cells)}<td class="number">{tokens}</td></tr>')
    return (
        '<table id="answers"><thead><tr><th></th><th>asked cold</th><th>behind a prefix hit</th>'
        '<th class="number">error of K</th><th class="number">V</th>'
        '<th class="number">output</th><th class="number">tokens a page</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def picture(data: dict[str, Any], image: Image.Image, coded: Sequence[int]) -> str:
    """The image under its tokens, with what the tokens can show."""
    shown = image.copy()
    shown.thumbnail((PIXELS, PIXELS))
    with io.BytesIO() as file:
        shown.save(file, "PNG")
        source = base64.b64encode(file.getvalue()).decode()
    rows, columns = data["grid"]
    width, height = shown.size
    w, h = width / columns, height / rows
    tokens = "".join(
        f'<rect x="{i % columns * w:.2f}" y="{i // columns * h:.2f}" width="{w:.2f}" '
        f'height="{h:.2f}"><title></title></rect>'
        for i in range(data["tokens"])
    )
    views = (
        ("page", "visual pages; what is clear stays at 16 bits"),
        ("error", "error of keys, mean over layers"),
        ("attention", "exact attention of the last token, mean over layers and heads"),
    )
    choices = [radio("view", value, text, checked=value == "page") for value, text in views]
    widths = [
        radio("setting", str(i), data["settings"][i]["name"], checked=i == coded[-1]) for i in coded
    ]
    plain = (
        ""
        if rows > 1
        else '<p class="soft">This model does not lay its tokens out as a grid: they are shown as '
        "strips.</p>"
    )
    return (
        f'<div class="picture"><svg viewBox="0 0 {width} {height}" role="img">'
        f'<image href="data:image/png;base64,{source}" width="{width}" height="{height}"/>'
        f'<g id="tokens" fill="none">{tokens}</g></svg><div>'
        f"<fieldset><legend>Show</legend>{''.join(choices)}</fieldset>"
        f"<fieldset><legend>of</legend>{''.join(widths)}</fieldset>{plain}"
        '<div id="scale" hidden><div class="legend" style="background: linear-gradient(to right, '
        'transparent, rgb(214 40 40 / 85%))"></div><div class="ends"><span>0</span>'
        '<span id="top"></span></div></div></div></div>'
    )


def radio(name: str, value: str, text: str, *, checked: bool) -> str:
    """One choice of several."""
    mark = " checked" if checked else ""
    return (
        f'<label><input type="radio" name="{name}" value="{value}"{mark}>'
        f"<span>{html.escape(text)}</span></label>"
    )


def maps(settings: Sequence[dict[str, Any]]) -> str:
    """Heat maps: a row for each setting, a column for each of K, V and output."""
    cells = ["<div></div>"]
    cells += [
        f"<div>{label} <span class='soft'>({heads})</span></div>" for _, label, heads in PARTS
    ]
    for one in settings:
        cells.append(f"<div>{html.escape(one['name'])}</div>")
        cells += [heat_map(one["layers"], one[name], name) for name, _, _ in PARTS]
    gradient = ", ".join(RAMP)
    legend = (
        f'<p></p><div class="legend" style="background: linear-gradient(to right, {gradient})">'
        '</div><div class="ends"><span>0</span><span>1 and more</span></div>'
    )
    return f'<div class="maps">{"".join(cells)}</div>{legend}'


def heat_map(layers: Sequence[int], values: Sequence[Sequence[float]], name: str) -> str:
    """Errors of layers (rows) and heads (columns)."""
    heads = len(values[0])
    w, h = max(6, min(26, 330 // heads)), max(7, min(16, 480 // len(layers)))
    step = -(-len(layers) // 16)
    parts = [
        f'<rect class="{name}" x="{26 + j * w}" y="{i * h}" width="{w}" height="{h}" '
        f'fill="{colour(x)}"><title>layer {layer}, head {j}: {x:.3f}</title></rect>'
        for i, (layer, row) in enumerate(zip(layers, values, strict=True))
        for j, x in enumerate(row)
    ]
    parts += [
        f'<text x="22" y="{i * h + h * 0.75:.1f}" text-anchor="end">{layer}</text>'
        for i, layer in enumerate(layers)
        if i % step == 0
    ]
    return f'<svg width="{26 + heads * w}" height="{h * len(layers)}">{"".join(parts)}</svg>'


def colour(error: float) -> str:
    """A colour of the ramp, between its steps in proportion."""
    at = min(max(error, 0.0), 1.0) * (len(RAMP) - 1)
    low = min(int(at), len(RAMP) - 2)
    ends = [[int(RAMP[low + k][1 + 2 * c : 3 + 2 * c], 16) for c in range(3)] for k in range(2)]
    return "#" + "".join(
        f"{round(a + (b - a) * (at - low)):02x}" for a, b in zip(*ends, strict=True)
    )
