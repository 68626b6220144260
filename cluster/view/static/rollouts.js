"use strict";
// All saved completions of a run: filters, search, a list that draws only what is seen, and the chosen one.
(() => {
  const { h, number, signed } = AV;
  const FLAGS = { hinted: 1, replayed: 2, masked: 4, quarantined: 8, dead: 16, imputed: 32, cut: 64, heldout: 128 };
  const ROW = 58; // px, as in style.css
  const PAGE = 10;
  let files = [];
  const stepOf = (row) => files[row[0]][1], held = (row) => (row[7] & FLAGS.heldout ? 1 : 0);
  const SORTS = {
    newest: ["Newest step", (a, b) => stepOf(b) - stepOf(a) || held(a) - held(b) || a[1] - b[1] || a[2] - b[2]],
    oldest: ["Oldest step", (a, b) => a[0] - b[0] || a[1] - b[1] || a[2] - b[2]],
    best: ["Best reward", (a, b) => (b[4] ?? -1e9) - (a[4] ?? -1e9)],
    worst: ["Worst reward", (a, b) => (a[4] ?? 1e9) - (b[4] ?? 1e9)],
    advantage: ["Largest advantage", (a, b) => Math.abs(b[8] ?? 0) - Math.abs(a[8] ?? 0)],
    longest: ["Longest", (a, b) => (b[9] ?? 0) - (a[9] ?? 0)],
    age: ["Oldest replay", (a, b) => (b[11] ?? -1) - (a[11] ?? -1)],
  };

  AV.rollouts = (run, table, query) => {
    files = table.files;
    const state = Object.fromEntries(["q", "type", "tier", "half", "reward", "sort", "step", "hinted", "masked", "quarantined", "dead", "cut", "at"].map((name) => [name, query.get(name) || ""]));
    table.rows.forEach((row, i) => { row.i = i; });
    let texts = null, wanted = [], cursor = -1, opened = 0;
    const types = [...new Set(table.prompts.map((prompt) => prompt[2]))].filter(Boolean).sort();
    const rewards = table.rows.map((row) => row[4]).filter((value) => value !== null);
    const low = rewards.reduce((a, b) => Math.min(a, b), 0), high = rewards.reduce((a, b) => Math.max(a, b), 1);
    AV.range = [low, high];

    // -- filters ---------------------------------------------------------------------------------
    const select = (name, label, options) => h("label", { class: "field" }, h("span", {}, label), h("select", { name, value: state[name], onchange: (event) => set(name, event.target.value) },
      options.map(([value, text]) => h("option", { value, selected: value === state[name] }, text))));
    const toggle = (name, label) => h("label", { class: "toggle" }, h("input", { type: "checkbox", name, checked: state[name] === "1", onchange: (event) => set(name, event.target.checked ? "1" : "") }), h("span", {}, label));
    const search = h("input", { type: "search", name: "q", value: state.q, placeholder: "Search prompts and completions", "aria-label": "Search prompts and completions", autocomplete: "off", spellcheck: "false" });
    let typing = 0;
    search.addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(() => set("q", search.value), 120); });
    search.addEventListener("keydown", (event) => { if (event.key === "ArrowDown" || event.key === "Enter") { event.preventDefault(); list.focus(); } });
    const count = h("p", { class: "count", role: "status" });
    const reset = h("button", { type: "button", class: "plain", onclick: () => { location.hash = AV.to(["run", run, "rollouts"]); } }, "reset");
    const filters = h("form", { class: "filters", "aria-label": "Filters", onsubmit: (event) => event.preventDefault() }, search,
      h("details", { class: "more", open: window.innerWidth > 760 || Object.entries(state).some(([name, value]) => value && !["q", "at"].includes(name)) }, h("summary", {}, "Filters"),
        h("div", { class: "fields" },
          select("half", "Half", [["", "all"], ["fresh", "fresh"], ["replayed", "replayed"], ["heldout", "held-out"]]),
          select("type", "Type", [["", "all"], ...types.map((type) => [type, type])]),
          select("tier", "Tier", [["", "all"], ["hard", "hard"], ["medium", "medium"], ["easy", "easy"]]),
          select("reward", "Reward", [["", "all"], ["full", "highest"], ["some", "between"], ["zero", "lowest"], ["right", "right"], ["wrong", "wrong"]]),
          select("sort", "Order", Object.entries(SORTS).map(([name, [label]]) => [name === "newest" ? "" : name, label]))),
        h("div", { class: "toggles" }, toggle("hinted", "hinted"), toggle("dead", "dead group"), toggle("masked", "masked"), toggle("quarantined", "quarantined"), toggle("cut", "cut off"), state.step ? toggle("step", `step ${state.step}`) : null)),
      h("div", { class: "counts" }, count, reset));

    function matches(row, words) {
      const flags = row[7], held = flags & FLAGS.heldout, replayed = flags & FLAGS.replayed;
      if (state.half && state.half !== (held ? "heldout" : replayed ? "replayed" : "fresh")) return false;
      if (state.type && table.prompts[row[3]][2] !== state.type) return false;
      if (state.tier && row[6] !== state.tier) return false;
      if (state.step && state.step !== "1" && String(table.files[row[0]][1]) !== state.step) return false;
      for (const name of ["hinted", "masked", "quarantined", "dead", "cut"]) if (state[name] && !(flags & FLAGS[name])) return false;
      if (state.reward) {
        const reward = row[4];
        if (state.reward === "right" || state.reward === "wrong") { if (row[5] === null || (row[5] >= 0.5) !== (state.reward === "right")) return false; }
        else if (reward === null || state.reward !== (reward >= high - 1e-9 ? "full" : reward <= low + 1e-9 ? "zero" : "some")) return false;
      }
      if (words.length) {
        const prompt = table.prompts[row[3]], text = `${prompt[0]} ${prompt[1]} ${texts ? texts[row.i] : row[12]}`.toLowerCase();
        return words.every((word) => text.includes(word));
      }
      return true;
    }

    // -- the list: only the rows in sight are in the document -----------------------------------------
    const inner = h("div", { class: "inner", role: "presentation" });
    const list = h("div", { class: "list", role: "listbox", tabindex: "0", "aria-label": "Saved completions" }, inner);
    const detail = h("div", { class: "detail", tabindex: "-1" });
    const box = h("div", { class: "split" }, h("div", { class: "left" }, filters, list), detail);

    function draw() {
      const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 6), last = Math.min(wanted.length, first + Math.ceil((list.clientHeight || 800) / ROW) + 14);
      inner.style.height = `${wanted.length * ROW}px`;
      inner.replaceChildren(...wanted.slice(first, last).map((row, i) => line(row, first + i)));
      if (cursor >= 0) list.setAttribute("aria-activedescendant", `row-${cursor}`); else list.removeAttribute("aria-activedescendant");
    }
    function line(row, index) {
      const [file, group, member, , reward, , tier, flags, advantage, tokens, , age, snippet] = row, prompt = table.prompts[row[3]];
      const marks = [["hinted", "hinted"], ["dead", "dead"], ["masked", "masked"], ["quarantined", "quarantined"], ["cut", "cut"]].filter(([name]) => flags & FLAGS[name]);
      return h("div", { class: `row${flags & FLAGS.replayed ? " is-replay" : ""}`, role: "option", id: `row-${index}`, "aria-selected": String(index === cursor), "aria-setsize": wanted.length, "aria-posinset": index + 1, style: { transform: `translateY(${index * ROW}px)` }, onclick: () => { move(index); open(true); } },
        h("span", { class: `chip ${AV.rewardTone(reward ?? row[5], low, high)}` }, number(reward ?? row[5])),
        h("span", { class: "body" }, h("span", { class: "one" }, h("b", {}, AV.visible(prompt[1] || prompt[0]))), h("span", { class: "two" }, AV.visible(snippet) || "(empty)")),
        h("span", { class: "tail" }, h("span", { class: "small" }, `step ${table.files[file][1]}`), h("span", { class: "marks" }, flags & FLAGS.replayed ? h("i", { class: "m-replayed", title: `replayed, age ${age ?? "?"}` }, "R") : flags & FLAGS.heldout ? h("i", { class: "m-heldout", title: "held-out" }, "E") : "",
          tier ? h("i", { class: `m-${tier}`, title: `${tier} tier` }, tier[0].toUpperCase()) : "", marks.map(([name]) => h("i", { class: `m-${name}`, title: name }, name[0])))));
    }
    let frame = 0;
    list.addEventListener("scroll", () => { cancelAnimationFrame(frame); frame = requestAnimationFrame(draw); });
    // A list that is not in the document yet cannot be scrolled: it is when it gets its size.
    let wish = null;
    function settle() {
      inner.style.height = `${wanted.length * ROW}px`;
      if (wish !== null && list.clientHeight) { list.scrollTop = wish; wish = null; }
      draw();
    }
    new ResizeObserver(settle).observe(list);

    function move(index) {
      if (!wanted.length) return;
      cursor = Math.max(0, Math.min(wanted.length - 1, index));
      const top = cursor * ROW;
      if (top < list.scrollTop) list.scrollTop = top;
      else if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
      draw();
    }
    let pause = 0;
    list.addEventListener("keydown", (event) => {
      const by = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1, PageDown: PAGE, PageUp: -PAGE, Home: -1e9, End: 1e9 }[event.key];
      if (by && !event.ctrlKey && !event.metaKey) { event.preventDefault(); event.stopPropagation(); move(cursor + by); clearTimeout(pause); if (wide()) pause = setTimeout(() => open(false), 90); }
      else if (event.key === "Enter") { event.preventDefault(); open(true); }
    });
    const wide = () => window.innerWidth > 960;

    // -- the chosen one ------------------------------------------------------------------------------
    const nameOf = (row) => `${table.files[row[0]][0]}/${row[1]}/${row[2]}`;
    function open(focus) {
      const row = wanted[cursor];
      if (row) show(nameOf(row), focus);
    }
    async function show(at, focus) {
      const [file, group, member] = at.split("/"), mine = (opened += 1);
      state.at = at;
      remember();
      let document_;
      try { document_ = await AV.get(`run/${run}/group/${file}/${group}`); } catch (error) { if (mine === opened) detail.replaceChildren(back(), AV.problem(error)); return; }
      if (mine !== opened) return;
      const step = (table.files.find((one) => one[0] === file) || [0, Number(file.split("_")[1])])[1];
      const pick = (i) => {
        const next = `${file}/${group}/${i}`;
        cursor = wanted.findIndex((row) => nameOf(row) === next);
        if (cursor >= 0) move(cursor); else draw();
        show(next, true);
      };
      AV.sibling = (by) => { const to = Number(member) + by; if (document_.rows[to]) pick(to); };
      AV.stopMedia(detail);
      try { detail.replaceChildren(back(), AV.rollout(run, step, document_, Number(member), pick)); } catch (error) { detail.replaceChildren(back(), AV.problem(error)); }
      box.classList.add("opened");
      detail.scrollTop = 0;
      if (focus) { if (!wide()) window.scrollTo(0, 0); detail.focus({ preventScroll: true }); }
    }
    function close() {
      opened += 1;
      state.at = "";
      AV.stopMedia(detail);
      detail.replaceChildren(hintText());
      box.classList.remove("opened");
      remember();
      list.focus();
      draw();
    }
    AV.closeRollout = close;
    const back = () => h("button", { type: "button", class: "back plain", onclick: close }, "← all rollouts");
    const hintText = () => h("p", { class: "wait" }, wanted.length ? "Choose a rollout." : "");

    function remember() {
      history.replaceState(null, "", AV.to(["run", run, "rollouts"], state));
    }
    async function set(name, value) {
      state[name] = name === "step" ? "" : value;
      await apply();
      remember();
    }
    async function apply() {
      const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
      if (words.length && !texts) {
        try { texts = await AV.get(`run/${run}/texts`); if (texts.length !== table.rows.length) texts = null; } catch { texts = null; }
      }
      wanted = table.rows.filter((row) => matches(row, words)).sort(SORTS[state.sort || "newest"] ? SORTS[state.sort || "newest"][1] : SORTS.newest[1]);
      count.textContent = wanted.length === table.rows.length ? `${wanted.length.toLocaleString("en")} rollouts` : `${wanted.length.toLocaleString("en")} of ${table.rows.length.toLocaleString("en")} rollouts`;
      reset.hidden = !Object.entries(state).some(([name, of]) => of && name !== "at");
      cursor = state.at ? wanted.findIndex((row) => nameOf(row) === state.at) : -1;
      wish = cursor > 5 ? (cursor - 3) * ROW : 0;
      settle();
      if (!wanted.length) inner.replaceChildren(h("p", { class: "wait" }, table.rows.length ? "No rollout has all of this." : "No samples are saved yet: they come every output.samples_every steps."));
    }

    (async () => {
      await apply();
      detail.replaceChildren(hintText());
      if (state.at) show(state.at, false);
      else if (wanted.length && wide()) { cursor = 0; draw(); open(false); }
    })();
    box.focusList = () => list.focus({ preventScroll: true });
    box.focusSearch = () => search.focus();
    return box;
  };
})();
