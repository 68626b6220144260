"use strict";
// The address decides the page; keys; runs under way are looked at again every few seconds.
(() => {
  const { h } = AV;
  const main = document.getElementById("main"), trail = document.getElementById("trail"), live = document.getElementById("live"), help = document.getElementById("help");
  const EVERY = 3000;
  let showing = 0;

  function crumbs(parts) {
    const links = [h("a", { href: "#/" }, "runs")];
    if (parts[0] === "run" && parts[1]) links.push(h("a", { href: AV.to(["run", parts[1]]) }, AV.visible(parts[1])));
    if (parts[0] === "compare") links.push(h("span", {}, "compare"));
    if (parts[0] === "prompt") links.push(h("span", {}, "one prompt"));
    trail.replaceChildren(...links);
    document.title = parts[1] ? `${parts[1]} · avatar view` : "avatar view";
  }

  async function show({ quiet = false } = {}) {
    const { parts, query } = AV.place(), mine = (showing += 1);
    AV.closeRollout = AV.sibling = null;
    crumbs(parts);
    try {
      const page = parts[0] === "run" && parts[1] ? await AV.runPage(parts[1], parts[2] || "", query)
        : parts[0] === "compare" && parts[2] ? await AV.comparePage(parts[1], parts[2])
          : parts[0] === "prompt" && parts[1] ? await AV.promptPage(parts[1], query) : await AV.runsPage();
      if (mine !== showing) return;
      const y = window.scrollY;
      AV.stopMedia(main);
      const held = quiet && document.activeElement && document.activeElement.getAttribute("href");
      main.replaceChildren(page);
      if (held) { const same = [...main.querySelectorAll("a")].find((link) => link.getAttribute("href") === held); if (same) same.focus({ preventScroll: true }); }
      if (quiet) window.scrollTo(0, y); else window.scrollTo(0, 0);
      if (!quiet) performance.mark("avatar-shown");
    } catch (error) {
      if (mine === showing) main.replaceChildren(AV.problem(error), h("p", {}, h("a", { href: "#/" }, "All runs")));
    }
  }
  window.addEventListener("hashchange", () => show());

  // -- runs under way -----------------------------------------------------------------------------
  async function look() {
    const { parts } = AV.place();
    const name = parts[0] === "run" && parts[1] ? `run/${parts[1]}` : ["compare", "prompt"].includes(parts[0]) ? "" : "runs";
    if (document.visibilityState === "visible" && name) {
      try {
        const changed = await AV.changed(name);
        live.textContent = "live";
        live.className = "ok";
        // A list that somebody reads is not pulled away from under them.
        if (changed && parts[2] !== "rollouts" && !document.querySelector("input:focus")) await show({ quiet: true });
        else if (changed) live.textContent = "new steps: reload to see them";
      } catch { live.textContent = "not connected"; live.className = "off"; }
    }
    setTimeout(look, EVERY);
  }

  // -- keys --------------------------------------------------------------------------------------------
  document.getElementById("help-button").addEventListener("click", () => help.showModal());
  document.addEventListener("keydown", (event) => {
    const writing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) && !["checkbox", "radio"].includes(event.target.type);
    if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
    if (event.key === "Escape") {
      if (writing) event.target.blur();
      else if (AV.closeRollout && document.querySelector(".split.opened")) AV.closeRollout();
      return;
    }
    if (writing) return;
    const { parts } = AV.place();
    const video = document.querySelector("video[data-player]");
    const keys = {
      "?": () => help.showModal(),
      "/": () => { const field = document.querySelector("input[type=search]"); if (field) field.focus(); },
      c: () => AV.nextColour(), h: () => AV.sibling && AV.sibling(-1), l: () => AV.sibling && AV.sibling(1),
      j: () => step(1), k: () => step(-1), ArrowDown: () => (onList() ? step(1) : false), ArrowUp: () => (onList() ? step(-1) : false),
      " ": () => (video && !/^(BUTTON|A|VIDEO|AUDIO|SUMMARY|INPUT)$/.test(event.target.tagName) ? (video.paused ? video.play() : video.pause()) : false),
    };
    if (parts[0] === "run" && "12345".includes(event.key)) { location.hash = AV.to(["run", parts[1], ["", "rollouts", "steps", "events", "recipe"][Number(event.key) - 1]].filter(Boolean)); return; }
    const act = keys[event.key];
    if (act && act() !== false) event.preventDefault();
  });
  const onList = () => Boolean(document.querySelector(".run-list, .groups"));
  // j and k: rows of the list of rollouts; elsewhere the links of the list.
  function step(by) {
    const list = document.querySelector(".list");
    if (list) { list.dispatchEvent(new KeyboardEvent("keydown", { key: by > 0 ? "ArrowDown" : "ArrowUp", bubbles: false })); return; }
    const links = [...document.querySelectorAll(".run-list .name, .group .about a")], at = links.indexOf(document.activeElement);
    const next = links[Math.max(0, Math.min(links.length - 1, at + by))];
    if (next) { next.focus(); next.scrollIntoView({ block: "nearest" }); }
  }

  show();
  if (!AV.files) setTimeout(look, EVERY); else { live.textContent = "exported"; }
})();
