"use strict";
// Whatever comes from a node is data: it reaches the page as text nodes and attributes' values, never as markup.

const MAX_ROLLOUTS = 400; // kept in the page
const MAX_NAMES = 24; // in the legend
const MAX_POINTS = 4000; // rounds of a node that are kept
const COLOURS = ["#0b7bd6", "#e4572e", "#2a9d4b", "#a855c7", "#c08a00", "#139c9c", "#d6336c", "#7a7f87"];

const nodes = new Map(); // name -> {rows, scores, taught, said}
const rollouts = []; // newest first
const label = new Map(); // node id -> what it is called here
let curves = []; // the plots: a title, the metrics that each draws, and whether these are scores of evaluations
let reasons = {}; // for refusals: what each means, and whether it is nobody's fault
let shown = { title: "", nodes: [] };

const called = (peer) => label.get(peer) || peer.slice(0, 8);
const find = (id) => document.getElementById(id);

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function node(name) {
  if (!nodes.has(name)) nodes.set(name, { rows: [], scores: [], taught: new Map() });
  return nodes.get(name);
}

// --- what comes ---

function takeRows({ node: name, reset, rows }) {
  const one = node(name);
  if (reset) { one.rows = []; one.taught = new Map(); }
  one.rows.push(...rows);
  if (one.rows.length > MAX_POINTS) one.rows = one.rows.filter((_, index) => index % 2 === 1);
  for (const row of rows) {
    for (const [peer, count] of Object.entries(row["swarm/taught_by"] || {})) {
      one.taught.set(peer, (one.taught.get(peer) || 0) + count);
    }
  }
  stale.plots = true;
}

function takeScores({ node: name, rows }) {
  const one = node(name);
  for (const row of rows) {
    one.scores = one.scores.filter((old) => old.round < row.round);
    one.scores.push(row);
  }
  stale.plots = true;
}

function takeRollouts(rows) {
  for (const row of rows) rollouts.unshift(row);
  rollouts.length = Math.min(rollouts.length, MAX_ROLLOUTS);
  stale.rollouts = true;
}

function takeState(state) {
  shown = state;
  for (const one of state.nodes) node(one.name);
  stale.state = true;
}

// --- plots ---

const plots = [];
let pointing = false; // the pointer is on a plot, and the legend says what is under it
const colour = (index) => COLOURS[index % COLOURS.length];

function smoothed(values, window) {
  const out = [];
  let sum = 0, count = 0;
  values.forEach((value, index) => {
    if (value !== null) { sum += value; count += 1; }
    const left = index - window;
    if (left >= 0 && values[left] !== null) { sum -= values[left]; count -= 1; }
    out.push(count && value !== null ? sum / count : null);
  });
  return out;
}

function column(rows, key, rounds, smooth) {
  const at = new Map(rows.map((row) => [row.round, row[key] ?? null]));
  const own = rows.map((row) => row[key] ?? null);
  const values = smooth ? smoothed(own, Math.max(1, Math.round(rows.length / 25))) : own;
  rows.forEach((row, index) => at.set(row.round, values[index]));
  return rounds.map((round) => (at.has(round) ? at.get(round) : undefined));
}

// One legend for all plots: whose colour is which, and, under the pointer, what each had in that round.
function drawLegend(names, round, said) {
  const parts = names.slice(0, MAX_NAMES).map((name, index) => {
    const part = element("span", said && said.has(name) ? `${name} ${said.get(name)}` : name);
    part.prepend(element("i"));
    part.firstChild.style.background = colour(index);
    return part;
  });
  if (names.length > MAX_NAMES) parts.push(element("span", `and ${names.length - MAX_NAMES} more`));
  if (round !== undefined) parts.unshift(element("span", `round ${round}`));
  find("legend").replaceChildren(...parts);
}

// From zero up, so that what looks like much is much; flat zeros are at the bottom.
const fromZero = (_, min, max) => {
  const low = Math.min(0, min ?? 0);
  return [low, max > low ? max + (max - low) * 0.08 : low + 1];
};

