"use strict";
// Reads the status every two seconds. Everything that comes in is text: no HTML is made of it.
const EVERY = 2000;
const SVG = "http://www.w3.org/2000/svg";
const STATES = {
  asking: "waits for decisions", running: "running", stopped: "stopped", refused: "refused", withdrawn: "withdrawn",
  finished: "finished",
};
const PRESENCE = { present: "present", late: "late", lost: "lost", never: "never connected" };
const SAID = { asked: "no answer yet", pending: "not decided yet", approved: "approved", refused: "refused" };
const seen = { curves: new Map(), tests: new Map(), metric: new Map(), drawn: "" };

function node(tag, about, ...children) {
  const made = document.createElement(tag);
  fill(made, about, children);
  return made;
}
function shape(tag, about, ...children) {
  const made = document.createElementNS(SVG, tag);
  fill(made, about, children);
  return made;
}
function fill(made, about, children) {
  for (const [key, value] of Object.entries(about || {})) if (value !== null) made.setAttribute(key, value);
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
}
function moment(seconds) {
  const at = new Date(seconds * 1000), two = (number) => String(number).padStart(2, "0");
  return `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())} ${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}`;
}
const byId = (id) => document.getElementById(id);

function bytes(count) {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (count < 999.5) return `${unit === "B" || count >= 99.95 ? count.toFixed(0) : count.toFixed(1)} ${unit}`;
    count /= 1000;
  }
  return `${count.toFixed(1)} TB`;
}
function duration(seconds) {
  if (seconds < 90) return `${Math.max(0, Math.round(seconds))} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 90) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.round(hours / 24)} days`;
}
const ago = (at, now) => `${duration(now - at)} ago`;
const short = (value) => (value === null || value === undefined ? "–" : Number(value.toPrecision(4)).toString());
const armOf = (study, name) => study.arms.find((arm) => arm.name === name);
const done = (study) => (armOf(study, "federated") || { round: 0 }).round;
const armLabel = (name, labels) =>
  labels && labels[name] ? labels[name] : name === "federated" ? "federation"
    : name.startsWith("local/") ? `${name.slice(6)} alone` : name.startsWith("without/") ? `without ${name.slice(8)}` : name;

// Header and lists ---------------------------------------------------------------------------------------------------

function showProcess(said) {
  const status = said.status;
  byId("federation").textContent = status ? status.federation : "";
  document.title = status ? `${status.federation} – Wardround` : "Wardround";
  const process = byId("process");
  process.className = "dot " + (said.alive ? "present" : "lost");
  if (!status) process.textContent = "no coordinator was at work yet";
  else if (said.alive) process.textContent = `at work for ${duration(said.now - status.process.began)} on ${status.process.address} (${status.process.carrier})`;
  else process.textContent = `the coordinator ${status.process.state === "ended" ? "has ended" : "does not answer"}, last heard ${ago(status.process.at, said.now)}`;
  const warnings = [];
  const expiries = status ? [["the coordinator", status.process.certificate_until], ...status.sites.map((site) => [`site ${site.name}`, site.certificate_until])] : [];
  for (const [whose, until] of expiries) {
    if (until && until < said.now) warnings.push(`The certificate of ${whose} has expired, and no connection can be made with it: renew it.`);
    else if (until && until - said.now < 30 * 86400) warnings.push(`The certificate of ${whose} expires in ${duration(until - said.now)}: renew it.`);
  }
  byId("warnings").replaceChildren(...warnings.map((text) => node("p", { role: "alert" }, text)));
}

function showSites(said) {
  const sites = said.status ? said.status.sites : [];
  byId("sites").replaceChildren(...(sites.length ? sites.map((site) => node("li", {},
    node("strong", {}, site.name),
    node("span", { class: `dot ${site.state}` }, PRESENCE[site.state]),
    node("small", {}, site.seen ? `heard ${ago(site.seen, said.now)}` : "",
      site.waiting ? `${site.seen ? ", " : ""}${site.waiting} message${site.waiting > 1 ? "s" : ""} to answer` : ""),
  )) : [node("li", { class: "empty" }, "No hospital has joined yet.")]));
}

