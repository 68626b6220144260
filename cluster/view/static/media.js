"use strict";
// A prompt's clips: video with its sound, frames as images, what is heard alone, pictures.
(() => {
  const { h, mediaUrl, number, bytes } = AV;

  AV.media = (run, clips) => {
    if (!clips || !clips.length) return null;
    const videos = clips.filter((clip) => clip.kind === "video");
    const sounds = clips.filter((clip) => clip.kind === "audio");
    const box = h("section", { class: "media", "aria-label": "Media of the prompt" });
    videos.forEach((clip, index) => {
      // A sound that comes with the video in a file of its own is played with it.
      const sound = videos.length === 1 && sounds.length === 1 && sounds[0].name !== clip.name && !sounds[0].error ? sounds[0]
        : null;
      box.append(clip.error ? missing(clip) : video(run, clip, sound, index));
    });
    for (const clip of sounds) {
      const together = videos.length === 1 && sounds.length === 1 && !videos[0].error && !clip.error;
      const same = videos.some((one) => one.uri === clip.uri && !one.error);
      if (clip.error) box.append(missing(clip));
      else if (!together && !same) box.append(audio(run, clip));
    }
    for (const clip of clips.filter((one) => one.kind === "image")) box.append(clip.error ? missing(clip) : picture(run, clip));
    return box;
  };

  // Players that are taken off the page give their connections back.
  AV.stopMedia = (box) => {
    for (const player of box.querySelectorAll("video, audio")) { player.pause(); player.removeAttribute("src"); player.load(); }
  };

  const missing = (clip) => h("div", { class: "problem moved", role: "alert" }, h("b", {}, `The ${clip.kind} is not shown. `), AV.visible(clip.error));

  function windowOf(clip) {
    return clip.clip ? `#t=${clip.clip[0]},${clip.clip[1]}` : "";
  }

  function video(run, clip, sound, index) {
    const player = h("video", {
      controls: true, preload: "auto", playsinline: true, tabindex: "0", "data-player": index,
      src: mediaUrl(run, clip, "file") + windowOf(clip), "aria-label": `Video ${clip.name}${sound ? " with sound" : ""}`,
    });
    const facts = h("span", { class: "facts" });
    const box = h("figure", { class: "clip" }, h("div", { class: "screen" }, player), h("figcaption", {}, h("span", { class: "file", title: clip.uri }, AV.visible(clip.name)), facts));
    const codecs = Object.values(clip.codecs || {}).join(" + ");
    facts.textContent = [codecs, clip.duration ? `${number(clip.duration)} s` : "", clip.bytes ? bytes(clip.bytes) : "",
      clip.clip ? `window ${clip.clip[0]} to ${clip.clip[1]} s` : ""].filter(Boolean).join(" · ");
    if (sound) box.querySelector("figcaption").append(together(run, player, clip, sound));
    const strip = frames(run, clip, player);
    if (strip) box.append(strip);
    let failed = false;
    const fallBack = () => {
      if (failed || !player.isConnected || !player.hasAttribute("src")) return;
      failed = true;
      box.classList.add("unplayable");
      player.remove();
      box.querySelector(".screen").append(h("p", { class: "note", role: "status" },
        `This browser cannot play ${codecs || "this file"} (${AV.visible(clip.name)}). Its frames${clip.sound || sound ? " and its sound" : ""} are shown instead.`));
      if (clip.sound && !sound) box.append(h("audio", { controls: true, preload: "metadata", src: mediaUrl(run, clip, "sound.wav"), "aria-label": `Sound of ${clip.name}` }));
      if (sound) box.append(h("audio", { controls: true, preload: "metadata", src: mediaUrl(run, sound, "file"), "aria-label": `Sound ${sound.name}` }));
    };
    player.addEventListener("error", fallBack);
    // A container whose picture is not understood plays as sound alone.
    player.addEventListener("loadedmetadata", () => { if (!player.videoWidth) fallBack(); });
    return box;
  }

  // The sound follows the picture: begins, stops and jumps with it.
  function together(run, player, video, clip) {
    const sound = h("audio", { preload: "auto", src: mediaUrl(run, clip, "file") });
    // Each has its own window; the wav that stands in for a sound is cut to it already.
    const align = () => {
      const begin = clip.clip && !sound.src.endsWith("sound.wav") ? clip.clip[0] : 0;
      const wanted = Math.max(0, player.currentTime - (video.clip ? video.clip[0] : 0)) + begin;
      if (Math.abs(sound.currentTime - wanted) > 0.06) sound.currentTime = wanted;
      sound.playbackRate = player.playbackRate;
    };
    const start = () => { align(); if (!sound.ended) sound.play().catch(() => {}); };
    player.addEventListener("play", start);
    player.addEventListener("playing", start);
    player.addEventListener("seeked", () => { align(); if (!player.paused) start(); });
    for (const stop of ["pause", "ended", "waiting", "emptied"]) player.addEventListener(stop, () => sound.pause());
    player.addEventListener("ratechange", align);
    const wave = h("button", { type: "button", class: "sound", "aria-pressed": "true", title: AV.visible(clip.uri) }, "sound on");
    wave.addEventListener("click", () => {
      sound.muted = !sound.muted;
      wave.setAttribute("aria-pressed", String(!sound.muted));
      wave.textContent = sound.muted ? "sound off" : "sound on";
    });
    sound.addEventListener("error", () => {
      if (!sound.src.endsWith("sound.wav")) { sound.src = mediaUrl(run, clip, "sound.wav"); return; }
      wave.disabled = true;
      wave.textContent = "no sound";
    });
    return h("span", { class: "together" }, wave, sound);
  }

  function frames(run, clip, player) {
    if (!clip.frames) return null;
    const begin = clip.clip ? clip.clip[0] : 0;
    const length = clip.clip ? clip.clip[1] - clip.clip[0] : clip.duration || 0;
    const count = clip.frames + (clip.frames % 2);
    const images = Array.from({ length: count }, (_, i) => {
      const at = begin + ((i + 0.5) * length) / count;
      const image = h("img", { src: mediaUrl(run, clip, `frame-${i}.jpg`), alt: `Frame ${i + 1} at ${number(at)} s`, loading: "lazy", decoding: "async" });
      image.addEventListener("error", () => image.closest("button").remove());
      return h("button", { type: "button", class: "frame", title: `Go to ${number(at)} s`, onclick: () => { player.currentTime = at; } }, image, h("span", {}, `${number(at)} s`));
    });
    return h("div", { class: "strip" }, h("p", { class: "small" }, clip.frames_exact ? `The ${count} frames the model saw` : `${count} frames, evenly spaced`), h("div", { class: "frames" }, images));
  }

  const audio = (run, clip) => {
    const player = h("audio", { controls: true, preload: "metadata", src: mediaUrl(run, clip, "file") + windowOf(clip), "aria-label": `Sound ${clip.name}` });
    player.addEventListener("error", () => { if (!player.src.endsWith("sound.wav")) player.src = mediaUrl(run, clip, "sound.wav"); });
    return h("figure", { class: "clip" }, player, h("figcaption", {}, h("span", { class: "file", title: clip.uri }, AV.visible(clip.name))));
  };

  const picture = (run, clip) => {
    const image = h("img", { src: mediaUrl(run, clip, "file"), alt: `Image ${clip.name}` });
    image.addEventListener("error", () => { if (!image.src.endsWith("frame-0.jpg")) image.src = mediaUrl(run, clip, "frame-0.jpg"); });
    return h("figure", { class: "clip" }, image, h("figcaption", {}, h("span", { class: "file", title: clip.uri }, AV.visible(clip.name))));
  };
})();