function drawPlots() {
  const names = [...nodes.keys()];
  if (!pointing) drawLegend(names);
  const last = Math.max(10, ...names.map((name) => node(name).rows.at(-1)?.round ?? 0));
  const ink = getComputedStyle(document.body).color;
  curves.forEach((plot, index) => {
    const source = (name) => (plot.scores ? node(name).scores : node(name).rows);
    const keys = plot.keys;
    const with_data = names.filter((name) => source(name).some((row) => keys.some((key) => row[key] != null)));
    const card = (plots[index] ||= { card: element("div", undefined, { class: "plot" }), drawn: null, for: "" });
    card.card.hidden = with_data.length === 0;
    if (!card.card.parentNode) {
      card.card.append(element("h3", plot.title));
      find("plots").append(card.card);
    }
    if (card.card.hidden) return;
    const rounds = [...new Set(with_data.flatMap((name) => source(name).map((row) => row.round)))].sort((a, b) => a - b);
    const data = [rounds];
    const series = [{ label: "round" }];
    const whose = [""]; // of each series
    with_data.forEach((name) => {
      keys.forEach((key, at) => {
        data.push(column(source(name), key, rounds, !plot.scores));
        series.push({
          label: `${name} ${key}`, stroke: colour(names.indexOf(name)), width: 1.5, spanGaps: true,
          dash: at ? [5, 4] : undefined,
          points: { show: (drawn, which) => drawn.data[which].filter((value) => value != null).length < 3 },
        });
        whose.push(name);
      });
    });
    const width = Math.max(260, card.card.clientWidth);
    const shape = `${series.map((one) => one.label).join()}|${width}|${ink}`;
    card.last = last;
    if (card.for === shape) { card.drawn.setData(data); return; }
    if (card.drawn) { card.drawn.destroy(); pointing = false; }
    const pointed = (drawn) => {
      const at = drawn.cursor.idx;
      pointing = at != null;
      if (!pointing) { drawLegend(names); return; }
      const said = new Map();
      whose.forEach((name, which) => {
        const value = drawn.data[which][at];
        if (which && value != null) said.set(name, `${said.has(name) ? `${said.get(name)} / ` : ""}${value.toPrecision(3)}`);
      });
      drawLegend(names, drawn.data[0][at], said);
    };
    const axis = { stroke: ink, grid: { stroke: "#8884", width: 0.5 }, ticks: { stroke: "#8884" } };
    card.drawn = new uPlot({
      width, height: 190, series, legend: { show: false }, hooks: { setCursor: [pointed] },
      scales: { x: { time: false, range: () => [0, card.last] }, y: { range: fromZero } },
      axes: [axis, { ...axis, size: 52 }], cursor: { y: false, drag: { x: false, y: false } },
    }, data, card.card);
    card.drawn.root.setAttribute("role", "img");
    card.drawn.root.setAttribute("aria-label", `${plot.title} over rounds; the table of nodes has the newest values`);
    card.for = shape;
  });
}

// --- tables ---

const bytes = (count) => {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (count < 1000) return `${unit === "B" || count >= 100 ? count.toFixed(0) : count.toFixed(1)} ${unit}`;
    count /= 1000;
  }
  return `${count.toFixed(1)} TB`;
};
const span = (seconds) => {
  const minutes = Math.floor(seconds / 60), hours = Math.floor(minutes / 60);
  if (minutes < 1) return `${Math.floor(seconds)} s`;
  if (hours < 1) return `${minutes} min`;
  return hours < 48 ? `${hours} h` : `${Math.floor(hours / 24)} d`;
};
const total = (counts) => counts.reduce((sum, [, count]) => sum + count, 0);
const isUnfit = ([reason]) => reasons[reason]?.blameless;
const isRejected = (one) => !isUnfit(one);
const figure = (value, digits = 3) => (typeof value === "number" ? value.toFixed(digits) : "–");

// Cells are text, or [text, attributes]; a table is made anew only where its text has changed.
function fill(table, head, rows) {
  const key = JSON.stringify([head, rows]);
  if (table.dataset.holds === key) return;
  table.dataset.holds = key;
  const line = (tag, cells) => {
    const row = element("tr");
    for (const cell of cells) {
      const [text, attributes] = Array.isArray(cell) ? cell : [cell, {}];
      row.append(element(tag, text, attributes));
    }
    return row;
  };
  const top = element("thead"), body = element("tbody");
  top.append(line("th", head));
  body.append(...rows.map((row) => line("td", row)));
  table.replaceChildren(top, body);
}