function progress(study) {
  const share = study.rounds ? Math.min(1, done(study) / study.rounds) : 0;
  const bar = node("i", {});
  bar.style.width = `${100 * share}%`;
  return node("div", { class: "bar", role: "progressbar", "aria-valuenow": done(study), "aria-valuemax": study.rounds,
    "aria-label": "rounds" }, bar);
}

function showStudies(said, chosen) {
  const studies = said.status ? said.status.studies : [];
  byId("studies").replaceChildren(...(studies.length ? [...studies].reverse().map((study) =>
    node("a", { href: `#${encodeURIComponent(study.name)}`, "aria-current": study === chosen ? "true" : null },
      node("div", { class: "line" }, node("strong", {}, study.name), node("span", { class: study.state }, STATES[study.state])),
      node("div", { class: "line muted" }, node("small", {}, `round ${done(study)} of ${study.rounds}`),
        node("small", {}, `${Object.keys(study.sites).length} hospitals`)),
      progress(study)))
    : [node("p", { class: "empty" }, "No study was submitted yet: ", node("code", {}, "wardround submit STUDY --federation FOLDER"))]));
}

function showEvents(said) {
  const events = said.status ? [...said.status.events].reverse() : [];
  byId("events").replaceChildren(...events.map((event) => node("li", {},
    node("time", { datetime: new Date(event.at * 1000).toISOString() }, moment(event.at)),
    node("span", {}, event.text))));
}

// One study ----------------------------------------------------------------------------------------------------------

function fact(name, value, note) {
  return node("div", {}, node("dt", {}, name), node("dd", {}, node("strong", {}, value), note || ""));
}

function facts(study) {
  const left = study.state === "running" && study.seconds_a_round ? (study.rounds - done(study)) * study.seconds_a_round : 0;
  const spent = Object.values(study.epsilon);
  const missing = Object.keys(study.missing);
  const trains = study.training_sites.length;
  return node("dl", { class: "facts" },
    fact("Round", `${done(study)} of ${study.rounds}`, left ? `about ${duration(left)} left, ${duration(study.seconds_a_round)} a round` : study.phase),
    fact("In the last round", done(study) ? `${study.participants.length} of ${trains}` : "–", missing.length ? `without ${missing.join(", ")}` : "hospitals that train"),
    fact("Traffic", bytes(study.bytes_up + study.bytes_down), `${bytes(study.bytes_down)} to hospitals, ${bytes(study.bytes_up)} from them`),
    study.budget === null ? fact("Privacy", study.secure ? "summed under masks" : "no noise", study.secure ? "no single update is seen" : "the study asks for none")
      : fact("Privacy spent", spent.length ? `ε ${short(Math.max(...spent))}` : `ε ≤ ${short(study.budget)}`,
        spent.length ? `the largest of ${spent.length} hospitals, of ${short(study.budget)}` : "budget; hospitals say at the end what was spent"),
    fact("Log", study.log_records ? `${study.log_records} records` : "–", study.log_head ? node("span", { class: "hash", title: study.log_head }, `head ${study.log_head.slice(0, 16)}…`) : ""));
}

function siteTable(study, said) {
  const present = new Map(said.status.sites.map((site) => [site.name, site.state]));
  const rows = Object.entries(study.sites).map(([name, answer]) => {
    const working = study.state === "running" ? study.working[name] : null;
    const left = study.left_out[name];
    const owed = study.state === "finished" ? (study.undelivered.includes(name) ? "waits for it" : "delivered") : "–";
    return node("tr", {},
      node("td", {}, node("strong", {}, name)),
      node("td", {}, node("span", { class: `dot ${present.get(name) || "never"}` }, PRESENCE[present.get(name) || "never"])),
      node("td", {}, node("span", { class: answer.state }, SAID[answer.state]), answer.reason ? node("div", { class: "muted" }, answer.reason) : null),
      node("td", { class: "number" }, working ? `${armLabel(working.arm)}, round ${working.round}: ${working.step} of ${working.steps}` : "–"),
      node("td", {}, left ? `${left.rounds} round${left.rounds > 1 ? "s" : ""}` : "–", left ? node("div", { class: "muted" }, left.reason) : null),
      study.budget === null ? null : node("td", { class: "number" }, name in study.epsilon ? short(study.epsilon[name]) : "–"),
      node("td", {}, study.site_heads[name] ? node("span", { class: "hash", title: study.site_heads[name] }, study.site_heads[name].slice(0, 12) + "…") : "–"),
      node("td", {}, owed));
  });
  const head = ["hospital", "", "decision", "at work", "left out of", ...(study.budget === null ? [] : ["ε spent"]), "head of its log", "released model"];
  return node("div", { class: "wide" }, node("table", {},
    node("thead", {}, node("tr", {}, ...head.map((text) => node("th", { scope: "col" }, text)))), node("tbody", {}, ...rows)));
}

