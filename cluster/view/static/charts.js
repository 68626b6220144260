"use strict";
// Line charts and sparklines in SVG. A chart can be read by pointer, touch or arrow keys.
(() => {
  const { h, svg, number } = AV;
  const W = 420, H = 168, LEFT = 42, RIGHT = 10, TOP = 10, BOTTOM = 22;

  function ticks(low, high, about) {
    if (!(high > low)) return [low];
    const raw = (high - low) / about, size = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].find((m) => m * size >= raw) * size;
    const found = [];
    for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-9; at += step) found.push(Math.abs(at) < step * 1e-9 ? 0 : at);
    return found;
  }

  // series: [{name, points: [[step, value], ...], tone: 0..5, dashed}]
  AV.chart = ({ title, series, meaning, unit }) => {
    const shown = series.filter((one) => one.points && one.points.length);
    if (!shown.length) return null;
    const all = shown.flatMap((one) => one.points);
    let [x0, x1] = [Math.min(...all.map((p) => p[0])), Math.max(...all.map((p) => p[0]))];
    let [y0, y1] = [Math.min(...all.map((p) => p[1])), Math.max(...all.map((p) => p[1]))];
    if (unit === "share") { y0 = Math.min(0, y0); y1 = Math.max(1, y1); }
    if (x0 === x1) x1 = x0 + 1;
    if (y0 === y1) { y0 -= Math.abs(y0) * 0.1 || 1; y1 += Math.abs(y1) * 0.1 || 1; }
    const room = unit === "share" ? 0 : (y1 - y0) * 0.06;
    y0 -= room; y1 += room;
    const X = (x) => LEFT + ((x - x0) / (x1 - x0)) * (W - LEFT - RIGHT);
    const Y = (y) => H - BOTTOM - ((y - y0) / (y1 - y0)) * (H - TOP - BOTTOM);
    const grid = svg("g", { class: "grid" });
    for (const y of ticks(y0, y1, 4)) grid.append(
      svg("line", { x1: LEFT, x2: W - RIGHT, y1: Y(y), y2: Y(y) }),
      svg("text", { x: LEFT - 6, y: Y(y) + 3.5, "text-anchor": "end" }, number(y)));
    for (const x of ticks(x0, x1, 5)) if (Number.isInteger(x)) grid.append(
      svg("text", { x: X(x), y: H - 6, "text-anchor": "middle" }, String(x)));
    const cross = svg("line", { class: "cross", y1: TOP, y2: H - BOTTOM, visibility: "hidden" });
    const said = h("output", { class: "reading" });
    const drawing = svg("svg", { viewBox: `0 0 ${W} ${H}`, "aria-hidden": "true" }, grid, cross);
    for (const one of shown) {
      drawing.append(svg("path", {
        class: `line tone-${one.tone}${one.dashed ? " dashed" : ""}`,
        d: one.points.map((p, i) => `${i ? "L" : "M"}${X(p[0]).toFixed(1)} ${Y(p[1]).toFixed(1)}`).join(""),
      }));
      const last = one.points[one.points.length - 1];
      if (one.points.length < 2 || one.dots) for (const p of one.points) drawing.append(svg("circle", { class: `dot tone-${one.tone}`, cx: X(p[0]), cy: Y(p[1]), r: 2.6 }));
      else drawing.append(svg("circle", { class: `dot tone-${one.tone}`, cx: X(last[0]), cy: Y(last[1]), r: 2.6 }));
    }
    const steps = [...new Set(all.map((p) => p[0]))].sort((a, b) => a - b);
    let at = -1;
    function read(index) {
      at = Math.max(0, Math.min(steps.length - 1, index));
      const step = steps[at];
      cross.setAttribute("x1", X(step)); cross.setAttribute("x2", X(step)); cross.setAttribute("visibility", "visible");
      said.replaceChildren(`step ${step}`, ...shown.map((one) => {
        let near = null;
        for (const p of one.points) if (p[0] <= step) near = p;
        return near ? h("span", { class: `tone-${one.tone}` }, ` ${shown.length > 1 ? one.name + " " : ""}${number(near[1])}`) : "";
      }));
    }
    function leave() { cross.setAttribute("visibility", "hidden"); said.replaceChildren(); at = -1; }
    drawing.addEventListener("pointermove", (event) => {
      const box = drawing.getBoundingClientRect(), x = ((event.clientX - box.left) / box.width) * W;
      const step = x0 + ((x - LEFT) / (W - LEFT - RIGHT)) * (x1 - x0);
      let best = 0;
      for (let i = 0; i < steps.length; i += 1) if (Math.abs(steps[i] - step) < Math.abs(steps[best] - step)) best = i;
      read(best);
    });
    drawing.addEventListener("pointerleave", leave);
    const last = shown.map((one) => `${one.name} ${number(one.points[one.points.length - 1][1])}`).join(", ");
    return h("figure", {
      class: "chart", tabindex: "0", role: "img", title: meaning, "aria-label": `${title}: last ${last}`,
      onkeydown: (event) => {
        const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (by) { event.preventDefault(); event.stopPropagation(); read(at < 0 ? steps.length - 1 : at + by); }
      },
      onblur: leave,
    },
    h("figcaption", {}, h("b", {}, title),
      shown.length > 1 ? h("span", { class: "legend" }, shown.map((one) => h("span", { class: `key tone-${one.tone}` }, one.name)))
        : h("span", { class: "last" }, number(shown[0].points[shown[0].points.length - 1][1])), said), drawing);
  };

  AV.spark = (points, label) => {
    if (!points || points.length < 2) return h("span", { class: "spark none" }, "");
    const w = 120, hgt = 28, xs = points.map((p) => p[0]), ys = points.map((p) => p[1]);
    const [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
    const X = (x) => 2 + ((x - x0) / (x1 - x0 || 1)) * (w - 6), Y = (y) => hgt - 3 - ((y - y0) / (y1 - y0 || 1)) * (hgt - 6);
    const d = points.map((p, i) => `${i ? "L" : "M"}${X(p[0]).toFixed(1)} ${Y(p[1]).toFixed(1)}`).join("");
    return svg("svg", { class: "spark", viewBox: `0 0 ${w} ${hgt}`, role: "img", "aria-label": `${label}: ${number(ys[0])} to ${number(ys[ys.length - 1])}` },
      svg("path", { class: "area", d: `${d}L${X(x1).toFixed(1)} ${hgt}L${X(x0).toFixed(1)} ${hgt}Z` }),
      svg("path", { class: "line tone-0", d }),
      svg("circle", { class: "dot tone-0", cx: X(xs[xs.length - 1]), cy: Y(ys[ys.length - 1]), r: 2.4 }));
  };
})();
