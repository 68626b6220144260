"use strict";
// One rollout: its clip, prompt and hint, its group, its tokens, what it was paid and why.
(() => {
  const { h, number, signed, badge } = AV;

  AV.rewardTone = (reward, low, high) => {
    if (reward === null || reward === undefined) return "none";
    const part = high > low ? (reward - low) / (high - low) : 0.5;
    return part > 0.75 ? "good" : part > 0.4 ? "fair" : part > 0.15 ? "poor" : "bad";
  };

  // document: resource run/RUN/group/FILE/NUMBER. pick(row) is told of another completion of the group.
  AV.rollout = (run, step, document, at, pick) => {
    const rows = document.rows, row = rows[at] || rows[0];
    const masked = Object.values(row.components || {}).some((value) => value === null);
    const flags = [
      row.replayed ? badge("replayed", "replayed", "drawn from the replay buffer") : !document.held_out && badge("fresh", "fresh", "generated for this step"),
      document.held_out && badge("held-out", "heldout"),
      row.tier && badge(row.tier, `tier-${row.tier}`, "tier of its prompt"),
      row.hinted && badge("hinted", "hinted", "the hint was in its context"),
      row.dead_before && badge("dead group", "dead", "the fresh rewards are all alike: they teach nothing of their own"),
      row.dead_before && row.dead_after === false && badge("revived by replay", "alive", "with the replayed half the group teaches something"),
      masked && badge("masked", "masked", "a reward component could not be had"),
      row.imputed && badge("imputed", "masked", "the reward rests on a mean in place of a masked mark"),
      row.finish_reason === "length" && badge("cut off", "masked", "it reached the token limit"),
      document.quarantined && badge("quarantined", "dead", "its prompt is not asked any more"),
    ];
    const own = document.prompts && document.prompts[at];
    const box = h("article", { class: "rollout", "aria-label": `Rollout ${row.id || at}` },
      h("header", {}, h("h2", {}, document.held_out ? `Held-out answer at step ${step}` : `Step ${step}`, h("span", { class: "dim" }, ` ${row.category || row.type || ""}`)),
        h("div", { class: "badges" }, flags)),
      siblings(rows, at, pick, document),
      h("div", { class: "pair" }, h("div", {}, AV.media(run, own || document.media), AV.promptCard(row, AV.to(["prompt", row.prompt_id], { a: `${run}/${document.file}/${document.number}` }))), h("div", {}, AV.completion(row), paid(row))));
    if (rows.length > 1) box.append(sideBySide(rows, at, pick));
    return box;
  };

  // Colours mean the same for all rollouts of a run; AV.range is set where they are known.
  function range(rows) {
    if (AV.range) return AV.range;
    const paid = rows.map((row) => row.reward ?? row.accuracy).filter((value) => typeof value === "number");
    return [Math.min(...paid), Math.max(...paid)];
  }

  function siblings(rows, at, pick, document) {
    if (rows.length < 2) return null;
    const [low, high] = range(rows);
    const half = (replayed) => {
      const members = rows.map((row, i) => [row, i]).filter(([row]) => Boolean(row.replayed) === replayed);
      if (!members.length) return null;
      return h("div", { class: "half" }, h("span", { class: "small" }, replayed ? "replayed" : "fresh"), members.map(([row, i]) =>
        h("button", { type: "button", class: `chip ${AV.rewardTone(row.reward, low, high)}`, "aria-current": i === at ? "true" : null, "aria-label": `Completion ${i + 1}, reward ${number(row.reward)}`, onclick: () => pick(i) }, number(row.reward))));
    };
    return h("nav", { class: "siblings", "aria-label": "Completions of this group" }, half(false), half(true),
      rows[0].dead_before ? h("span", { class: "small dead-note" }, rows[0].dead_after === false ? "fresh rewards alike: dead, revived by its replays" : "rewards alike: a dead group") : null);
  }

  // link: where all answers to it are
  AV.promptCard = (row, link) => h("section", { class: "prompt", "aria-label": "Prompt" },
    h("p", { class: "question" }, AV.visible(row.question)),
    row.options && row.options.length ? h("ul", { class: "options" }, row.options.map((option) => h("li", { class: option === row.answer || option.startsWith(`${row.answer}.`) ? "true" : null }, AV.visible(option)))) : null,
    h("dl", { class: "short" }, h("dt", {}, "Answer"), h("dd", {}, h("b", { class: "truth" }, AV.visible(row.answer))),
      row.hint && [h("dt", {}, "Hint"), h("dd", {}, AV.visible(row.hint), h("span", { class: "small" }, row.hinted ? " (shown to the model)" : " (not shown)"))],
      row.needs && row.needs.length ? [h("dt", {}, "Needs"), h("dd", {}, row.needs.join(" + "))] : null,
      h("dt", {}, "Prompt"), h("dd", {}, h("code", {}, AV.visible(row.prompt_id)))),
    link ? h("p", { class: "all-answers" }, h("a", { href: link }, "All answers to this prompt, two side by side")) : null);

  function paid(row) {
    const components = Object.entries(row.components || {}), details = Object.entries(row.details || {});
    const facts = [["Reward", number(row.reward)], ["Advantage", row.advantage === null ? "masked" : row.advantage === undefined ? null : signed(row.advantage)],
      ["Baseline", row.baseline === undefined ? null : number(row.baseline), "Rbar: mean reward of the prompt's last visits"], ["Tier", row.tier],
      ["Age", row.age === undefined ? null : `${number(row.age)} ${row.age === 1 ? "version" : "versions"}`, "versions behind the policy that was trained"],
      ["Versions", row.versions ? row.versions.map(([version, tokens]) => (row.versions.length > 1 ? `${version} (${tokens} tokens)` : version)).join(", ") : row.version], ["Tokens", number(row.tokens)],
      ["End", row.finish_reason === "length" ? "token limit" : row.finish_reason], ["Temperature", row.temperature === undefined ? null : number(row.temperature)]];
    const bar = (value) => h("span", { class: `meter ${value < 0 ? "below" : ""}` }, h("i", { style: { width: `${Math.min(1, Math.abs(value)) * 100}%` } }));
    return h("section", { class: "paid", "aria-label": "Rewards" },
      components.length ? h("table", { class: "components" }, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Reward component"), h("th", { scope: "col" }, ""), h("th", { scope: "col" }, "Mark"))),
        h("tbody", {}, components.map(([name, value]) => [
          h("tr", {}, h("th", { scope: "row" }, AV.visible(name)), h("td", {}, value === null ? "" : bar(value)), h("td", {}, value === null ? badge("masked", "masked") : number(value))),
          details.filter(([key]) => key.startsWith(`${name}/`)).map(([key, mark]) =>
            h("tr", { class: "criterion" }, h("th", { scope: "row" }, AV.visible(key.slice(name.length + 1).replace(/_/g, " "))), h("td", {}, bar(mark)), h("td", {}, number(mark))))]))) : null,
      h("dl", { class: "facts-grid" }, facts.filter(([, value]) => value !== null && value !== undefined && value !== "").map(([name, value, meaning]) => h("div", { title: meaning }, h("dt", {}, name), h("dd", {}, value)))));
  }

  function sideBySide(rows, at, pick) {
    const [low, high] = range(rows);
    const card = (row, i) => h("button", { type: "button", class: "answer", "aria-current": i === at ? "true" : null, onclick: () => pick(i) },
      h("span", { class: "head" }, h("span", { class: `chip ${AV.rewardTone(row.reward, low, high)}` }, number(row.reward)),
        h("span", { class: "small" }, [row.advantage !== undefined ? `advantage ${row.advantage === null ? "masked" : signed(row.advantage)}` : "", row.age ? `age ${row.age}` : "", row.tokens ? `${row.tokens} tokens` : ""].filter(Boolean).join(" · "))),
      h("span", { class: "text" }, AV.visible((row.text || "").slice(0, 600)) || "(empty)"));
    const column = (title, replayed) => {
      const members = rows.map((row, i) => [row, i]).filter(([row]) => Boolean(row.replayed) === replayed);
      return h("div", {}, h("h3", {}, `${title} `, h("span", { class: "dim" }, members.length)), members.length ? members.map(([row, i]) => card(row, i)) : h("p", { class: "small" }, "none"));
    };
    return h("section", { class: "side", "aria-label": "The group side by side" }, column("Fresh", false), column("Replayed", true));
  }
})();