async function read(path) {
  const answer = await fetch(path, { headers: { Accept: "application/json" } });
  if (answer.status === 401) location.reload();
  return answer.ok ? answer.json() : null;
}

async function filesOf(study) {
  const version = `${study.state} ${study.arms.map((arm) => `${arm.name} ${arm.round} ${JSON.stringify(arm.validation)}`).join()}`;
  for (const [what, kept] of [["curves", seen.curves], ["tests", seen.tests]]) {
    const known = kept.get(study.name);
    if (known && known.version === version) continue;
    const wanted = what === "curves" ? study.arms.length : study.state === "finished";
    kept.set(study.name, { version, data: wanted ? await read(`/api/studies/${encodeURIComponent(study.name)}/${what}`) : null });
  }
}

function ticks(low, high, count) {
  const raw = (high - low || Math.abs(high) || 1) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((by) => by * power).find((each) => each >= raw);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) found.push(Number((Math.round(at / step) * step).toPrecision(12)));
  return found;
}

function curvePanel(study) {
  const data = (seen.curves.get(study.name) || {}).data;
  if (!data || !Object.keys(data.arms).length) return null;
  const names = study.metrics.length ? [...study.metrics] : [];
  for (const lines of Object.values(data.arms)) for (const line of lines) for (const key of Object.keys(line.validation || {})) if (!names.includes(key)) names.push(key);
  const choices = [...names.filter((name) => Object.values(data.arms).some((lines) => lines.some((line) => line.validation && name in line.validation))), "loss"];
  const metric = choices.includes(seen.metric.get(study.name)) ? seen.metric.get(study.name) : choices[0];
  const value = (line) => (metric === "loss" ? line.loss : (line.validation || {})[metric]);
  const select = node("select", { "aria-label": "what is drawn" }, ...choices.map((name) => {
    const option = node("option", { value: name }, name === "loss" ? "training loss" : `validation ${name}`);
    option.selected = name === metric;
    return option;
  }));
  select.addEventListener("change", () => { seen.metric.set(study.name, select.value); seen.drawn = ""; look(); });
  const arms = Object.entries(data.arms).map(([name, lines]) => ({ name, points: lines.filter((line) => Number.isFinite(value(line))).map((line) => [line.round, value(line)]) }));
  arms.sort((one, other) => (one.name === "federated" ? 1 : other.name === "federated" ? -1 : one.name < other.name ? -1 : 1));
  const colour = new Map(arms.filter((arm) => arm.name !== "federated").map((arm, at) => [arm.name, `c${1 + (at % 7)}`]));
  const points = arms.flatMap((arm) => arm.points);
  const panel = node("div", { class: "panel" }, node("div", { class: "head" }, node("h3", {}, "Learning"), select));
  if (!points.length) { panel.append(node("p", { class: "muted" }, "Nothing was validated yet.")); return panel; }
  panel.append(curves(arms, points, study.rounds, (name) => colour.get(name) || "c0"),
    node("div", { class: "key" }, ...[...arms].reverse().map((arm) => node("span", {}, node("i", { class: colour.get(arm.name) || "c0" }), armLabel(arm.name)))));
  return panel;
}

