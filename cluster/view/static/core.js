"use strict";
// What every part of the page uses: elements, data, addresses, numbers as text.
// Text of prompts and completions only ever becomes a text node: there is no innerHTML in this page.
const AV = {};
(() => {
  const NS = "http://www.w3.org/2000/svg";

  function fill(element, attributes, children) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (name === "style") for (const [key, of] of Object.entries(value)) element.style.setProperty(key, of);
      else if (name === "value") element.value = value;
      else if (name === "checked" || name === "muted" || name === "open") element[name] = value;
      else element.setAttribute(name, value === true ? "" : String(value));
    }
    for (const child of children.flat(4)) {
      if (child === null || child === undefined || child === false || child === "") continue;
      element.append(child instanceof Node ? child : document.createTextNode(String(child)));
    }
    return element;
  }
  AV.h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
  AV.svg = (tag, attributes, ...children) => fill(document.createElementNS(NS, tag), attributes, children);

  // Control characters and marks that turn the direction of text are spelled out, as on a terminal.
  const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069\ud800-\udfff]/g;
  AV.visible = (text) =>
    String(text ?? "").replace(/[\ud800-\udbff][\udc00-\udfff]|[\s\S]/g, (letter) =>
      letter.length > 1 ? letter : letter.replace(HIDDEN, (c) =>
        c.charCodeAt(0) < 256 ? "\\x" + c.charCodeAt(0).toString(16).padStart(2, "0")
          : "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0")));

  // -- data: from the server, or from scripts beside the page -------------------------------------
  AV.files = document.documentElement.dataset.mode === "files";
  const part = (text) => encodeURIComponent(text).replace(/[!'()*]/g, (c) => "%" + c.charCodeAt(0).toString(16).toUpperCase());
  const onDisk = (name) => name.split("/").map((text) => part(text).replace(/%/g, "_")).join("/");
  const waiting = new Map(), known = new Map(), tags = new Map();
  AV.deliver = (name, document) => { known.set(name, document); };

  function fromDisk(name) {
    if (known.has(name)) return Promise.resolve(known.get(name));
    if (!waiting.has(name)) {
      waiting.set(name, new Promise((done, failed) => {
        const script = AV.h("script", { src: `data/${onDisk(name)}.js` });
        script.onload = () => { script.remove(); known.has(name) ? done(known.get(name)) : failed(new Error(`data/${onDisk(name)}.js is not whole`)); };
        script.onerror = () => { script.remove(); waiting.delete(name); failed(new Error(`data/${onDisk(name)}.js is missing from this export`)); };
        document.head.append(script);
      }));
    }
    return waiting.get(name);
  }

  AV.get = async (name) => {
    if (AV.files) return fromDisk(name);
    let response;
    try {
      response = await fetch(`data/${name.split("/").map(part).join("/")}.json`, { cache: "no-cache" });
    } catch {
      throw new Error("the server does not answer: was `avatar view` ended?");
    }
    if (!response.ok) throw new Error((await response.text()).trim() || `the server says ${response.status}`);
    const tag = response.headers.get("etag");
    if (tag && tags.get(name) === tag && known.has(name)) return known.get(name);
    const document = await response.json();
    tags.set(name, tag);
    known.set(name, document);
    // Groups that were looked at long ago are asked for again.
    for (const old of known.keys()) { if (known.size <= 120) break; if (old.includes("/group/")) { known.delete(old); tags.delete(old); } }
    return document;
  };
  // True when a document is not the one that was read last.
  AV.changed = async (name) => {
    const before = tags.get(name);
    await AV.get(name);
    return tags.get(name) !== before;
  };
  AV.mediaUrl = (run, clip, what) => AV.files
    ? `media/${clip.key}/${what === "file" ? "file" + clip.suffix : what}`
    : `media/${part(run)}/${clip.key}/${what}`;

  // -- addresses: #/run/ID/rollouts?tier=hard&at=step_000010/0/3 -----------------------------------
  AV.place = () => {
    const [path, query] = location.hash.replace(/^#/, "").split("?");
    const decoded = (text) => { try { return decodeURIComponent(text); } catch { return text; } };
    return { parts: path.split("/").filter(Boolean).map(decoded), query: new URLSearchParams(query || "") };
  };
  AV.to = (parts, query) => {
    const words = new URLSearchParams();
    for (const [name, value] of Object.entries(query || {})) if (value !== "" && value !== null && value !== undefined && value !== false) words.set(name, value);
    const said = words.toString().replace(/%2F/g, "/");
    return "#/" + parts.map(part).join("/") + (said ? "?" + said : "");
  };

  // -- text ----------------------------------------------------------------------------------------
  AV.number = (value, digits = 3) => {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    if (Number.isInteger(value)) return value.toLocaleString("en");
    const size = Math.abs(value);
    if (size >= 10000) return Math.round(value).toLocaleString("en");
    if (size > 0 && size < 0.001) return value.toExponential(1);
    return String(Number(value.toPrecision(digits)));
  };
  AV.signed = (value) => (value === null || value === undefined ? "–" : (value > 0 ? "+" : value < 0 ? "−" : "") + AV.number(Math.abs(value)));
  AV.ago = (seconds) => {
    for (const [size, name] of [[86400, "d"], [3600, "h"], [60, "min"]]) if (seconds >= size) return `${Math.floor(seconds / size)} ${name} ago`;
    return "now";
  };
  AV.span = (seconds) => {
    const whole = Math.max(0, Math.round(seconds));
    const hours = Math.floor(whole / 3600), minutes = Math.floor((whole % 3600) / 60);
    return hours ? `${hours} h ${minutes} min` : minutes ? `${minutes} min ${whole % 60} s` : `${whole} s`;
  };
  AV.bytes = (size) => size > 1e6 ? `${(size / 1e6).toFixed(1)} MB` : size > 1e3 ? `${Math.round(size / 1e3)} kB` : `${size} B`;
  AV.state = (run) => (run.lost ? "lost" : run.state);
  // What a run is busy with; a run that has ended is busy with nothing.
  AV.phase = (run) => (run.lost || ["finished", "interrupted", "failed"].includes(run.state) ? "" : run.phase || "");
  AV.badge = (text, kind, title) => AV.h("span", { class: `badge ${kind || ""}`, title }, text);
  AV.problem = (error) => AV.h("div", { class: "problem", role: "alert" }, AV.h("b", {}, "This cannot be shown. "), AV.visible(error.message || error));
  AV.faults = (list) => list && list.length
    ? AV.h("details", { class: "faults" }, AV.h("summary", {}, `${list.length} ${list.length > 1 ? "things" : "thing"} of this run could not be read and ${list.length > 1 ? "are" : "is"} left out`),
      AV.h("ul", {}, list.map((fault) => AV.h("li", {}, AV.visible(fault)))))
    : null;
})();
