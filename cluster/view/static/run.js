"use strict";
// One run: overview with curves, rollouts, saved steps, events, recipe.
(() => {
  const { h, number, badge } = AV;
  const TABS = [["", "Overview"], ["rollouts", "Rollouts"], ["steps", "Steps"], ["events", "Events"], ["recipe", "Recipe"]];
  const tone = (series) => series.map((one, i) => ({ ...one, tone: one.tone ?? i }));
  // [title, unit, [[metric, name]...]]
  const CHARTS = [
    ["Accuracy", "share", [["eval/accuracy", "held-out"], ["accuracy/moving", "training"]]],
    ["Reward", "", [["reward/mean", "mean"]]],
    ["Dead groups", "share", [["groups/dead_before", "before replay"], ["groups/dead_after", "after replay"]]],
    ["Tiers", "", [["tiers/easy", "easy", 2], ["tiers/medium", "medium", 4], ["tiers/hard", "hard", 1]]],
    ["KL to behaviour", "", [["kl/behaviour_capped/fresh", "fresh"], ["kl/behaviour_capped/replay", "replayed"]]],
    ["Entropy", "", [["entropy/fresh", "fresh"], ["entropy/replay", "replayed"]]],
    ["Age of replays", "", [["age/replay/mean", "mean"], ["age/replay/max", "max"]]],
    ["Completion length", "", [["completion/length_mean", "tokens"]]],
    ["Gradient norm", "", [["grad_norm", "norm"]]],
    ["Effective sample size", "share", [["ess/fresh", "fresh"], ["ess/replay", "replayed"]]],
    ["Tokens per second", "", [["rollout/tokens_per_s", "generated"], ["learner/tokens_per_s", "trained"]]],
    ["Hints", "", [["hints/active", "active"]]],
  ];

  AV.runPage = async (run, tab, query) => {
    const document_ = await AV.get(`run/${run}`);
    const status = document_.status || {};
    const head = h("div", { class: "run-head" },
      h("h1", {}, AV.visible(run)), badge(AV.state({ ...status, lost: document_.lost }) || "damaged", `state-${(AV.state({ ...status, lost: document_.lost }) || "lost").replace(" ", "-")}`),
      status.total_steps ? h("span", { class: "progress", title: `step ${status.step} of ${status.total_steps}` }, h("i", { style: { width: `${Math.min(100, (status.step / status.total_steps) * 100)}%` } })) : null,
      h("span", { class: "small" }, status.total_steps ? `step ${status.step} of ${status.total_steps}` : `step ${status.step ?? "?"}`, AV.phase({ ...status, lost: document_.lost }) ? ` · ${AV.visible(status.phase)}` : ""));
    const tabs = h("nav", { class: "tabs", "aria-label": "Parts of the run" }, TABS.map(([name, label]) =>
      h("a", { href: AV.to(["run", run, name].filter(Boolean)), "aria-current": name === tab ? "page" : null }, label, name === "rollouts" ? h("span", { class: "dim" }, ` ${number(document_.saved.rollouts)}`) : "")));
    const page = h("div", { class: `run ${tab || "overview"}` }, head, status.error ? h("div", { class: "problem", role: "alert" }, AV.visible(status.error)) : null, AV.faults(document_.faults), tabs);
    if (tab === "rollouts") {
      const table = await AV.get(`run/${run}/rollouts`);
      const list = AV.rollouts(run, table, query);
      page.append(list);
      page.focusList = list.focusList; page.focusSearch = list.focusSearch;
    } else if (tab === "steps") page.append(steps(run, await AV.get(`run/${run}/steps`)));
    else if (tab === "events") page.append(events(document_.events));
    else if (tab === "recipe") page.append(recipe(document_.config));
    else page.append(overview(run, document_));
    return page;
  };

  AV.firstOf = (points) => (points && points.length ? points[0][1] : null);
  AV.lastOf = (points) => (points && points.length ? points[points.length - 1][1] : null);

  function overview(run, document_) {
    const { curves, meanings, status } = document_;
    const last = (name) => AV.lastOf(curves[name]);
    const tile = (label, value, note) => (value === null || value === undefined ? null : h("div", { class: "tile" }, h("span", { class: "small" }, label), h("b", {}, value), note ? h("span", { class: "small" }, note) : null));
    const now = status && status.accuracy_now, before = status && status.accuracy_before;
    const gain = typeof now === "number" && typeof before === "number" && curves["eval/accuracy"] && curves["eval/accuracy"].length > 1 ? now - before : null;
    const tiles = h("div", { class: "tiles" },
      tile("held-out accuracy", typeof now === "number" ? number(now) : null, gain === null ? null : `${AV.signed(gain)} since the start`),
      tile("training accuracy", last("accuracy/moving") === null ? null : number(last("accuracy/moving")), "last 8 steps"),
      tile("reward", last("reward/mean") === null ? null : number(last("reward/mean"))),
      tile("completions", last("completions/generated") === null ? null : number(last("completions/generated")), "generated"),
      tile("in the buffer", last("buffer/stored") === null ? null : number(last("buffer/stored")), "trajectories"),
      tile("dead groups", last("groups/dead_before") === null ? null : `${Math.round(last("groups/dead_before") * 100)} %`, last("groups/dead_after") === null ? null : `${Math.round(last("groups/dead_after") * 100)} % after replay`),
      tile("wall time", status ? AV.span(status.updated - status.started) : null));
    const drawn = CHARTS.map(([title, unit, series]) => AV.chart({ title, unit, meaning: series.map(([name]) => (meanings[name] ? meanings[name].meaning : name)).join(" "), series: tone(series.map(([metric, name, tone]) => ({ name, tone, points: curves[metric], dots: metric === "eval/accuracy" }))) })).filter(Boolean);
    const types = Object.keys(curves).filter((name) => name.startsWith("eval/accuracy/"));
    const byType = types.length ? AV.chart({ title: "Held-out accuracy by type", unit: "share", series: tone(types.slice(0, 6).map((name) => ({ name: name.slice(14), points: curves[name] }))) }) : null;
    const used = new Set([...CHARTS.flatMap(([, , series]) => series.map(([name]) => name)), ...types]);
    const rest = Object.keys(curves).filter((name) => !used.has(name) && curves[name].length > 1);
    const more = h("details", { class: "more-charts" }, h("summary", {}, `${rest.length} more metrics`));
    more.addEventListener("toggle", () => {
      if (more.open && more.children.length === 1) more.append(h("div", { class: "charts" }, rest.map((name) => AV.chart({ title: name, unit: (meanings[name] || {}).unit, meaning: (meanings[name] || {}).meaning, series: [{ name, points: curves[name], tone: 0 }] }))));
    });
    return h("div", {}, tiles, drawn.length ? h("div", { class: "charts" }, drawn, byType) : h("p", { class: "wait" }, "No step has been trained yet."), rest.length ? more : null,
      document_.report && !AV.files ? h("p", {}, h("a", { href: `report/${encodeURIComponent(run)}`, target: "_blank", rel: "noopener" }, "The run's own report")) : null,
      h("p", { class: "small" }, "Folder ", h("code", {}, AV.visible(document_.folder))));
  }

  function steps(run, list) {
    if (!list.length) return h("p", { class: "wait" }, "No samples are saved yet: they come every output.samples_every steps.");
    const paid = list.flatMap((file) => file.groups.flatMap((group) => group.rows.map((row) => row[0]))).filter((value) => value !== null);
    const low = Math.min(...paid, 0), high = Math.max(...paid, 1);
    const open = (file, group, row) => AV.to(["run", run, "rollouts"], { at: `${file}/${group}/${row}` });
    const dots = (file, group, g, replayed) => {
      const members = group.rows.map((row, i) => [row, i]).filter(([row]) => Boolean(row[1]) === replayed);
      return h("span", { class: `dots ${replayed ? "replayed" : "fresh"}` }, members.map(([row, i]) =>
        h("a", { class: `chip ${AV.rewardTone(row[0], low, high)}`, href: open(file.file, g, i), "aria-label": `${replayed ? "Replayed" : "Fresh"} completion, reward ${number(row[0])}` }, number(row[0]))));
    };
    const training = list.filter((file) => !file.held_out).reverse(), held = list.filter((file) => file.held_out).reverse();
    const card = (file) => {
      const dead = file.groups.filter((group) => group.dead).length;
      return h("section", { class: "step" }, h("h2", {}, `Step ${file.step} `, h("span", { class: "dim" }, `${file.groups.length} groups${dead ? `, ${dead} dead` : ""}`)),
        h("div", { class: "groups" }, h("div", { class: "group head" }, h("span", {}, "prompt"), h("span", {}, "fresh"), h("span", {}, "replayed")), file.groups.map((group, g) =>
          h("div", { class: `group${group.dead ? " is-dead" : ""}` }, h("span", { class: "about" }, h("a", { href: open(file.file, g, 0) }, AV.visible(group.question || group.prompt)),
            h("span", { class: "badges" }, badge(AV.visible(group.type), "type"), group.tier && badge(group.tier, `tier-${group.tier}`), group.hinted && badge("hinted", "hinted"), group.dead && badge("dead", "dead", "the fresh rewards are all alike"))),
          dots(file, group, g, false), dots(file, group, g, true)))));
    };
    // A long run has hundreds of saved steps: they are drawn as they come into sight.
    const box = h("div", { class: "steps" });
    let drawn = 0;
    const more = h("button", { type: "button", class: "plain", onclick: () => add(20) }, "earlier steps");
    function add(count) {
      training.slice(drawn, drawn + count).forEach((file) => more.before(card(file)));
      drawn += count;
      more.hidden = drawn >= training.length;
    }
    box.append(more);
    add(20);
    if (held.length) box.append(h("section", { class: "step" }, h("h2", {}, "Held-out answers"), held.map((file) => h("div", { class: "group" }, h("span", { class: "about" }, `evaluation at step ${file.step}`),
      h("span", { class: "dots" }, file.groups.map((group, g) => h("a", { class: `chip ${AV.rewardTone(group.rows[0][0], 0, 1)}`, href: open(file.file, g, 0), title: AV.visible(group.question), "aria-label": `Answer, accuracy ${number(group.rows[0][0])}` }, number(group.rows[0][0]))))))));
    return box;
  }

  const events = ({ counts, last }) => h("div", {}, h("p", { class: "badges" }, Object.entries(counts).map(([kind, count]) => badge(`${AV.visible(kind)} ${count}`, "type"))),
    h("table", { class: "plain-table" }, h("thead", {}, h("tr", {}, ["Time", "Step", "What", ""].map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", {}, [...last].reverse().map((row) => h("tr", {}, h("td", { class: "small" }, row.timestamp ? new Date(row.timestamp * 1000).toLocaleTimeString("en-GB") : ""), h("td", {}, number(row.step)), h("td", {}, h("b", {}, AV.visible(row.kind))), h("td", { class: "message" }, AV.visible(row.message)))))));

  function recipe(config) {
    const names = Object.keys(config);
    const body = h("tbody", {});
    const show = (word) => body.replaceChildren(...names.filter((name) => !word || `${name} ${config[name]}`.toLowerCase().includes(word)).map((name) => h("tr", {}, h("th", { scope: "row" }, h("code", {}, AV.visible(name))), h("td", {}, AV.visible(config[name] === null ? "null" : config[name])))));
    show("");
    return h("div", {}, h("input", { type: "search", placeholder: "Find a key", "aria-label": "Find a key", oninput: (event) => show(event.target.value.toLowerCase()) }), h("table", { class: "plain-table" }, body));
  }
})();