function curves(arms, points, rounds, colour) {
  const wide = 560, high = 250, left = 56, right = 12, top = 12, bottom = 30;
  let low = Math.min(...points.map((point) => point[1])), up = Math.max(...points.map((point) => point[1]));
  if (low === up) { low -= Math.abs(low) * 0.05 || 1; up += Math.abs(up) * 0.05 || 1; }
  const margin = (up - low) * 0.06; low -= margin; up += margin;
  const last = Math.max(rounds, 2);
  const x = (round) => left + (wide - left - right) * (round - 1) / (last - 1);
  const y = (value) => top + (high - top - bottom) * (up - value) / (up - low);
  const drawing = shape("svg", { viewBox: `0 0 ${wide} ${high}`, role: "img", "aria-label": "by round" });
  for (const at of ticks(low, up, 4)) drawing.append(
    shape("line", { class: "grid", x1: left, x2: wide - right, y1: y(at), y2: y(at) }),
    shape("text", { x: left - 8, y: y(at) + 4, "text-anchor": "end" }, short(at)));
  for (const at of ticks(1, last, 8).filter(Number.isInteger)) drawing.append(
    shape("text", { x: x(at), y: high - 10, "text-anchor": "middle" }, String(at)));
  drawing.append(shape("line", { class: "axis", x1: left, x2: wide - right, y1: high - bottom, y2: high - bottom }));
  for (const arm of arms) {
    const main = arm.name === "federated";
    const path = arm.points.map(([round, value], at) => `${at ? "L" : "M"}${x(round).toFixed(1)} ${y(value).toFixed(1)}`).join("");
    drawing.append(shape("path", { class: `curve ${colour(arm.name)}${main ? " main" : ""}`, d: path }));
    const end = arm.points[arm.points.length - 1];
    if (end) drawing.append(shape("circle", { class: colour(arm.name), cx: x(end[0]), cy: y(end[1]), r: main ? 4.5 : 3 }));
  }
  return drawing;
}

function testPanel(study) {
  const data = (seen.tests.get(study.name) || {}).data;
  if (!data) return null;
  const lacking = Object.entries(data.lacking).map(([site, why]) => node("p", { class: "muted" }, `${site}: ${why}`));
  if (!data.metrics.length) return lacking.length ? node("div", { class: "panel" }, node("h3", {}, "Test: no hospital gave its results"), ...lacking) : null;
  const metric = data.metrics[0];
  const found = data.estimates.filter((each) => each.metric === metric.name && each.site !== "mean" && each.site !== "unseen");
  const mean = data.estimates.filter((each) => each.metric === metric.name && each.site === "mean");
  const arms = [...new Set([...mean, ...found].map((each) => each.arm))];
  const rows = [{ title: "all hospitals", of: mean }, ...[...new Set(found.map((each) => each.site))].map((site) => ({ title: site, of: found.filter((each) => each.site === site) }))]
    .filter((row) => row.of.length);
  if (!rows.length) return null;
  const federated = arms.indexOf("federated");
  const colour = (arm) => (arm === "federated" ? "c0" : `c${1 + (arms.indexOf(arm) - (arms.indexOf(arm) > federated && federated >= 0 ? 1 : 0)) % 7}`);
  const ends = rows.flatMap((row) => row.of.flatMap((each) => [each.value, ...(each.interval || [])]));
  let low = Math.min(...ends), up = Math.max(...ends);
  const margin = (up - low) * 0.06 || 1; low -= margin; up += margin;
  const lane = 13, gap = 16, wide = 560, left = 130, right = 14;
  const x = (value) => left + (wide - left - right) * (value - low) / (up - low);
  const drawing = shape("svg", { role: "img", "aria-label": `test results, ${metric.label}` });
  let at = 14;
  const bottom = rows.reduce((sum, row) => sum + row.of.length * lane + gap, at);
  for (const tick of ticks(low, up, 5)) drawing.append(
    shape("line", { class: "grid", x1: x(tick), x2: x(tick), y1: 4, y2: bottom - 8 }),
    shape("text", { x: x(tick), y: bottom + 8, "text-anchor": "middle" }, short(tick)));
  for (const row of rows) {
    drawing.append(shape("text", { class: "name", x: 0, y: at + row.of.length * lane / 2 + 3 }, row.title.length > 18 ? row.title.slice(0, 17) + "…" : row.title));
    for (const each of row.of) {
      const middle = at + lane / 2, said = `${armLabel(each.arm, data.labels)}: ${short(each.value)}${each.interval ? ` (95% ${short(each.interval[0])} to ${short(each.interval[1])})` : ""}, ${each.n} patients`;
      drawing.append(shape("g", {}, shape("title", {}, said),
        each.interval ? shape("line", { class: colour(each.arm), "stroke-width": 2, x1: x(each.interval[0]), x2: x(each.interval[1]), y1: middle, y2: middle }) : null,
        shape("circle", { class: colour(each.arm), cx: x(each.value), cy: middle, r: 4.2 })));
      at += lane;
    }
    at += gap;
  }
  drawing.setAttribute("viewBox", `0 0 ${wide} ${bottom + 14}`);
  return node("div", { class: "panel" }, node("div", { class: "head" }, node("h3", {}, `Test: ${metric.label}${metric.unit ? ` (${metric.unit})` : ""}`),
    node("small", { class: "muted" }, `${metric.larger ? "higher" : "lower"} is better, lines are 95% intervals`)), drawing,
  node("div", { class: "key" }, ...arms.map((arm) => node("span", {}, node("i", { class: colour(arm) }), armLabel(arm, data.labels)))), ...lacking);
}

