"use strict";
(() => {
  const pause = 250; // ms between two requests: as often as a person can read a growing number
  const silence = 3000; // an answer that takes longer is a broken connection
  const firstRetry = 1000, lastRetry = 10000; // ms
  const slots = 60; // windows shown
  const fewest = 12; // the chart has room for so many, and for more as they come

  const $ = (id) => document.getElementById(id);
  const whole = new Intl.NumberFormat("en");
  const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
  // changed reports whether what an element shows is to be made anew.
  const shown = {};
  const changed = (id, of) => {
    const made = JSON.stringify(of);
    if (shown[id] === made) return false;
    shown[id] = made;
    return true;
  };
  // row makes a row of a table, with its first cell as its head.
  const row = (cells) => {
    const tr = document.createElement("tr");
    cells.forEach((words, i) => {
      const cell = document.createElement(i ? "td" : "th");
      if (!i) cell.scope = "row";
      cell.textContent = words;
      tr.append(cell);
    });
    return tr;
  };
  const text = (id, s) => { const e = $(id); if (e.textContent !== s) e.textContent = s; };
  const at = (ms) => new Date(ms).toISOString();

  // clock is the time of day, with what a window shorter than a second needs.
  const clock = (ms) => at(ms).slice(11, ms % 1000 ? 23 : 19);
  const rate = (n) => n >= 10000 ? short.format(n) : n >= 10 || n === Math.round(n) ? whole.format(Math.round(n)) : n.toFixed(1);
  const remaining = (ms) => {
    const s = Math.ceil(ms / 1000);
    return s >= 120 ? Math.floor(s / 60) + ":" + String(s % 60).padStart(2, "0") : s + " s";
  };
  const span = (s) => {
    if (s < 1) return Math.round(s * 1000) + " ms";
    if (s < 120) return Math.round(s) + " s";
    if (s < 7200) return Math.round(s / 60) + " min";
    return s < 172800 ? Math.round(s / 3600) + " h" : Math.round(s / 86400) + " days";
  };

  const length = (ms) => ms % 3600000 === 0 ? ms / 3600000 + " h" : ms % 60000 === 0 ? ms / 60000 + " min" : ms >= 1000 ? ms / 1000 + " s" : ms + " ms";

  // The state of the page: the last answer, and what earlier answers contained.
  let now = null;
  let windows = []; // oldest first, the open one last
  let samples = []; // [unix seconds, unique, duplicate, refused], each per second

  // ---- figures

  function show(m) {
    now = m;
    if (m.all) samples = [];
    samples = samples.concat(m.rates || []).slice(-m.rates_kept);
    const closed = m.windows ? m.windows.slice().reverse() : m.all ? [] : windows.slice(0, -1);
    const turned = windows.length > 0 && m.windows;
    windows = closed.slice(-(slots - 1)).concat([m.open]);

    const o = m.open;
    for (const e of document.querySelectorAll(".scope")) e.hidden = !m.shared;
    const start = Date.parse(o.window_start), end = start + o.window_ms;
    const left = Math.max(0, end - m.time);
    const n = whole.format(unique(o));
    text("unique", n);
    $("unique").classList.toggle("long", n.length > 9);
    text("window", clock(start) + " to " + clock(end) + (o.exact ? "" : ", not exact"));
    $("left").title = left === 0 ? "The window is over. The next one opens with the next request, or a moment later without one." : "";
    text("left", left === 0 ? "turning" : o.window_ms < 10000 ? (left / 1000).toFixed(1) + " s left" : remaining(left) + " left");
    const passed = Math.min(1, Math.max(0, (m.time - start) / o.window_ms));
    $("progress").firstElementChild.style.transform = "scaleX(" + passed.toFixed(4) + ")";
    $("progress").setAttribute("aria-valuenow", String(Math.floor(passed * 100)));
    $("progress").setAttribute("aria-valuetext", $("left").textContent);
    text("duplicates", whole.format(o.duplicates));
    text("last", closed.length ? figure(unique(closed[closed.length - 1])) : "–");
    text("length", length(o.window_ms));
    text("pending", whole.format(m.ready.records_pending));
    text("connections", whole.format(m.connections));
    text("who", m.group + " / " + m.instance);
    $("shared").hidden = !m.shared;
    if (m.shared) {
      text("shared", "This instance answered ok to " + whole.format(o.unique) + " of them. " + (m.shared.members > 1 ? m.shared.members + " instances count as one" : "No other instance of the group is alive") +
        (m.shared.leading ? "; this one publishes the records." : "."));
    }
    room(m);
    memory(m);
    text("up", "Up " + span((m.time - m.started) / 1000) + ", version " + m.version + ".");
    readiness(m, n);

    const counted = m.answers.some((a) => a.count > 0);
    $("hint").hidden = counted || windows.some((w) => w.unique > 0);
    if (!counted && m.public_port) {
      const host = location.hostname.includes(":") ? "[" + location.hostname.replace(/[[\]]/g, "") + "]" : location.hostname;
      $("hint").querySelector("code").textContent = (m.public_tls ? "curl -k 'https://" : "curl 'http://") + host + ":" + m.public_port + "/api/verve/accept?id=42'";
    }

    const s = samples[samples.length - 1];
    if (s) ["unique", "duplicate", "refused"].forEach((name, i) => text("rate-" + name, rate(s[i + 1])));

    checks(m);
    results("answers", m.answers, ["ok", "duplicate"], ["replayed"]);
    keys(m);
    text("batches", "of ids; " + whole.format(m.batches) + (m.batches === 1 ? " batch" : " batches") + " answered");
    results("callbacks", m.callbacks, ["delivered", "merged"]);
    text("callbacks-now", m.callbacks_waiting + " waiting, " + m.callbacks_in_flight + " in flight" +
      (m.breakers_open ? ", " + m.breakers_open + (m.breakers_open === 1 ? " destination" : " destinations") + " given a rest after failures" : "") + ".");
    draw();
    if (turned) say(closed[closed.length - 1]);
  }

  // unique is the count of a window: that of the whole group if its instances count
  // as one, null if this instance does not know it.
  const unique = (w) => !now.shared ? w.unique : w.whole_group ? w.whole_group.unique : null;
  const figure = (n) => n === null ? "–" : whole.format(n);

  // say announces a closed window to screen readers, and not every number.
  function say(w) {
    if (w && w.window_ms >= 10000 && unique(w) !== null) text("said", "Window " + clock(Date.parse(w.window_start)) + " closed with " + figure(unique(w)) + " unique ids.");
  }

  // room shows how many of the ids that fit the open window has.
  function room(m) {
    const used = unique(m.open), share = m.max_ids ? Math.min(1, used / m.max_ids) : 0;
    text("room-text", !m.max_ids ? (m.shared ? "as many as fit into Redis" : "no limit is known") :
      percent(share) + " % of " + (m.max_ids_estimated ? "about " + short.format(m.max_ids) + " that fit into memory" : whole.format(m.max_ids) + " (--max-ids)"));
    const bar = $("room");
    bar.hidden = !m.max_ids;
    bar.firstElementChild.style.transform = "scaleX(" + share.toFixed(4) + ")";
    bar.dataset.light = share >= .95 ? "bad" : share >= .8 ? "warn" : "good";
    bar.setAttribute("aria-valuenow", String(Math.floor(share * 100)));
    bar.setAttribute("aria-valuetext", $("room-text").textContent);
  }

  const bytes = (n) => n < 1e9 ? Math.round(n / 1e6) + " MB" : (n / 1e9).toFixed(1) + " GB";

  function memory(m) {
    const all = m.resident_bytes ? bytes(m.resident_bytes) + " " : "";
    const ids = bytes(m.id_bytes) + " for ids" + (m.max_id_bytes ? ", at most " + bytes(m.max_id_bytes) : "");
    if (!changed("memory", [all, ids])) return;
    const small = document.createElement("small");
    small.textContent = ids;
    $("memory").replaceChildren(all, small);
  }

  // readiness shows in the header, in a banner, in the title and in the icon whether
  // requests should be sent here, and what fails.
  function readiness(m, n) {
    const list = (checks) => (checks || []).map((c) => names[c] || c).join(", ");
    const blocking = m.ready.ready ? "" : list(m.blocking) || "unknown reason", failing = list(m.failing);
    const state = blocking ? "bad" : failing ? "warn" : "live";
    const what = blocking ? "not ready: " + blocking : failing ? failing + " failing" : "";
    $("link").dataset.state = state;
    text("link-text", what || "live");
    document.title = (what ? what + " · " : "") + n + " · Verve";
    icon(state);
    $("alarm").hidden = !what;
    $("alarm").dataset.level = state;
    text("alarm-what", what && (blocking ? "This instance is not ready: " + blocking + ". /readyz answers 503." : what + ". This instance is ready" + (m.sinks.some((s) => (m.failing || []).includes(s.name)) ? ", and its records wait in the spool." : ".")));
    const why = (blocking ? m.blocking || [] : m.failing || []).map((c) => (names[c] || c) + ": " + m.ready.checks[c].reason);
    text("alarm-why", why.join(" · "));
  }

  function icon(state) {
    const colour = { live: "0b5fce", warn: "a85800", bad: "b3203a", lost: "545c66" }[state];
    const href = $("icon").getAttribute("href").replace(/fill='%23[0-9a-f]{6}'/, "fill='%23" + colour + "'");
    if ($("icon").getAttribute("href") !== href) $("icon").setAttribute("href", href);
  }

  const shapes = {
    good: ["M10 1a9 9 0 1 0 0 18a9 9 0 1 0 0-18z", "M5.8 10.3l2.9 2.9 5.5-6"],
    warn: ["M10 1.4L19.4 18.4H.6z", "M10 7.4v5M10 15.4v.1"],
    bad: ["M6.3 1h7.4L19 6.3v7.4L13.7 19H6.3L1 13.7V6.3z", "M6.8 6.8l6.4 6.4M13.2 6.8l-6.4 6.4"],
  };
  const names = { dedup: "Ids", server: "Server", spool: "Spool", kafka: "Kafka", file: "Counts file", redis: "Redis", clock: "Clock", admin: "Admin listener" };

  function checks(m) {
    const r = m.ready;
    if (changed("checks", [r.checks, m.failing, m.sinks])) {
      $("checks").replaceChildren(...Object.entries(r.checks).map(([name, c]) => {
        // What answering ids does not need is a warning.
        const light = c.ok ? "good" : (m.failing || []).includes(name) ? "warn" : "bad";
        const li = document.createElement("li");
        li.dataset.light = light;
        li.dataset.check = name;
        const icon = document.createElementNS("http://www.w3.org/2000/svg", "svg");
        icon.setAttribute("viewBox", "0 0 20 20");
        icon.setAttribute("aria-hidden", "true");
        shapes[light].forEach((d, i) => {
          const p = document.createElementNS("http://www.w3.org/2000/svg", "path");
          p.setAttribute("d", d);
          p.setAttribute("class", i ? "sign" : "shape");
          icon.append(p);
        });
        const line = document.createElement("div");
        const title = document.createElement("b"), state = document.createElement("em");
        title.textContent = names[name] || name;
        state.textContent = c.ok ? "ready" : light === "warn" ? "failing" : "down";
        line.append(title, state);
        li.append(icon, line);
        const sink = m.sinks.find((s) => s.name === name);
        for (const [kind, words] of [["target", sink && sink.target && "Records go to " + sink.target], ["", c.reason]]) {
          if (!words) continue;
          const p = document.createElement("p");
          p.className = kind;
          p.textContent = words;
          li.append(p);
        }
        return li;
      }));
    }
    text("records", !m.sinks.length ? "Records go nowhere: no broker and no counts file is set." :
      r.records_pending === 0 ? "No record waits in the spool" + (m.shared ? " of this instance." : ".") :
      whole.format(r.records_pending) + (r.records_pending === 1 ? " record waits" : " records wait") + " in the spool, the oldest for " + span(r.records_oldest_age_seconds) + ".");
  }

  // keys lists the largest keys of the open window with their part of it.
  function keys(m) {
    const list = m.keys || [];
    if (!changed("keys", [m.open.keys, list])) return;
    $("keys-card").hidden = list.length === 0;
    $("keys").replaceChildren(...list.map((k) => row([k.key, whole.format(k.unique), percent(k.share) + " %"])));
    const more = (m.open.keys || 0) - list.length;
    text("keys-more", more > 0 ? "and " + whole.format(more) + (more === 1 ? " more key" : " more keys") : "");
  }

  const percent = (share) => share === 0 ? "0" : share < .001 ? "under 0.1" : share < .1 ? (share * 100).toFixed(1) : String(Math.floor(share * 100));

  // results fills a table with the results that happened, and the usual ones. Those that
  // are neither usual nor harmless are faults.
  function results(id, list, usual, harmless = []) {
    const rows = list.filter((r) => r.count > 0 || usual.includes(r.result));
    if (!changed(id, rows)) return;
    $(id).replaceChildren(...rows.map((r) => {
      const tr = row([r.result.replaceAll("_", " "), whole.format(r.count)]);
      tr.dataset.result = r.result;
      tr.className = usual.includes(r.result) || harmless.includes(r.result) ? "" : "fault";
      return tr;
    }));
  }

  // ---- charts

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const font = "12px system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif";

  function axis(extra) {
    return Object.assign({ stroke: css("--soft"), font, grid: { stroke: css("--grid"), width: 1 }, ticks: { show: false } }, extra);
  }

  // texture is the filling of a bar, told apart without its colour.
  function texture(state) {
    const colour = css("--" + state);
    if (state === "delivered") return colour;
    const d = Math.max(1, Math.round(devicePixelRatio)), size = (state === "open" ? 4 : 6) * d;
    const c = document.createElement("canvas");
    c.width = c.height = size;
    const g = c.getContext("2d");
    g.strokeStyle = g.fillStyle = colour;
    g.globalAlpha = .16;
    g.fillRect(0, 0, size, size);
    g.globalAlpha = 1;
    if (state === "open") g.fillRect(0, 0, size, 2 * d);
    if (state === "spooled") {
      g.lineWidth = 2 * d;
      for (const x of [-size, 0, size]) {
        g.beginPath();
        g.moveTo(x - d, size + d);
        g.lineTo(x + size + d, -d);
        g.stroke();
      }
    }
    return g.createPattern(c, "repeat");
  }

  let charts = null;

  function build() {
    const fills = {}, strokes = {};
    for (const state of ["open", "sealed", "spooled", "delivered"]) {
      fills[state] = texture(state);
      strokes[state] = css("--" + state);
    }
    const each = (of) => ({ unit: 3, values: () => windows.map((w) => of[w.state] || of.sealed) });
    const label = (i) => { const w = windows[i]; return w ? clock(Date.parse(w.window_start)) : ""; };
    // Counts are whole, and so are the marks beside them.
    const marks = [];
    for (let p = 1; p < 1e15; p *= 10) marks.push(p, 2 * p, 5 * p);
    const upright = (extra) => axis(Object.assign({ size: 48, space: 36, incrs: marks, values: (u, ticks) => ticks.map((v) => short.format(v)) }, extra));
    const across = (extra) => axis(Object.assign({ size: 30, grid: { show: false } }, extra));
    const common = (id) => ({
      ...size(id),
      legend: { show: false },
      padding: [8, 28, 0, 0],
    });

    const bars = new uPlot(Object.assign(common("windows"), {
      cursor: { y: false, points: { show: false }, drag: { x: false, y: false } },
      scales: { x: { time: false, range: () => [-.6, Math.max(fewest, windows.length) - .4] }, y: { range: (u, lo, hi) => [0, Math.max(4, hi) * 1.06] } },
      axes: [
        across({ space: 84, incrs: [1, 2, 5, 10, 15, 20, 30], values: (u, ticks) => ticks.map(label) }),
        upright(),
      ],
      series: [{}, { width: 1.5, stroke: strokes.open, paths: uPlot.paths.bars({ size: [.72, 72], disp: { fill: each(fills), stroke: each(strokes) } }), points: { show: false } }],
      hooks: { setCursor: [() => read("windows")] },
    }), barData(), $("windows"));

    const line = (name, dash) => ({ stroke: css("--" + name), width: 2, dash, points: { show: false } });
    const lines = new uPlot(Object.assign(common("rates"), {
      cursor: { y: false, points: { size: 7 }, drag: { x: false, y: false } },
      tzDate: (s) => uPlot.tzDate(new Date(s * 1e3), "Etc/UTC"),
      scales: { x: { range: (u, lo, hi) => [Math.max(lo, hi - 120), Math.max(hi, lo + 20)] }, y: { range: (u, lo, hi) => [0, Math.max(4, hi) * 1.08] } },
      axes: [
        across({ space: 76, values: (u, ticks) => ticks.map((s) => clock(s * 1e3)) }),
        upright(),
      ],
      series: [{}, line("unique"), line("duplicate", [7, 4]), line("refused", [2, 3])],
      hooks: { setCursor: [() => read("rates")] },
    }), lineData(), $("rates"));
    charts = { windows: bars, rates: lines };
  }

  const size = (id) => ({ width: Math.max(120, $(id).clientWidth), height: Math.max(120, $(id).clientHeight) });

  function barData() {
    return [windows.map((_, i) => i), windows.map(unique)];
  }

  function lineData() {
    // With one sample there is no line yet, and no time to place it in.
    const s = samples.length ? samples : [[Math.floor(now.time / 1000), null, null, null]];
    return [0, 1, 2, 3].map((k) => s.map((v) => v[k]));
  }

  function draw() {
    if (!charts) build();
    charts.windows.setData(barData());
    charts.rates.setData(lineData());
    for (const [id, list] of [["windows", windows], ["rates", samples]]) {
      $(id).setAttribute("aria-valuemax", String(Math.max(0, list.length - 1)));
      read(id);
    }
    for (const li of document.querySelectorAll(".legend li")) {
      const n = String(windows.filter((w) => w.state === li.dataset.state).length);
      if (li.lastElementChild.textContent !== n) li.lastElementChild.textContent = n;
    }
    table();
  }

  function describe(id, i) {
    const list = id === "windows" ? windows : samples, v = list[i];
    if (!v) return "";
    if (id === "rates") return clock(v[0] * 1e3) + ": " + rate(v[1]) + " unique, " + rate(v[2]) + " duplicate, " + rate(v[3]) + " refused per second";
    const here = whole.format(v.unique) + " unique, " + whole.format(v.duplicates) + " duplicate";
    const counts = now.shared ? figure(unique(v)) + " unique in the whole group; by this instance " + here : here;
    return clock(Date.parse(v.window_start)) + ": " + counts + ", " + v.state + notes(v);
  }

  // pointed is what the cursor is at, or the newest.
  function pointed(id) {
    const last = (id === "windows" ? windows : samples).length - 1;
    const i = charts && charts[id].cursor.idx;
    return typeof i === "number" ? Math.min(last, Math.max(0, i)) : last;
  }

  function read(id) {
    const i = pointed(id);
    const s = describe(id, i);
    text(id + "-read", s);
    $(id).setAttribute("aria-valuenow", String(Math.max(0, i)));
    $(id).setAttribute("aria-valuetext", s || "nothing yet");
  }

  function notes(w) {
    const n = [], of = now.shared && w.whole_group || w;
    if (w.state !== "open" && !of.complete) n.push("partial");
    if (!of.exact) n.push("not exact");
    return n.length ? ", " + n.join(", ") : "";
  }

  function table() {
    if (!$("table").open || !changed("table", windows)) return;
    const columns = ["window (UTC)", ...(now.shared ? ["unique, whole group", "unique, this instance", "duplicates, this instance"] : ["unique", "duplicates"]), "record", "notes"];
    $("table").querySelector("thead tr").replaceChildren(...columns.map((name) => {
      const th = document.createElement("th");
      th.scope = "col";
      th.textContent = name;
      return th;
    }));
    $("table").querySelector("tbody").replaceChildren(...windows.slice().reverse().map((w) => {
      const start = Date.parse(w.window_start);
      const day = at(start).slice(0, 10);
      const tr = row([(day === at(now.time).slice(0, 10) ? "" : day + " ") + clock(start), ...(now.shared ? [figure(unique(w))] : []), whole.format(w.unique), whole.format(w.duplicates), w.state, notes(w).slice(2)]);
      const record = tr.cells[columns.length - 2], mark = document.createElement("i");
      record.dataset.state = w.state;
      mark.setAttribute("aria-hidden", "true");
      record.prepend(mark);
      return tr;
    }));
  }

  for (const id of ["windows", "rates"]) {
    $(id).addEventListener("keydown", (e) => {
      const last = (id === "windows" ? windows : samples).length - 1, i = pointed(id);
      if (!charts || last < 0) return;
      const to = { ArrowLeft: i - 1, ArrowRight: i + 1, ArrowDown: i - 1, ArrowUp: i + 1, PageUp: i + 10, PageDown: i - 10, Home: 0, End: last, Escape: null }[e.key];
      if (to === undefined) return;
      e.preventDefault();
      const u = charts[id], at = Math.max(0, Math.min(last, to));
      u.setCursor(to === null ? { left: -10, top: -10 } : { left: u.valToPos(u.data[0][at], "x"), top: 10 });
    });
  }
  $("table").addEventListener("toggle", table);

  const resized = new ResizeObserver(() => {
    for (const id in charts) {
      const u = charts[id], to = size(id);
      if (u.width !== to.width || u.height !== to.height) u.setSize(to);
    }
  });
  for (const id of ["windows", "rates"]) resized.observe($(id));

  function restyle() {
    if (!charts) return;
    for (const id in charts) charts[id].destroy();
    build();
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", restyle);

  // ---- the connection

  let asking = false, tries = 0, retryAt = 0;
  let has = ""; // what the page has, in the words of the server

  function live() {
    tries = 0;
    if (!$("lost").hidden) text("said", "Connected again.");
    $("lost").hidden = true;
    $("lost-why").textContent = "";
    $("main").classList.remove("stale");
  }

  function lost(why) {
    const wait = Math.min(firstRetry * 2 ** tries++, lastRetry);
    retryAt = performance.now() + wait;
    $("link").dataset.state = "lost";
    text("link-text", "not connected");
    icon("lost");
    $("alarm").hidden = true;
    text("alarm-what", "");
    $("lost").hidden = false;
    text("lost-why", why);
    $("main").classList.toggle("stale", now !== null);
    document.title = "not connected · Verve";
    countdown();
  }

  function countdown() {
    const s = Math.max(0, Math.ceil((retryAt - performance.now()) / 1000));
    text("lost-when", (now ? "The figures below are those of " + clock(Math.floor(now.time / 1000) * 1000) + ". " : "") + (s ? "Trying again in " + s + " s." : "Trying again."));
  }

  // A user and a password in the address of the page are not in it: fetch takes no such URL.
  const source = new URL("api/live", location.origin + location.pathname);

  async function ask() {
    asking = true;
    const stopping = now && now.ready.checks.server.reason === "shutting down";
    let m = null, why = !now ? "No connection to the server." : stopping ? "The server is stopping." : "Connection lost.";
    try {
      const answer = await fetch(source + "?has=" + has, { signal: AbortSignal.timeout(silence), cache: "no-store" });
      if (answer.ok) m = await answer.json();
      else why = "The server answers " + answer.status + ".";
    } catch { } // no connection, or no answer in time
    asking = false;
    if (!m) return lost(why);
    has = m.has;
    show(m);
    live();
  }

  // A page that nobody looks at asks for nothing.
  setInterval(() => {
    if (document.hidden || asking) return;
    if (performance.now() >= retryAt) ask();
    else countdown();
  }, pause);

  $("again").addEventListener("click", () => { tries = retryAt = 0; });
  ask();
})();