const right = (text) => [text, { class: "number" }];

const mean = (values) => values.length ? values.reduce((a, b) => a + b) / values.length : null;

function drawSummary(states, totals) {
  const up = states.filter((one) => ["running", "starting"].includes(one.state)).length;
  const rewards = states.map((one) => one.status && one.status.reward).filter((value) => typeof value === "number");
  const parts = [`${up} of ${states.length} nodes up`, `reward ${figure(mean(rewards))}`];
  const scores = states.map((one) => node(one.name).scores).filter((rows) => rows.length);
  if (scores.length) {
    const [first, last] = [0, -1].map((at) => figure(mean(scores.map((rows) => rows.at(at)["eval/accuracy"]))));
    parts.push(`held-out accuracy ${first} at first, ${last} now`);
  }
  const groups = [...totals.values()].reduce((a, b) => a + b, 0);
  if (groups) parts.push(`${groups} groups from ${totals.size} peers`);
  find("summary").textContent = parts.join(" · ");
}

function drawState() {
  const states = shown.nodes;
  document.title = `${shown.title} · gossamer`;
  find("title").textContent = shown.title;

  label.clear();
  for (const one of states) {
    for (const peer of (one.status && one.status.peers) || []) {
      if (!label.has(peer.node)) label.set(peer.node, peer.short_name);
    }
  }
  for (const one of states) if (one.status) label.set(one.status.node, states.length > 1 ? one.name : one.status.short_name);

  const averaging = states.some((one) => one.status && one.status.weights.members != null);
  fill(find("nodes"),
    ["node", "called", "state", right("round"), right("reward"), right("s a round"), right("accuracy"), right("peers"),
      right("sent"), right("got"), right("groups taken by peers"), right("not fit"), right("refused"), ...(averaging ? [right("averages with")] : [])],
    states.map((one) => {
      const said = one.status, rows = node(one.name).scores;
      const refused = Object.entries(said ? said.rejected : {});
      const state = one.restarts ? `${one.state} (${one.restarts} restarts)` : one.state;
      return [
        one.name, said ? said.short_name : "", [state, { class: `state-${one.state}`, title: one.error || "" }],
        right(said ? `${said.round ?? 0}${said.rounds ? ` of ${said.rounds}` : ""}` : "–"),
        right(figure(said && said.reward)), right(figure(said && said.round_s, 2)),
        right(rows.length ? figure(rows[rows.length - 1]["eval/accuracy"]) : "–"),
        right(said ? String(said.counters.live_peers) : "–"),
        right(said ? bytes(said.counters.bytes_sent) : "–"), right(said ? bytes(said.counters.bytes_received) : "–"),
        right(said ? String(said.counters.items_sent) : "–"), right(String(total(refused.filter(isUnfit)))), right(String(total(refused.filter(isRejected)))),
        ...(averaging ? [right(said && said.weights.members != null ? `${said.weights.members}, revision ${said.weights.revision}` : "–")] : []),
      ];
    }));

  const totals = new Map();
  for (const one of states) {
    for (const [peer, count] of node(one.name).taught) totals.set(peer, (totals.get(peer) || 0) + count);
  }
  drawSummary(states, totals);
  const teachers = [...totals].sort((a, b) => b[1] - a[1]).slice(0, 24).map(([peer]) => peer);
  fill(find("taught"), ["node", ...teachers.map((peer) => [called(peer), { class: "number", title: peer }]), right("all peers")],
    states.map((one) => {
      const taught = node(one.name).taught;
      const sum = [...taught.values()].reduce((a, b) => a + b, 0);
      return [one.name, ...teachers.map((peer) => right(String(taught.get(peer) || 0))), right(String(sum))];
    }));

  const peers = states.flatMap((one) => ((one.status && one.status.peers) || []).map((peer) => ({ ...peer, of: one })));
  const others = peers.some((peer) => peer.agent !== peer.of.status.agent); // run another version
  const several = states.length > 1;
  fill(find("peers"), [...(several ? ["of"] : []), "peer", "called", "state", right("for"), right("sent"), right("got"), right("score"), right("round trip"),
    right("taught"), "endpoint", ...(others ? ["runs"] : [])],
    peers.slice(0, 200).map((peer) => {
      return [
        ...(several ? [peer.of.name] : []), [peer.node.slice(0, 12), { title: peer.node }], called(peer.node),
        [peer.state, { class: `state-${peer.state}` }],
        right(span(peer.age_s)), right(bytes(peer.bytes_sent)), right(bytes(peer.bytes_received)),
        [rounded(peer.score), { class: isBad(peer, peer.of.status) ? "number state-suspect" : "number" }],
        right(peer.rtt_s == null ? "–" : `${(1000 * peer.rtt_s).toFixed(peer.rtt_s < 0.01 ? 1 : 0)} ms`),
        right(String(node(peer.of.name).taught.get(peer.node) || 0)),
        peer.endpoint ? peer.endpoint.replace("tcp://", "") : "cannot be dialled", ...(others ? [peer.agent] : [])];
    }));
  find("peers-none").hidden = peers.length > 0;
  find("peers-note").hidden = find("links").hidden = peers.length === 0;
  if (peers.length) find("least-score").textContent = String(peers[0].of.status.least_score);
  drawGraph(states);

  const refused = new Map();
  for (const one of states) {
    for (const [reason, count] of Object.entries((one.status && one.status.rejected) || {})) {
      refused.set(reason, (refused.get(reason) || 0) + count);
    }
  }
  const sorted = [...refused].sort((a, b) => b[1] - a[1]);
  for (const [table, counts] of [["refused", sorted.filter(isRejected)], ["unfit", sorted.filter(isUnfit)]]) {
    fill(find(table), ["reason", right("times"), "which is"],
      counts.map(([reason, count]) => [reason, right(String(count)), reasons[reason]?.means || ""]));
    find(table).hidden = counts.length === 0;
  }
  find("unfit-note").hidden = find("unfit").hidden;
  find("refused-none").hidden = !find("refused").hidden;
}