function downloads(study) {
  if (study.state !== "finished") return null;
  const base = `/studies/${encodeURIComponent(study.name)}`;
  return node("p", { class: "downloads" }, node("a", { href: `${base}/report`, target: "_blank", rel: "noopener" }, "Open the report"),
    node("a", { href: `${base}/report`, download: `${study.name}.html` }, "Download the report"),
    node("a", { href: `${base}/model` }, "Download the released model"),
    study.model_sha256 ? node("span", { class: "hash muted", title: study.model_sha256 }, `model_sha256 ${study.model_sha256.slice(0, 16)}…`) : null);
}

async function showStudy(said, study) {
  const place = byId("study");
  place.hidden = !study;
  if (!study) return;
  await filesOf(study);
  const drawn = JSON.stringify([study, said.status.sites.map((site) => site.state), (seen.curves.get(study.name) || {}).version]);
  if (drawn === seen.drawn || place.contains(document.activeElement) && document.activeElement.tagName === "SELECT") return;
  seen.drawn = drawn;
  const panels = [curvePanel(study), testPanel(study)].filter(Boolean);
  place.replaceChildren(...[
    node("div", { class: "top" }, node("h2", {}, study.name), node("span", { class: study.state }, STATES[study.state]),
      node("span", { class: "hash muted", title: study.study_sha256 }, `study_sha256 ${study.study_sha256.slice(0, 16)}…`)),
    study.description ? node("p", { class: "muted" }, study.description) : null,
    study.reason ? node("p", { class: `reason ${study.state}` }, study.reason) : null,
    study.state === "stopped" && study.waits_for.length ? node("p", { class: "muted" }, `It goes on by itself when ${study.waits_for.join(" or ")} is back.`) : null,
    facts(study),
    downloads(study),
    panels.length ? node("div", { class: "charts" }, ...panels) : null,
    node("h3", {}, "Its hospitals"),
    siteTable(study, said),
  ].filter(Boolean));
}

function chosenOf(said) {
  const studies = said.status ? said.status.studies : [];
  let asked = "";
  try { asked = decodeURIComponent(location.hash.slice(1)); } catch { /* no study has such a name */ }
  return studies.find((study) => study.name === asked)
    || [...studies].reverse().find((study) => study.state === "running") || studies[studies.length - 1];
}

async function look() {
  const said = await read("/api/status");
  if (!said) return;
  const chosen = chosenOf(said);
  showProcess(said);
  showSites(said);
  showStudies(said, chosen);
  showEvents(said);
  await showStudy(said, chosen);
}

async function keepLooking() {
  try {
    await look();
  } catch (error) {
    const process = byId("process");
    process.className = "dot lost";
    process.textContent = "this page reaches the coordinator no more";
  }
  setTimeout(keepLooking, document.hidden ? 5 * EVERY : EVERY);
}

window.addEventListener("hashchange", () => { seen.drawn = ""; look(); });
keepLooking();
