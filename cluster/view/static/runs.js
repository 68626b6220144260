"use strict";
// The list of runs, and two runs compared.
(() => {
  const { h, number, signed, badge } = AV;
  const chosen = new Set();

  AV.runsPage = async () => {
    const { runs, damaged, folder, now } = await AV.get("runs");
    const compare = h("a", { class: "button", role: "button", hidden: true }, "Compare");
    function choose(name, is) {
      if (is) chosen.add(name); else chosen.delete(name);
      const two = [...chosen].slice(-2);
      compare.hidden = two.length < 2;
      compare.href = AV.to(["compare", ...two]);
      compare.textContent = "Compare the two";
    }
    const card = (run) => {
      const state = AV.state(run), before = run.accuracy_before, after = run.accuracy_now;
      return h("li", { class: "run-card" },
        h("label", { class: "pick", title: "Choose two to compare" }, h("input", { type: "checkbox", "aria-label": `Compare ${run.name}`, checked: chosen.has(run.name), onchange: (event) => choose(run.name, event.target.checked) })),
        h("a", { class: "name", href: AV.to(["run", run.name]) }, h("b", {}, AV.visible(run.name)), h("span", { class: "small" }, AV.phase(run) ? AV.visible(run.phase) : AV.ago(now - run.started))),
        badge(state, `state-${state.replace(" ", "-")}`),
        h("span", { class: "progress", title: `step ${run.step} of ${run.total_steps}` }, h("i", { style: { width: `${run.total_steps ? Math.min(100, (run.step / run.total_steps) * 100) : 0}%` } }), h("span", {}, `${run.step}${run.total_steps ? ` / ${run.total_steps}` : ""}`)),
        h("span", { class: "curve", title: run.curve.name }, AV.spark(run.curve.points, run.curve.name)),
        h("span", { class: "figure" }, typeof after === "number" ? [h("b", {}, number(after)), h("span", { class: "small" }, typeof before === "number" && run.curve.points.length > 1 ? ` ${signed(after - before)} held-out` : " held-out")] : typeof run.reward === "number" ? [h("b", {}, number(run.reward)), h("span", { class: "small" }, " reward")] : "–"));
    };
    return h("div", { class: "runs" }, h("div", { class: "runs-head" }, h("h1", {}, `${runs.length} ${runs.length === 1 ? "run" : "runs"}`), h("code", { class: "small" }, AV.visible(folder)), compare),
      damaged.length ? AV.faults(damaged) : null,
      runs.length ? h("ul", { class: "run-list" }, runs.map(card)) : h("p", { class: "wait" }, "There are no runs in this folder yet. They appear here as soon as one begins."));
  };

  AV.comparePage = async (one, other) => {
    const [a, b, left, right] = await Promise.all([`run/${one}`, `run/${other}`, `run/${one}/rollouts`, `run/${other}/rollouts`].map(AV.get));
    const curves = [...new Set([...Object.keys(a.curves), ...Object.keys(b.curves)])];
    const wanted = ["eval/accuracy", "accuracy/moving", "reward/mean", "groups/dead_before", "groups/dead_after", "entropy", "kl/behaviour_capped", "completion/length_mean", "completions/generated", "replay/share", "grad_norm", "rollout/tokens_per_s", "time/step"].filter((name) => curves.includes(name));
    const meaning = (name) => (a.meanings[name] || b.meanings[name] || {});
    const charts = wanted.map((name) => AV.chart({ title: name, unit: meaning(name).unit, meaning: meaning(name).meaning, series: [{ name: "A", points: a.curves[name], tone: 0 }, { name: "B", points: b.curves[name], tone: 1 }] }));
    const figures = wanted.map((name) => [name, AV.lastOf(a.curves[name]), AV.lastOf(b.curves[name])]);
    const keys = [...new Set([...Object.keys(a.config), ...Object.keys(b.config)])].filter((key) => a.config[key] !== b.config[key]);
    const said = (value) => (value === undefined ? "–" : AV.visible(value === null ? "null" : value));
    return h("div", { class: "compare" }, h("h1", {}, h("span", { class: "key tone-0" }, "A"), " ", h("a", { href: AV.to(["run", one]) }, AV.visible(one)), h("span", { class: "dim" }, " against "), h("span", { class: "key tone-1" }, "B"), " ", h("a", { href: AV.to(["run", other]) }, AV.visible(other))),
      AV.faults([...a.faults, ...b.faults]),
      h("div", { class: "charts" }, charts),
      h("h2", {}, "Last values"), h("table", { class: "plain-table" }, h("thead", {}, h("tr", {}, ["Metric", "A", "B", "B − A"].map((name) => h("th", { scope: "col" }, name)))),
        h("tbody", {}, figures.map(([name, left, right]) => h("tr", { title: meaning(name).meaning }, h("th", { scope: "row" }, h("code", {}, name)), h("td", {}, number(left)), h("td", {}, number(right)), h("td", {}, left === null || right === null ? "–" : signed(right - left)))))),
      h("h2", {}, "Prompts that both have answered ", h("span", { class: "dim" }, "accuracy of the last saved visit")), AV.sharedPrompts(one, other, left, right),
      h("h2", {}, `What differs in the recipes `, h("span", { class: "dim" }, keys.length)), keys.length ? h("table", { class: "plain-table" }, h("thead", {}, h("tr", {}, ["Key", "A", "B"].map((name) => h("th", { scope: "col" }, name)))),
        h("tbody", {}, keys.map((key) => h("tr", {}, h("th", { scope: "row" }, h("code", {}, AV.visible(key))), h("td", {}, said(a.config[key])), h("td", {}, said(b.config[key])))))) : h("p", { class: "wait" }, "Nothing."));
  };
})();