const rounded = (score) => (score > -0.05 ? "0" : score.toFixed(1));
const isBad = (peer, status) => peer.state === "suspect" || peer.score < status.least_score / 2;

// The more bytes went over a link, both ways, the wider it is: a step for each factor of ten above 10 kB.
const width = (count) => 1 + Math.max(0, Math.round(Math.log10(Math.max(1, count)) - 4));

function drawGraph(states) {
  const here = states.filter((one) => one.status && ["running", "starting"].includes(one.state));
  const ids = new Set(here.map((one) => one.status.node));
  for (const one of here) for (const peer of one.status.peers) ids.add(peer.node);
  const listed = [...ids].sort().slice(0, 60);
  const edges = new Map(); // what each end says of a link, the busier count of the two
  for (const one of here) {
    for (const peer of one.status.peers) {
      const ends = [one.status.node, peer.node].sort().join(" ");
      const edge = edges.get(ends) || { width: 1, bad: false, said: [] };
      edge.width = Math.max(edge.width, width(peer.bytes_sent + peer.bytes_received));
      edge.bad = edge.bad || isBad(peer, one.status);
      edge.said.push(`${called(one.status.node)} of ${called(peer.node)}: for ${span(peer.age_s)}, ` +
        `sent ${bytes(peer.bytes_sent)}, got ${bytes(peer.bytes_received)}, score ${rounded(peer.score)}`);
      edges.set(ends, edge);
    }
  }
  const shapes = [...edges].map(([ends, edge]) => [ends, edge.width, edge.bad]).sort();
  const key = JSON.stringify([listed, shapes]);
  const graph = find("graph");
  const tell = () => {
    for (const line of graph.querySelectorAll("line")) {
      line.firstChild.textContent = edges.get(line.dataset.ends).said.join("\n");
    }
  };
  if (graph.dataset.holds === key) { tell(); return; } // not drawn anew under the pointer
  graph.dataset.holds = key;
  const svg = (tag, attributes) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
    return made;
  };
  const place = new Map(listed.map((id, index) => {
    const angle = (2 * Math.PI * index) / listed.length - Math.PI / 2;
    return [id, [70 * Math.cos(angle), 70 * Math.sin(angle)]];
  }));
  const local = new Set(here.map((one) => one.status.node));
  graph.replaceChildren();
  for (const [ends, edge] of edges) {
    const [a, b] = ends.split(" ").map((id) => place.get(id));
    if (!a || !b) continue;
    const line = svg("line", {
      x1: a[0], y1: a[1], x2: b[0], y2: b[1], "stroke-width": edge.width, class: edge.bad ? "bad" : "", "data-ends": ends,
    });
    line.append(svg("title", {}));
    graph.append(line);
  }
  for (const [id, [x, y]] of place) {
    graph.append(svg("circle", { cx: x, cy: y, r: 5, class: local.has(id) ? "here" : "" }));
    // Beside its circle, outwards; above or below it where the ring is level.
    const anchor = x > 6 ? "start" : x < -6 ? "end" : "middle";
    const text = svg("text", { x: x + (anchor === "middle" ? 0 : Math.sign(x) * 8), y: y * (anchor === "middle" ? 1.17 : 1.03) + 3,
      "text-anchor": anchor });
    text.textContent = called(id);
    graph.append(text);
  }
  tell();
}

