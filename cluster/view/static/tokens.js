"use strict";
// A completion with its tokens coloured by what the loss saw of them.
(() => {
  const { h, signed, number } = AV;
  const MOST = 3000; // tokens shown before somebody asks for the rest
  AV.COLOURS = [
    ["credit", "Advantage × TAS", "how much the token is pushed up or down"],
    ["ratio", "Log-ratio", "log-probability now minus at generation, nats"],
    ["entropy", "Entropy", "of the policy's next-token distribution, nats"],
    ["plain", "None", "no colours"],
  ];

  // Token ends count code points; strings here count UTF-16 units.
  AV.split = (row) => {
    const ends = row.token_ends;
    if (!Array.isArray(ends) || !ends.length) return null;
    const letters = /[\ud800-\udbff]/.test(row.text) ? Array.from(row.text) : row.text;
    let from = 0;
    return ends.map((end) => {
      const piece = typeof letters === "string" ? letters.slice(from, end) : letters.slice(from, end).join("");
      from = end;
      return piece;
    });
  };

  function values(row, mode) {
    if (mode === "credit") return row.weight && row.advantage !== null && row.advantage !== undefined ? row.weight.map((w) => w * row.advantage) : null;
    if (mode === "ratio") return row.log_ratio || null;
    if (mode === "entropy") return row.entropy || null;
    return null;
  }

  // mode is kept from rollout to rollout
  let mode = "credit";
  AV.nextColour = () => {
    const names = AV.COLOURS.map((colour) => colour[0]);
    const radio = document.querySelector(`input[name=colour][value=${names[(names.indexOf(mode) + 1) % names.length]}]`);
    if (radio) radio.click();
  };

  AV.completion = (row) => {
    const pieces = AV.split(row);
    const box = h("section", { class: "completion", "aria-label": "Completion" });
    if (!pieces) {
      box.append(h("pre", { class: "tokens", tabindex: "0" }, AV.visible(row.text || "(empty)")),
        h("p", { class: "small" }, row.tokens_left_out ? "The tokens' values were left out to keep the samples small." : "This sample has no values per token: it was saved by an older release, or is a held-out answer."));
      return box;
    }
    const text = h("div", { class: "tokens", role: "group", "aria-label": "Tokens; arrow keys move", tabindex: "-1" });
    const said = h("div", { class: "token-facts", "aria-live": "polite" }, h("span", { class: "small" }, "Point at a token, or move with the arrow keys."));
    const scale = h("div", { class: "scale" });
    let spans = [];

    function show(count) {
      spans = pieces.slice(0, count).map((piece, i) => h("span", { class: "token", tabindex: i ? "-1" : "0", "data-i": i }, AV.visible(piece) || "\u200b"));
      const rest = pieces.length - count;
      text.replaceChildren(...spans, rest > 0 ? h("button", { type: "button", onclick: () => { show(pieces.length); paint(); } }, `show ${rest.toLocaleString("en")} more tokens`) : "");
    }
    function paint() {
      const of = values(row, mode), entropy = mode === "entropy";
      const sizes = (of || []).map((v) => Math.abs(v ?? 0)).sort((a, b) => a - b);
      // The largest may be a lone spike: colours reach full strength at the 98th percentile.
      const top = Math.max(sizes[Math.floor(sizes.length * 0.98)] ?? 0, sizes.length ? sizes[sizes.length - 1] * 0.25 : 0);
      spans.forEach((span, i) => {
        const value = of ? of[i] : null;
        const size = value === null || value === undefined || !top ? 0 : Math.min(1, Math.abs(value) / top);
        // Within a completion it varies by a third only, as the weights do: the third power shows where.
        const part = mode === "credit" ? size ** 3 : size;
        span.style.setProperty("--p", (part * 100).toFixed(0) + "%");
        span.dataset.tone = entropy ? "warm" : value > 0 ? "up" : value < 0 ? "down" : "";
      });
      const label = AV.COLOURS.find((colour) => colour[0] === mode);
      scale.replaceChildren(...(mode === "plain" ? [] : !of ? [h("span", {}, mode === "credit" && row.advantage === null ? "The reward is masked: there is no advantage." : "Not known of this completion.")]
        : !top ? [h("span", {}, mode === "credit" ? "The advantage is 0: this completion teaches nothing." : "0 everywhere.")]
          : entropy ? ["0", h("i", { class: "bar warm" }), number(top)] : [signed(-top), h("i", { class: "bar both" }), signed(top)]),
      h("span", { class: "small" }, label[2]));
    }
    function tell(i) {
      const at = (list) => (list ? list[i] : null), credit = values(row, "credit");
      said.replaceChildren(h("code", {}, AV.visible(pieces[i]) || "(part of a character)"), h("span", {}, `#${i + 1} of ${pieces.length}`),
        ...[["p", row.logprobs ? Math.exp(at(row.logprobs)) : null, number], ["log-ratio", at(row.log_ratio), signed], ["entropy", at(row.entropy), number],
          ["TAS", at(row.weight), number], ["adv × TAS", at(credit), signed]].map(([name, value, format]) => (value === null || value === undefined ? "" : h("span", {}, h("i", {}, name + " "), format(value)))));
    }
    const near = (event) => { const span = event.target.closest(".token"); return span ? Number(span.dataset.i) : null; };
    text.addEventListener("pointerover", (event) => { const i = near(event); if (i !== null) tell(i); });
    text.addEventListener("focusin", (event) => { const i = near(event); if (i !== null) tell(i); });
    text.addEventListener("keydown", (event) => {
      const i = near(event), by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 }[event.key];
      if (i === null || !by) return;
      event.preventDefault(); event.stopPropagation();
      const next = spans[Math.max(0, Math.min(spans.length - 1, i + by))];
      spans[i].tabIndex = -1; next.tabIndex = 0; next.focus();
    });
    const choice = h("fieldset", { class: "segments" }, h("legend", {}, "Colour the tokens by"), AV.COLOURS.map(([name, label, meaning]) =>
      h("label", { title: meaning }, h("input", { type: "radio", name: "colour", value: name, checked: name === mode, onchange: () => { mode = name; paint(); } }), h("span", {}, label))));
    show(Math.min(MOST, pieces.length));
    paint();
    box.append(choice, scale, text, said);
    return box;
  };
})();
