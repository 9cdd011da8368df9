"""One self-contained report.html of a workdir: scores, loss curves, answers.

Reads what the commands left there: `metrics.jsonl`, `config.json`, `eval/<name>/scores.json` with
the images that it lists, and PNGs in `pictures/`. Whatever is absent or damaged is left out.
"""

from __future__ import annotations

import base64
import collections
import html
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from argenseg_jax import files
from argenseg_jax.data.mixture import Source
from argenseg_jax.data.rle import decode_rle
from argenseg_jax.errors import UserError
from argenseg_jax.eval import evaluator, results, visualize
from argenseg_jax.eval.results import Say, evaluations, say

# Columns of the score table: key of scores.json -> heading.
# Columns of other metrics follow them, in the order of the paper's tables.
COLUMNS = {
    "n": "samples",
    "gIoU": "gIoU",
    "baseline_gIoU": "(baseline)",
    "cIoU": "cIoU",
    "baseline_cIoU": "(baseline)",
    "Pr@0.5": "Pr@0.5",
    "Pr@0.7": "Pr@0.7",
    "Pr@0.9": "Pr@0.9",
    "N-acc": "N-acc",
    "T-acc": "T-acc",
    "mIoU": "mIoU",
    "AP": "AP",
    "AP50": "AP50",
    "Acc@0.5": "Acc@0.5",
    "IoU@1": "IoU@1",
    "image_AUROC": "image AUROC",
    "pixel_AUROC": "pixel AUROC",
    "pixel_F1": "F1-max",
    "accuracy": "accuracy",
    "baseline_accuracy": "(baseline)",
    "F1": "F1",
    "yes_ratio": "yes",
    "PSNR": "PSNR",
    "SSIM": "SSIM",
    "seconds_per_image": "s / image",
}
# What the tables of papers print of a metric; of others the accuracy.
HEADLINES = {
    "referring": ("cIoU", "gIoU"),
    "grefcoco": ("cIoU", "gIoU", "N-acc"),
    "semantic": ("mIoU",),
    "boxes": ("Acc@0.5",),
    "instances": ("AP", "AP50"),
    "interactive": ("gIoU", "cIoU"),
    "anomaly": ("image_AUROC", "pixel_AUROC", "pixel_F1"),
    "fidelity": ("PSNR", "SSIM"),
    "pope": ("accuracy", "F1"),
}
DECIBELS = {"PSNR"}  # all other scores are shares of 1
CURVES = ("loss", "text_loss", "gen_loss")  # drawn first; other logged numbers follow
DRAWN = 1e100  # larger numbers are no measurement, and their differences are infinite
NOT_CURVES = {"step", "phase", "skipped", "seconds_per_step", "rows_per_second"}


# ---------------------------------------------------------------------- images of an evaluation


def save_images(
    folder: epath.Path, source: Source, result: evaluator.Evaluation, each: int = 4, seed: int = 0
) -> list[dict[str, Any]]:
    """Draws the best, the worst and some random answers into `folder`.

    Returns one dict per answer: group ('best', 'worst', 'random' or 'scales'), file, question,
    answer, iou, and for 'scales' the file `scales` with the mask at each scale, coarse to fine.
    """
    records = result.records
    drawn = [(-r.iou, r.index, k) for k, r in enumerate(records) if r.truth is not None]  # not text
    ranked = [k for *_, k in sorted(drawn)]
    # Empty answers to empty questions are right but show nothing: best means best drawn.
    best = list(itertools.islice((k for k in ranked if decode_rle(records[k].truth).any()), each))
    order = np.random.default_rng(seed).permutation(len(ranked))
    groups = {
        "random": [ranked[i] for i in order[:each]],
        "best": best or ranked[:each],
        "worst": ranked[::-1][:each],
        "scales": [k for *_, index, k in sorted(drawn, key=lambda d: d[2]) if index in result.scales],
    }
    rows = []
    for group, chosen in groups.items():
        for k, r in enumerate(map(records.__getitem__, chosen)):
            row = {"group": group, "file": f"{group}_{k}.png", "question": r.question, "answer": r.answer, "iou": r.iou}
            truth = decode_rle(r.truth)
            image = (*source[r.index].images, np.zeros((*truth.shape, 3), np.uint8))[0]
            tiles = visualize.comparison(image, truth, decode_rle(r.prediction))
            files.write(folder / row["file"], visualize.encode_png(tiles))
            if group == "scales":
                row["scales"] = f"{group}_{k}_coarse_to_fine.png"
                scales = visualize.strip(result.scales[r.index], height=96)
                files.write(folder / row["scales"], visualize.encode_png(scales))
            rows.append(row)
    return rows


# ------------------------------------------------------------------------------------- the report