// --- rollouts ---

// The turns of an episode: the policy's and its environment's.
const textsOf = (row) => row.texts || [row.text];

function drawRollouts() {
  if (find("pause").checked) return;
  const words = find("search").value.toLowerCase(), whose = find("whose").value, reward = find("right").value;
  const wanted = rollouts.filter((row) =>
    (!whose || (row.whose === "own") === (whose === "own")) &&
    (!reward || (row.reward > 0.5) === (reward === "right")) &&
    (!words || `${row.question} ${textsOf(row).join(" ")} ${row.task}`.toLowerCase().includes(words)));
  find("rollouts").replaceChildren(...wanted.slice(0, 100).map((row) => {
    const item = element("li");
    const from = row.whose === "own" ? "own" : `from ${called(row.whose)}, ${Math.round(row.age)} s old`;
    const meta = element("div", `${row.node} · round ${row.round} · ${row.task} · ${from} · `, { class: "meta" });
    meta.append(element("span", `reward ${row.reward}`, { class: row.reward > 0.5 ? "right" : "wrong" }));
    if (!row.finished) meta.append(" · cut off");
    item.append(meta, element("pre", row.question), ...textsOf(row).map((text, at) =>
      element("pre", text, { class: at % 2 ? "told" : row.reward > 0.5 ? "right" : "wrong" })));
    return item;
  }));
}

// --- at most twice a second, and only what is stale ---

const stale = { plots: false, state: false, rollouts: false };
function draw() {
  if (stale.state) { stale.state = false; drawState(); }
  if (stale.plots) { stale.plots = false; drawPlots(); }
  if (stale.rollouts) { stale.rollouts = false; drawRollouts(); }
}
setInterval(draw, 500);
for (const id of ["search", "whose", "right", "pause"]) find(id).addEventListener("input", drawRollouts);
find("filters").addEventListener("submit", (event) => event.preventDefault());
addEventListener("resize", () => { stale.plots = true; });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { stale.plots = true; });

function listen() {
  const source = new EventSource("events");
  const on = (kind, take) => source.addEventListener(kind, (event) => take(JSON.parse(event.data)));
  on("rows", takeRows);
  on("scores", takeScores);
  on("rollouts", takeRollouts);
  on("state", takeState);
  source.onerror = () => {
    find("summary").textContent = "not connected: the run has ended, or its machine cannot be reached; trying again";
    source.close();
    setTimeout(() => { nodes.clear(); rollouts.length = 0; listen(); }, 2000);
  };
}
fetch("refusals").then((answer) => answer.json()).then((said) => { reasons = said; stale.state = true; });
fetch("curves").then((answer) => answer.json()).then((said) => { curves = said; stale.plots = true; });
listen();
