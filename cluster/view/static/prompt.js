"use strict";
// One prompt, two of its groups side by side: of two steps, or of two runs.
(() => {
  const { h, number, signed, badge } = AV;
  const REPLAYED = 2, HELD_OUT = 128; // as in rollouts.js
  const mean = (values) => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : null);
  const known = (values) => values.filter((value) => typeof value === "number");

  // Groups of a run's table by prompt: id -> [{at, step, heldOut, rows}], oldest first.
  AV.visits = (table) => {
    const found = new Map();
    for (const row of table.rows) {
      const id = table.prompts[row[3]][0], [name, step, heldOut] = table.files[row[0]], at = `${name}/${row[1]}`;
      if (!found.has(id)) found.set(id, new Map());
      const groups = found.get(id);
      if (!groups.has(at)) groups.set(at, { at, step, heldOut, rows: [] });
      groups.get(at).rows.push(row);
    }
    return new Map([...found].map(([id, groups]) => [id, [...groups.values()]]));
  };
  const fresh = (visit) => visit.rows.filter((row) => !(row[7] & REPLAYED));
  // What a visit came to: accuracy where it is known, else the reward.
  AV.visitScore = (visit) => {
    const own = fresh(visit), right = known(own.map((row) => row[5]));
    return mean(right.length ? right : known(own.map((row) => row[4])));
  };
  const said = (visit) => {
    const score = AV.visitScore(visit);
    return `step ${visit.step}${visit.heldOut ? ", held-out" : ""}${score === null ? ", replays only" : `: ${number(score, 2)}`}`;
  };

  AV.promptPage = async (id, query) => {
    const { runs } = await AV.get("runs");
    const names = runs.map((run) => run.name), seen = new Map();
    async function visits(run) {
      if (!seen.has(run)) seen.set(run, AV.visits(await AV.get(`run/${run}/rollouts`)).get(id) || []);
      return seen.get(run);
    }
    const parse = (text) => { const [run, ...rest] = (text || "").split("/"); return { run, at: rest.join("/") }; };
    const sides = { a: parse(query.get("a")), b: parse(query.get("b")) };
    if (!sides.a.run) sides.a.run = names[0] || "";
    if (!sides.b.run) sides.b.run = sides.a.run;
    for (const side of [sides.a, sides.b]) {
      const of = side.run ? await visits(side.run) : [];
      side.visits = of;
      if (!of.some((visit) => visit.at === side.at)) {
        // The right side begins with the last visit, the left one with the first.
        const order = side === sides.b ? [...of].reverse() : of;
        const other = (visit) => side !== sides.b || visit.at !== sides.a.at || side.run !== sides.a.run;
        side.at = (order.find((visit) => other(visit) && AV.visitScore(visit) !== null) || order.find(other) || order[0] || { at: "" }).at;
      }
      side.group = side.at ? await AV.get(`run/${side.run}/group/${side.at}`) : null;
    }
    const address = (changes) => {
      const next = { a: `${sides.a.run}/${sides.a.at}`, b: `${sides.b.run}/${sides.b.at}`, ...changes };
      return AV.to(["prompt", id], next);
    };
    history.replaceState(null, "", address({}));
    const ours = (side) => (side.group ? side.group.rows.map((row, i) => ({ ...row, i })).filter((row) => row.prompt_id === id) : []);
    const left = ours(sides.a), right = ours(sides.b), first = left[0] || right[0];
    const all = [...left, ...right], paid = known(all.map((row) => row.reward ?? row.accuracy));
    const low = Math.min(0, ...paid), high = Math.max(1, ...paid);
    const head = h("div", { class: "prompt-head" }, h("h1", {}, "One prompt, two visits"), h("code", {}, AV.visible(id)));
    if (!first) return h("div", { class: "one-prompt" }, head, h("p", { class: "wait" }, "No saved completion answers this prompt."), h("div", { class: "versus" }, column("a"), column("b")));
    const shown = sides.a.group && left.length ? sides.a : sides.b;
    const own = shown.group.prompts && shown.group.prompts[first.i];
    const differs = left.length && right.length && (left[0].question !== right[0].question || left[0].answer !== right[0].answer);
    return h("div", { class: "one-prompt" }, head,
      differs ? h("div", { class: "problem", role: "alert" }, "The two runs mean different prompts by this id: their questions or answers differ.") : null,
      h("div", { class: "asked" }, AV.media(shown.run, own || shown.group.media), AV.promptCard(first)),
      h("div", { class: "versus" }, column("a", left, right), column("b", right, left)));

    function column(name, rows = [], others = []) {
      const side = sides[name];
      const runChoice = h("select", { name: `run-${name}`, value: side.run, onchange: (event) => { location.hash = address({ [name]: `${event.target.value}/` }); } },
        names.map((run) => h("option", { value: run, selected: run === side.run }, AV.visible(run))));
      const visitChoice = h("select", { name: `visit-${name}`, value: side.at, onchange: (event) => { location.hash = address({ [name]: `${side.run}/${event.target.value}` }); } },
        side.visits.map((visit) => h("option", { value: visit.at, selected: visit.at === side.at }, said(visit))));
      const texts = new Set(others.map((row) => row.text));
      const half = (replayed) => fold(rows.filter((row) => Boolean(row.replayed) === replayed)).map((members) => card(side, members, texts.has(members[0].text)));
      const own = rows.filter((row) => !row.replayed), right_ = known(own.map((row) => row.accuracy));
      const paid_ = known(own.map((row) => row.reward));
      const facts = rows.length ? [paid_.length ? `reward ${number(mean(paid_))}` : "", right_.length ? `${right_.filter((value) => value >= 0.5).length} of ${right_.length} right` : "",
        rows[0].tier ? `${rows[0].tier} tier` : "", rows[0].hinted ? "hinted" : "", `version ${number(Math.max(...known(rows.map((row) => row.version)), 0))}`].filter(Boolean).join(" · ") : "";
      return h("section", { class: "visit", "aria-label": name === "a" ? "Left" : "Right" },
        h("div", { class: "fields" }, h("label", { class: "field" }, h("span", {}, "Run"), runChoice), h("label", { class: "field" }, h("span", {}, "Visit"), side.visits.length ? visitChoice : h("span", { class: "small" }, "none saved"))),
        rows.length ? [h("p", { class: "small facts" }, facts), half(false), rows.some((row) => row.replayed) ? [h("h3", {}, "Replayed"), half(true)] : null]
          : h("p", { class: "wait" }, "This run has saved no completion of the prompt."));
    }
    function card(side, members, also) {
      const row = members[0];
      return h("a", { class: "answer", href: AV.to(["run", side.run, "rollouts"], { at: `${side.at}/${row.i}` }) },
        h("span", { class: "head" }, members.map((one) => h("span", { class: `chip ${AV.rewardTone(one.reward ?? one.accuracy, low, high)}` }, number(one.reward ?? one.accuracy))),
          members.length > 1 ? badge(`× ${members.length}`, "type", "completions of the same text") : null,
          also ? badge("also on the other side", "alive", "the same text") : null,
          h("span", { class: "small" }, [row.advantage === null ? "masked" : row.advantage !== undefined ? `advantage ${signed(row.advantage)}` : "", row.replayed && row.age ? `age ${row.age}` : "", row.tokens ? `${row.tokens} tokens` : ""].filter(Boolean).join(" · "))),
        h("span", { class: "text" }, AV.visible(row.text || "") || "(empty)"));
    }
  };

  // Completions of the same text stand together.
  function fold(rows) {
    const found = new Map();
    for (const row of rows) found.set(row.text, [...(found.get(row.text) || []), row]);
    return [...found.values()];
  }

  // Prompts that two runs have answered, those whose last visits differ most first.
  AV.sharedPrompts = (one, other, left, right) => {
    const a = AV.visits(left), b = AV.visits(right);
    const last = (visits) => [...visits].reverse().find((visit) => AV.visitScore(visit) !== null);
    const rows = [...a.keys()].filter((id) => b.has(id)).map((id) => ({ id, a: last(a.get(id)), b: last(b.get(id)) })).filter((row) => row.a && row.b)
      .map((row) => ({ ...row, by: AV.visitScore(row.b) - AV.visitScore(row.a) })).sort((x, y) => Math.abs(y.by) - Math.abs(x.by));
    if (!rows.length) return h("p", { class: "wait" }, "No prompt has saved completions in both.");
    const question = new Map(left.prompts.map((prompt) => [prompt[0], prompt[1]]));
    const MOST = 25;
    return [h("table", { class: "plain-table shared" }, h("thead", {}, h("tr", {}, ["Prompt", "A", "B", "B − A"].map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", {}, rows.slice(0, MOST).map((row) => h("tr", {}, h("th", { scope: "row" }, h("a", { href: AV.to(["prompt", row.id], { a: `${one}/${row.a.at}`, b: `${other}/${row.b.at}` }) }, AV.visible(question.get(row.id) || row.id)), h("span", { class: "small" }, ` ${AV.visible(row.id)}`)),
        h("td", {}, number(AV.visitScore(row.a), 2)), h("td", {}, number(AV.visitScore(row.b), 2)), h("td", {}, signed(row.by)))))),
    rows.length > MOST ? h("p", { class: "small" }, `and ${rows.length - MOST} more that differ less`) : null];
  };
})();