def write_report(workdir: Any, title: str = "ARGenSeg run", note: Say = say) -> epath.Path:
    """Writes `workdir`/report.html, and `workdir`/table.md where there are scores; returns the former.

    What is damaged is left out; `note` gets a line about each, and so does the report.
    """
    workdir, faults = epath.Path(workdir), []

    def tell(text: str) -> None:
        faults.append(text)
        note(text)

    found = evaluations(workdir, tell)
    logged = results.logged(workdir / "metrics.jsonl", tell)
    loose = sorted(workdir.glob("pictures/*.png"))
    body = [f"<header><h1>{html.escape(title)}</h1><p>{_summary(results.config(workdir, tell), logged)}</p></header>"]
    if found:
        body += ["<section><h2>Scores</h2>", _table(found), _legend(found), "</section>"]
        files.write(workdir / "table.md", _printable(paper_table(found) + "\n"))
    if logged:
        body += ["<section><h2>Training</h2><div class=charts>", *_charts(logged), "</div></section>"]
    for name, scores in found.items():
        body += _answers(workdir / "eval" / name / "pictures", name, scores.get("pictures", []), tell)
    if loose:
        body += [
            "<section><h2>Pictures</h2><div class=rows>",
            *(f"<figure>{_img(p, tell)}<figcaption>{html.escape(p.stem)}</figcaption></figure>" for p in loose),
            "</div></section>",
        ]
    body += [f"<p class=note>{html.escape(fault)}</p>" for fault in faults]
    page = (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{html.escape(title)}"
        "</title><meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<style>{STYLE}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )
    files.write(workdir / "report.html", _printable(page))
    return workdir / "report.html"


def paper_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown in the form of the paper's tables: data sets and their scores across, in per cent.

    Decibels (PSNR) are printed as they are; what could not be computed is a dash.
    """
    columns = [
        (name, key, scores.get(key))
        for name, scores in found.items()
        for key in HEADLINES.get(scores.get("metric", "referring"), ("accuracy",))
    ]
    values = ["–" if v is None else f"{v if key in DECIBELS else 100 * v:.1f}" for _, key, v in columns]
    before = ["", *[name for name, _, _ in columns]]
    names = ["", *(name if name != last else "" for last, name in itertools.pairwise(before))]
    rows = [names, ["---", *["---:"] * len(columns)], ["score", *[key for _, key, _ in columns]], ["value", *values]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _summary(config: Mapping[str, Mapping[str, Any]], logged: Sequence[Mapping[str, Any]]) -> str:
    """One line about the run: model, data, steps."""
    facts = []
    if config:
        facts.append(f"model {config.get('model', {}).get('variant', '?')}")
        if isinstance(sources := config.get("data", {}).get("sources"), list) and sources:
            facts.append("trained on " + ", ".join(map(str, sources)))
    if steps := [row["step"] for row in logged]:
        facts.append(f"{max(steps):,} steps")
    return html.escape(" · ".join(facts))


# -------------------------------------------------------------------------------------- scores


def _table(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    keys = [k for k in COLUMNS if any(s.get(k) is not None for s in evaluations.values())]
    head = "".join(f"<th>{COLUMNS[k]}</th>" for k in keys)
    rows = "".join(
        f"<tr><th scope=row>{html.escape(name)}</th>"
        f"<td>{_bar(s)}</td>" + "".join(f"<td class={k.lower()}>{_number(s.get(k))}</td>" for k in keys) + "</tr>"
        for name, s in evaluations.items()
    )
    kinds = "".join(_kinds(name, s["by_kind"]) for name, s in evaluations.items() if "by_kind" in s)
    parts = "".join(_breakdown(name, s["breakdown"]) for name, s in evaluations.items() if "breakdown" in s)
    return f"<div class=scroll><table><tr><th></th><th></th>{head}</tr>{rows}</table></div>{kinds}{parts}"


def _kinds(name: str, kinds: Mapping[str, Mapping[str, Any]]) -> str:
    score = "gIoU" if all("gIoU" in v for v in kinds.values()) else "accuracy"
    cells = "".join(
        f"<li><b>{html.escape(k)}</b> {_number(v.get(score))} <small>n={v['n']}</small></li>" for k, v in kinds.items()
    )
    return f"<p class=kinds>{score} by kind, {html.escape(name)}</p><ul class=kinds>{cells}</ul>"


def _breakdown(name: str, parts: Mapping[str, Any]) -> str:
    """The histogram of IoU, and gIoU by the size of the mask and the length of the expression."""
    counts, width, height = parts["histogram"], 220, 48
    step, most = width / len(counts), max([*counts, 1])
    bars = "".join(
        f"<rect class=fill x={k * step + 1:.1f} width={step - 2:.1f} "
        f"y={height * (1 - c / most):.1f} height={height * c / most:.1f}>"
        f"<title>IoU {k / len(counts):.1f}-{(k + 1) / len(counts):.1f}: {c:,}</title></rect>"
        for k, c in enumerate(counts)
    )
    groups = "".join(
        f"<p class=kinds>gIoU by {what}</p><ul class=kinds>"
        + "".join(
            f"<li><b>{html.escape(label)}</b> {_number(v['gIoU'])} <small>n={v['n']}</small></li>"
            for label, v in parts[key].items()
        )
        + "</ul>"
        for key, what in (
            ("by_size", "the share of the image that the true mask covers"),
            ("by_length", "the length of the expression"),
        )
    )
    return (
        f"<p class=kinds>IoU of all samples from 0 to 1, {html.escape(name)}</p>"
        f"<svg class=histogram width={width} height={height} role=img aria-label='IoU histogram'>"
        f"{bars}</svg>{groups}"
    )


def _bar(scores: Mapping[str, Any]) -> str:
    """gIoU as a bar from 0 to 1, with a tick at the baseline."""
    width, baseline = 110, scores.get("baseline_gIoU")
    tick = (
        ""
        if baseline is None
        else (f"<line class=tick x1={width * baseline:.1f} x2={width * baseline:.1f} y1=0 y2=14 />")
    )
    return (
        f"<svg class=bar width={width} height=14 role=img aria-label='gIoU bar'>"
        f"<rect class=rail width={width} height=8 y=3 rx=2 />"
        f"<rect class=fill width={width * (scores.get('gIoU') or 0):.1f} height=8 y=3 rx=2 />"
        f"{tick}</svg>"
    )


def _legend(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    has_baseline = any(s.get("baseline_gIoU") is not None for s in evaluations.values())
    return (
        "<p class=note>gIoU: mean IoU per sample (1 where truth and answer are both empty). "
        "cIoU: all intersections over all unions. Pr@X: share of samples with IoU above X."
        + (
            " The baseline (tick) answers without reading the question or without seeing the image."
            if has_baseline
            else ""
        )
        + "</p>"
    )


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


# -------------------------------------------------------------------------------------- curves


def _charts(logged: Iterable[Mapping[str, Any]]) -> list[str]:
    """One small chart per phase and logged number."""
    series: dict[tuple[str, str], list[tuple[float, float]]] = collections.defaultdict(list)
    for row in logged:
        for key, value in row.items():
            if (
                key not in NOT_CURVES
                and isinstance(value, (int, float))
                and not isinstance(value, bool)
                and abs(value) < DRAWN
            ):
                series[str(row.get("phase", "")), key].append((row["step"], value))
    phases = list(dict.fromkeys(phase for phase, _ in series))
    rank = {key: i for i, key in enumerate(CURVES)}
    ordered = sorted(series, key=lambda s: (phases.index(s[0]), rank.get(s[1], len(CURVES)), s[1]))
    return [curve_svg(" ".join(filter(None, name)), series[name]) for name in ordered if len(series[name]) > 1]


def curve_svg(name: str, points: Sequence[tuple[float, float]]) -> str:
    """A line chart of (step, value), with the running mean over a twentieth of it on top."""
    width, height, left, bottom, top = 300, 150, 44, 18, 8
    x, y = np.asarray(points, np.float64).T
    low, high = y.min(), y.max()
    px = left + (x - x[0]) / max(x[-1] - x[0], 1) * (width - left - 6)
    py = top + (high - y) / max(high - low, 1e-12) * (height - top - bottom)
    n = max(1, len(y) // 20)
    padded = np.pad(py, (n // 2, n - 1 - n // 2), mode="edge")
    smooth = np.convolve(padded, np.ones(n) / n, mode="valid")

    def path(values: np.ndarray) -> str:
        keep = np.unique(np.linspace(0, len(px) - 1, min(len(px), 400)).astype(int))
        return "M" + "L".join(f"{px[i]:.1f},{values[i]:.1f}" for i in keep)

    return (
        f"<figure><figcaption><b>{html.escape(name)}</b> {y[-1]:.4g}</figcaption>"
        f"<svg viewBox='0 0 {width} {height}' role=img>"
        f"<path class=axis d='M{left},{top}V{height - bottom}H{width - 6}'/>"
        f"<path class=raw d='{path(py)}'/><path class=smooth d='{path(smooth)}'/>"
        f"<text x={left - 5} y={top + 8} text-anchor=end>{high:.3g}</text>"
        f"<text x={left - 5} y={height - bottom} text-anchor=end>{low:.3g}</text>"
        f"<text x={left} y={height - 4}>{x[0]:,.0f}</text>"
        f"<text x={width - 6} y={height - 4} text-anchor=end>{x[-1]:,.0f}</text>"
        "</svg></figure>"
    )


# -------------------------------------------------------------------------------------- answers


def _answers(folder: epath.Path, name: str, rows: Sequence[Mapping[str, Any]], note: Say) -> list[str]:
    """The sections of one evaluation's images."""
    out = []
    for group, heading in (
        ("random", "drawn at random"),
        ("best", "best"),
        ("worst", "worst"),
        ("scales", "coarse to fine"),
    ):
        chosen = [r for r in rows if r["group"] == group]
        if not chosen:
            continue
        by_scale = group == "scales"
        wide, more = " wide" * by_scale, ", then the answer after each scale" * by_scale
        out += [
            f"<section><h2>{html.escape(name)} <small>{heading}</small></h2>"
            f"<p class=note>image | truth | answer{more}</p><div class='rows{wide}'>"
        ]
        for r in chosen:
            scales = _img(folder / r["scales"], note) if "scales" in r else ""
            out.append(
                f"<figure title='{html.escape(r['answer'], quote=True)}'>"
                f"{_img(folder / r['file'], note)}{scales}<figcaption>"
                f"<span class=iou>{r['iou']:.2f}</span> {html.escape(r['question'])}"
                "</figcaption></figure>"
            )
        out.append("</div></section>")
    return out


def _img(path: epath.Path, note: Say) -> str:
    try:
        data = base64.b64encode(files.read_bytes(path)).decode("ascii")
    except UserError as fault:
        note(f"left out: {fault}")
        return ""
    return f"<img alt='{html.escape(path.stem, quote=True)}' src='data:image/png;base64,{data}'>"


def _printable(text: str) -> bytes:
    """UTF-8; half a character, as a damaged file may hold, becomes `?`."""
    return text.encode("utf-8", "replace")


STYLE = """
:root{color-scheme:light dark;--fg:#1c2024;--mute:#666e78;--line:#dfe3e8;--bg:#fff;--card:#f6f7f9;
--accent:#c8501e;--soft:#e9b59c}
@media(prefers-color-scheme:dark){:root{--fg:#e6e8eb;--mute:#98a1ab;--line:#333a42;--bg:#14171a;
--card:#1c2024;--accent:#f0834f;--soft:#7a4a34}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,-apple-system,"Segoe UI",
Roboto,"Helvetica Neue",sans-serif}
main{max-width:1120px;margin:0 auto;padding:40px 24px 80px}
h1{font-size:28px;font-weight:650;letter-spacing:-.01em;margin:0}
header p{color:var(--mute);margin:4px 0 0}
h2{font-size:18px;font-weight:600;margin:44px 0 10px}
h2 small{font-weight:400;color:var(--mute);font-size:15px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;white-space:nowrap}
th,td{padding:7px 9px;text-align:right;border-bottom:1px solid var(--line);font-weight:400}
tr:first-child th{color:var(--mute);font-size:13px}
th[scope=row]{text-align:left;font-weight:600;padding-left:0}
td.giou{font-weight:650}
.note,p.kinds{color:var(--mute);font-size:13px;margin:8px 0 12px}p.kinds{margin:18px 0 2px}
ul.kinds{display:flex;flex-wrap:wrap;gap:4px 18px;list-style:none;margin:0;padding:0;font-size:13px;
font-variant-numeric:tabular-nums}
ul.kinds small{color:var(--mute)}
.bar{vertical-align:middle}.rail{fill:var(--line)}.fill{fill:var(--accent)}
.tick{stroke:var(--fg);stroke-width:2}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(290px,1fr));gap:16px}
.charts figcaption{font-size:13px;color:var(--mute);margin-bottom:2px}
.charts b{color:var(--fg);font-weight:600}
.charts svg{width:100%;height:auto;display:block}
.charts text{font-size:10px;fill:var(--mute)}
.axis{fill:none;stroke:var(--line)}
.raw{fill:none;stroke:var(--soft);stroke-width:1}
.smooth{fill:none;stroke:var(--accent);stroke-width:1.8;stroke-linejoin:round}
.rows{display:grid;grid-template-columns:repeat(auto-fill,minmax(440px,1fr));gap:18px}
.rows.wide{grid-template-columns:1fr}
figure{margin:0}
.rows figure{background:var(--card);border-radius:10px;padding:12px}
.rows img{max-width:100%;display:block;border-radius:4px;margin-bottom:8px}
.rows figcaption{font-size:14px}
.iou{font-weight:650;font-variant-numeric:tabular-nums;color:var(--accent);margin-right:6px}
@media(max-width:520px){.rows{grid-template-columns:1fr}main{padding:24px 14px}}
"""
